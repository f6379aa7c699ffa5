"""Sinkhorn-Knopp at the corners of dtype, ε, scale, shape and iterations; and by other solvers.

``test_sinkhorn.py`` holds the laws at moderate settings. Codes are compared relative to the largest
entry of their row here, so that a tolerance means as much for 70,000 prototypes as for two.

Scores of 1e4 at ε = 1e-3 are exponents of 1e7, which float32 knows no better than to 1: a corner is
called coarse if its tolerance says nothing of an entry. What such scores still determine is tested:
the samples whose prototype wins by far more than the rounding, and answers that are known.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swavkit import sinkhorn_knopp
from swavkit.sinkhorn import at_once as at_once_route
from swavkit.sinkhorn import kernel
from tests import oracles, tolerances
from tests.strategies import reals

MEANINGFUL = 0.06  # the largest tolerance that says something of an entry
SMALL, LARGE = 2.0**-10, 2.0**3  # ε, about 1e-3 and 10; any dtype divides by them exactly
HIGH = 2.0**13  # scores, about 1e4
ITERATIONS = [1, 2, 5, 6, 7, 11, 100]
DTYPES = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)


# The equations, vectorised


def every_iteration(
    scores: np.ndarray,
    epsilon: float,
    sample_weight: np.ndarray | None = None,
    prototype_weight: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Yield log Q after each iteration: the loops of the oracle, on whole (..., B, K) arrays."""
    *_, samples, prototypes = scores.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    mass = np.ones(prototypes) if prototype_weight is None else np.asarray(prototype_weight, float)
    used = mass > 0
    with np.errstate(divide="ignore"):
        log_weight, log_mass = np.log(weight)[..., None], np.log(mass[used] / mass.sum())
    log_plan = np.asarray(scores, np.float64)[..., used] / epsilon
    while True:
        log_plan += log_mass - log_sum_exp(log_weight + log_plan, axis=-2)
        log_plan -= log_sum_exp(log_plan, axis=-1)
        log_codes = np.full(scores.shape, -np.inf)
        log_codes[..., used] = log_plan
        yield log_codes


def log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    """Return log Σ exp(values) along an axis, which is kept; each sum must be above 0."""
    largest = values.max(axis, keepdims=True)
    return largest + np.log(np.exp(values - largest).sum(axis, keepdims=True))


def log_codes_after(
    wanted: Iterable[int], *problem: Any, **weights: Any
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield log Q after these numbers of iterations, which ascend."""
    steps = enumerate(every_iteration(*problem, **weights), start=1)
    for iterations in wanted:
        yield next(step for step in steps if step[0] == iterations)


def twin(scores: np.ndarray, epsilon: float, iterations: int, **weights: Any) -> np.ndarray:
    """Return the codes of (..., B, K) scores."""
    steps = every_iteration(scores, epsilon, **weights)
    return np.exp(next(itertools.islice(steps, iterations - 1, None)))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_twin_is_the_oracle(scale: float, weighted: bool) -> None:
    weights = {}
    if weighted:
        weights["sample_weight"] = np.array([1, 0, 2, 0.5, 3, 1, 0, 0.25, 4])
        weights["prototype_weight"] = np.array([1, 2, 0.5, 0, 4])
    scores = uniform(2, 9, 5, scale=scale, far="prototype and sample below")
    for epsilon in (1e-3, 0.05, 10.0):
        atol = tolerances.of_codes(torch.float64, epsilon=epsilon, largest=np.abs(scores).max())
        for iterations, log_codes in log_codes_after([1, 2, 7, 30], scores, epsilon, **weights):
            codes = twin(scores, epsilon, iterations, **weights)
            np.testing.assert_array_equal(codes, np.exp(log_codes))
            for own, alone in zip(codes, scores, strict=True):
                expected = oracles.sinkhorn(alone, epsilon, iterations, **weights)
                np.testing.assert_allclose(own, expected, rtol=0, atol=atol)


# Scores, and what is compared


def uniform(*shape: int, scale: float, far: str = "", seed: int = 0) -> np.ndarray:
    """Return scores in ±scale, but for a prototype and a sample that are ``far`` from the rest."""
    scores = np.random.default_rng(seed).uniform(-scale, scale, shape)
    reach = min(scale, 600) * (-1 if "below" in far else 1)  # float16 ends at 65,504
    scores[..., -1] += 50 * reach * ("prototype" in far)
    scores[..., -1, :] += 30 * reach * ("sample" in far)
    return scores


def grid(*shape: int, step: float = 1.0, most: int = 8, seed: int = 0) -> np.ndarray:
    """Return whole multiples of ``step``, a power of two; any dtype holds them up to 128."""
    return np.random.default_rng(seed).integers(-most, most, shape, endpoint=True) * step


def in_float64(tensor: torch.Tensor) -> np.ndarray:
    """Return what the dtype of a tensor holds, as float64 NumPy."""
    return tensor.double().cpu().numpy()


def is_meaningful(dtype: torch.dtype, epsilon: float, largest: float) -> bool:
    return tolerances.of_codes(dtype, epsilon=epsilon, largest=largest) <= MEANINGFUL


def assert_codes(
    codes: torch.Tensor,
    expected: np.ndarray,
    *,
    epsilon: float,
    largest: float,
    results: int = 1,
    case: object = "",
) -> None:
    """Compare codes of scores of at most ``largest``, relative to the largest entry of a row.

    ``results`` says how many results of ours are in the comparison.
    """
    assert is_meaningful(codes.dtype, epsilon, largest)
    tolerance = tolerances.of_codes(codes.dtype, epsilon=epsilon, largest=largest)
    info = torch.finfo(codes.dtype)
    of_row = expected.max(axis=-1, keepdims=True, initial=0)
    allowed = results * (tolerance * of_row + info.tiny * info.eps)  # the step next to 0
    excess = np.abs(in_float64(codes) - expected) / allowed
    assert excess.max(initial=0) <= 1, f"{case}: {excess.max():.3g} times the tolerance"


def assert_plan(codes: torch.Tensor, case: object = "") -> None:
    """Check what holds of any codes: entries in [0, 1], rows that sum to 1."""
    values, atol = in_float64(codes), tolerances.ATOL[codes.dtype]
    assert values.min() >= 0, case
    assert values.max() <= 1 + atol, case
    np.testing.assert_allclose(values.sum(axis=-1), 1, rtol=0, atol=atol, err_msg=str(case))


# The equations, at every corner


def corners(*, coarse: bool) -> list[tuple[torch.dtype, float, float, str]]:
    """Return each dtype, ε, scale and far prototype or sample that is coarse, or is not."""
    return [
        (dtype, epsilon, scale, far)
        for dtype in tolerances.DTYPES
        for epsilon in (1e-3, 0.05, 10.0)
        for scale in (1.0, 1e4)
        for far in ("", "prototype below", "sample below", "prototype and sample above")
        if coarse != is_meaningful(dtype, epsilon, scale + (80 * min(scale, 600) if far else 0))
    ]


@pytest.mark.parametrize(("dtype", "epsilon", "scale", "far"), corners(coarse=False))
def test_codes_are_those_of_the_equations_at_every_corner(
    device: torch.device, dtype: torch.dtype, epsilon: float, scale: float, far: str
) -> None:
    for shape in [(40, 7), (7, 40)]:
        scores = torch.tensor(uniform(*shape, scale=scale, far=far)).to(device, dtype)
        largest = scores.abs().max().item()
        for iterations, log_codes in log_codes_after(ITERATIONS, in_float64(scores), epsilon):
            case = (shape, iterations)
            codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
            assert_plan(codes, case)
            assert_codes(codes, np.exp(log_codes), epsilon=epsilon, largest=largest, case=case)


@pytest.mark.parametrize(("dtype", "epsilon", "scale", "far"), corners(coarse=True))
def test_a_sample_whose_prototype_wins_by_far_is_assigned_to_it_at_coarse_corners(
    device: torch.device, dtype: torch.dtype, epsilon: float, scale: float, far: str
) -> None:
    for shape in [(40, 7), (12, 12)]:
        scores = torch.tensor(uniform(*shape, scale=scale, far=far)).to(device, dtype)
        largest = scores.abs().max().item()
        for iterations, log_codes in log_codes_after(ITERATIONS, in_float64(scores), epsilon):
            codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
            share = assert_decided(codes, log_codes, epsilon=epsilon, largest=largest)
            assert share > 0.7, (shape, iterations)


def assert_decided(
    codes: torch.Tensor, log_codes: np.ndarray, *, epsilon: float, largest: float
) -> float:
    """Compare the samples whose prototype wins by over 100 roundings; return how many these are.

    It wins by 30 besides, a factor of 1e13, so that their codes are 1 and 0.
    """
    assert_plan(codes)
    rounding = tolerances.of_codes(codes.dtype, epsilon=epsilon, largest=largest)
    ascending = np.sort(log_codes, axis=-1)
    decided = ascending[..., -1] - ascending[..., -2] > 100 * rounding + 30
    winners = np.eye(codes.shape[-1])[log_codes.argmax(axis=-1)]
    atol = tolerances.ATOL[codes.dtype]
    np.testing.assert_allclose(in_float64(codes)[decided], winners[decided], rtol=0, atol=atol)
    return float(decided.mean())


@pytest.mark.parametrize(
    ("shape", "epsilon", "wanted"),
    [
        ((1, 1), 1e-3, [1, 5, 6, 100]),
        ((1, 70_000), 1e-3, [1, 5, 6, 20]),
        ((5_000, 1), 1e-3, [1, 5, 6, 100]),
        ((5_000, 2), 1e-3, [1, 5, 6, 100]),
        ((2, 70_000), 10.0, [1, 5, 6, 11]),
        ((5_000, 300), 0.05, [1, 5, 6]),
        ((20, 70_000), 1e-3, [1, 5, 6]),
    ],
)
def test_few_or_many_samples_and_prototypes_have_the_codes_of_the_equations(
    device: torch.device, shape: tuple[int, int], epsilon: float, wanted: list[int]
) -> None:
    scores = grid(*shape, step=2.0**-7, most=128)
    for iterations, log_codes in log_codes_after(wanted, scores, epsilon):
        expected = np.exp(log_codes)
        for dtype in tolerances.DTYPES:
            held = torch.tensor(scores).to(device, dtype)
            codes = sinkhorn_knopp(held, epsilon=epsilon, iterations=iterations)
            assert_codes(codes, expected, epsilon=epsilon, largest=1, case=(dtype, iterations))


@pytest.mark.slow
def test_all_prototypes_but_one_near_a_single_sample_for_up_to_a_hundred_iterations(
    device: torch.device,
) -> None:
    """Scaling vectors that are never absorbed leave the range of float32 from 12 iterations on."""
    scores = grid(4096, 300, step=2.0**-8, most=3)  # which any dtype holds next to 0.875
    scores += np.where((np.arange(4096) == 0)[:, None] ^ (np.arange(300) == 0), 0.875, -0.875)
    dtypes = {
        12: tolerances.DTYPES,
        13: tolerances.DTYPES,
        50: [torch.float32],
        100: [torch.float32, torch.float64],
    }
    for iterations, log_codes in log_codes_after(dtypes, scores, 0.01):
        expected = np.exp(log_codes)
        for dtype in dtypes[iterations]:
            held = torch.tensor(scores).to(device, dtype)
            codes = sinkhorn_knopp(held, epsilon=0.01, iterations=iterations)
            assert_codes(codes, expected, epsilon=0.01, largest=1, case=(dtype, iterations))


@pytest.mark.parametrize("weight", [None, torch.bool, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_rounding_of_large_potentials_does_not_add_up(
    device: torch.device, dtype: torch.dtype, weight: torch.dtype | None
) -> None:
    """log u is 1e4 here, where float32 is coarser than 1e-3; the exponents are exact."""
    scores = grid(90, 20, step=2.0**-6, most=2**10)
    iterations = [1, 4, 5, 6, 10, 60, 100]
    sample_weight = None if weight is None else torch.ones(90, dtype=weight, device=device)
    for count, log_codes in log_codes_after(iterations, scores, SMALL):
        codes = sinkhorn_knopp(
            torch.tensor(scores, dtype=dtype, device=device),
            epsilon=SMALL,
            iterations=count,
            sample_weight=sample_weight,
        )
        error = np.abs(in_float64(codes) - np.exp(log_codes)).max()
        assert error <= tolerances.ATOL[dtype], (count, error)


@pytest.mark.parametrize(
    ("scores", "epsilon", "sample_weight", "prototype_weight"),
    [
        ([[-1, 1], [1, -1]], 0.01, [2.0**30, 1], [1, 1]),
        (
            [[-0.875, 0.875, 1.125, 0.875], [1.125, -1, -1.125, -1.125]],
            0.01,
            [1, 2.0**20],
            [2.0**10, 2.0**20, 1, 1],
        ),
        (
            [[-0.875, 1.125, 0.875], [0.875, -1.125, -1], [1, -1, -1.125]],
            0.02,
            [1, 2.0**24, 1],
            [2.0**12, 1, 2.0**24],
        ),
    ],
    ids=["two by two", "two by four", "three by three"],
)
@DTYPES
def test_weights_of_very_different_sizes_exhaust_no_range(
    device: torch.device,
    dtype: torch.dtype,
    scores: list[list[float]],
    epsilon: float,
    sample_weight: list[float],
    prototype_weight: list[float],
) -> None:
    """The ranges of u and v grow faster than by B·K in an iteration if weights differ by more."""
    held = torch.tensor(scores, dtype=dtype, device=device)
    weights = {"sample_weight": sample_weight, "prototype_weight": prototype_weight}
    steps = log_codes_after(range(1, 21), in_float64(held), epsilon, **weights)
    for iterations, log_codes in steps:
        codes = sinkhorn_knopp(
            held,
            epsilon=epsilon,
            iterations=iterations,
            sample_weight=torch.tensor(sample_weight, device=device),
            prototype_weight=torch.tensor(prototype_weight, device=device).float(),
        )
        assert_codes(codes, np.exp(log_codes), epsilon=epsilon, largest=1.125, case=iterations)


@DTYPES
def test_problems_of_several_blocks_and_any_layout_have_the_codes_of_the_equations(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores = grid(3, 5_000, 80, step=2.0**-7, most=128)
    scores *= np.array([1, 2.0**-6, 2.0**6])[:, None, None]  # of different scales, far ones too
    scores[1, :, 7] -= 2
    scores[2, 4_999] += 64
    contiguous = torch.tensor(scores).to(device, dtype)
    frame = torch.full((3, 5_002, 85), math.nan, dtype=dtype, device=device)
    frame[:, 1:-1, 2:-3] = contiguous
    layouts = {
        "contiguous": contiguous,
        "framed by NaN": frame[:, 1:-1, 2:-3],
        "transposed": contiguous.mT.contiguous().mT,
        "samples first": contiguous.movedim(0, 1).contiguous().movedim(1, 0),
        "strided": torch.stack([contiguous, contiguous], dim=-1)[..., 0],
        "more leading dimensions": contiguous.unsqueeze(1).unsqueeze(0),
    }
    expected = twin(in_float64(contiguous), 0.05, 6)
    for layout, view in layouts.items():
        codes = sinkhorn_knopp(view, iterations=6)
        assert codes.shape == view.shape
        codes = codes.view(scores.shape)
        assert_codes(codes, expected, epsilon=0.05, largest=128, case=layout)


@pytest.mark.parametrize("options", [{}, {"iterations": 6}, {"prototype_weight": torch.ones(5)}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_weights_of_any_layout_are_those_of_a_contiguous_one(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    scores = torch.tensor(uniform(2, 3, 4, 5, scale=1)).float()
    weight = (torch.arange(24) % 3).view(3, 2, 4).to(dtype).transpose(0, 1)
    codes = sinkhorn_knopp(scores, sample_weight=weight, **options)
    assert torch.equal(codes, sinkhorn_knopp(scores, sample_weight=weight.contiguous(), **options))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=str)
@DTYPES
def test_autocast_changes_nothing_at_any_corner(
    device: torch.device, dtype: torch.dtype, low: torch.dtype
) -> None:
    problems = [
        (uniform(2, 40, 7, scale=scale, far=far), epsilon, iterations)
        for epsilon in (1e-3, 0.05, 10.0)
        for scale in (1.0, 1e4)
        for far in ("", "prototype and sample below")
        for iterations in (1, 6, 11)
    ]
    problems.append((uniform(5_000, 300, scale=1), 0.05, 6))  # several blocks
    for values, epsilon, iterations in problems:
        scores = torch.tensor(values).to(device, dtype)
        expected = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
        with torch.autocast(device.type, dtype=low):
            codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
        assert codes.dtype == dtype
        assert torch.equal(codes, expected), (scores.shape, epsilon, iterations)


# The laws, at every corner. Scores and constants are such that each dtype holds their sums.

Solver = Callable[..., torch.Tensor]  # (scores, **weights) -> codes
Law = Callable[[Solver, np.ndarray, float], tuple[torch.Tensor, np.ndarray]]


CORNERS_OF_LAWS = pytest.mark.parametrize(
    ("epsilon", "scale"),
    [(SMALL, 2.0**-7), (SMALL, 1.0), (SMALL, 2.0**5), (2.0**-4, 1.0), (LARGE, 1.0), (LARGE, HIGH)],
)


def permuted(solve: Solver, scores: np.ndarray, step: float) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(1)
    order = np.ix_(*(rng.permutation(count) for count in scores.shape))
    return solve(scores[order]), in_float64(solve(scores))[order]


def constant_for_all(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    return solve(scores + 32 * step), in_float64(solve(scores))


def constant_per_prototype(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    constants = grid(scores.shape[1], step=4 * step, seed=1)
    return solve(scores + constants), in_float64(solve(scores))


def repeated_batch(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    return solve(np.tile(scores, (3, 1))), np.tile(in_float64(solve(scores)), (3, 1))


def repeated_prototypes(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    return solve(np.tile(scores, (1, 4))), np.tile(in_float64(solve(scores)), (1, 4)) / 4


def sample_weights_as_copies(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    counts = np.arange(len(scores)) % 4
    present = counts > 0
    codes = solve(np.where(present[:, None], scores, np.nan), sample_weight=counts)
    of_copies = in_float64(solve(np.repeat(scores, counts, axis=0)))
    return codes[torch.tensor(present)], of_copies[np.cumsum(counts)[present] - 1]


def prototype_weights_as_copies(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    counts = 1 + np.arange(scores.shape[1]) % 3
    of_copies = in_float64(solve(np.repeat(scores, counts, axis=1)))
    expected = np.add.reduceat(of_copies, np.cumsum(counts) - counts, axis=1)
    return solve(scores, prototype_weight=counts), expected


def weights_of_another_scale(
    solve: Solver, scores: np.ndarray, step: float
) -> tuple[torch.Tensor, np.ndarray]:
    weights = {
        "sample_weight": np.arange(len(scores)) % 4,
        "prototype_weight": 1 + np.arange(scores.shape[1]) % 3,
    }
    scaled = {name: weight * 2.0**100 for name, weight in weights.items()}
    return solve(scores, **scaled), in_float64(solve(scores, **weights))


LAWS: list[Law] = [
    permuted,
    constant_for_all,
    constant_per_prototype,
    repeated_batch,
    repeated_prototypes,
    sample_weights_as_copies,
    prototype_weights_as_copies,
    weights_of_another_scale,
]


def solver(device: torch.device, dtype: torch.dtype, epsilon: float, iterations: int) -> Solver:
    """Return what turns NumPy scores, which the dtype must hold, and weights into codes."""

    def solve(scores: np.ndarray, **weights: np.ndarray) -> torch.Tensor:
        held = torch.tensor(scores).to(device, dtype)
        np.testing.assert_array_equal(in_float64(held), scores)
        return sinkhorn_knopp(
            held,
            epsilon=epsilon,
            iterations=iterations,
            **{
                name: torch.tensor(weight, dtype=torch.float32, device=device)
                for name, weight in weights.items()
            },
        )

    return solve


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@CORNERS_OF_LAWS
@DTYPES
def test_the_laws_hold_at_every_corner(
    device: torch.device, dtype: torch.dtype, epsilon: float, scale: float, law: Law
) -> None:
    step = scale / 8
    for iterations, shape in itertools.product((1, 6, 12), [(11, 5), (5, 11)]):
        solve = solver(device, dtype, epsilon, iterations)
        codes, expected = law(solve, grid(*shape, step=step), step)
        assert_codes(
            codes, expected, epsilon=epsilon, largest=5 * scale, results=2, case=(iterations, shape)
        )


def separable(of_samples: np.ndarray, of_prototypes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores a_i + b_j, and their codes: no sample prefers any prototype."""
    scores = of_samples[:, None] + of_prototypes
    return scores, np.full(scores.shape, 1 / scores.shape[1])


def balanced(scores: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of which each row is a permutation of the first, each column too; and codes.

    The first normalisation has the same factor for all prototypes, the second for all samples.
    """
    plan = np.exp((scores - scores.max()) / epsilon)
    return scores, plan / plan.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, HIGH])
@pytest.mark.parametrize("epsilon", [SMALL, 2.0**-4, LARGE])
@DTYPES
def test_balanced_scores_have_known_codes_without_any_rounding_at_coarse_corners_too(
    device: torch.device, dtype: torch.dtype, epsilon: float, scale: float
) -> None:
    """S/ε is held exactly, and the rounding of log u is the same for all prototypes."""
    turns = [np.roll(grid(9, step=scale / 8), turn) for turn in range(9)]
    groups = np.kron(np.eye(4), np.ones((10, 3)))
    problems = {
        "all tied": balanced(np.full((40, 7), scale), epsilon),
        "one prototype": separable(grid(40, step=scale / 8), np.zeros(1)),
        "circulant": balanced(np.stack(turns), epsilon),
        "groups": balanced(scale * groups, epsilon),
        "opposite groups": balanced(scale * (1 - 2 * groups), epsilon),
    }
    for name, (scores, expected) in problems.items():
        for iterations in ITERATIONS:
            codes = solver(device, dtype, epsilon, iterations)(scores)
            assert_codes(codes, expected, epsilon=epsilon, largest=0, case=(name, iterations))


@CORNERS_OF_LAWS
@DTYPES
def test_separable_scores_give_equal_entries_at_every_corner(
    device: torch.device, dtype: torch.dtype, epsilon: float, scale: float
) -> None:
    step = scale / 8
    for samples, prototypes in [(1, 40), (40, 7), (7, 40)]:
        scores, expected = separable(grid(samples, step=step), grid(prototypes, step=step, seed=1))
        for iterations in ITERATIONS:
            codes = solver(device, dtype, epsilon, iterations)(scores)
            case = (scores.shape, iterations)
            assert_codes(codes, expected, epsilon=epsilon, largest=2 * scale, case=case)


CONVERGING = pytest.mark.parametrize("epsilon", [SMALL, 2.0**-4, 1.0, LARGE])  # S/ε is moderate


@CONVERGING
@DTYPES
def test_two_by_two_converges_to_the_closed_form_at_any_scale(
    device: torch.device, dtype: torch.dtype, epsilon: float
) -> None:
    signs = np.reshape(list(itertools.product((-1.0, 0.5, 1.0), repeat=4)), (-1, 2, 2))
    scores = signs * epsilon
    agree = 1 / (1 + np.exp(-np.trace(signs - signs[:, ::-1], axis1=1, axis2=2) / 2))
    expected = np.stack([agree, 1 - agree, 1 - agree, agree], axis=-1).reshape(-1, 2, 2)
    codes = solver(device, dtype, epsilon, 100)(scores)
    assert_codes(codes, expected, epsilon=epsilon, largest=epsilon)


@CONVERGING
@DTYPES
def test_the_mean_code_converges_to_the_masses_at_any_scale(
    device: torch.device, dtype: torch.dtype, epsilon: float
) -> None:
    sample_weight, prototype_weight = 1.0 + np.arange(40) % 4, 1.0 + np.arange(7) % 3
    codes = solver(device, dtype, epsilon, 100)(
        grid(40, 7, step=epsilon / 8),
        sample_weight=sample_weight,
        prototype_weight=prototype_weight,
    )
    mean = sample_weight @ in_float64(codes) / sample_weight.sum()
    atol = tolerances.of_codes(dtype, epsilon=epsilon, largest=epsilon)
    expected = prototype_weight / prototype_weight.sum()
    np.testing.assert_allclose(mean, expected, rtol=0, atol=atol)


@CONVERGING
@DTYPES
def test_log_codes_are_the_scores_and_two_constants_at_any_scale(
    device: torch.device, dtype: torch.dtype, epsilon: float
) -> None:
    scores = grid(11, 5, step=epsilon / 8)
    for iterations in ITERATIONS:
        codes = in_float64(solver(device, dtype, epsilon, iterations)(scores))
        constants = np.log(codes) - scores / epsilon
        separated = constants[:1] + constants[:, :1] - constants[0, 0]
        atol = 4 * tolerances.of_codes(dtype, epsilon=epsilon, largest=epsilon)
        np.testing.assert_allclose(constants, separated, rtol=0, atol=atol)


# Random draws


@st.composite
def drawn_scores(
    draw: st.DrawFn, dtype: torch.dtype, largest: float, leading: tuple[int, ...] = ()
) -> torch.Tensor:
    """Return scores of at most ``largest``: a prototype and a sample far off, near ties between."""
    samples, prototypes = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    scores = draw(reals(*leading, samples, prototypes)) * draw(st.sampled_from([1, 0.01, 1e-4]))
    scores[..., draw(st.integers(0, prototypes - 1))] += draw(st.sampled_from([0, 1, -1]))
    scores[..., draw(st.integers(0, samples - 1)), :] += draw(st.sampled_from([0, 1, -1]))
    return torch.tensor(scores / 3 * largest).to(dtype)


@st.composite
def drawn_weights(draw: st.DrawFn, *shape: int) -> np.ndarray | None:
    """Return weights on the last dimension, one at least above 0; or none."""
    weights = arrays(np.float64, shape, elements=st.sampled_from([0, 0.25, 1, 3]))
    return draw(st.none() | weights.filter(lambda weight: (weight.sum(axis=-1) > 0).all()))


logarithms_of_epsilon = st.floats(-3, 1)
any_iterations = st.integers(1, 100)


@settings(max_examples=150)
@given(st.data(), st.sampled_from(tolerances.DTYPES), logarithms_of_epsilon, any_iterations)
def test_any_problem_at_any_corner_has_the_codes_of_the_equations(
    data: st.DataObject, dtype: torch.dtype, logarithm: float, iterations: int
) -> None:
    epsilon = 10**logarithm
    limit = math.log10(min(1e4, 2e5 * epsilon)) if dtype != torch.float64 else 4.0
    largest = 10 ** data.draw(st.floats(-3, limit), label="logarithm of the largest score")
    leading = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    scores = data.draw(drawn_scores(dtype, largest, leading))
    *_, samples, prototypes = scores.shape
    weights = {
        "sample_weight": data.draw(
            drawn_weights(*data.draw(st.sampled_from([(), leading])), samples)
        ),
        "prototype_weight": data.draw(drawn_weights(prototypes)),
    }
    expected = twin(in_float64(scores), epsilon, iterations, **weights)
    if data.draw(st.booleans(), label="transposed in memory"):
        scores = scores.mT.contiguous().mT
    low = data.draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    at_once = data.draw(st.sampled_from([0, 2**20]), label="entries that are computed at once")
    with (
        torch.autocast("cpu", dtype=low) if low else contextlib.nullcontext(),
        patch.object(at_once_route, "_VALUES_AT_ONCE", at_once),
    ):
        codes = sinkhorn_knopp(
            scores,
            epsilon=epsilon,
            iterations=iterations,
            **{
                name: None if weight is None else torch.tensor(weight)
                for name, weight in weights.items()
            },
        )
    assert codes.shape == scores.shape
    assert codes.dtype == dtype
    assert_plan(codes)
    assert_codes(codes, expected, epsilon=epsilon, largest=scores.abs().max().item())


@settings(max_examples=100)
@given(
    st.data(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.floats(-3, -1.5),
    any_iterations,
)
def test_a_prototype_that_wins_by_far_gets_its_sample_at_any_coarse_corner(
    data: st.DataObject, dtype: torch.dtype, logarithm: float, iterations: int
) -> None:
    epsilon = 10**logarithm
    scores = data.draw(drawn_scores(dtype, 1e4))
    assume(scores.shape[-1] > 1)
    ((_, log_codes),) = log_codes_after([iterations], in_float64(scores), epsilon)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    assert_decided(codes, log_codes, epsilon=epsilon, largest=scores.abs().max().item())


# Other solvers


def entropy(codes: np.ndarray) -> np.ndarray:
    """Return the sum over samples of the entropies of (..., B, K) codes."""
    logarithms = np.log(codes, out=np.zeros_like(codes), where=codes > 0)
    return -(codes * logarithms).sum(axis=(-1, -2))


def assignments(size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (count, size, size) scores and, one-hot, the one assignment that is best of each.

    The second best is worse by 1.
    """
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    problems, best = [], []
    for seed in itertools.count():
        scores = np.random.default_rng(seed).uniform(-1, 1, (size, size))
        pairs = optimize.linear_sum_assignment(scores, maximize=True)
        others = []
        for pair in zip(*pairs, strict=True):  # every other assignment lacks one of these
            without = scores.copy()
            without[pair] = -1e3
            others.append(without[optimize.linear_sum_assignment(without, maximize=True)].sum())
        margin = scores[pairs].sum() - max(others)
        if margin > 0.1:
            problems.append(scores / margin)
            best.append(np.eye(size)[pairs[1]])
        if len(problems) == count:
            return np.stack(problems), np.stack(best)
    raise AssertionError


@pytest.mark.parametrize("size", [2, 8])
@DTYPES
def test_codes_become_the_best_assignment_as_epsilon_vanishes(
    device: torch.device, dtype: torch.dtype, size: int
) -> None:
    problems, best = assignments(size, count=6)
    scores = torch.tensor(problems).to(device, dtype)
    held = in_float64(scores)
    optimum = (held * best).sum(axis=(-1, -2))
    gaps = []
    for epsilon in (1, 1 / 4, 1 / 16, 1 / 64):
        codes = in_float64(sinkhorn_knopp(scores, epsilon=epsilon, iterations=600))
        gaps.append(optimum - (codes * held).sum(axis=(-1, -2)))
        # Q maximises Tr(QᵀS) + ε H(Q) for the masses that its columns have; where these are not yet
        # 1, the best value without entropy differs by at most max|S| times the difference.
        difference = np.abs(codes.sum(axis=-2) - 1).sum(axis=-1)
        assert difference.max() < 0.05
        rounding = size * tolerances.of_codes(dtype, epsilon=epsilon, largest=np.abs(held).max())
        slack = np.abs(held).max(axis=(-1, -2)) * (difference + rounding)
        assert (gaps[-1] >= -slack).all()
        assert (gaps[-1] <= epsilon * entropy(codes) + slack).all()
    np.testing.assert_array_equal(codes.argmax(axis=-1), best.argmax(axis=-1))
    assert (gaps[-1] < 0.1 * gaps[0]).all()
    assert np.max(gaps[-1]) < 0.1  # of the margin


@pytest.mark.parametrize("seed", range(2))
def test_the_value_of_the_codes_approaches_that_of_the_linear_program(seed: int) -> None:
    """With masses on both sides and any number of samples and prototypes."""
    optimize = pytest.importorskip("scipy.optimize", reason="SciPy is not installed")
    rng = np.random.default_rng(seed)
    samples, prototypes = 7, 4
    scores = rng.uniform(-1, 1, (samples, prototypes))
    sample_mass, prototype_mass = (
        rng.dirichlet(np.ones(samples)),
        rng.dirichlet(np.ones(prototypes)),
    )
    program = optimize.linprog(
        -scores.ravel(),
        A_eq=np.concatenate(
            [
                np.kron(np.eye(samples), np.ones(prototypes)),
                np.kron(np.ones(samples), np.eye(prototypes)),
            ]
        ),
        b_eq=np.concatenate([sample_mass, prototype_mass]),
    )
    best = program.x.reshape(samples, prototypes)
    gaps = []
    for epsilon in (0.5, 0.1, 0.02):
        codes = sinkhorn_knopp(
            torch.tensor(scores),
            epsilon=epsilon,
            iterations=2000,
            sample_weight=torch.tensor(sample_mass),
            prototype_weight=torch.tensor(prototype_mass),
        )
        plan = codes.numpy() * sample_mass[:, None]
        np.testing.assert_allclose(plan.sum(axis=0), prototype_mass, rtol=0, atol=1e-6)
        gaps.append(-program.fun - (plan * scores).sum())
        assert gaps[-1] > -1e-5
        assert gaps[-1] <= epsilon * (entropy(plan) - entropy(best)) + 1e-5
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.01


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (30, 12)], ids=str)
def test_converged_codes_are_the_plan_of_python_optimal_transport(
    shape: tuple[int, int], epsilon: float
) -> None:
    ot = pytest.importorskip("ot", reason="POT is not installed")
    rng = np.random.default_rng(0)
    scores = rng.uniform(-1, 1, shape)
    sample_weight, prototype_weight = (rng.uniform(0.25, 4, count) for count in shape)
    sample_mass = sample_weight / sample_weight.sum()
    plan = ot.sinkhorn(
        sample_mass,
        prototype_weight / prototype_weight.sum(),
        -scores,
        epsilon,
        method="sinkhorn_log",
        numItermax=5000,
        stopThr=1e-12,
    )
    codes = sinkhorn_knopp(
        torch.tensor(scores),
        epsilon=epsilon,
        iterations=1000,
        sample_weight=torch.tensor(sample_weight),
        prototype_weight=torch.tensor(prototype_weight),
    )
    np.testing.assert_allclose(codes.numpy(), plan / sample_mass[:, None], rtol=0, atol=1e-9)


# Finite scores of any size


ROUTES = pytest.mark.parametrize("at_once", [0, 2**20], ids=["in blocks", "at once"])
NUMBERS = pytest.mark.parametrize("iterations", [1, 3, 7])
WEIGHTED = pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])


@contextlib.contextmanager
def blocks_of_five_samples(at_once: int) -> Iterator[None]:
    with (
        patch.object(at_once_route, "_VALUES_AT_ONCE", at_once),
        patch.object(kernel, "_SAMPLES_OF_A_BLOCK", 5),
        patch.object(kernel, "PARTS_OF_A_PRODUCT", 1),
    ):
        yield


def some_weights(samples: int, weighted: bool) -> dict[str, Any]:
    return {"sample_weight": torch.arange(samples).remainder(4) / 2} if weighted else {}


@WEIGHTED
@NUMBERS
@pytest.mark.parametrize("options", [{}, {"relaxation": 0.5}, {"hard": True}, {"validate": True}])
@ROUTES
@DTYPES
def test_a_finite_mask_forbids_prototypes(
    dtype: torch.dtype, at_once: int, options: dict[str, Any], iterations: int, weighted: bool
) -> None:
    scores = grid(12, 6, step=2.0**-5)
    forbidden = np.random.default_rng(1).random(scores.shape) < 0.4
    forbidden[:, 0] = False
    held = torch.tensor(scores, dtype=dtype)
    held[torch.tensor(forbidden)] = torch.finfo(dtype).min
    weights = some_weights(12, weighted)
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(held, iterations=iterations, **options, **weights)
    problem = np.where(forbidden, -1e9, scores), 0.05, iterations
    weight = None if not weighted else in_float64(weights["sample_weight"])
    if "relaxation" in options:
        expected = oracles.relaxed_sinkhorn(*problem, options["relaxation"], weight)
    else:
        expected = oracles.sinkhorn(*problem, weight)
    assert (codes[torch.tensor(forbidden)] == 0).all()
    if "hard" in options:
        np.testing.assert_array_equal(in_float64(codes).argmax(1), expected.argmax(1))
    else:
        np.testing.assert_allclose(in_float64(codes), expected, rtol=0, atol=tolerances.ATOL[dtype])


@WEIGHTED
@NUMBERS
@pytest.mark.parametrize("relaxation", [math.inf, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.05])
@ROUTES
@DTYPES
def test_scores_up_to_the_largest_number_have_the_codes_of_smaller_ones(
    dtype: torch.dtype,
    at_once: int,
    share: float,
    relaxation: float,
    iterations: int,
    weighted: bool,
) -> None:
    """A prototype that wins by far does so at any scale."""
    largest = torch.finfo(dtype).max * share
    scores = (torch.tensor(uniform(12, 5, scale=1.0)) * largest).to(dtype)
    weights = some_weights(12, weighted)
    settings = {"iterations": iterations, "relaxation": relaxation}
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(scores, **settings, **weights)
    weight = None if not weighted else in_float64(weights["sample_weight"])
    problem = in_float64(scores) * (2e3 / largest), 0.05, iterations
    if math.isinf(relaxation):
        expected = oracles.sinkhorn(*problem, weight)
    else:
        expected = oracles.relaxed_sinkhorn(*problem, relaxation, weight)
    decided = expected.max(axis=-1) > 1 - 1e-12
    assert decided.mean() > 0.6
    atol = tolerances.ATOL[dtype]
    np.testing.assert_allclose(in_float64(codes)[decided], expected[decided], rtol=0, atol=atol)


@NUMBERS
@ROUTES
@DTYPES
def test_a_row_may_hold_the_largest_number_and_its_opposite(
    dtype: torch.dtype, at_once: int, iterations: int
) -> None:
    signs = np.where(np.random.default_rng(2).random((12, 5)) < 0.5, 1.0, -1.0)
    signs[np.arange(12), np.arange(12) % 5] = 1
    scores = torch.tensor(signs * torch.finfo(dtype).max).to(dtype)
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(scores, iterations=iterations)
    expected = oracles.sinkhorn(signs * 1e2, 0.05, iterations)
    np.testing.assert_allclose(in_float64(codes), expected, rtol=0, atol=tolerances.ATOL[dtype])


@NUMBERS
@ROUTES
@DTYPES
def test_a_prototype_that_is_forbidden_for_all_is_as_near_to_all(
    dtype: torch.dtype, at_once: int, iterations: int
) -> None:
    """Only differences within a column count. A row of the lowest numbers gives a finite code."""
    scores = grid(12, 6, step=2.0**-5)
    held = torch.tensor(scores, dtype=dtype)
    held[:, 2] = torch.finfo(dtype).min
    lowest = held.clone()
    lowest[4] = torch.finfo(dtype).min
    scores[:, 2] = 0
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(held, iterations=iterations)
        assert_plan(sinkhorn_knopp(lowest, iterations=iterations))
    expected = oracles.sinkhorn(scores, 0.05, iterations)
    np.testing.assert_allclose(in_float64(codes), expected, rtol=0, atol=tolerances.ATOL[dtype])


@NUMBERS
@ROUTES
@DTYPES
def test_a_score_that_is_not_finite_is_left_out_of_every_block(
    dtype: torch.dtype, at_once: int, iterations: int
) -> None:
    scores = grid(12, 6, step=2.0**-5)
    held = torch.tensor(scores, dtype=dtype)
    held[3, 1], held[7, 2], held[11] = math.nan, -math.inf, math.inf
    with blocks_of_five_samples(at_once):
        codes = in_float64(sinkhorn_knopp(held, iterations=iterations))
    others = np.delete(np.arange(12), [3, 7, 11])
    expected = oracles.sinkhorn(scores[others], 0.05, iterations)
    np.testing.assert_allclose(codes[others], expected, rtol=0, atol=tolerances.ATOL[dtype])
    assert np.isnan(codes[[3, 7, 11]]).all()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("epsilon", [1e-300, 1e-40, 1e38, 1e300])
@ROUTES
def test_any_positive_epsilon_gives_codes(
    at_once: int, epsilon: float, weighted: bool, as_tensor: bool
) -> None:
    scores = torch.tensor([[0.5, 0.25], [-0.25, 0.5]])
    weight = torch.tensor([0.5, 0.5]) if weighted else None
    given = torch.tensor(epsilon, dtype=torch.float64) if as_tensor else epsilon
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(scores, epsilon=given, sample_weight=weight)
    expected = torch.eye(2) if epsilon < 1 else torch.full((2, 2), 0.5)
    torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)


def test_only_differences_of_scores_are_rounded(device: torch.device) -> None:
    """S/ε is rounded to a multiple of 2 here."""
    scores = grid(12, 6, step=2.0**-5)
    far = torch.tensor(scores + 2.0**18, dtype=torch.float32, device=device)
    expected = oracles.sinkhorn(scores, 0.01, 3)
    np.testing.assert_allclose(in_float64(sinkhorn_knopp(far, epsilon=0.01)), expected, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@WEIGHTED
@ROUTES
def test_hard_codes_are_rounded_before_they_are_in_half_precision(
    at_once: int, weighted: bool, dtype: torch.dtype
) -> None:
    scores = torch.tensor(grid(64, 3, step=2.0**-10)).to(dtype)
    options = {"epsilon": 1.0, "hard": True, **some_weights(64, weighted)}
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(scores, **options)
        expected = sinkhorn_knopp(scores.float(), **options)
    assert torch.equal(codes.float(), expected)


# Weights of any size


DECADES = {
    "44 decades": (torch.float32, [1e-16, 6e-12, 1e28, 1.0]),
    "tiny": (torch.float32, [1e-40, 3e-40, 2e-40, 1e-40]),
    "subnormal and normal": (torch.float32, [1e-44, 1e-40, 1e-38, 1.0]),
    "huge": (torch.float32, [2.4e38, 3e38, 1e38, 2.4e38]),
    "wider than the scores": (torch.float64, [1e300, 3e300, 1e299, 1e300]),
    "narrower than the scores": (torch.float64, [1e-300, 3e-300, 1e-299, 1e-300]),
    "half precision": (torch.float16, [6e-8, 65504.0, 1.0, 1e-4]),
}


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("relaxation", [math.inf, 0.5])
@NUMBERS
@ROUTES
@pytest.mark.parametrize(("dtype", "weight"), DECADES.values(), ids=list(DECADES))
@pytest.mark.parametrize("weighted", ["samples", "prototypes"])
def test_only_ratios_of_weights_count_over_many_decades(
    weighted: str,
    dtype: torch.dtype,
    weight: list[float],
    at_once: int,
    iterations: int,
    relaxation: float,
    scale: float,
) -> None:
    samples = 4 if weighted == "samples" else 12
    scores = np.random.default_rng(3).choice([-scale, scale / 2, scale], (samples, 4))
    given_weight = torch.tensor(weight, dtype=dtype)
    held = torch.tensor(scores, dtype=torch.float32)
    settings = {"iterations": iterations, "relaxation": relaxation}
    name = "sample_weight" if weighted == "samples" else "prototype_weight"
    with blocks_of_five_samples(at_once):
        codes = sinkhorn_knopp(held, **{name: given_weight}, **settings)
    problem = (scores, 0.05, iterations)
    if math.isinf(relaxation):
        expected = oracles.sinkhorn(*problem, **{name: in_float64(given_weight)})
    else:
        expected = oracles.relaxed_sinkhorn(
            *problem, relaxation, **{name: in_float64(given_weight)}
        )
    atol = tolerances.of_codes(torch.float32, epsilon=0.05, largest=scale)
    np.testing.assert_allclose(in_float64(codes), expected, rtol=0, atol=atol)


@given(
    arrays(np.float64, (5, 4), elements=st.floats(-2, 2, width=32)),
    arrays(np.float64, 5, elements=st.floats(-22, 22)),
    st.sampled_from([1, 2, 3, 7]),
)
def test_any_weights_over_many_decades_have_the_codes_of_the_equations(
    scores: np.ndarray, exponents: np.ndarray, iterations: int
) -> None:
    weight = torch.tensor(10.0**exponents, dtype=torch.float32)
    held = torch.tensor(scores, dtype=torch.float32)
    codes = sinkhorn_knopp(held, sample_weight=weight, iterations=iterations)
    expected = oracles.sinkhorn(scores, 0.05, iterations, in_float64(weight))
    np.testing.assert_allclose(in_float64(codes), expected, rtol=0, atol=1e-4)


# Long rows


@pytest.mark.parametrize(
    "shape",
    [(2, 10**6), pytest.param((8, 10**6 + 3), marks=pytest.mark.slow), (3, 10**5)],
    ids=str,
)
def test_long_rows_are_as_accurate_as_short_ones(
    device: torch.device, shape: tuple[int, int]
) -> None:
    scores = grid(*shape, step=2.0**-7, most=128)
    codes = sinkhorn_knopp(torch.tensor(scores, dtype=torch.float32, device=device))
    expected = twin(scores, 0.05, 3)
    assert np.abs(in_float64(codes) / expected - 1).max() < 1e-5
