"""Sinkhorn-Knopp's options: relaxed masses, a tolerance, hard codes, validation of values."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import SinkhornKnopp, sinkhorn_knopp
from tests import oracles, tolerances
from tests.strategies import (
    CodesProblem,
    KnownCodes,
    circulant,
    codes_problems,
    converged_two_by_two,
    permutations,
    reals,
    seeds,
    separable,
)
from tests.test_sinkhorn import assert_codes, assert_compiles_once, cosines, small_blocks

ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
ITERATIONS = pytest.mark.parametrize("iterations", [1, 3, 8])
NOT_FINITE = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
ON_THE_DEVICE = [{"relaxation": 0.5}, {"hard": True}, {"relaxation": 0.5, "hard": True}]
WITHOUT_READING = pytest.mark.parametrize("options", ON_THE_DEVICE, ids=str)
OPTIONS = [*ON_THE_DEVICE, {"tolerance": 0.55}, {"validate": True}]
ANY_OPTIONS = pytest.mark.parametrize("options", OPTIONS, ids=str)

relaxations = st.sampled_from([0.001, 0.05, 0.5, 2.0, 50.0])
some_tolerances = st.sampled_from([1e-6, 1e-3, 0.03, 0.3, 3.0])
multiplicities = st.integers(0, 3).map(float)


def assert_relaxed(
    codes: torch.Tensor,
    scores: torch.Tensor,
    epsilon: float,
    iterations: int,
    relaxation: float,
    largest: float = 1.0,
) -> None:
    """Compare codes with the oracle's for the scores as their dtype holds them."""
    expected = oracles.relaxed_sinkhorn(in_float64(scores), epsilon, iterations, relaxation)
    assert_codes(codes, expected, epsilon=epsilon, largest=largest)


def solve(
    problem: CodesProblem,
    sample_weight: np.ndarray | None = None,
    prototype_weight: np.ndarray | None = None,
    **options: Any,
) -> np.ndarray:
    """Return our codes of a problem, in float64."""
    codes = sinkhorn_knopp(
        torch.tensor(problem.scores),
        epsilon=problem.epsilon,
        iterations=problem.iterations,
        sample_weight=None if sample_weight is None else torch.tensor(sample_weight),
        prototype_weight=None if prototype_weight is None else torch.tensor(prototype_weight),
        **options,
    )
    return codes.numpy()


def expect_relaxed(problem: CodesProblem, relaxation: float, *weights: Any) -> np.ndarray:
    """Return the oracle's relaxed codes of a problem."""
    return oracles.relaxed_sinkhorn(
        problem.scores, problem.epsilon, problem.iterations, relaxation, *weights
    )


def softmax(exponents: np.ndarray) -> np.ndarray:
    return np.exp(exponents - np.logaddexp.reduce(exponents, axis=-1, keepdims=True))


def one_hot(codes: np.ndarray) -> np.ndarray:
    """Return 1 for the first of the largest entries of each row, else 0."""
    return np.eye(codes.shape[-1])[codes.argmax(axis=-1)]


def in_float64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def numbers(masses: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {name: in_float64(mass) for name, mass in masses.items()}


def masses_of(weighted: str, **to: Any) -> dict[str, torch.Tensor]:
    """Return masses of 9 samples and of 5 prototypes, or of one of both."""
    masses = {
        "sample_weight": torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 0.25, 4]),
        "prototype_weight": torch.tensor([1, 2, 0.5, 0.25, 4]),
    }
    if weighted != "both":
        del masses["prototype_weight" if weighted == "samples" else "sample_weight"]
    return {name: mass.to(**to) for name, mass in masses.items()}


def unlike_its_parts(samples: int, prototypes: int) -> torch.Tensor:
    """Return scores in which no block of samples is like the whole."""
    scores = cosines(samples, prototypes)
    scores[samples // 3 : samples // 2, : prototypes // 2] += 0.5
    return scores


# Relaxed masses: the equations


@pytest.mark.parametrize("relaxation", [0.01, 0.5, 20.0])
@pytest.mark.parametrize("epsilon", [0.5, 0.05, 0.01])
@pytest.mark.parametrize("iterations", [1, 2, 3, 12])
@ANY_DTYPE
def test_relaxed_codes_are_those_of_the_equations(
    device: torch.device, dtype: torch.dtype, iterations: int, epsilon: float, relaxation: float
) -> None:
    scores = cosines(12, 7, seed=iterations).to(device, dtype)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations, relaxation=relaxation)
    assert codes.dtype == dtype
    assert codes.device == scores.device
    assert_relaxed(codes, scores, epsilon, iterations, relaxation)


@pytest.mark.parametrize("weighted", ["samples", "prototypes", "both"])
@ITERATIONS
@ANY_DTYPE
def test_weighted_relaxed_codes_are_those_of_the_equations(
    device: torch.device, dtype: torch.dtype, iterations: int, weighted: str
) -> None:
    scores = cosines(9, 5).to(device, dtype)
    masses = masses_of(weighted, device=device, dtype=dtype)
    codes = sinkhorn_knopp(scores, iterations=iterations, relaxation=0.2, **masses)
    expected = oracles.relaxed_sinkhorn(
        in_float64(scores), 0.05, iterations, 0.2, **numbers(masses)
    )
    assert codes.dtype == dtype
    assert_codes(codes, expected, epsilon=0.05)


@given(codes_problems(), relaxations, st.data())
def test_any_relaxed_problem_has_the_codes_of_the_equations(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    samples, prototypes = problem.scores.shape
    weights = (
        data.draw(reals(samples, low=0.125, high=4.0)),
        data.draw(reals(prototypes, low=0.125, high=4.0)),
    )
    assert_codes(
        solve(problem, relaxation=relaxation),
        expect_relaxed(problem, relaxation),
        epsilon=problem.epsilon,
    )
    assert_codes(
        solve(problem, *weights, relaxation=relaxation),
        expect_relaxed(problem, relaxation, *weights),
        epsilon=problem.epsilon,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_large_relaxed_problem_has_the_codes_of_the_equations(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores = unlike_its_parts(5000, 7).to(device, dtype)
    codes = sinkhorn_knopp(scores, relaxation=0.1)
    assert_relaxed(codes, scores, 0.05, 3, 0.1, largest=1.5)


@pytest.mark.parametrize("weights", ["none", "shared", "own"])
@ITERATIONS
def test_leading_dimensions_are_independent_relaxed_problems(
    device: torch.device, iterations: int, weights: str
) -> None:
    scores = cosines(2, 3, 6, 4).to(device)
    weight = {
        "none": None,
        "shared": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "own": torch.arange(36.0, device=device).view(2, 3, 6) % 5,
    }[weights]
    codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight, relaxation=0.2)
    assert codes.shape == scores.shape
    for index in np.ndindex(2, 3):
        own = weight[index] if weights == "own" else weight
        expected = oracles.relaxed_sinkhorn(
            in_float64(scores[index]), 0.05, iterations, 0.2, None if own is None else own.cpu()
        )
        assert_codes(codes[index], expected, epsilon=0.05)


# Relaxed masses: laws


@given(codes_problems(), st.data())
def test_an_infinite_relaxation_is_strict(problem: CodesProblem, data: st.DataObject) -> None:
    weight = data.draw(reals(len(problem.scores), low=0.125))
    np.testing.assert_array_equal(solve(problem, relaxation=math.inf), solve(problem))
    np.testing.assert_array_equal(
        solve(problem, weight, relaxation=math.inf), solve(problem, weight)
    )


@given(codes_problems(), st.data())
def test_a_large_relaxation_approaches_the_strict_codes(
    problem: CodesProblem, data: st.DataObject
) -> None:
    weights = (
        data.draw(reals(problem.scores.shape[0], low=0.125)),
        data.draw(reals(problem.scores.shape[1], low=0.125)),
    )
    codes = solve(problem, *weights, relaxation=1e12)
    np.testing.assert_allclose(codes, solve(problem, *weights), rtol=0, atol=1e-8)


@given(codes_problems(), st.sampled_from([1e-15, 1e-60, 5e-324]))
def test_a_small_relaxation_approaches_the_softmax(
    problem: CodesProblem, relaxation: float
) -> None:
    codes = solve(problem, relaxation=relaxation)
    expected = softmax(problem.scores / problem.epsilon)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("relaxation", [1e-15, 1e-60, 5e-324])
@ANY_DTYPE
def test_a_small_relaxation_keeps_a_prototype_of_mass_zero_absent(
    device: torch.device, dtype: torch.dtype, relaxation: float
) -> None:
    scores = cosines(6, 4).to(device, dtype)
    used = torch.tensor([True, False, True, True], device=device)
    codes = sinkhorn_knopp(scores, epsilon=2.0, prototype_weight=used, relaxation=relaxation)
    expected = softmax(np.where(used.cpu(), in_float64(scores) / 2, -np.inf))
    assert_codes(codes, expected, epsilon=2.0)


@settings(max_examples=15)  # of hundreds of iterations each
@given(seeds, st.sampled_from([0.1, 1.0, 3.0]), st.sampled_from([0.5, 1.0]), st.data())
def test_converged_masses_have_the_price_of_their_divergence(
    seed: int, relaxation: float, epsilon: float, data: st.DataObject
) -> None:
    # Where Tr(QᵀS) + ε H(Q) - ρ KL(masses | c) is largest, it is stationary but for a constant per
    # sample. The problem is concave, so that nothing else is.
    problem = CodesProblem(cosines(8, 5, seed=seed).numpy(), epsilon, iterations=200)
    sample_weight = data.draw(reals(8, low=0.125))
    prototype_weight = data.draw(reals(5, low=0.125))
    codes = solve(problem, sample_weight, prototype_weight, relaxation=relaxation)
    share = sample_weight @ codes / sample_weight.sum()
    price = relaxation * np.log(share * prototype_weight.sum() / prototype_weight)
    gradient = problem.scores - epsilon * np.log(codes) - price
    np.testing.assert_allclose(gradient, gradient[:, :1].repeat(5, axis=1), rtol=0, atol=1e-9)


@given(codes_problems(), relaxations)
def test_rows_of_relaxed_codes_sum_to_one(problem: CodesProblem, relaxation: float) -> None:
    codes = solve(problem, relaxation=relaxation)
    np.testing.assert_allclose(codes.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert codes.min() >= 0
    assert codes.max() <= 1 + 1e-12


@given(codes_problems(), relaxations, st.data())
def test_relaxed_codes_are_equivariant_under_permutation_of_samples_and_of_prototypes(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    samples, prototypes = problem.scores.shape
    order = np.ix_(data.draw(permutations(samples)), data.draw(permutations(prototypes)))
    permuted = solve(problem.with_scores(problem.scores[order]), relaxation=relaxation)
    assert_codes(permuted, solve(problem, relaxation=relaxation)[order], epsilon=problem.epsilon)


@given(codes_problems(), relaxations, st.floats(-100, 100))
def test_relaxed_codes_are_invariant_to_a_constant_for_all_scores(
    problem: CodesProblem, relaxation: float, constant: float
) -> None:
    shifted = solve(problem.with_scores(problem.scores + constant), relaxation=relaxation)
    expected = solve(problem, relaxation=relaxation)
    assert_codes(shifted, expected, epsilon=problem.epsilon, largest=100)


def test_a_constant_per_prototype_changes_relaxed_codes() -> None:
    scores = np.array([[1.0, 0.0], [0.4, 0.0], [0.0, 0.2]])
    problem = CodesProblem(scores, epsilon=0.2, iterations=3)
    shifted = problem.with_scores(scores - scores.max(axis=0))
    codes = solve(shifted, relaxation=0.2)
    assert np.abs(codes - solve(problem, relaxation=0.2)).max() > 0.1
    assert_codes(codes, expect_relaxed(shifted, 0.2), epsilon=0.2)


@given(separable(), relaxations, st.data())
def test_separable_scores_have_the_relaxed_codes_of_a_higher_temperature(
    known: KnownCodes, relaxation: float, data: st.DataObject
) -> None:
    # φ takes back its part of what a prototype has above the others, which leaves S/(ε + ρ).
    mass = data.draw(reals(known.scores.shape[1], low=0.125))
    part = relaxation / (relaxation + known.epsilon)
    expected = softmax(known.scores / (known.epsilon + relaxation) + part * np.log(mass))
    codes = solve(known, prototype_weight=mass, relaxation=relaxation)
    assert_codes(codes, expected, epsilon=known.epsilon, largest=2)


@ITERATIONS
@ANY_DTYPE
def test_one_sample_has_the_relaxed_code_of_a_higher_temperature_and_one_prototype_gives_ones(
    device: torch.device, dtype: torch.dtype, iterations: int
) -> None:
    scores = cosines(1, 6).to(device, dtype)
    alone = sinkhorn_knopp(scores, iterations=iterations, relaxation=0.2)
    assert_codes(alone, softmax(in_float64(scores) / 0.25), epsilon=0.05)
    only = sinkhorn_knopp(cosines(6, 1).to(device, dtype), iterations=iterations, relaxation=0.2)
    assert_codes(only, np.ones((6, 1)), epsilon=0.05)


@given(circulant(), relaxations)
def test_circulant_scores_give_the_softmax_at_any_relaxation(
    known: KnownCodes, relaxation: float
) -> None:
    assert_codes(solve(known, relaxation=relaxation), known.codes, epsilon=known.epsilon)


@given(codes_problems(), relaxations, st.integers(2, 4))
def test_a_repeated_batch_gets_the_same_relaxed_codes_each_time(
    problem: CodesProblem, relaxation: float, times: int
) -> None:
    repeated = problem.with_scores(np.tile(problem.scores, (times, 1)))
    expected = np.tile(solve(problem, relaxation=relaxation), (times, 1))
    assert_codes(solve(repeated, relaxation=relaxation), expected, epsilon=problem.epsilon)


@given(codes_problems(), relaxations, st.integers(2, 4))
def test_repeated_prototypes_share_their_relaxed_code(
    problem: CodesProblem, relaxation: float, times: int
) -> None:
    repeated = problem.with_scores(np.tile(problem.scores, (1, times)))
    expected = np.tile(solve(problem, relaxation=relaxation), (1, times)) / times
    assert_codes(solve(repeated, relaxation=relaxation), expected, epsilon=problem.epsilon)


@given(codes_problems(), relaxations, st.data())
def test_a_prototype_of_mass_zero_is_absent_from_relaxed_codes(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    used = data.draw(arrays(np.bool_, problem.scores.shape[1]).filter(np.any))
    expected = np.zeros(problem.scores.shape)
    expected[:, used] = solve(problem.with_scores(problem.scores[:, used]), relaxation=relaxation)
    codes = solve(problem, prototype_weight=used, relaxation=relaxation)
    assert_codes(codes, expected, epsilon=problem.epsilon)


@given(
    codes_problems(),
    relaxations,
    st.data(),
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 50.0]),
)
def test_sample_weights_are_multiplicities_in_relaxed_codes(
    problem: CodesProblem, relaxation: float, data: st.DataObject, score_of_absent: float
) -> None:
    weight = data.draw(arrays(np.float64, len(problem.scores), elements=multiplicities))
    with_absent = problem.scores.copy()
    with_absent[weight == 0, 0] = score_of_absent
    repeats = weight.astype(int)
    repeated = problem.with_scores(np.repeat(problem.scores, repeats, axis=0))
    codes = solve(problem.with_scores(with_absent), weight, relaxation=relaxation)
    expected = solve(repeated, relaxation=relaxation)
    assert_codes(np.repeat(codes, repeats, axis=0), expected, epsilon=problem.epsilon)


@given(codes_problems(), relaxations, st.data())
def test_weights_of_any_scale_give_the_same_relaxed_codes(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    sample_weight = data.draw(reals(problem.scores.shape[0], low=0.125))
    prototype_weight = data.draw(reals(problem.scores.shape[1], low=0.125))
    scale = 2.0 ** data.draw(st.integers(-300, 300))
    scaled = solve(problem, sample_weight * scale, prototype_weight * scale, relaxation=relaxation)
    expected = solve(problem, sample_weight, prototype_weight, relaxation=relaxation)
    assert_codes(scaled, expected, epsilon=problem.epsilon)


@given(codes_problems(), relaxations, st.data())
def test_bool_weights_are_weights_of_one_and_zero_in_relaxed_codes(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    present = data.draw(arrays(np.bool_, problem.scores.shape[0]))
    used = data.draw(arrays(np.bool_, problem.scores.shape[1]).filter(np.any))
    codes = solve(problem, present, used, relaxation=relaxation)
    expected = solve(problem, present.astype(float), used.astype(float), relaxation=relaxation)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)


@given(codes_problems(), relaxations, st.data())
def test_an_absent_sample_gets_the_relaxed_code_that_the_present_ones_give_it(
    problem: CodesProblem, relaxation: float, data: st.DataObject
) -> None:
    absent = data.draw(reals(2, problem.scores.shape[1]))
    together = problem.with_scores(np.concatenate([problem.scores, absent]))
    weight = np.append(np.ones(len(problem.scores)), [0.0, 0.0])
    codes = solve(together, weight, relaxation=relaxation)
    # f is what the code of a present sample has beside its scores, up to a constant.
    potentials = np.log(codes[0]) - problem.scores[0] / problem.epsilon
    expected = softmax(absent / problem.epsilon + potentials)
    np.testing.assert_allclose(codes[-2:], expected, rtol=0, atol=1e-10)


# Relaxed masses: numerical limits


@pytest.mark.parametrize("relaxation", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("epsilon", [0.05, 0.005, 0.001])
@ITERATIONS
def test_a_far_prototype_and_a_far_sample_do_no_harm_to_relaxed_codes(
    device: torch.device, iterations: int, epsilon: float, relaxation: float
) -> None:
    scores = cosines(64, 16)
    scores[:, 5] -= 50
    scores[7] -= 30
    scores = scores.float().to(device)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations, relaxation=relaxation)
    assert_relaxed(codes, scores, epsilon, iterations, relaxation, largest=82)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_samples_of_a_relaxed_problem_are_not_rounded_to_half_precision(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores = cosines(4096, 16).to(device, dtype)
    codes = sinkhorn_knopp(scores, relaxation=0.5)
    assert_relaxed(codes, scores, 0.05, 3, 0.5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("iterations", [1, 3, 300])
def test_the_scale_of_weights_exhausts_no_range_of_relaxed_codes(
    device: torch.device, iterations: int, scale: float
) -> None:
    scores = cosines(6, 4).float().to(device)
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], device=device),
    }
    scaled = {name: scale * weight for name, weight in weights.items()}
    expected = sinkhorn_knopp(scores, iterations=iterations, relaxation=0.2, **weights)
    codes = sinkhorn_knopp(scores, iterations=iterations, relaxation=0.2, **scaled)
    torch.testing.assert_close(codes, expected, rtol=0, atol=2e-5)


# Relaxed masses, tolerance and hard codes: values that are none


@NOT_FINITE
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{"relaxation": 0.2}, {"tolerance": 0.05}], ids=str)
@ITERATIONS
def test_a_sample_with_a_score_that_is_not_finite_has_nan_codes_and_is_left_out(
    device: torch.device, iterations: int, options: dict[str, Any], weighted: bool, bad: float
) -> None:
    scores = cosines(6, 4).to(device)
    scores[2, 1] = bad
    weight = torch.ones(6, device=device) if weighted else None
    codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight, **options)
    assert codes[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    alone = sinkhorn_knopp(scores[others], iterations=iterations, **options)
    torch.testing.assert_close(codes[others], alone, rtol=0, atol=1e-12)


@NOT_FINITE
@ITERATIONS
@ANY_DTYPE
def test_an_absent_sample_without_finite_scores_gets_zeros(
    device: torch.device, dtype: torch.dtype, iterations: int, bad: float
) -> None:
    scores = cosines(6, 4).to(device, dtype)
    scores[2, 1] = bad
    weight = torch.tensor([1, 1, 0, 1, 1, 1.0], device=device)
    others = [0, 1, 3, 4, 5]
    expected = in_float64(scores[others])
    for options, codes_of_others in [
        ({"relaxation": 0.2}, oracles.relaxed_sinkhorn(expected, 0.05, iterations, 0.2)),
        ({"tolerance": 1e-12}, oracles.sinkhorn(expected, 0.05, iterations)),
        ({"validate": True}, oracles.sinkhorn(expected, 0.05, iterations)),
    ]:
        codes = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight, **options)
        assert codes[2].tolist() == [0, 0, 0, 0]
        assert_codes(codes[others], codes_of_others, epsilon=0.05)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("options", [*ON_THE_DEVICE, {"tolerance": 0.1}], ids=str)
@ITERATIONS
def test_a_weight_that_is_none_gives_nan_codes(
    iterations: int, options: dict[str, Any], bad: float
) -> None:
    weight = torch.ones(6)
    weight[2] = bad
    scores = cosines(6, 4)
    of_samples = sinkhorn_knopp(scores, iterations=iterations, sample_weight=weight, **options)
    assert of_samples.isnan().all()
    of_prototypes = sinkhorn_knopp(
        scores, iterations=iterations, prototype_weight=weight[:4], **options
    )
    assert of_prototypes.isnan().all()


@pytest.mark.parametrize("bad", [0.0, math.nan])
@pytest.mark.parametrize("relaxation", [0.05, math.inf])
@ITERATIONS
def test_nobody_present_gives_no_nan(
    device: torch.device, iterations: int, relaxation: float, bad: float
) -> None:
    scores = cosines(6, 4).to(device)
    scores[2, 1] = bad
    masses = torch.tensor([1, 2, 0, 1], dtype=scores.dtype, device=device)
    weights = {"sample_weight": torch.zeros(6, device=device), "prototype_weight": masses}
    part = 1.0 if relaxation == math.inf else 0.5
    log_mass = (masses / masses.sum()).log()
    expected = torch.softmax(scores / 0.05 + part * log_mass, dim=-1).nan_to_num(0)
    codes = sinkhorn_knopp(scores, iterations=iterations, relaxation=relaxation, **weights)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)
    if relaxation == math.inf:
        stopped = sinkhorn_knopp(scores, iterations=iterations, tolerance=1e-9, **weights)
        torch.testing.assert_close(stopped, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 4, 5), (2, 0, 4, 5)], ids=str)
@ANY_OPTIONS
@ANY_DTYPE
def test_nothing_in_gives_nothing_out(
    device: torch.device,
    dtype: torch.dtype,
    options: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    scores = torch.zeros(shape, dtype=dtype, device=device)
    codes = sinkhorn_knopp(scores, **options)
    assert codes.shape == shape
    assert codes.dtype == dtype


# A tolerance


def enough(
    problem: CodesProblem, tolerance: float, *weights: np.ndarray | None
) -> tuple[int, np.ndarray, bool]:
    """Return how many iterations the oracle makes, its codes, and whether no rounding decides."""
    clear = True
    for iterations in range(1, problem.iterations + 1):
        codes = oracles.sinkhorn(problem.scores, problem.epsilon, iterations, *weights)
        error = oracles.marginal_error(codes, *weights)
        clear &= abs(error - tolerance) > 1e-9
        if error <= tolerance:
            break
    return iterations, codes, clear


@given(codes_problems(), some_tolerances, st.data())
def test_the_first_codes_that_are_near_enough_are_returned(
    problem: CodesProblem, tolerance: float, data: st.DataObject
) -> None:
    _, expected, clear = enough(problem, tolerance)
    assume(clear)
    assert_codes(solve(problem, tolerance=tolerance), expected, epsilon=problem.epsilon)
    samples, prototypes = problem.scores.shape
    weights = (
        data.draw(arrays(np.float64, samples, elements=multiplicities).filter(np.any)),
        data.draw(arrays(np.float64, prototypes, elements=multiplicities).filter(np.any)),
    )
    _, expected, clear = enough(problem, tolerance, *weights)
    assume(clear)
    codes = solve(problem, *weights, tolerance=tolerance)
    assert_codes(codes, expected, epsilon=problem.epsilon)


@pytest.mark.parametrize("tolerance", [1.0, 0.3, 0.1, 0.03])
@ANY_DTYPE
def test_a_tolerance_means_the_same_in_every_dtype(
    device: torch.device, dtype: torch.dtype, tolerance: float
) -> None:
    scores = cosines(12, 7).to(device, dtype)
    problem = CodesProblem(in_float64(scores), 0.05, 40)
    iterations, expected, _ = enough(problem, tolerance)
    codes = sinkhorn_knopp(scores, iterations=40, tolerance=tolerance)
    assert codes.dtype == dtype
    assert_codes(codes, expected, epsilon=0.05)
    assert_codes(codes, in_float64(sinkhorn_knopp(scores, iterations=iterations)), epsilon=0.05)


def test_a_tolerance_needs_several_numbers_of_iterations() -> None:
    # Else the tests of a tolerance would prove little.
    problem = CodesProblem(cosines(12, 7).numpy(), 0.05, 40)
    needed = [enough(problem, tolerance)[0] for tolerance in (1.0, 0.3, 0.1, 0.03)]
    assert needed == sorted(set(needed))
    assert needed[-1] < 40


@given(codes_problems())
def test_at_least_one_iteration_is_made_and_at_most_so_many(problem: CodesProblem) -> None:
    once = CodesProblem(problem.scores, problem.epsilon, 1)
    assert_codes(solve(problem, tolerance=1e9), solve(once), epsilon=problem.epsilon)
    assert_codes(solve(problem, tolerance=5e-324), solve(problem), epsilon=problem.epsilon)


@given(converged_two_by_two())
def test_a_small_tolerance_gives_the_codes_of_convergence(known: KnownCodes) -> None:
    patient = KnownCodes(known.scores, known.epsilon, 10_000, known.codes)
    codes = solve(patient, tolerance=1e-10)
    np.testing.assert_allclose(codes, known.codes, rtol=0, atol=1e-8)


def test_all_problems_of_the_leading_dimensions_must_be_near_enough(device: torch.device) -> None:
    scores = cosines(2, 2, 12, 7).to(device)
    scores[0, 0] = 0  # near enough at once
    problems = [CodesProblem(one.cpu().numpy(), 0.05, 40) for one in scores.flatten(0, 1)]
    alone = [enough(problem, 0.1)[0] for problem in problems]
    assert min(alone) == 1 < max(alone) < 40
    codes = sinkhorn_knopp(scores, iterations=40, tolerance=0.1)
    expected = sinkhorn_knopp(scores, iterations=max(alone))
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_tolerance_counts_every_block_of_a_problem(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores = unlike_its_parts(60, 5).to(device, dtype)
    problem = CodesProblem(in_float64(scores), 0.05, 40)
    for tolerance in (0.3, 0.1, 0.01):
        iterations, expected, _ = enough(problem, tolerance)
        assert 1 < iterations < 40
        with small_blocks():
            codes = sinkhorn_knopp(scores, iterations=40, tolerance=tolerance)
        assert_codes(codes, expected, epsilon=0.05, largest=1.5)


# Hard codes


@pytest.mark.parametrize("relaxation", [0.2, math.inf])
@pytest.mark.parametrize("weighted", ["neither", "both"])
@ITERATIONS
@ANY_DTYPE
def test_hard_codes_are_one_hot_at_the_largest_entry(
    device: torch.device, dtype: torch.dtype, iterations: int, weighted: str, relaxation: float
) -> None:
    scores = cosines(2, 9, 5).to(device, dtype)
    masses = masses_of(weighted, device=device) if weighted == "both" else {}
    settings = {"iterations": iterations, "relaxation": relaxation} | masses
    soft = in_float64(sinkhorn_knopp(scores, **settings))
    hard = sinkhorn_knopp(scores, hard=True, **settings)
    assert hard.dtype == dtype
    assert hard.device == scores.device
    np.testing.assert_array_equal(in_float64(hard), one_hot(soft))


@given(codes_problems(), st.data())
def test_any_hard_codes_are_one_hot_at_the_largest_entry(
    problem: CodesProblem, data: st.DataObject
) -> None:
    samples, prototypes = problem.scores.shape
    weights = (
        data.draw(arrays(np.float64, samples, elements=multiplicities)),
        data.draw(arrays(np.float64, prototypes, elements=multiplicities).filter(np.any)),
    )
    options = data.draw(st.sampled_from([{}, {"relaxation": 0.5}, {"tolerance": 0.55}]))
    hard = solve(problem, *weights, hard=True, **options)
    np.testing.assert_array_equal(hard, one_hot(solve(problem, *weights, **options)))


@pytest.mark.parametrize("relaxation", [0.2, math.inf])
@ITERATIONS
@ANY_DTYPE
def test_the_lowest_index_wins_a_tie(
    device: torch.device, dtype: torch.dtype, iterations: int, relaxation: float
) -> None:
    scores = torch.zeros(3, 70, dtype=dtype, device=device)
    settings = {"iterations": iterations, "relaxation": relaxation, "hard": True}
    assert sinkhorn_knopp(scores, **settings).argmax(dim=-1).tolist() == [0, 0, 0]
    unused = torch.arange(70, device=device) < 7
    codes = sinkhorn_knopp(scores, prototype_weight=~unused, **settings)
    np.testing.assert_array_equal(in_float64(codes), np.eye(70)[[7, 7, 7]])


@pytest.mark.parametrize("relaxation", [0.2, math.inf])
@NOT_FINITE
@ANY_DTYPE
def test_hard_codes_of_samples_without_finite_scores_are_nan_or_zeros(
    device: torch.device, dtype: torch.dtype, bad: float, relaxation: float
) -> None:
    scores = cosines(6, 4).to(device, dtype)
    scores[[2, 4], 1] = bad
    weight = torch.tensor([1, 1, 1, 1, 0, 1.0], device=device)
    settings = {"sample_weight": weight, "relaxation": relaxation}
    soft = sinkhorn_knopp(scores, **settings)
    hard = sinkhorn_knopp(scores, hard=True, **settings)
    assert hard[2].isnan().all()
    assert hard[4].tolist() == [0, 0, 0, 0]
    others = [0, 1, 3, 5]
    np.testing.assert_array_equal(in_float64(hard[others]), one_hot(in_float64(soft[others])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_hard_codes_in_many_blocks_are_those_of_the_soft_ones(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores = cosines(2, 60, 5).to(device, dtype)
    with small_blocks():
        soft, hard = sinkhorn_knopp(scores), sinkhorn_knopp(scores, hard=True)
    np.testing.assert_array_equal(in_float64(hard), one_hot(in_float64(soft)))


# Validation

ONES = torch.ones(6)
NOBODY = torch.zeros(6)


def with_entry(tensor: torch.Tensor, index: Any, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[index] = value
    return changed


BAD_VALUES = [
    *(
        (
            {name: with_entry(ones, 2, value)},
            f"{name} must be finite and at least 0, got {value}",
        )
        for name, ones in [
            ("sample_weight", ONES),
            ("sample_weight", torch.ones(2, 6)[1]),
            ("prototype_weight", ONES[:4]),
        ]
        for value in (-1.0, math.nan, math.inf, -math.inf)
    ),
    (
        {"sample_weight": with_entry(torch.ones(2, 6), (1, 3), -0.5)},
        "sample_weight must be finite and at least 0, got -0.5",
    ),
    ({"sample_weight": NOBODY}, "sample_weight must have a positive sum, got 0.0"),
    ({"sample_weight": NOBODY.bool()}, "sample_weight must have a positive sum, got 0.0"),
    (
        {"sample_weight": torch.stack([ONES, NOBODY])},
        "sample_weight must have a positive sum, got 0.0",
    ),
    ({"prototype_weight": NOBODY[:4]}, "prototype_weight must have a positive sum, got 0.0"),
    (
        {"prototype_weight": NOBODY[:4].bool()},
        "prototype_weight must have a positive sum, got 0.0",
    ),
    *(
        (
            {"scores": with_entry(cosines(2, 6, 4), (1, 2, 3), value)} | weights,
            f"scores must be finite in every sample that is present, got {value}",
        )
        for value in (math.nan, math.inf, -math.inf)
        for weights in (
            {},
            {"sample_weight": ONES},
            {"sample_weight": with_entry(NOBODY, 2, 0.5)},
            {"sample_weight": torch.stack([with_entry(ONES, 2, 0.0), ONES])},
        )
    ),
]


@pytest.mark.parametrize(("inputs", "text"), BAD_VALUES)
@pytest.mark.parametrize("options", [{}, *ON_THE_DEVICE, {"tolerance": 0.1}], ids=str)
def test_bad_values_are_named(options: dict[str, Any], inputs: dict[str, Any], text: str) -> None:
    complete = {"scores": cosines(2, 6, 4)} | inputs
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        sinkhorn_knopp(**complete, validate=True, **options)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        SinkhornKnopp(validate=True, **options)(**complete)
    sinkhorn_knopp(**complete, **options)  # nothing is said without


@ANY_DTYPE
def test_bad_values_are_found_in_every_dtype(device: torch.device, dtype: torch.dtype) -> None:
    scores = cosines(6, 4).to(device, dtype)
    with pytest.raises(ValueError, match="present, got nan"):
        sinkhorn_knopp(with_entry(scores, (2, 3), math.nan), validate=True)
    weight = with_entry(ONES.to(device, dtype), 2, -0.5)
    with pytest.raises(ValueError, match=r"sample_weight must be .*, got -0\.5"):
        sinkhorn_knopp(scores, sample_weight=weight, validate=True)
    with pytest.raises(ValueError, match=r"prototype_weight must be .*, got -0\.5"):
        sinkhorn_knopp(scores, prototype_weight=weight[:4], validate=True)


@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"sample_weight": torch.tensor([True, False, True, True, True, True])},
        {"sample_weight": 1e-30 * ONES, "prototype_weight": 1e30 * ONES[:4]},
        {"sample_weight": with_entry(NOBODY, 3, 1e-40)},
        {"sample_weight": 60_000 * ONES.half(), "prototype_weight": 60_000 * ONES[:4].half()},
        {"prototype_weight": torch.tensor([1.0, 0.0, 2.0, 0.0])},
        {"scores": 1e300 * cosines(2, 6, 4)},
        {"scores": 60_000 * cosines(2, 6, 4).half()},
        {
            "scores": with_entry(cosines(2, 6, 4), (slice(None), 2), math.nan),
            "sample_weight": with_entry(ONES, 2, 0.0),
        },
        {
            "scores": with_entry(cosines(2, 6, 4), (1, 2), -math.inf),
            "sample_weight": torch.stack([ONES, with_entry(ONES, 2, 0.0)]),
        },
        {"scores": cosines(2, 0, 4)},
        {"scores": cosines(2, 0, 4), "sample_weight": ONES[:0]},
    ],
)
@pytest.mark.parametrize("options", [{}, *ON_THE_DEVICE, {"tolerance": 0.1}], ids=str)
def test_good_values_have_the_same_codes_with_and_without_validation(
    options: dict[str, Any], inputs: dict[str, Any]
) -> None:
    complete = {"scores": cosines(2, 6, 4)} | inputs
    codes = sinkhorn_knopp(**complete, validate=True, **options)
    torch.testing.assert_close(
        codes, sinkhorn_knopp(**complete, **options), rtol=0, atol=0, equal_nan=True
    )


# What the options leave alone


@pytest.mark.parametrize("leading", [(), (2,)], ids=["one problem", "two problems"])
@ANY_OPTIONS
@ITERATIONS
def test_autocast_changes_nothing(
    device: torch.device, iterations: int, options: dict[str, Any], leading: tuple[int, ...]
) -> None:
    scores = cosines(*leading, 64, 16).float().to(device)
    expected = sinkhorn_knopp(scores, iterations=iterations, **options)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        codes = sinkhorn_knopp(scores, iterations=iterations, **options)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, expected)


@ANY_OPTIONS
@ANY_DTYPE
def test_no_gradient_flows_and_no_input_changes(
    device: torch.device, dtype: torch.dtype, options: dict[str, Any]
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
        sinkhorn_knopp(scores, **weights, **options),
        sinkhorn_knopp(scores, **options),
    ):
        assert codes.grad_fn is None
        assert not codes.requires_grad
    assert all(map(torch.equal, inputs, before))
    assert torch.is_grad_enabled()


@ANY_OPTIONS
def test_the_global_random_state_is_left_alone(options: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    sinkhorn_knopp(cosines(6, 4), **options)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 6, 4), (0, 4)], ids=str)
@WITHOUT_READING
@ANY_DTYPE
def test_shapes_and_dtypes_are_known_without_values(
    dtype: torch.dtype, options: dict[str, Any], shape: tuple[int, ...], fake: bool
) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        codes = sinkhorn_knopp(
            torch.empty(shape, dtype=dtype, device="meta"),
            sample_weight=torch.empty(shape[:-1], device="meta"),
            prototype_weight=torch.empty(shape[-1], device="meta"),
            **options,
        )
    assert codes.shape == shape
    assert codes.dtype == dtype
    assert codes.device.type == "meta"


@WITHOUT_READING
def test_compiles_once_for_changing_values(device: torch.device, options: dict[str, Any]) -> None:
    assert_compiles_once(SinkhornKnopp(iterations=8, **options), device)


def test_the_function_compiles_and_needs_no_backward(device: torch.device) -> None:
    torch._dynamo.reset()
    options = {"relaxation": 0.5, "hard": True}
    compiled = torch.compile(sinkhorn_knopp, fullgraph=True, backend="aot_eager")
    scores = cosines(6, 4).to(device).requires_grad_()
    codes = compiled(scores, **options)
    assert not codes.requires_grad
    torch.testing.assert_close(codes, sinkhorn_knopp(scores, **options), rtol=0, atol=1e-12)


# The module


@pytest.mark.parametrize(
    "options", [*OPTIONS, {"tolerance": 0.55, "hard": True, "validate": True}], ids=str
)
def test_the_module_computes_with_its_options(
    device: torch.device, options: dict[str, Any]
) -> None:
    scores = cosines(2, 6, 4).to(device)
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], device=device),
    }
    sinkhorn = SinkhornKnopp(0.1, 7, **options)
    assert {name: getattr(sinkhorn, name) for name in options} == options
    expected = sinkhorn_knopp(scores, epsilon=0.1, iterations=7, **weights, **options)
    plain = sinkhorn_knopp(scores, epsilon=0.1, iterations=7, **weights)
    assert torch.equal(expected, plain) == (options == {"validate": True})
    assert torch.equal(sinkhorn(scores, **weights), expected)
    assert torch.equal(sinkhorn.eval()(scores, **weights), expected)


def test_options_of_the_module_can_be_changed() -> None:
    scores = cosines(6, 4)
    sinkhorn = SinkhornKnopp(iterations=8)
    sinkhorn.relaxation = 0.5
    assert torch.equal(sinkhorn(scores), sinkhorn_knopp(scores, iterations=8, relaxation=0.5))
    sinkhorn.tolerance = 0.3
    with pytest.raises(ValueError, match="tolerance must be None with a finite relaxation"):
        sinkhorn(scores)
    sinkhorn.relaxation = math.inf
    assert torch.equal(sinkhorn(scores), sinkhorn_knopp(scores, iterations=8, tolerance=0.3))
    sinkhorn.hard = True
    expected = sinkhorn_knopp(scores, iterations=8, tolerance=0.3, hard=True)
    assert torch.equal(sinkhorn(scores), expected)
    sinkhorn.validate = True
    with pytest.raises(ValueError, match="sample_weight must have a positive sum, got 0"):
        sinkhorn(scores, torch.zeros(6))


@pytest.mark.parametrize(("name", "value"), [("relaxation", 0.0), ("hard", 1), ("validate", None)])
def test_a_bad_change_of_the_module_is_named_when_it_is_used(name: str, value: Any) -> None:
    sinkhorn = SinkhornKnopp()
    setattr(sinkhorn, name, value)
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        sinkhorn(cosines(6, 4))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@ANY_OPTIONS
def test_a_copy_of_the_module_has_its_options(
    options: dict[str, Any], duplicate: Callable[[SinkhornKnopp], SinkhornKnopp]
) -> None:
    scores = cosines(6, 4)
    sinkhorn = SinkhornKnopp(0.1, 7, **options)
    twin = duplicate(sinkhorn)
    assert repr(twin) == repr(sinkhorn)
    assert torch.equal(twin(scores), sinkhorn(scores))
    twin.relaxation, twin.tolerance = 0.25, None
    assert {name: getattr(sinkhorn, name) for name in options} == options


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, ""),
        ({"relaxation": 0.5, "hard": True}, ", relaxation=0.5, hard=True"),
        ({"tolerance": 0.1, "validate": True}, ", tolerance=0.1, validate=True"),
    ],
)
def test_the_module_shows_the_options_that_are_not_the_default(
    options: dict[str, Any], shown: str
) -> None:
    sinkhorn = SinkhornKnopp(0.1, 7, synchronize=False, **options)
    assert repr(sinkhorn) == f"SinkhornKnopp(epsilon=0.1, iterations=7, synchronize=False{shown})"


# Bad input

BAD_OPTIONS = [
    ({"relaxation": 0}, ValueError, "relaxation must be a number above 0, got 0"),
    ({"relaxation": 0.0}, ValueError, r"relaxation must be a number above 0, got 0\.0"),
    ({"relaxation": -1.0}, ValueError, r"relaxation must be a number above 0, got -1\.0"),
    ({"relaxation": -math.inf}, ValueError, "relaxation must be a number above 0, got -inf"),
    ({"relaxation": math.nan}, ValueError, "relaxation must be a number above 0, got nan"),
    ({"relaxation": "1"}, TypeError, "relaxation must be a number, got str"),
    ({"relaxation": True}, TypeError, "relaxation must be a number, got bool"),
    ({"relaxation": None}, TypeError, "relaxation must be a number, got NoneType"),
    ({"relaxation": torch.tensor(1.0)}, TypeError, "relaxation must be a number, got Tensor"),
    ({"tolerance": 0}, ValueError, "tolerance must be a finite number above 0, got 0"),
    ({"tolerance": 0.0}, ValueError, r"tolerance must be a finite number above 0, got 0\.0"),
    ({"tolerance": -0.1}, ValueError, r"tolerance must be a finite number above 0, got -0\.1"),
    ({"tolerance": math.nan}, ValueError, "tolerance must be a finite number, got nan"),
    ({"tolerance": math.inf}, ValueError, "tolerance must be a finite number, got inf"),
    ({"tolerance": "0.1"}, TypeError, "tolerance must be a number, got str"),
    ({"tolerance": True}, TypeError, "tolerance must be a number, got bool"),
    ({"tolerance": torch.tensor(0.1)}, TypeError, "tolerance must be a number, got Tensor"),
    (
        {"tolerance": 0.1, "relaxation": 0.5},
        ValueError,
        r"tolerance must be None with a finite relaxation, got 0\.1",
    ),
    ({"hard": 1}, ValueError, "hard must be True or False, got 1"),
    ({"hard": None}, ValueError, "hard must be True or False, got None"),
    ({"hard": "soft"}, ValueError, "hard must be True or False, got 'soft'"),
    ({"validate": 1}, ValueError, "validate must be True or False, got 1"),
    ({"validate": None}, ValueError, "validate must be True or False, got None"),
    ({"validate": "always"}, ValueError, "validate must be True or False, got 'always'"),
]


@pytest.mark.parametrize(("options", "error", "text"), BAD_OPTIONS)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^{text}"):
        sinkhorn_knopp(torch.zeros(6, 4), **options)
    with pytest.raises(error, match=f"^{text}"):
        SinkhornKnopp(**options)
