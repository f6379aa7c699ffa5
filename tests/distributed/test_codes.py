"""Codes of a batch that is spread over processes are the codes of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from swavkit import SwAVLoss, sinkhorn_knopp
from tests import oracles, tolerances
from tests.modes import Collectives
from tests.ranks import Ranks
from tests.strategies import codes_problems, reals, splits

pytestmark = pytest.mark.distributed

# How 64 samples lie on the ranks: evenly, unevenly, some or all but one of them without any.
SIZES = [
    (22, 21, 21),
    (48, 16, 0),
    (0, 63, 1),
    (1, 0, 63),
    (0, 64, 0),
    (32, 32),
    (48, 16),
    (63, 1),
    (64, 0),
]


def codes_of_part(rank: int, part: dict[str, Any]) -> np.ndarray:
    dtype = part.get("dtype", torch.float64)
    scores = torch.tensor(part["scores"], dtype=dtype)
    if rank in part.get("stored_in_reverse", ()):
        turned = tuple(reversed(range(scores.dim())))
        scores = scores.permute(turned).contiguous().permute(turned)
    weights = {
        name: torch.tensor(part[name])
        for name in ("sample_weight", "prototype_weight")
        if name in part
    }
    codes = sinkhorn_knopp(scores, **weights, **part.get("settings", {}))
    assert codes.dtype == dtype
    return codes.double().numpy()


def along_samples(values: np.ndarray, sizes: Sequence[int], axis: int) -> list[np.ndarray]:
    return np.split(values, np.cumsum(sizes)[:-1], axis=axis)


def codes_of_split(
    ranks: Ranks,
    scores: np.ndarray,
    sizes: Sequence[int],
    *,
    sample_weight: np.ndarray | None = None,
    **everywhere: Any,
) -> np.ndarray:
    """Return the codes that the ranks give to their ``sizes`` samples of (..., B, K) scores."""
    parts = [{"scores": part} | everywhere for part in along_samples(scores, sizes, -2)]
    if sample_weight is not None:
        for part, weight in zip(parts, along_samples(sample_weight, sizes, -1), strict=True):
            part["sample_weight"] = weight
    return np.concatenate(ranks.run(codes_of_part, parts), axis=-2)


def cosines(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, shape)


@pytest.mark.parametrize("iterations", [1, 3, 5, 8])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_codes_do_not_depend_on_the_split(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...], iterations: int
) -> None:
    scores = cosines(iterations, 64, 10)
    codes = codes_of_split(
        start_ranks(len(sizes)), scores, sizes, settings={"iterations": iterations}
    )
    np.testing.assert_allclose(
        codes, oracles.sinkhorn(scores, 0.05, iterations), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("iterations", [1, 2, 3, 8])
@pytest.mark.parametrize("relaxation", [np.inf, 0.5])
@pytest.mark.parametrize("sizes", [(3, 3), (1, 5), (6, 0), (0, 2, 4)], ids=str)
@pytest.mark.parametrize(
    "decades", [[-16, -12, 28, 0, 20, -3], [-40] * 6, [38] * 6, [-40] * 3 + [3] * 3], ids=str
)
def test_ranks_may_have_weights_of_different_decades(
    start_ranks: Callable[[int], Ranks],
    decades: list[int],
    sizes: tuple[int, ...],
    relaxation: float,
    iterations: int,
) -> None:
    scores = 100 * np.sign(cosines(3, 6, 5))
    weight = np.array([1, 3, 2, 1, 0.5, 1]) * np.array([10.0**power for power in decades])
    weight = weight.astype(np.float32)
    codes = codes_of_split(
        start_ranks(len(sizes)),
        scores,
        sizes,
        sample_weight=weight,
        dtype=torch.float32,
        settings={"iterations": iterations, "relaxation": relaxation},
    )
    if relaxation == np.inf:
        expected = oracles.sinkhorn(scores, 0.05, iterations, weight)
    else:
        expected = oracles.relaxed_sinkhorn(scores, 0.05, iterations, relaxation, weight)
    atol = tolerances.of_codes(torch.float32, epsilon=0.05, largest=100)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_no_rank_with_a_sample_gives_no_codes(ranks: Ranks, iterations: int) -> None:
    parts = [{"scores": np.zeros((2, 0, 5)), "settings": {"iterations": iterations}}] * 3
    assert [codes.shape for codes in ranks.run(codes_of_part, parts)] == [(2, 0, 5)] * 3


@pytest.mark.parametrize("iterations", [1, 3, 8])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("sizes", [(8, 0, 4), (0, 0, 12)], ids=str)
def test_a_rank_without_samples_shifts_no_scores(
    ranks: Ranks, sizes: tuple[int, ...], offset: float, iterations: int
) -> None:
    scores = cosines(7, 12, 5) + offset
    codes = codes_of_split(ranks, scores, sizes, settings={"iterations": iterations})
    expected = oracles.sinkhorn(scores, 0.05, iterations)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-9)


@st.composite
def weighted_splits(draw: st.DrawFn) -> tuple[Any, list[int], np.ndarray, np.ndarray]:
    """A problem, the number of its samples on each of three ranks, and masses for both sides."""
    problem = draw(codes_problems())
    samples, prototypes = problem.scores.shape
    sample_weight = draw(
        st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=samples, max_size=samples)
        .filter(any)
        .map(np.array)
    )
    prototype_weight = draw(reals(prototypes, low=0.25, high=2.0))
    return problem, draw(splits(samples, 3)), sample_weight, prototype_weight


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@given(weighted_splits())
@settings(max_examples=25)
def test_any_split_has_the_codes_of_the_whole_batch(
    start_ranks: Callable[[int], Ranks], dtype: torch.dtype, drawn: Any
) -> None:
    problem, sizes, sample_weight, prototype_weight = drawn
    scores = torch.tensor(problem.scores).to(dtype).double().numpy()  # as the dtype holds them
    codes = codes_of_split(
        start_ranks(3),
        scores,
        sizes,
        dtype=dtype,
        sample_weight=sample_weight,
        prototype_weight=prototype_weight,
        settings={"epsilon": problem.epsilon, "iterations": problem.iterations},
    )
    expected = oracles.sinkhorn(
        scores, problem.epsilon, problem.iterations, sample_weight, prototype_weight
    )
    tolerance = tolerances.of_codes(dtype, epsilon=problem.epsilon, largest=1.0)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("iterations", [1, 3, 8])
@pytest.mark.parametrize("stored_in_reverse", [(), (1,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_leading_dimensions_are_independent_problems_however_they_are_stored(
    ranks: Ranks, leading: tuple[int, ...], stored_in_reverse: tuple[int, ...], iterations: int
) -> None:
    scores = cosines(0, *leading, 12, 5)
    codes = codes_of_split(
        ranks,
        scores,
        (5, 3, 4),
        stored_in_reverse=stored_in_reverse,
        settings={"iterations": iterations},
    )
    for index in np.ndindex(leading):
        np.testing.assert_allclose(
            codes[index], oracles.sinkhorn(scores[index], 0.05, iterations), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("iterations", [1, 3, 5, 8])
def test_ranks_whose_scores_lie_far_apart_share_codes(
    ranks: Ranks, iterations: int, dtype: torch.dtype
) -> None:
    # exp(S/ε) is 0 on rank 0 and infinite on rank 1, in any dtype.
    scores = cosines(4, 12, 5) + np.repeat([-60, 60, 0], [5, 3, 4])[:, None]
    codes = codes_of_split(
        ranks, scores, (5, 3, 4), dtype=dtype, settings={"iterations": iterations}
    )
    expected = oracles.sinkhorn(scores, 0.05, iterations)
    tolerance = tolerances.of_codes(dtype, epsilon=0.05, largest=61.0)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_a_rank_whose_samples_are_all_absent_changes_nothing(ranks: Ranks, iterations: int) -> None:
    scores = cosines(2, 12, 5)
    weight = np.repeat([1.0, 0.0, 1.0], [5, 4, 3])
    scores[5] = np.nan  # absent, so that nobody may see it
    codes = codes_of_split(
        ranks, scores, (5, 4, 3), sample_weight=weight, settings={"iterations": iterations}
    )
    present = np.flatnonzero(weight)
    expected = oracles.sinkhorn(scores[present], 0.05, iterations)
    np.testing.assert_allclose(codes[present], expected, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(codes[5], 0)
    # The absent ones with scores get the code that the others' prototype masses give them.
    finite = np.delete(np.arange(12), 5)
    with_absent = oracles.sinkhorn(scores[finite], 0.05, iterations, weight[finite])
    np.testing.assert_allclose(codes[finite], with_absent, rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 2, 3, 6, 7, 12])
def test_each_rank_may_weigh_in_its_own_way(ranks: Ranks, iterations: int) -> None:
    """Ranks then compute P anew at different iterations."""
    scores = cosines(3, 12, 5)
    weight = np.array([1, 1, 1, 1, 1, 0.5, 3, 0.1, 1, 0, 1, 1])
    parts = [
        {"scores": part, "settings": {"iterations": iterations}}
        for part in along_samples(scores, (5, 3, 4), -2)
    ]
    parts[1]["sample_weight"] = weight[5:8]
    parts[2]["sample_weight"] = weight[8:].astype(bool)
    codes = np.concatenate(ranks.run(codes_of_part, parts))
    expected = oracles.sinkhorn(scores, 0.05, iterations, weight)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("iterations", [1, 3, 8])
def test_where_every_sample_is_absent_codes_are_those_of_the_scores_alone(
    ranks: Ranks, iterations: int
) -> None:
    scores = cosines(5, 12, 5)
    codes = codes_of_split(
        ranks, scores, (5, 3, 4), sample_weight=np.zeros(12), settings={"iterations": iterations}
    )
    plan = np.exp(scores / 0.05)
    np.testing.assert_allclose(codes, plan / plan.sum(axis=1, keepdims=True), rtol=0, atol=1e-12)


def codes_in_groups(rank: int, scores: np.ndarray) -> dict[str, Any]:
    pair, single = dist.new_group([0, 1]), dist.new_group([2])
    outcome: dict[str, Any] = {}
    for name, group in (("pair", pair), ("single", single)):
        try:
            outcome[name] = sinkhorn_knopp(torch.tensor(scores), process_group=group).numpy()
        except ValueError as error:
            outcome[name] = str(error)
    return outcome


def test_a_group_shares_its_own_samples_and_refuses_strangers(ranks: Ranks) -> None:
    parts = [cosines(seed, size, 5) for seed, size in enumerate((6, 3, 4))]
    outcomes = ranks.run(codes_in_groups, parts)
    pair = oracles.sinkhorn(np.concatenate(parts[:2]), 0.05, 3)
    np.testing.assert_allclose(outcomes[0]["pair"], pair[:6], rtol=0, atol=1e-12)
    np.testing.assert_allclose(outcomes[1]["pair"], pair[6:], rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        outcomes[2]["single"], oracles.sinkhorn(parts[2], 0.05, 3), rtol=0, atol=1e-12
    )
    for rank, name in ((2, "pair"), (0, "single"), (1, "single")):
        assert outcomes[rank][name] == (
            f"process_group must contain the calling rank, got a group without rank {rank}"
        )


@pytest.mark.parametrize("iterations", [3, 8])
def test_without_synchronisation_each_rank_has_the_codes_of_its_own_samples(
    ranks: Ranks, iterations: int
) -> None:
    parts = [cosines(seed, size, 5) for seed, size in enumerate((6, 1, 4))]
    given_settings = {"iterations": iterations, "synchronize": False}
    results = ranks.run(
        codes_of_part, [{"scores": part, "settings": given_settings} for part in parts]
    )
    for part, codes in zip(parts, results, strict=True):
        expected = oracles.sinkhorn(part, 0.05, iterations)
        np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)


def payloads(rank: int, part: dict[str, Any]) -> list[int]:
    with Collectives() as collectives:
        codes_of_part(rank, part)
    return collectives.numels


@pytest.mark.parametrize(
    ("iterations", "synchronize", "calls"),
    [(1, True, 2), (3, True, 4), (5, True, 6), (8, True, 9), (3, False, 0)],
)
def test_all_problems_share_few_collectives_of_a_number_per_prototype(
    ranks: Ranks, iterations: int, synchronize: bool, calls: int
) -> None:
    # Two for the first iteration, with the largest mass in one of them; one for each of the others.
    parts = [
        {
            "scores": cosines(rank, 2, size, 5),
            "settings": {"iterations": iterations, "synchronize": synchronize},
        }
        for rank, size in enumerate((30, 0, 7))
    ]
    expected = [2 * (5 + 1)] + [2 * 5] * (calls - 1) if calls else []
    assert ranks.run(payloads, parts) == [expected] * 3


def alone_in_the_world(rank: int, features: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    criterion = SwAVLoss(4, 5)
    with Collectives() as collectives:
        loss, details = criterion(torch.tensor(features), return_details=True)
        loss.backward()
    return collectives.numels, details.scores.numpy(), details.codes.numpy()


def test_a_world_of_one_makes_no_collective(start_ranks: Callable[[int], Ranks]) -> None:
    ((numels, scores, codes),) = start_ranks(1).run(alone_in_the_world, [cosines(3, 2, 6, 4)])
    assert numels == []
    expected = [oracles.sinkhorn(view, 0.05, 3) for view in scores]
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)
