"""The fused kernel for errors and residuals against NumPy; see ``test_triton_codes.py``."""

from __future__ import annotations

from unittest.mock import MagicMock, patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import _triton_errors, swapped_prediction, swapped_prediction_loss
from swavkit._triton_errors import errors_by_triton, supports
from swavkit.swapped_prediction import errors_of_samples
from tests import oracles
from tests.modes import LiveStorage
from tests.test_triton_codes import DTYPES, INTERPRETED, kernels, run_under_the_interpreter

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with:DeprecationWarning")
__all__ = ["kernels"]  # a fixture

TAU = 0.1


def problem(
    views: int, samples: int, prototypes: int, codes: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(views + samples + prototypes + codes)
    scores = torch.rand(views, samples, prototypes, generator=generator) * 2 - 1
    logits = torch.randn(codes, samples, prototypes, generator=generator)
    return scores.to(dtype), torch.softmax(3 * logits, dim=-1)


def expected(
    scores: torch.Tensor, codes: torch.Tensor, weight: torch.Tensor | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors (B,) and the residuals (V, B, K)."""
    logits, targets = scores.double().numpy() / TAU, codes.double().numpy()
    errors, residuals = np.zeros(logits.shape[1]), np.zeros(logits.shape)
    for view, sample in np.ndindex(logits.shape[:2]):
        others = [code[sample] for i, code in enumerate(targets) if i != view]
        if not others or (weight is not None and weight[sample] == 0):
            continue
        target, own = sum(others), logits[view, sample]
        level = oracles.log_sum_exp(own)
        products = np.where(target == 0, 0, target * (own - level))
        errors[sample] -= products.sum()
        residuals[view, sample] = target - target.sum() * np.exp(own - level)
    return errors, residuals


def assert_right(
    device: torch.device,
    scores: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor | None = None,
    inverse_temperature: float | torch.Tensor = 1 / TAU,
    as_lists: bool = False,
) -> None:
    own, targets = scores.to(device), codes.to(device)
    residuals = torch.full_like(own, torch.nan)
    arguments = [list(each) if as_lists else each for each in (own, targets, residuals)]
    assert supports(*arguments)
    errors, scale = errors_by_triton(
        *arguments[:2],
        inverse_temperature,
        None if weight is None else weight.to(device),
        arguments[2],
    )
    of_errors, of_residuals = expected(scores, codes, weight)
    np.testing.assert_allclose(errors.cpu().numpy(), of_errors, rtol=2e-6, atol=2e-5)
    assert (scale is not None) == (scores.dtype == torch.float16)
    if scale is not None:
        mass = codes.sum(dim=(0, 2)).numpy()
        mass = np.where((mass > 0) & np.isfinite(mass), mass, 1)
        np.testing.assert_allclose(scale.cpu().numpy(), 256 / mass, rtol=1e-6)
        of_residuals *= (256 / mass)[:, None]
    rounding = torch.finfo(scores.dtype).eps / 2
    if INTERPRETED and scores.dtype == torch.bfloat16:
        rounding *= 2  # the interpreter truncates
    largest = np.nanmax(np.abs(of_residuals), initial=0)
    np.testing.assert_allclose(
        residuals.double().cpu().numpy(), of_residuals, rtol=rounding, atol=2e-6 * max(largest, 1)
    )


@pytest.mark.parametrize(
    ("views", "samples", "prototypes"),
    [(2, 1, 1), (8, 3, 35), (3, 5, 4096), (2, 2, 5000), (2, 40, 7)],
)
@pytest.mark.parametrize("codes", [1, 2])
def test_errors_of_any_shape(
    kernels: torch.device, views: int, samples: int, prototypes: int, codes: int
) -> None:
    assert_right(kernels, *problem(views, samples, prototypes, codes))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("as_lists", [False, True])
def test_errors_of_any_dtype(kernels: torch.device, dtype: torch.dtype, as_lists: bool) -> None:
    assert_right(kernels, *problem(4, 6, 33, 2, dtype), as_lists=as_lists)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float16, torch.float32, torch.float64])
def test_samples_of_weight_0(kernels: torch.device, dtype: torch.dtype) -> None:
    scores, codes = problem(3, 5, 20, 2)
    scores[:, 1], codes[:, 3] = torch.nan, torch.nan
    assert_right(kernels, scores, codes, torch.tensor([1, 0, 1, 0, 2]).to(dtype))


def test_what_is_not_finite(kernels: torch.device) -> None:
    scores, codes = problem(3, 9, 20, 2, torch.float16)
    codes[:, :, 5] = 0
    scores[0, 0, 3], scores[1, 1, 3], scores[2, 2] = torch.nan, torch.inf, -torch.inf
    scores[0, 3, 5] = -torch.inf  # where the code is 0
    codes[0, 4, 7], codes[1, 5] = torch.nan, torch.nan
    with np.errstate(invalid="ignore"):
        assert_right(kernels, scores, codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_temperature_may_be_a_tensor(kernels: torch.device, dtype: torch.dtype) -> None:
    inverse = torch.tensor(8.0, dtype=dtype, device=kernels)
    with patch(f"{__name__}.TAU", 1 / 8):
        assert_right(kernels, *problem(2, 3, 20, 2), inverse_temperature=inverse)


def test_residuals_may_overwrite_scores_that_are_not_contiguous(kernels: torch.device) -> None:
    scores, codes = problem(3, 8, 40, 2)
    memory = torch.zeros(3, 12, 50, device=kernels)
    own = memory[:, 2:10, 5:45].copy_(scores)
    targets = torch.zeros(2, 8, 60, device=kernels)[..., 3:43].copy_(codes)
    errors, _ = errors_by_triton(own, targets, 1 / TAU, None, own)
    of_errors, of_residuals = expected(scores, codes, None)
    np.testing.assert_allclose(errors.cpu().numpy(), of_errors, rtol=2e-6, atol=2e-5)
    np.testing.assert_allclose(own.cpu().numpy(), of_residuals, atol=2e-6)
    own.zero_()
    assert not memory.any()  # nothing else is written


def test_without_residuals(kernels: torch.device) -> None:
    scores, codes = problem(3, 8, 40, 2)
    errors, _ = errors_by_triton(scores.to(kernels), codes.to(kernels), 1 / TAU, None, None)
    of_errors, _ = expected(scores, codes, None)
    np.testing.assert_allclose(errors.cpu().numpy(), of_errors, rtol=2e-6, atol=2e-5)


@settings(max_examples=15)
@given(st.data())
def test_any_small_problem_has_the_errors_of_the_oracle(data: st.DataObject) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if not INTERPRETED:
        pytest.skip("random problems are for the interpreter")
    codes = data.draw(st.integers(1, 2))
    sizes = data.draw(st.tuples(st.integers(2, 4), st.integers(1, 6), st.integers(1, 40)))
    scores, targets = problem(*sizes, codes, data.draw(st.sampled_from(DTYPES)))
    for tensor in (scores, targets):
        places = st.tuples(*(st.integers(0, size - 1) for size in tensor.shape))
        for place in data.draw(st.lists(places, max_size=2)):
            tensor[place] = data.draw(st.sampled_from([torch.nan, torch.inf, 0.0]))
    weight = data.draw(st.none() | st.just(torch.rand(sizes[1]) < 0.7))
    with np.errstate(all="ignore"):
        assert_right(torch.device("cpu"), scores, targets, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_needs_no_more_memory_than_its_gradient(
    kernels: torch.device, dtype: torch.dtype
) -> None:
    scores, codes = (part.to(kernels) for part in problem(2, 16, 4000, 2, dtype))
    with patch.object(_triton_errors, "_errors", MagicMock()) as kernel, LiveStorage() as memory:
        errors_by_triton(scores, codes, 1 / TAU, None, torch.empty_like(scores))
    assert memory.peak < 1.01 * scores.nbytes
    assert kernel.__getitem__.call_count == 1


def test_what_is_not_supported() -> None:
    scores, codes = problem(2, 3, 4, 2)
    assert not supports(scores.to("meta"), codes.to("meta"), None)
    if INTERPRETED:
        assert supports(scores, codes, scores)
        assert not supports(scores.double(), codes, None)
        assert not supports(scores, codes.double(), None)
        assert not supports(scores, codes, scores.mT)
        assert not supports(scores[:, :0], codes[:, :0], None)
        assert not supports(torch.cat([scores, scores]), torch.cat([codes, codes]), None)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_loss_by_triton_is_that_of_torch(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    results = []
    for backend in ("torch", "triton"):
        scores, codes = (part.cuda() for part in problem(8, 64, 3000, 2, dtype))
        scores.requires_grad_()
        with patch.object(swapped_prediction, "BACKEND", backend):
            loss = swapped_prediction_loss(scores, codes)
        results.append((loss, *torch.autograd.grad(loss, [scores])))
    (loss, gradient), (of_triton, gradient_of_triton) = results
    torch.testing.assert_close(of_triton, loss, rtol=2e-6, atol=0)
    atol = torch.finfo(dtype).eps * gradient.abs().max().item()
    torch.testing.assert_close(gradient_of_triton, gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_torch_computes_the_errors_where_triton_cannot(error: type[Exception]) -> None:
    calls = []

    def fails(*_: object) -> None:
        calls.append(error)
        raise error("Failed to find C compiler")

    kernel = patch.multiple(
        _triton_errors, errors_by_triton=fails, supports=lambda *_: True, usable=True
    )
    backend = patch.multiple(
        swapped_prediction, BACKEND="triton", _errors_of_block=lambda *_: "those of torch"
    )
    with kernel, backend, FakeTensorMode():
        views = [torch.empty(4, 5, device="cuda")] * 2  # no device is needed
        arguments = views, views, 1 / TAU, None, None
        with patch.object(swapped_prediction, "BACKEND", "torch"):
            assert errors_of_samples(*arguments) == "those of torch"
        assert not calls
        if error is torch.OutOfMemoryError:
            with pytest.raises(error):
                errors_of_samples(*arguments)
            return
        with pytest.warns(UserWarning, match=r"Triton cannot run .* the loss.* C compiler"):
            assert errors_of_samples(*arguments) == "those of torch"
        assert errors_of_samples(*arguments) == "those of torch"
    assert len(calls) == 1


def test_under_the_interpreter() -> None:
    run_under_the_interpreter(__file__)
