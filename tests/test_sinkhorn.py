"""Sinkhorn-Knopp: the equations in every dtype, its laws, its numerical limits, its arguments."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import SinkhornKnopp, sinkhorn_knopp
from swavkit.sinkhorn import at_once as at_once_route
from swavkit.sinkhorn import kernel
from swavkit.sinkhorn.marginals import masses
from tests import oracles, tolerances
from tests.modes import (
    CountingBackend,
    LargestTensor,
    RefuseSoftmaxOverRows,
)
from tests.strategies import (
    CodesProblem,
    KnownCodes,
    circulant,
    codes_problems,
    converged_two_by_two,
    iterations,
    permutations,
    reals,
    seeds,
    separable,
)

ONE_PLAN, TWO_PLANS = 3, 8  # few iterations, and so many that P is computed anew
BOTH_FORMS = pytest.mark.parametrize("iterations", [ONE_PLAN, TWO_PLANS])


def solve(problem: CodesProblem, **weights: Any) -> np.ndarray:
    """Return our codes of a problem, in float64."""
    codes = sinkhorn_knopp(
        torch.tensor(problem.scores),
        epsilon=problem.epsilon,
        iterations=problem.iterations,
        **{name: torch.tensor(weight) for name, weight in weights.items()},
    )
    return codes.numpy()


def expect(
    problem: CodesProblem,
    sample_weight: np.ndarray | None = None,
    prototype_weight: np.ndarray | None = None,
) -> np.ndarray:
    """Return the oracle's codes of a problem."""
    return oracles.sinkhorn(
        problem.scores, problem.epsilon, problem.iterations, sample_weight, prototype_weight
    )


def assert_codes(
    codes: torch.Tensor | np.ndarray, expected: np.ndarray, *, epsilon: float, largest: float = 1.0
) -> None:
    """Compare codes of scores of at most ``largest`` with those of the oracle."""
    tensor = torch.as_tensor(codes)
    np.testing.assert_allclose(
        tensor.double().cpu().numpy(),
        expected,
        rtol=0,
        atol=tolerances.of_codes(tensor.dtype, epsilon=epsilon, largest=largest),
    )


def assert_codes_of_equations(
    codes: torch.Tensor,
    scores: torch.Tensor,
    epsilon: float,
    iterations: int,
    largest: float = 1.0,
) -> None:
    """Compare codes with the oracle's for the scores as their dtype holds them."""
    expected = oracles.sinkhorn(scores.double().cpu().numpy(), epsilon, iterations)
    assert_codes(codes, expected, epsilon=epsilon, largest=largest)


def assert_compiles_once(sinkhorn: SinkhornKnopp, device: torch.device) -> None:
    """Compare the codes with those of the compiled module, one graph for changing values."""
    backend = CountingBackend()
    compiled = torch.compile(sinkhorn, fullgraph=True, backend=backend)
    for seed in range(3):
        scores = cosines(2, 6, 4, seed=seed).to(device)
        weight = torch.arange(6, device=device) > seed  # as a queue fills
        torch.testing.assert_close(
            compiled(scores, weight), sinkhorn(scores, weight), rtol=0, atol=1e-12
        )
    assert backend.graphs == 1


def cosines(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 scores in [-1, 1] which float32 holds exactly."""
    return torch.tensor(np.random.default_rng(seed).uniform(-1, 1, shape)).float().double()


# The equations


@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("iterations", range(1, 13))
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_codes_are_those_of_the_equations(
    device: torch.device, dtype: torch.dtype, iterations: int, epsilon: float
) -> None:
    scores = cosines(12, 7, seed=iterations).to(device, dtype)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    assert codes.dtype == dtype
    assert codes.device == scores.device
    assert_codes_of_equations(codes, scores, epsilon, iterations)


@pytest.mark.parametrize("weighted", ["samples", "prototypes", "both"])
@pytest.mark.parametrize("iterations", [1, 2, 3, 5, 6, 12])
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_weighted_codes_are_those_of_the_equations(
    device: torch.device, dtype: torch.dtype, iterations: int, weighted: str
) -> None:
    scores = cosines(9, 5).to(device, dtype)
    masses = {
        "sample_weight": torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 0.25, 4]),
        "prototype_weight": torch.tensor([1, 2, 0.5, 0.25, 4]),
    }
    if weighted != "both":
        del masses["prototype_weight" if weighted == "samples" else "sample_weight"]
    weights = {name: mass.to(device, dtype) for name, mass in masses.items()}
    codes = sinkhorn_knopp(scores, iterations=iterations, **weights)
    expected = oracles.sinkhorn(
        scores.double().cpu().numpy(),
        0.05,
        iterations,
        **{name: mass.numpy() for name, mass in masses.items()},
    )
    assert codes.dtype == dtype
    assert_codes(codes, expected, epsilon=0.05)


@given(codes_problems(), st.data())
def test_any_problem_has_the_codes_of_the_equations(
    problem: CodesProblem, data: st.DataObject
) -> None:
    samples, prototypes = problem.scores.shape
    sample_weight = data.draw(reals(samples, low=0.125, high=4.0))
    prototype_weight = data.draw(reals(prototypes, low=0.125, high=4.0))
    assert_codes(solve(problem), expect(problem), epsilon=problem.epsilon)
    assert_codes(
        solve(problem, sample_weight=sample_weight, prototype_weight=prototype_weight),
        expect(problem, sample_weight, prototype_weight),
        epsilon=problem.epsilon,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@BOTH_FORMS
def test_a_large_problem_has_the_codes_of_the_equations(
    device: torch.device, iterations: int, dtype: torch.dtype
) -> None:
    scores = cosines(512, 300).to(device, dtype)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.05, iterations)


@pytest.mark.parametrize("weights", ["none", "shared", "own"])
@BOTH_FORMS
def test_leading_dimensions_are_independent_problems(
    device: torch.device, iterations: int, weights: str
) -> None:
    scores = cosines(2, 3, 6, 4).to(device)
    weight = {
        "none": None,
        "shared": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "own": torch.arange(36.0, device=device).view(2, 3, 6) % 5,
    }[weights]
    codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight)
    assert codes.shape == scores.shape
    for index in np.ndindex(2, 3):
        own = weight[index] if weights == "own" else weight
        alone = sinkhorn_knopp(scores[index], iterations=iterations, sample_weight=own)
        torch.testing.assert_close(codes[index], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 4, 5), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_nothing_in_gives_nothing_out(
    device: torch.device, iterations: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    scores = torch.zeros(shape, dtype=dtype, device=device)
    weight = torch.ones(shape[:-1], device=device)
    for codes in (
        sinkhorn_knopp(scores, iterations=iterations),
        sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight),
    ):
        assert codes.shape == shape
        assert codes.dtype == dtype


# Laws. In float64, so that only a breach of the law is larger than the tolerance.


@given(codes_problems())
def test_rows_sum_to_one_and_entries_are_between_zero_and_one(problem: CodesProblem) -> None:
    codes = solve(problem)
    np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert codes.min() >= 0
    assert codes.max() <= 1 + 1e-12


@given(codes_problems(), st.data())
def test_equivariant_under_permutation_of_samples_and_of_prototypes(
    problem: CodesProblem, data: st.DataObject
) -> None:
    samples, prototypes = problem.scores.shape
    order = np.ix_(data.draw(permutations(samples)), data.draw(permutations(prototypes)))
    permuted = problem.with_scores(problem.scores[order])
    assert_codes(solve(permuted), solve(problem)[order], epsilon=problem.epsilon)


@given(codes_problems(), st.floats(-100, 100))
def test_invariant_to_a_constant_for_all_scores(problem: CodesProblem, constant: float) -> None:
    shifted = problem.with_scores(problem.scores + constant)
    assert_codes(solve(shifted), solve(problem), epsilon=problem.epsilon, largest=100)


@given(codes_problems(), st.data())
def test_invariant_to_a_constant_per_prototype(problem: CodesProblem, data: st.DataObject) -> None:
    constants = data.draw(reals(problem.scores.shape[1], low=-10, high=10))
    shifted = problem.with_scores(problem.scores + constants)
    assert_codes(solve(shifted), solve(problem), epsilon=problem.epsilon, largest=11)


def test_a_constant_per_sample_changes_the_codes() -> None:
    scores = np.array([[1.0, 0.0], [0.4, 0.0], [0.0, 0.2]])
    problem = CodesProblem(scores, epsilon=0.2, iterations=3)
    shifted = problem.with_scores(scores - scores.max(axis=1, keepdims=True))
    assert np.abs(solve(shifted) - solve(problem)).max() > 0.1


@given(codes_problems(), st.data())
def test_a_constant_per_sample_counts_as_the_equations_say(
    problem: CodesProblem, data: st.DataObject
) -> None:
    constants = data.draw(reals(len(problem.scores), 1))
    shifted = problem.with_scores(problem.scores + constants)
    assert_codes(solve(shifted), expect(shifted), epsilon=problem.epsilon, largest=2)


@given(separable())
def test_separable_scores_give_equal_entries(known: KnownCodes) -> None:
    assert_codes(solve(known), known.codes, epsilon=known.epsilon, largest=2)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_one_sample_gives_equal_entries_and_one_prototype_gives_ones(
    device: torch.device, iterations: int, dtype: torch.dtype
) -> None:
    alone = sinkhorn_knopp(cosines(1, 6).to(device, dtype), iterations=iterations)
    assert_codes(alone, np.full((1, 6), 1 / 6), epsilon=0.05)
    only = sinkhorn_knopp(cosines(6, 1).to(device, dtype), iterations=iterations)
    assert_codes(only, np.ones((6, 1)), epsilon=0.05)


@given(converged_two_by_two())
def test_two_by_two_converges_to_the_closed_form(known: KnownCodes) -> None:
    assert_codes(solve(known), known.codes, epsilon=known.epsilon)


@given(circulant())
def test_circulant_scores_give_the_softmax_at_once(known: KnownCodes) -> None:
    assert_codes(solve(known), known.codes, epsilon=known.epsilon)


@given(codes_problems(), st.integers(2, 4))
def test_a_repeated_batch_gets_the_same_codes_each_time(problem: CodesProblem, times: int) -> None:
    repeated = problem.with_scores(np.tile(problem.scores, (times, 1)))
    assert_codes(solve(repeated), np.tile(solve(problem), (times, 1)), epsilon=problem.epsilon)


@given(codes_problems(), st.integers(2, 4))
def test_repeated_prototypes_share_their_code(problem: CodesProblem, times: int) -> None:
    repeated = problem.with_scores(np.tile(problem.scores, (1, times)))
    expected = np.tile(solve(problem), (1, times)) / times
    assert_codes(solve(repeated), expected, epsilon=problem.epsilon)


@given(codes_problems())
def test_a_duplicated_prototype_gets_the_code_of_its_twin(problem: CodesProblem) -> None:
    codes = solve(problem.with_scores(problem.scores[:, [0, *range(problem.scores.shape[1])]]))
    assert_codes(codes[:, 0], codes[:, 1], epsilon=problem.epsilon)


@given(codes_problems())
def test_log_codes_are_the_scores_and_a_constant_per_sample_and_per_prototype(
    problem: CodesProblem,
) -> None:
    constants = np.log(solve(problem)) - problem.scores / problem.epsilon
    separated = constants[:1] + constants[:, :1] - constants[0, 0]
    np.testing.assert_allclose(constants, separated, rtol=0, atol=1e-10)


@given(codes_problems(), st.data())
def test_a_prototype_of_mass_zero_is_absent(problem: CodesProblem, data: st.DataObject) -> None:
    used = data.draw(arrays(np.bool_, problem.scores.shape[1]).filter(np.any))
    expected = np.zeros(problem.scores.shape)
    expected[:, used] = solve(problem.with_scores(problem.scores[:, used]))
    codes = solve(problem, prototype_weight=used)
    assert_codes(codes, expected, epsilon=problem.epsilon)


multiplicities = st.integers(0, 3).map(float)


@given(codes_problems(), st.data(), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 50.0]))
def test_sample_weights_are_multiplicities(
    problem: CodesProblem, data: st.DataObject, score_of_absent: float
) -> None:
    weight = data.draw(arrays(np.float64, len(problem.scores), elements=multiplicities))
    with_absent = problem.scores.copy()
    with_absent[weight == 0, 0] = score_of_absent
    repeats = weight.astype(int)
    repeated = problem.with_scores(np.repeat(problem.scores, repeats, axis=0))
    codes = solve(problem.with_scores(with_absent), sample_weight=weight)
    assert_codes(np.repeat(codes, repeats, axis=0), solve(repeated), epsilon=problem.epsilon)


@given(codes_problems(), st.data())
def test_weights_mean_the_same_at_any_scale(problem: CodesProblem, data: st.DataObject) -> None:
    weights = {
        "sample_weight": data.draw(reals(problem.scores.shape[0], low=0.125)),
        "prototype_weight": data.draw(reals(problem.scores.shape[1], low=0.125)),
    }
    scale = 2.0 ** data.draw(st.integers(-300, 300))
    scaled = solve(problem, **{name: weight * scale for name, weight in weights.items()})
    assert_codes(scaled, solve(problem, **weights), epsilon=problem.epsilon)


@given(codes_problems(), st.data())
def test_bool_weights_are_weights_of_one_and_zero(
    problem: CodesProblem, data: st.DataObject
) -> None:
    present = data.draw(arrays(np.bool_, len(problem.scores)))
    used = data.draw(arrays(np.bool_, problem.scores.shape[1]).filter(np.any))
    codes = solve(problem, sample_weight=present, prototype_weight=used)
    expected = solve(
        problem, sample_weight=present.astype(float), prototype_weight=used.astype(float)
    )
    assert_codes(codes, expected, epsilon=problem.epsilon)


@given(codes_problems(), st.data())
def test_an_absent_sample_gets_the_code_that_the_present_ones_give_it(
    problem: CodesProblem, data: st.DataObject
) -> None:
    absent = data.draw(reals(2, problem.scores.shape[1]))
    together = problem.with_scores(np.concatenate([problem.scores, absent]))
    weight = np.append(np.ones(len(problem.scores)), [0.0, 0.0])
    codes = solve(together, sample_weight=weight)
    # log u is what the code of a present sample has beside its scores, up to a constant.
    log_u = np.log(codes[0]) - problem.scores[0] / problem.epsilon
    logits = absent / problem.epsilon + log_u
    expected = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    np.testing.assert_allclose(codes[-2:], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_an_absent_sample_without_finite_scores_gets_zeros(
    device: torch.device, iterations: int, dtype: torch.dtype, bad: float
) -> None:
    scores = cosines(6, 4).to(device, dtype)
    scores[2, 1] = bad
    weight = torch.tensor([1, 1, 0, 1, 1, 1.0], device=device)
    codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight)
    present = weight.cpu().numpy() > 0
    expected = oracles.sinkhorn(scores.double().cpu().numpy()[present], 0.05, iterations)
    assert codes[2].tolist() == [0, 0, 0, 0]
    assert_codes(codes[torch.tensor(present, device=device)], expected, epsilon=0.05)


@settings(max_examples=15)  # of hundreds of iterations each
@given(seeds, st.sampled_from([0.5, 1.0]), st.data())
def test_the_mean_code_converges_to_the_masses_of_the_prototypes(
    seed: int, epsilon: float, data: st.DataObject
) -> None:
    problem = CodesProblem(cosines(8, 5, seed=seed).numpy(), epsilon, iterations=300)
    sample_weight = data.draw(reals(8, low=0.125))
    prototype_weight = data.draw(reals(5, low=0.125))
    mean = solve(problem).mean(axis=0)
    np.testing.assert_allclose(mean, np.full(5, 1 / 5), rtol=0, atol=1e-9)
    codes = solve(problem, sample_weight=sample_weight, prototype_weight=prototype_weight)
    mean = sample_weight @ codes / sample_weight.sum()
    np.testing.assert_allclose(mean, prototype_weight / prototype_weight.sum(), rtol=0, atol=1e-9)


@given(codes_problems(iterations=st.just(1)), iterations)
def test_iterations_approach_equal_use(problem: CodesProblem, more: int) -> None:
    later = CodesProblem(problem.scores, problem.epsilon, problem.iterations + more)
    assert oracles.marginal_error(solve(later)) <= oracles.marginal_error(solve(problem)) + 1e-9


# Numerical limits


def test_half_precision_scores_of_one_do_not_overflow(device: torch.device) -> None:
    scores = torch.linspace(-1, 1, 60, device=device).view(12, 5).half()
    codes = sinkhorn_knopp(scores, epsilon=0.05)
    assert_codes(codes, oracles.sinkhorn(scores.double().cpu().numpy(), 0.05, 3), epsilon=0.05)


@pytest.mark.parametrize("epsilon", [0.05, 0.01, 0.005, 0.001])
@pytest.mark.parametrize("iterations", [1, 3, 5, 8])
def test_a_far_prototype_and_a_far_sample_do_no_harm(
    device: torch.device, iterations: int, epsilon: float
) -> None:
    scores = cosines(64, 16)
    scores[:, 5] -= 50
    scores[7] -= 30
    scores = scores.float().to(device)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    assert_codes_of_equations(codes, scores, epsilon, iterations, largest=82)


@pytest.mark.parametrize("constant", [1e4, -1e4])
@BOTH_FORMS
def test_large_offsets_cost_no_more_than_the_rounding_of_the_scores(
    device: torch.device, iterations: int, constant: float
) -> None:
    scores = (cosines(32, 8) + constant).float().to(device)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.05, iterations, largest=1e4)


@BOTH_FORMS
def test_large_scores_give_the_codes_of_the_equations(
    device: torch.device, iterations: int
) -> None:
    scores = (1e4 * cosines(32, 8)).float().to(device)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.05, iterations, largest=1e4)


@pytest.mark.parametrize("iterations", [5, 9])
def test_one_sample_and_many_prototypes_do_not_drift(device: torch.device, iterations: int) -> None:
    scores = cosines(1, 70_000).float().to(device)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    torch.testing.assert_close(codes, torch.full_like(codes, 1 / 70_000), rtol=1e-4, atol=0)


@pytest.mark.parametrize("iterations", [3, 5, 6, 12])
def test_all_prototypes_but_one_near_a_single_sample_exhaust_no_range(
    device: torch.device, iterations: int
) -> None:
    scores = cosines(4096, 300) / 100
    scores += torch.where((torch.arange(4096) == 0)[:, None] ^ (torch.arange(300) == 0), 0.9, -0.9)
    scores = scores.float().to(device)
    codes = sinkhorn_knopp(scores, epsilon=0.01, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.01, iterations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@BOTH_FORMS
def test_sums_over_many_samples_are_not_rounded_to_half_precision(
    device: torch.device, iterations: int, dtype: torch.dtype
) -> None:
    scores = cosines(4096, 16).to(device, dtype)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.05, iterations)


@BOTH_FORMS
def test_scores_need_not_be_cosines(device: torch.device, iterations: int) -> None:
    scores = 1.7 * torch.randn(64, 16, device=device)
    codes = sinkhorn_knopp(scores, iterations=iterations)
    assert_codes_of_equations(codes, scores, 0.05, iterations, largest=scores.abs().max().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weighted", [False, True])
@BOTH_FORMS
def test_a_sample_with_a_score_that_is_not_finite_has_nan_codes_and_is_left_out(
    device: torch.device, iterations: int, weighted: bool, bad: float
) -> None:
    scores = cosines(6, 4).to(device)
    scores[2, 1] = bad
    weight = torch.ones(6, device=device) if weighted else None
    codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight)
    assert codes[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    alone = sinkhorn_knopp(scores[others], iterations=iterations)
    torch.testing.assert_close(codes[others], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@BOTH_FORMS
def test_a_weight_that_is_none_gives_nan_codes(iterations: int, bad: float) -> None:
    weight = torch.ones(6)
    weight[2] = bad
    of_samples = sinkhorn_knopp(cosines(6, 4), iterations=iterations, sample_weight=weight)
    assert of_samples.isnan().all()
    weight = weight[:4]
    of_prototypes = sinkhorn_knopp(cosines(6, 4), iterations=iterations, prototype_weight=weight)
    assert of_prototypes.isnan().all()


@pytest.mark.parametrize("bad", [0.0, math.nan])
@BOTH_FORMS
def test_nobody_present_gives_no_nan(device: torch.device, iterations: int, bad: float) -> None:
    scores = cosines(6, 4).to(device)
    scores[2, 1] = bad
    masses = torch.tensor([1, 2, 0, 1], dtype=scores.dtype, device=device)
    codes = sinkhorn_knopp(
        scores,
        iterations=iterations,
        sample_weight=torch.zeros(6, device=device),
        prototype_weight=masses,
    )
    expected = torch.softmax(scores / 0.05 + masses.log(), dim=-1).nan_to_num(0)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("iterations", [3, 5, 300])
def test_the_scale_of_weights_exhausts_no_range(
    device: torch.device, iterations: int, scale: float
) -> None:
    scores = cosines(6, 4).float().to(device)
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], device=device),
    }
    scaled = {name: scale * weight for name, weight in weights.items()}
    expected = sinkhorn_knopp(scores, iterations=iterations, **weights)
    codes = sinkhorn_knopp(scores, iterations=iterations, **scaled)
    torch.testing.assert_close(codes, expected, rtol=0, atol=2e-5)


# Blocks, of which large problems have many. Small ones get them here.


@contextmanager
def small_blocks() -> Iterator[None]:
    """Let a block take 4 samples of 5 prototypes, and a product of them 2 parts."""
    with (
        patch.object(kernel, "_VALUES_OF_A_BLOCK", 20),
        patch.object(kernel, "_SAMPLES_OF_A_BLOCK", 4),
        patch.object(kernel, "PARTS_OF_A_PRODUCT", 2),
        patch.object(kernel, "_VALUES_OF_A_PART", 4),
        patch.object(at_once_route, "_VALUES_AT_ONCE", 0),
    ):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_codes_in_half_precision_block_by_block(dtype: torch.dtype, weighted: bool) -> None:
    scores = (2 * torch.rand(11, 5) - 1).to(dtype)
    weight = torch.rand(11) if weighted else None
    with small_blocks():
        codes = sinkhorn_knopp(scores, epsilon=0.1, sample_weight=weight, dtype=dtype)
    counted = None if weight is None else weight.double().numpy()
    expected = oracles.sinkhorn(scores.double().numpy(), 0.1, 3, counted)
    np.testing.assert_allclose(
        codes.double().numpy(),
        expected,
        rtol=0,
        atol=tolerances.of_codes(dtype, epsilon=0.1, largest=1),
    )


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["kept", "not kept"])
def test_masses_and_codes_of_an_earlier_step_do_not_depend_on_later_ones(
    fractional: bool, dtype: torch.dtype
) -> None:
    values = torch.randn(11, 5, dtype=torch.float64)
    with small_blocks():
        parts = kernel.parts_of(values)
        scores = kernel.ScaledScores(
            lambda: (values[part] for part in parts),
            parts,
            masses(None, values.shape[:1], values.device, values.dtype),
            5,
            None,
            weighted=False,
            fractional=fractional,
            epsilon=0.5,
            codes=torch.empty_like(values, dtype=dtype),
        )
        scaling, first_masses = scores.start(-scores.largest, scores.log_mass)
        steps, found = [scaling.scale(scores.target, first_masses)], []
        for _ in range(7):  # more than scalings of one P
            scaling, masses_now = steps[-1].masses()
            found.append((masses_now, scaling.kernel().codes().clone()))
            steps.append(scaling.scale(scores.target, masses_now))
        steps[1].masses()
        steps[1].log_masses()
        torch.testing.assert_close(steps[1].masses()[1], found[1][0])
        for scaling, expected in reversed(list(zip(steps, found, strict=False))):
            scaling, masses_again = scaling.masses()
            torch.testing.assert_close((masses_again, scaling.kernel().codes()), expected)
        _, again = scores.start(-scores.largest, scores.log_mass)
        torch.testing.assert_close(again, first_masses)


@pytest.mark.parametrize("relaxation", [math.inf, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4, 2), (1, 5), (4, 5), (11, 5), (3, 10, 5), (6, 30), (2, 9, 1)]
)
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_codes_in_many_blocks_are_those_in_one(
    iterations: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    weighted: bool,
    relaxation: float,
) -> None:
    scores = cosines(*shape).to(dtype)
    weights = {}
    if weighted:
        scores[..., -1, 0] = math.nan
        masses = torch.arange(math.prod(shape[:-1]), dtype=dtype).view(shape[:-1]) % 4
        weights = {"sample_weight": masses, "prototype_weight": 1 + torch.arange(shape[-1]).float()}
    settings = {"iterations": iterations, "relaxation": relaxation, **weights}
    expected = sinkhorn_knopp(scores, **settings)
    with small_blocks():
        codes = sinkhorn_knopp(scores, **settings)
    # Sums in another order; rounded to half precision they may come to lie a place apart.
    atol = 2 * tolerances.ATOL[dtype]
    torch.testing.assert_close(codes, expected, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH_FORMS
def test_a_problem_of_several_blocks_has_the_codes_of_the_equations(
    device: torch.device, iterations: int, dtype: torch.dtype
) -> None:
    scores = cosines(5000, 7).to(device, dtype)  # more samples than a block takes
    assert_codes_of_equations(
        sinkhorn_knopp(scores, iterations=iterations), scores, 0.05, iterations
    )


def test_half_precision_in_many_blocks_takes_no_matrix_in_float32() -> None:
    scores = cosines(64, 5).to(torch.bfloat16)
    with small_blocks(), LargestTensor(torch.float32) as largest:
        sinkhorn_knopp(scores)
    assert 0 < largest.numel < scores.numel()


# What it leaves alone


@pytest.mark.parametrize("leading", [(), (2,)], ids=["one problem", "two problems"])
@BOTH_FORMS
def test_autocast_changes_nothing(
    device: torch.device, iterations: int, leading: tuple[int, ...]
) -> None:
    scores = cosines(*leading, 64, 16).float().to(device)
    expected = sinkhorn_knopp(scores, iterations=iterations)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        codes = sinkhorn_knopp(scores, iterations=iterations)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("leading", [(), (2,)], ids=["one problem", "two problems"])
@BOTH_FORMS
def test_reduced_precision_of_products_changes_nothing(
    device: torch.device, iterations: int, leading: tuple[int, ...]
) -> None:
    scores = cosines(*leading, 64, 16).float().to(device)
    expected = sinkhorn_knopp(scores, iterations=iterations)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        codes = sinkhorn_knopp(scores, iterations=iterations)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_no_gradient_flows_and_no_input_changes(
    device: torch.device, iterations: int, dtype: torch.dtype
) -> None:
    scores = cosines(6, 4).to(device, dtype).requires_grad_()
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3], dtype=dtype, device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], dtype=dtype, device=device),
    }
    for weight in weights.values():
        weight.requires_grad_()
    inputs = [scores, *weights.values()]
    before = [tensor.detach().clone() for tensor in inputs]
    for codes in (
        sinkhorn_knopp(scores, iterations=iterations, **weights),
        sinkhorn_knopp(scores, iterations=iterations),
    ):
        assert codes.grad_fn is None
        assert not codes.requires_grad
    assert all(map(torch.equal, inputs, before))
    assert torch.is_grad_enabled()


@BOTH_FORMS
def test_the_global_random_state_is_left_alone(iterations: int) -> None:
    before = torch.get_rng_state()
    sinkhorn_knopp(cosines(6, 4), iterations=iterations)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("weights", ["none", "bool", "floating"])
@pytest.mark.parametrize("relaxation", [math.inf, 0.1])
@pytest.mark.parametrize("leading", [(), (2,)], ids=["one problem", "two problems"])
@BOTH_FORMS
def test_no_softmax_is_over_the_samples(
    iterations: int, leading: tuple[int, ...], relaxation: float, weights: str
) -> None:
    scores = torch.empty(*leading, 6, 4, device="meta")
    dtype = torch.bool if weights == "bool" else torch.float32
    weight = None if weights == "none" else torch.empty(6, dtype=dtype, device="meta")
    with RefuseSoftmaxOverRows():
        sinkhorn_knopp(scores, iterations=iterations, relaxation=relaxation, sample_weight=weight)
        with pytest.raises(RuntimeError, match="over dimension -2"):
            scores.log_softmax(-2)  # else the mode would prove nothing


@pytest.mark.parametrize("samples", [6, 20_000], ids=["small", "large"])
@pytest.mark.parametrize("options", [{}, {"relaxation": 0.1}, {"validate": True}], ids=str)
@BOTH_FORMS
def test_the_default_device_does_not_matter(
    iterations: int, options: dict[str, Any], samples: int
) -> None:
    settings = {"iterations": iterations, **options}
    scores = cosines(samples, 64)
    weights = {"sample_weight": torch.ones(samples), "prototype_weight": torch.ones(64).bool()}
    expected = sinkhorn_knopp(scores, **settings)
    with torch.device("meta"):
        codes = sinkhorn_knopp(scores, **settings)
        weighted = SinkhornKnopp(**settings)(scores, **weights)
    for each in (codes, weighted):
        torch.testing.assert_close(each, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@BOTH_FORMS
def test_shapes_and_dtypes_are_known_without_values(
    iterations: int, dtype: torch.dtype, shape: tuple[int, ...], fake: bool
) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        codes = sinkhorn_knopp(
            torch.empty(shape, dtype=dtype, device="meta"),
            iterations=iterations,
            sample_weight=torch.empty(shape[:-1], device="meta"),
            prototype_weight=torch.empty(shape[-1], device="meta"),
        )
    assert codes.shape == shape
    assert codes.dtype == dtype
    assert codes.device.type == "meta"


@BOTH_FORMS
def test_compiles_once_for_changing_values(device: torch.device, iterations: int) -> None:
    assert_compiles_once(SinkhornKnopp(iterations=iterations), device)


# The module


def test_the_module_computes_with_its_settings(device: torch.device) -> None:
    scores = cosines(2, 6, 4).to(device)
    sample_weight = torch.tensor([1, 0, 2, 1, 1, 3.0], device=device)
    prototype_weight = torch.tensor([1, 2, 0.5, 1], device=device)
    expected = sinkhorn_knopp(
        scores,
        epsilon=0.1,
        iterations=7,
        sample_weight=sample_weight,
        prototype_weight=prototype_weight,
    )
    codes = SinkhornKnopp(0.1, 7)(scores, sample_weight, prototype_weight)
    assert torch.equal(codes, expected)
    assert torch.equal(SinkhornKnopp()(scores), sinkhorn_knopp(scores))


def test_settings_of_the_module_can_be_changed() -> None:
    scores = cosines(6, 4)
    sinkhorn = SinkhornKnopp()
    sinkhorn.epsilon = 0.1
    sinkhorn.iterations = 7
    assert torch.equal(sinkhorn(scores), sinkhorn_knopp(scores, epsilon=0.1, iterations=7))
    sinkhorn.epsilon = 0.0
    with pytest.raises(ValueError, match="epsilon must be a finite number above 0, got 0"):
        sinkhorn(scores)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_of_the_module_has_its_settings(
    duplicate: Callable[[SinkhornKnopp], SinkhornKnopp],
) -> None:
    scores = cosines(6, 4)
    sinkhorn = SinkhornKnopp(0.1, 7, synchronize=False).eval()
    twin = duplicate(sinkhorn)
    assert repr(twin) == repr(sinkhorn)
    assert not twin.training
    assert torch.equal(twin(scores), sinkhorn(scores))
    twin.epsilon = 0.2
    assert sinkhorn.epsilon == 0.1


def test_the_module_shows_its_settings_and_has_no_state() -> None:
    sinkhorn = SinkhornKnopp(0.1, 7, synchronize=False)
    assert repr(sinkhorn) == "SinkhornKnopp(epsilon=0.1, iterations=7, synchronize=False)"
    assert not sinkhorn.state_dict()
    assert not list(sinkhorn.parameters())


def test_module_and_function_have_the_same_settings() -> None:
    def described(function: Callable[..., Any], names: list[str]) -> list[tuple[Any, ...]]:
        parameters = inspect.signature(function).parameters
        return [
            # Only a module has a mode in which it does not synchronise unless it "always" does.
            (name, parameters[name].default, name == "synchronize" or parameters[name].annotation)
            for name in parameters
            if name in names
        ]

    settings = list(inspect.signature(SinkhornKnopp).parameters)
    tensors = list(inspect.signature(SinkhornKnopp().forward).parameters)
    assert sorted(inspect.signature(sinkhorn_knopp).parameters) == sorted(settings + tensors)
    assert described(sinkhorn_knopp, settings) == described(SinkhornKnopp, settings)
    assert described(sinkhorn_knopp, tensors) == described(SinkhornKnopp().forward, tensors)


# Bad input

SCORES = torch.zeros(6, 4)
BAD_SETTINGS = [
    ("epsilon", 0.0, ValueError, r"epsilon must be a finite number above 0, got 0\.0"),
    ("epsilon", -0.05, ValueError, r"epsilon must be a finite number above 0, got -0\.05"),
    ("epsilon", math.nan, ValueError, "epsilon must be a finite number, got nan"),
    ("epsilon", math.inf, ValueError, "epsilon must be a finite number, got inf"),
    ("epsilon", "0.05", TypeError, "epsilon must be a number, got str"),
    ("epsilon", True, TypeError, "epsilon must be a number, got bool"),
    ("epsilon", None, TypeError, "epsilon must be a number, got NoneType"),
    (
        "epsilon",
        torch.tensor(1),
        TypeError,
        "epsilon must have a floating-point dtype, got torch.int64",
    ),
    ("iterations", 0, ValueError, "iterations must be at least 1, got 0"),
    ("iterations", -1, ValueError, "iterations must be at least 1, got -1"),
    ("iterations", 2.0, TypeError, "iterations must be an int, got float"),
    ("iterations", True, TypeError, "iterations must be an int, got bool"),
    ("iterations", "3", TypeError, "iterations must be an int, got str"),
    ("synchronize", 1, ValueError, "synchronize must be True or False.*, got 1"),
    ("synchronize", None, ValueError, "synchronize must be True or False.*, got None"),
]
BAD_TENSORS = [
    ("scores", [[0.0]], TypeError, r"scores must be a torch\.Tensor, got list"),
    ("scores", None, TypeError, r"scores must be a torch\.Tensor, got NoneType"),
    (
        "scores",
        torch.zeros(6, 4, dtype=torch.int64),
        TypeError,
        r"scores must have a floating-point dtype, got torch\.int64",
    ),
    (
        "scores",
        torch.zeros(6, 4, dtype=torch.complex64),
        TypeError,
        r"scores must have a floating-point dtype, got torch\.complex64",
    ),
    (
        "scores",
        torch.zeros(4),
        ValueError,
        r"scores must have at least 2 dimensions \(\.\.\., samples, prototypes\), "
        r"got shape \(4,\)",
    ),
    ("scores", torch.zeros(()), ValueError, r"at least 2 dimensions .*, got shape \(\)"),
    (
        "scores",
        torch.zeros(6, 0),
        ValueError,
        r"scores must have at least 1 of the prototypes in its last dimension, got shape \(6, 0\)",
    ),
    (
        "sample_weight",
        torch.ones(5),
        ValueError,
        r"sample_weight must have shape \(6,\), got \(5,\)",
    ),
    (
        "sample_weight",
        torch.ones(6, 1),
        ValueError,
        r"sample_weight must have shape \(6,\), got \(6, 1\)",
    ),
    (
        "sample_weight",
        torch.ones(6, dtype=torch.int64),
        TypeError,
        r"sample_weight must have a bool or floating-point dtype, got torch\.int64",
    ),
    ("sample_weight", [1.0] * 6, TypeError, r"sample_weight must be a torch\.Tensor, got list"),
    (
        "sample_weight",
        torch.ones(6, device="meta"),
        ValueError,
        "sample_weight must be on device cpu, got meta",
    ),
    (
        "prototype_weight",
        torch.ones(6),
        ValueError,
        r"prototype_weight must have shape \(4,\), got \(6,\)",
    ),
    (
        "prototype_weight",
        torch.ones(6, 4),
        ValueError,
        r"prototype_weight must have shape \(4,\), got \(6, 4\)",
    ),
    (
        "prototype_weight",
        torch.ones(4, dtype=torch.int32),
        TypeError,
        r"prototype_weight must have a bool or floating-point dtype, got torch\.int32",
    ),
    ("prototype_weight", (1.0,) * 4, TypeError, r"prototype_weight must be .*Tensor, got tuple"),
    (
        "prototype_weight",
        torch.ones(4, device="meta"),
        ValueError,
        "prototype_weight must be on device cpu, got meta",
    ),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_SETTINGS)
def test_bad_settings_are_named(name: str, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        sinkhorn_knopp(SCORES, **{name: value})
    with pytest.raises(error, match=text):
        SinkhornKnopp(**{name: value})


def test_only_a_module_always_synchronises() -> None:
    with pytest.raises(ValueError, match="synchronize must be True or False, got 'always'"):
        sinkhorn_knopp(SCORES, synchronize="always")  # type: ignore[arg-type]
    assert "synchronize=always" in repr(SinkhornKnopp(synchronize="always"))


@pytest.mark.parametrize(("name", "value", "error", "text"), BAD_TENSORS)
def test_bad_tensors_are_named(name: str, value: Any, error: type[Exception], text: str) -> None:
    inputs = {"scores": SCORES, name: value}
    with pytest.raises(error, match=text):
        sinkhorn_knopp(**inputs)
    with pytest.raises(error, match=text):
        SinkhornKnopp()(**inputs)


def test_both_shapes_of_sample_weight_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"sample_weight must have shape \(2, 6\) or \(6,\), got \(2,\)"
    ):
        sinkhorn_knopp(torch.zeros(2, 6, 4), sample_weight=torch.ones(2))
