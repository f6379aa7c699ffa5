"""The fused kernels for the codes, against the oracle.

They run on a CUDA device, and on the CPU under Triton's interpreter: in a process of its own, since
``TRITON_INTERPRET=1`` must be set before Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import sinkhorn_knopp
from swavkit.sinkhorn import at_once, triton_codes
from swavkit.sinkhorn.kernel import SCALINGS_OF_ONE_KERNEL
from swavkit.sinkhorn.triton_codes import codes_by_triton, supports
from tests import oracles, tolerances

EPSILON = 0.0625
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter of Triton 3.6 converts arrays of one element to numbers, which NumPy 2.4 refuses.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with:DeprecationWarning")
REFUSED = "only 0-dimensional arrays can be converted"


@pytest.fixture
def kernels(device: torch.device) -> Iterator[torch.device]:
    """The device on which the kernels run."""
    pytest.importorskip("triton", reason="triton is not installed")
    if (device.type == "cpu") != INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1 runs the kernels on the CPU, and only there")
    with np.errstate(all="ignore"):
        yield device


def problem(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return ((torch.rand(shape, generator=generator) * 2 - 1) * scale).to(dtype)


def expected_codes(
    scores: np.ndarray, epsilon: float, iterations: int, present: np.ndarray
) -> np.ndarray:
    """Return the codes (B, K): NaN, or zeros if absent, for a row that is not finite."""
    finite = np.isfinite(scores).all(axis=1)
    codes = np.where(present[:, None], np.nan, np.zeros(scores.shape))
    if (finite & present).any():
        codes[finite] = oracles.sinkhorn(scores[finite], epsilon, iterations, present[finite])
    else:
        for i in np.flatnonzero(finite):
            codes[i] = np.exp(scores[i] / epsilon - oracles.log_sum_exp(scores[i] / epsilon))
    return codes


def assert_right(
    device: torch.device,
    scores: torch.Tensor,
    epsilon: float | torch.Tensor = EPSILON,
    iterations: int = 3,
    weight: torch.Tensor | None = None,
) -> None:
    on_device = scores.to(device)
    weight_there = None if weight is None else weight.to(device)
    assert supports(on_device, iterations, weight_there)
    codes = codes_by_triton(on_device, epsilon, iterations, weight_there)
    assert codes.dtype == torch.float32
    assert codes.shape == scores.shape
    present = np.ones(scores.shape[:-1], bool) if weight is None else weight.numpy()
    present = np.broadcast_to(present, scores.shape[:-1])
    for index in np.ndindex(scores.shape[:-2]):
        own = scores[index].double().numpy()
        counted = np.where(np.isfinite(own) & (np.abs(own) < 1e30), np.abs(own), 0).max()
        atol = tolerances.of_codes(torch.float32, epsilon=float(epsilon), largest=counted)
        expected = expected_codes(own, float(epsilon), iterations, present[index])
        np.testing.assert_allclose(codes[index].cpu().numpy(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "shape",
    [(1, 1), (1, 17), (63, 1), (257, 17), (1, 3001), (5, 3001), (2, 63, 17), (1, 5, 8)],
    ids=str,
)
def test_codes_of_any_shape(kernels: torch.device, shape: tuple[int, ...]) -> None:
    assert_right(kernels, problem(*shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prototypes", [304, 300, 35])  # in rows at distances of 8, 4 and 1 values
def test_codes_of_any_dtype(kernels: torch.device, prototypes: int, dtype: torch.dtype) -> None:
    assert_right(kernels, problem(33, prototypes, dtype=dtype))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 3000), (2, 1000, 3000), (20, 65536)], ids=str)
def test_codes_of_large_problems(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    assert_right(torch.device("cuda"), problem(*shape, dtype=dtype))


@pytest.mark.parametrize("tile", [(4, 32), (64, 32)])
def test_many_groups_of_rows(kernels: torch.device, tile: tuple[int, int]) -> None:
    with patch.multiple(triton_codes, _TILE_OF_MASSES=tile, _VALUES_OF_A_PROGRAM=64, _MOST_ROWS=4):
        assert_right(kernels, problem(2, 47, 40))


@pytest.mark.parametrize("iterations", range(1, SCALINGS_OF_ONE_KERNEL + 1))
@pytest.mark.parametrize("rows", [4, 64])
def test_iterations(kernels: torch.device, iterations: int, rows: int) -> None:
    with patch.multiple(triton_codes, _VALUES_OF_A_PROGRAM=1, _MOST_ROWS=rows, _PROGRAMS=12):
        assert_right(kernels, problem(41, 33), iterations=iterations)


@pytest.mark.parametrize("epsilon", [2.0**-10, 2.0**-3, 3.0])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.float16], ids=str)
def test_epsilon_may_be_a_tensor(
    kernels: torch.device, epsilon: float, dtype: torch.dtype | None
) -> None:
    setting = epsilon if dtype is None else torch.tensor(epsilon, dtype=dtype, device=kernels)
    assert_right(kernels, problem(9, 20, scale=8 * epsilon), setting)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows", [4, 64])
def test_rows_that_are_not_finite(kernels: torch.device, weighted: bool, rows: int) -> None:
    scores = problem(2, 40, 35)
    scores[0, 3, 34], scores[0, 7, 0], scores[0, 8, 5] = torch.nan, torch.inf, -torch.inf
    scores[1, 39] = torch.nan
    scores[1, 20:24] = torch.inf
    weight = torch.rand(2, 40) < 0.6 if weighted else None
    with patch.multiple(triton_codes, _VALUES_OF_A_PROGRAM=1, _MOST_ROWS=rows):
        assert_right(kernels, scores, weight=weight)


@pytest.mark.parametrize("shape", [(12,), (2, 12)])
def test_absent_rows_get_codes_and_do_not_count(
    kernels: torch.device, shape: tuple[int, ...]
) -> None:
    weight = torch.rand(shape) < 0.5
    weight[..., 0] = True
    scores = problem(2, 12, 10)
    scores[:, ~weight.expand(2, 12).all(dim=0)] *= 20
    assert_right(kernels, scores, weight=weight)


@pytest.mark.parametrize("iterations", [1, 3])
def test_nobody_present(kernels: torch.device, iterations: int) -> None:
    scores = problem(3, 6, 10)
    scores[1, 2, 3] = torch.nan
    weight = torch.tensor([[False], [False], [True]]).expand(3, 6)
    assert_right(kernels, scores, iterations=iterations, weight=weight)


def test_large_offsets_of_prototypes(kernels: torch.device) -> None:
    scores = problem(20, 12) + torch.arange(12) * 100 - 500
    scores[7] -= 30
    assert_right(kernels, scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lowest_number_excludes_a_prototype(kernels: torch.device, dtype: torch.dtype) -> None:
    scores = problem(10, 6, dtype=dtype)
    scores[2:7, 4] = torch.finfo(dtype).min
    assert_right(kernels, scores)


def test_the_largest_finite_scores_have_codes(kernels: torch.device) -> None:
    scores = problem(9, 8, scale=3e38).to(kernels)
    codes = codes_by_triton(scores, 0.05, 3)
    torch.testing.assert_close(codes.sum(dim=-1), torch.ones(9, device=kernels))


def test_rows_need_not_be_contiguous(kernels: torch.device) -> None:
    scores = problem(7, 2, 24).to(kernels).transpose(0, 1)[:, 1:, 3:16]
    expected = codes_by_triton(scores.contiguous(), EPSILON, 3)
    torch.testing.assert_close(codes_by_triton(scores, EPSILON, 3), expected, rtol=0, atol=1e-7)


def test_results_do_not_differ_from_run_to_run(kernels: torch.device) -> None:
    scores = problem(130, 60).to(kernels)
    first, second = (codes_by_triton(scores, EPSILON, 3) for _ in range(2))
    assert torch.equal(first, second)


@settings(max_examples=12)
@given(st.data())
def test_any_small_problem_has_the_codes_of_the_oracle(data: st.DataObject) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED:
        pytest.skip("random problems are for the interpreter")
    shape = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 40)))
    scores = problem(*shape, dtype=data.draw(st.sampled_from(DTYPES)))
    bad = data.draw(st.lists(st.tuples(*(st.integers(0, size - 1) for size in shape)), max_size=3))
    for place in bad:
        scores[place] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    weight = data.draw(st.none() | st.just(torch.rand(shape[:-1]) < 0.7))
    with np.errstate(all="ignore"):
        assert_right(
            torch.device("cpu"), scores, iterations=data.draw(st.integers(1, 4)), weight=weight
        )


def test_what_is_not_supported() -> None:
    scores = torch.zeros(2, 3, 4, device="meta")
    assert not supports(scores, 3)
    if INTERPRETED:
        scores = torch.zeros(2, 3, 4)
        assert supports(scores, SCALINGS_OF_ONE_KERNEL, torch.ones(2, 3, dtype=torch.bool))
        assert not supports(scores, SCALINGS_OF_ONE_KERNEL + 1)
        assert not supports(scores, 3, torch.ones(2, 3))
        assert not supports(scores.double(), 3)
        assert not supports(scores.mT, 3)
        assert not supports(scores[:, :0], 3)


@pytest.mark.cuda
def test_the_codes_need_little_more_than_their_own_memory() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    scores = torch.rand(2, 256, 3000, device="cuda")
    codes_by_triton(scores, EPSILON, 3)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    codes_by_triton(scores, EPSILON, 3)
    assert torch.cuda.max_memory_allocated() - before < 1.05 * scores.nbytes


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_torch_computes_the_codes_where_triton_cannot(error: type[Exception]) -> None:
    calls = []

    def fails(*_: object) -> None:
        calls.append(error)
        raise error("Failed to find C compiler")

    kernels = patch.multiple(
        triton_codes, codes_by_triton=fails, supports=lambda *_: True, usable=True
    )
    with kernels, patch.object(at_once, "BACKEND", "triton"), FakeTensorMode():
        scores = torch.empty(4, 5, device="cuda")  # no device is needed
        if error is torch.OutOfMemoryError:
            with pytest.raises(error):
                sinkhorn_knopp(scores)
            return
        with pytest.warns(UserWarning, match=r"Triton cannot run .* Failed to find C compiler"):
            assert sinkhorn_knopp(scores).shape == (4, 5)
        assert sinkhorn_knopp(scores).is_cuda
    assert len(calls) == 1


def test_triton_is_not_imported_along_with_the_package() -> None:
    code = "import swavkit, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    files = {"swavkit.sinkhorn.triton_codes", "swavkit._triton"}
    assert not {"triton", *files} & set(done.stdout.split())


def run_under_the_interpreter(file: str) -> None:
    """Run the tests of a file in a process whose kernels run on the CPU."""
    if INTERPRETED:
        pytest.skip("this is the process under the interpreter")
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "not cuda", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0 and REFUSED in done.stdout:
        pytest.skip("the interpreter of this version of Triton does not go with this NumPy")
    assert done.returncode == 0, done.stdout


def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__)
