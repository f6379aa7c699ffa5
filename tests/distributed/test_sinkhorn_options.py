"""Relaxed masses, a tolerance, hard codes, validation and the marginal error over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swavkit import SinkhornKnopp, marginal_error, sinkhorn_knopp
from tests import oracles, tolerances
from tests.distributed.test_codes import (
    SIZES,
    along_samples,
    codes_of_part,
    codes_of_split,
    cosines,
    payloads,
    weighted_splits,
)
from tests.modes import Collectives
from tests.ranks import Ranks
from tests.strategies import CodesProblem, seeds
from tests.test_sinkhorn_options import enough, one_hot, softmax

pytestmark = pytest.mark.distributed

ITERATIONS = pytest.mark.parametrize("iterations", [1, 3, 8])
EACH_SPLIT = pytest.mark.parametrize("sizes", SIZES, ids=str)


def relaxed(
    scores: np.ndarray, iterations: int = 3, *weights: np.ndarray, epsilon: float = 0.05
) -> np.ndarray:
    """Return the oracle's codes at a relaxation of 0.2."""
    return oracles.relaxed_sinkhorn(scores, epsilon, iterations, 0.2, *weights)


# Relaxed masses


@ITERATIONS
@EACH_SPLIT
def test_relaxed_codes_do_not_depend_on_the_split(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...], iterations: int
) -> None:
    scores = cosines(iterations, 64, 10)
    options = {"iterations": iterations, "relaxation": 0.2}
    codes = codes_of_split(start_ranks(len(sizes)), scores, sizes, settings=options)
    np.testing.assert_allclose(codes, relaxed(scores, iterations), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@given(weighted_splits(), st.sampled_from([0.001, 0.05, 0.5, 50.0]))
@settings(max_examples=25)
def test_any_split_has_the_relaxed_codes_of_the_whole_batch(
    start_ranks: Callable[[int], Ranks], dtype: torch.dtype, drawn: Any, relaxation: float
) -> None:
    problem, sizes, *weights = drawn
    scores = torch.tensor(problem.scores).to(dtype).double().numpy()  # as the dtype holds them
    options = {"epsilon": problem.epsilon, "iterations": problem.iterations}
    codes = codes_of_split(
        start_ranks(3),
        scores,
        sizes,
        dtype=dtype,
        sample_weight=weights[0],
        prototype_weight=weights[1],
        settings=options | {"relaxation": relaxation},
    )
    expected = oracles.relaxed_sinkhorn(
        scores, problem.epsilon, problem.iterations, relaxation, *weights
    )
    tolerance = tolerances.of_codes(dtype, epsilon=problem.epsilon, largest=1.0)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=tolerance)


@ITERATIONS
@pytest.mark.parametrize("stored_in_reverse", [(), (1,)], ids=str)
def test_leading_dimensions_are_independent_relaxed_problems_however_they_are_stored(
    ranks: Ranks, stored_in_reverse: tuple[int, ...], iterations: int
) -> None:
    scores = cosines(0, 2, 3, 12, 5)
    codes = codes_of_split(
        ranks,
        scores,
        (5, 3, 4),
        stored_in_reverse=stored_in_reverse,
        settings={"iterations": iterations, "relaxation": 0.2},
    )
    for index in np.ndindex(2, 3):
        expected = relaxed(scores[index], iterations)
        np.testing.assert_allclose(codes[index], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@ITERATIONS
def test_ranks_whose_scores_lie_far_apart_share_relaxed_codes(
    ranks: Ranks, iterations: int, dtype: torch.dtype
) -> None:
    # exp(S/ε) is 0 on rank 0 and infinite on rank 1, in any dtype.
    scores = cosines(4, 12, 5) + np.repeat([-60, 60, 0], [5, 3, 4])[:, None]
    codes = codes_of_split(
        ranks,
        scores,
        (5, 3, 4),
        dtype=dtype,
        settings={"iterations": iterations, "relaxation": 0.2},
    )
    tolerance = tolerances.of_codes(dtype, epsilon=0.05, largest=61.0)
    np.testing.assert_allclose(codes, relaxed(scores, iterations), rtol=0, atol=tolerance)


@ITERATIONS
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("sizes", [(8, 0, 4), (0, 0, 12)], ids=str)
def test_a_rank_without_samples_shifts_no_scores_of_relaxed_problems(
    ranks: Ranks, sizes: tuple[int, ...], offset: float, iterations: int
) -> None:
    scores = cosines(7, 12, 5) + offset
    options = {"iterations": iterations, "relaxation": 0.2}
    codes = codes_of_split(ranks, scores, sizes, settings=options)
    np.testing.assert_allclose(codes, relaxed(scores, iterations), rtol=0, atol=1e-9)


@ITERATIONS
def test_a_rank_whose_samples_are_all_absent_changes_no_relaxed_code(
    ranks: Ranks, iterations: int
) -> None:
    scores = cosines(2, 12, 5)
    weight = np.repeat([1.0, 0.0, 1.0], [5, 4, 3])
    scores[5] = np.nan  # absent, so that nobody may see it
    codes = codes_of_split(
        ranks,
        scores,
        (5, 4, 3),
        sample_weight=weight,
        settings={"iterations": iterations, "relaxation": 0.2},
    )
    np.testing.assert_array_equal(codes[5], 0)
    finite = np.delete(np.arange(12), 5)
    expected = relaxed(scores[finite], iterations, weight[finite])
    np.testing.assert_allclose(codes[finite], expected, rtol=0, atol=1e-12)


@ITERATIONS
@pytest.mark.parametrize("relaxation", [0.2, np.inf])
def test_a_sample_that_is_not_finite_is_left_out_on_every_rank(
    ranks: Ranks, relaxation: float, iterations: int
) -> None:
    scores = cosines(6, 12, 5)
    scores[[2, 5], 1] = np.nan, np.inf
    options = {"iterations": iterations, "relaxation": relaxation}
    codes = codes_of_split(ranks, scores, (5, 3, 4), settings=options)
    assert np.isnan(codes[[2, 5]]).all()
    others = np.delete(np.arange(12), [2, 5])
    expected = oracles.relaxed_sinkhorn(scores[others], 0.05, iterations, relaxation)
    np.testing.assert_allclose(codes[others], expected, rtol=0, atol=1e-12)


@ITERATIONS
def test_where_every_sample_is_absent_relaxed_codes_are_those_of_the_scores_alone(
    ranks: Ranks, iterations: int
) -> None:
    scores = cosines(5, 12, 5)
    codes = codes_of_split(
        ranks,
        scores,
        (5, 3, 4),
        sample_weight=np.zeros(12),
        settings={"iterations": iterations, "relaxation": 0.2},
    )
    np.testing.assert_allclose(codes, softmax(scores / 0.05), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"relaxation": 0.2}, {"tolerance": 0.1}, {"hard": True}, {"validate": True}],
    ids=str,
)
def test_no_rank_with_a_sample_gives_no_codes(ranks: Ranks, options: dict[str, Any]) -> None:
    parts = [{"scores": np.zeros((2, 0, 5)), "settings": options}] * 3
    assert [codes.shape for codes in ranks.run(codes_of_part, parts)] == [(2, 0, 5)] * 3


# A tolerance


def codes_and_payloads(rank: int, part: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    with Collectives() as collectives:
        codes = codes_of_part(rank, part)
    return codes, collectives.numels


@pytest.mark.parametrize("tolerance", [1.0, 0.3, 0.1, 0.03])
@EACH_SPLIT
def test_all_ranks_stop_as_soon_as_the_whole_batch_is_near_enough(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...], tolerance: float
) -> None:
    scores = cosines(1, 64, 10) + 0.5 * (np.arange(64)[:, None] < 20) * (np.arange(10) < 4)
    needed, expected, _ = enough(CodesProblem(scores, 0.05, 40), tolerance)
    assert needed < 40
    parts = [
        {"scores": part, "settings": {"iterations": 40, "tolerance": tolerance}}
        for part in along_samples(scores, sizes, -2)
    ]
    codes, numels = zip(*start_ranks(len(sizes)).run(codes_and_payloads, parts), strict=True)
    np.testing.assert_allclose(np.concatenate(codes), expected, rtol=0, atol=1e-12)
    # Two for the first iteration, with the largest mass in one of them; one for each of the others,
    # and the masses that were enough.
    assert list(numels) == [[11] + [10] * (needed + 1)] * len(sizes)


@given(weighted_splits(), st.sampled_from([1e-6, 0.03, 0.3, 3.0]))
@settings(max_examples=40)
def test_any_split_stops_where_the_whole_batch_does(
    start_ranks: Callable[[int], Ranks], drawn: Any, tolerance: float
) -> None:
    problem, sizes, sample_weight, prototype_weight = drawn
    _, expected, clear = enough(problem, tolerance, sample_weight, prototype_weight)
    assume(clear)
    options = {"epsilon": problem.epsilon, "iterations": problem.iterations, "tolerance": tolerance}
    codes = codes_of_split(
        start_ranks(3),
        problem.scores,
        sizes,
        sample_weight=sample_weight,
        prototype_weight=prototype_weight,
        settings=options,
    )
    atol = tolerances.of_codes(torch.float64, epsilon=problem.epsilon, largest=1.0)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=atol)


def test_without_synchronisation_each_rank_stops_for_itself(ranks: Ranks) -> None:
    parts = [np.zeros((6, 5)), cosines(1, 12, 5), cosines(2, 4, 5)]
    options = {"iterations": 40, "tolerance": 0.1, "synchronize": False}
    results = ranks.run(codes_of_part, [{"scores": part, "settings": options} for part in parts])
    alone = [enough(CodesProblem(part, 0.05, 40), 0.1) for part in parts]
    assert len({needed for needed, _, _ in alone}) == 3
    for (_, expected, _), codes in zip(alone, results, strict=True):
        np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)


# Hard codes


@pytest.mark.parametrize("relaxation", [0.2, np.inf])
@EACH_SPLIT
def test_hard_codes_do_not_depend_on_the_split(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...], relaxation: float
) -> None:
    scores = cosines(3, 2, 64, 10)
    options = {"relaxation": relaxation, "hard": True}
    codes = codes_of_split(start_ranks(len(sizes)), scores, sizes, settings=options)
    for index in range(2):
        soft = oracles.relaxed_sinkhorn(scores[index], 0.05, 3, relaxation)
        np.testing.assert_array_equal(codes[index], one_hot(soft))


# Validation


def outcome_of_validation(rank: int, part: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Return the error, and the codes of a call thereafter: nobody must be left waiting."""
    try:
        codes_of_part(rank, part)
        error = ""
    except ValueError as raised:
        error = str(raised)
    return error, codes_of_part(rank, {"scores": part["good"]})


def outcomes_of_validation(
    ranks: Ranks, parts: Sequence[dict[str, Any]], **options: Any
) -> list[str]:
    """Return what each rank says of its part."""
    good = [cosines(rank, size, 5) for rank, size in enumerate((2, 0, 3))]
    complete = [
        part | {"settings": options | {"validate": True}, "good": good[rank]}
        for rank, part in enumerate(parts)
    ]
    errors, codes = zip(*ranks.run(outcome_of_validation, complete), strict=True)
    expected = oracles.sinkhorn(np.concatenate(good), 0.05, 3)
    np.testing.assert_allclose(np.concatenate(codes), expected, rtol=0, atol=1e-12)
    return list(errors)


def with_entry(values: np.ndarray, index: Any, value: float) -> np.ndarray:
    changed = values.copy()
    changed[index] = value
    return changed


MASS = "{} must be finite and at least 0, got {}"
FINITE = "scores must be finite in every sample that is present, got {}"
BAD_VALUES = [
    *(
        ({"sample_weight": with_entry(np.ones(4), 2, value)}, MASS, "sample_weight", value)
        for value in (-1.0, np.nan, np.inf)
    ),
    *(
        ({"prototype_weight": with_entry(np.ones(5), 2, value)}, MASS, "prototype_weight", value)
        for value in (-1.0, np.nan, np.inf)
    ),
    (
        {"prototype_weight": np.zeros(5)},
        "{} must have a positive sum, got {}",
        "prototype_weight",
        0.0,
    ),
    *(
        ({"scores": with_entry(cosines(1, 4, 5), (2, 3), value)}, FINITE, "", value)
        for value in (np.nan, np.inf, -np.inf)
    ),
]
EVERYWHERE = pytest.mark.parametrize(
    "options", [{}, {"tolerance": 0.1}, {"relaxation": 0.2, "hard": True}], ids=str
)


@EVERYWHERE
@pytest.mark.parametrize("faulty", [0, 2])
@pytest.mark.parametrize(("fault", "text", "name", "value"), BAD_VALUES)
def test_a_bad_value_on_one_rank_is_an_error_on_all(
    ranks: Ranks,
    fault: dict[str, Any],
    text: str,
    name: str,
    value: float,
    faulty: int,
    options: dict[str, Any],
) -> None:
    whole = {"sample_weight": np.ones(4), "prototype_weight": np.ones(5)}
    parts: list[dict[str, Any]] = [{"scores": cosines(rank, 4, 5)} | whole for rank in range(3)]
    parts[faulty] |= fault
    expected = [text.format(*filter(None, [name]), "another value on another rank")] * 3
    expected[faulty] = text.format(*filter(None, [name]), value)
    assert outcomes_of_validation(ranks, parts, **options) == expected


@EVERYWHERE
def test_ranks_that_differ_in_what_is_bad_agree_on_what_to_name(
    ranks: Ranks, options: dict[str, Any]
) -> None:
    parts: list[dict[str, Any]] = [
        {"scores": cosines(0, 4, 5), "sample_weight": -2 * np.ones(4)},
        {"scores": np.full((4, 5), np.nan), "sample_weight": np.ones(4)},
        {"scores": np.zeros((0, 5)), "sample_weight": np.zeros(0)},
    ]
    errors = outcomes_of_validation(ranks, parts, **options)
    mine = "sample_weight must be finite and at least 0, got -2.0"
    other = "sample_weight must be finite and at least 0, got another value on another rank"
    assert errors == [mine, other, other]


@EVERYWHERE
def test_nobody_on_any_rank_is_an_error_on_all(ranks: Ranks, options: dict[str, Any]) -> None:
    parts = [
        {"scores": cosines(rank, size, 5), "sample_weight": np.zeros(size)}
        for rank, size in enumerate((4, 0, 3))
    ]
    text = "sample_weight must have a positive sum, got 0.0"
    assert outcomes_of_validation(ranks, parts, **options) == [text] * 3
    del parts[1]["sample_weight"]  # which weighs nobody
    assert outcomes_of_validation(ranks, parts, **options) == [text] * 3


GOOD_PARTS = {
    "nobody anywhere": [
        {"scores": np.zeros((0, 5))} | ({"sample_weight": np.zeros(0)} if rank else {})
        for rank in range(3)
    ],
    "uneven": [{"scores": cosines(rank, 3 * rank, 5)} for rank in range(3)],
    "nobody on one rank": [
        {"scores": cosines(rank, 4, 5), "sample_weight": np.full(4, float(rank))}
        for rank in range(3)
    ],
    "weights on an empty rank": [
        {"scores": cosines(rank, size, 5), "sample_weight": np.ones(size)}
        for rank, size in enumerate((4, 0, 1))
    ],
    "weights on some ranks": [
        {"scores": cosines(rank, 4, 5)} | ({"sample_weight": np.ones(4)} if rank == 1 else {})
        for rank in range(3)
    ],
    "weights of all problems and of each": [
        {"scores": cosines(rank, 2, 4, 5), "sample_weight": np.ones((4,) if rank == 1 else (2, 4))}
        for rank in range(3)
    ],
    "nan in an absent sample": [
        {
            "scores": with_entry(cosines(rank, 4, 5), (rank, 0), np.nan),
            "sample_weight": with_entry(np.ones(4), rank, 0.0),
        }
        for rank in range(3)
    ],
}


@EVERYWHERE
@pytest.mark.parametrize("parts", GOOD_PARTS.values(), ids=GOOD_PARTS)
def test_good_values_pass_and_have_the_same_codes(
    ranks: Ranks, parts: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    def run(validate: bool) -> list[np.ndarray]:
        chosen = {"settings": options | {"validate": validate}}
        return ranks.run(codes_of_part, [part | chosen for part in parts])

    for found, expected in zip(run(validate=True), run(validate=False), strict=True):
        np.testing.assert_array_equal(found, expected)


def validated_alone(rank: int, scores: np.ndarray) -> list[str]:
    """Return the errors of a bad batch that no other rank has to do with."""
    errors = []
    for call in (
        SinkhornKnopp(validate=True).eval(),
        SinkhornKnopp(validate=True, synchronize=False),
        lambda values: sinkhorn_knopp(values, validate=True, synchronize=False),
    ):
        try:
            call(torch.tensor(scores))
        except ValueError as raised:
            errors.append(str(raised))
    return errors


def test_without_synchronisation_each_rank_validates_its_own_values(ranks: Ranks) -> None:
    parts = [np.full((4, 5), np.nan), cosines(1, 4, 5), np.zeros((0, 5))]
    assert ranks.run(validated_alone, parts) == [[FINITE.format("nan")] * 3, [], []]


# The marginal error


def error_of_part(rank: int, part: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
    tensors = {
        name: torch.tensor(value) for name, value in part.items() if isinstance(value, np.ndarray)
    }
    with Collectives() as collectives:
        error = marginal_error(**tensors, synchronize=part.get("synchronize", True))
    return error.numpy(), collectives.numels


def dirichlet(seed: int, *shape: int) -> np.ndarray:
    """Return codes (..., K) whose rows sum to 1."""
    return np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])


@EACH_SPLIT
def test_the_marginal_error_is_that_of_the_whole_batch_on_every_rank(
    start_ranks: Callable[[int], Ranks], sizes: tuple[int, ...]
) -> None:
    codes = dirichlet(0, 2, 64, 10)
    parts = [{"codes": part} for part in along_samples(codes, sizes, -2)]
    expected = [oracles.marginal_error(own) for own in codes]
    for errors, numels in start_ranks(len(sizes)).run(error_of_part, parts):
        np.testing.assert_allclose(errors, expected, rtol=1e-12)
        assert len(numels) == 1  # for all problems


@given(weighted_splits(), seeds)
@settings(max_examples=40)
def test_any_split_has_the_marginal_error_of_the_whole_batch(
    start_ranks: Callable[[int], Ranks], drawn: Any, seed: int
) -> None:
    problem, sizes, sample_weight, prototype_weight = drawn
    codes = dirichlet(seed, *problem.scores.shape)
    expected = oracles.marginal_error(codes, sample_weight, prototype_weight)
    codes[sample_weight == 0] = np.nan  # absent, so that nobody may see it
    parts = [
        {"codes": part, "sample_weight": weight, "prototype_weight": prototype_weight}
        for part, weight in zip(
            along_samples(codes, sizes, -2), along_samples(sample_weight, sizes, -1), strict=True
        )
    ]
    for error, _ in start_ranks(3).run(error_of_part, parts):
        np.testing.assert_allclose(error, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decades", [(-40, -40, -40), (37, 38, 38), (-40, 3, 20)], ids=str)
def test_the_marginal_error_knows_weights_of_different_decades(
    start_ranks: Callable[[int], Ranks], decades: tuple[int, ...]
) -> None:
    codes = dirichlet(3, 12, 5).astype(np.float32)
    weight = np.repeat([10.0**power for power in decades], 4).astype(np.float32)
    parts = [
        {"codes": part, "sample_weight": of_part}
        for part, of_part in zip(np.split(codes, 3), np.split(weight, 3), strict=True)
    ]
    expected = oracles.marginal_error(codes.astype(float), weight.astype(float))
    for error, _ in start_ranks(3).run(error_of_part, parts):
        np.testing.assert_allclose(error, expected, rtol=1e-4)


@pytest.mark.parametrize("weight", [None, 0.0])
def test_nobody_on_any_rank_has_no_marginal_error(ranks: Ranks, weight: float | None) -> None:
    sizes = (0, 0, 0) if weight is None else (4, 0, 3)
    parts = [
        {"codes": dirichlet(1, 2, size, 5)}
        | ({} if weight is None else {"sample_weight": np.full((2, size), weight)})
        for size in sizes
    ]
    for errors, _ in ranks.run(error_of_part, parts):
        assert errors.tolist() == [0, 0]


def test_without_synchronisation_each_rank_has_its_own_marginal_error(ranks: Ranks) -> None:
    parts = [dirichlet(seed, size, 5) for seed, size in enumerate((6, 1, 4))]
    results = ranks.run(error_of_part, [{"codes": part, "synchronize": False} for part in parts])
    for part, (error, numels) in zip(parts, results, strict=True):
        assert numels == []
        np.testing.assert_allclose(error, oracles.marginal_error(part), rtol=1e-12)


def errors_in_groups(rank: int, codes: np.ndarray) -> float | str:
    group = dist.new_group([0, 1])
    try:
        return marginal_error(torch.tensor(codes), process_group=group).item()
    except ValueError as error:
        return str(error)


def test_a_group_shares_its_own_marginal_error_and_refuses_strangers(ranks: Ranks) -> None:
    parts = [dirichlet(seed, size, 5) for seed, size in enumerate((6, 3, 4))]
    of_pair = oracles.marginal_error(np.concatenate(parts[:2]))
    *pair, stranger = ranks.run(errors_in_groups, parts)
    np.testing.assert_allclose(pair, of_pair, rtol=1e-12)
    assert stranger == ("process_group must contain the calling rank, got a group without rank 2")


# What is sent


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"iterations": 1}, 2),
        ({"iterations": 8}, 9),
        ({"iterations": 1, "relaxation": 0.2}, 2),
        ({"iterations": 3, "relaxation": 0.2}, 4),
        ({"iterations": 8, "relaxation": 0.2}, 9),
        ({"iterations": 8, "relaxation": 0.2, "synchronize": False}, 0),
        ({"iterations": 8, "tolerance": 1e-9, "synchronize": False}, 0),
        ({"iterations": 8, "tolerance": 1e-9}, 9),
    ],
    ids=str,
)
def test_all_problems_share_few_collectives(
    ranks: Ranks, options: dict[str, Any], calls: int, validate: bool, hard: bool
) -> None:
    # Two for the first iteration, one for each of the others, and one for all that is validated.
    chosen = options | {"hard": hard, "validate": validate}
    parts = [
        {"scores": cosines(rank, 2, size, 5), "settings": chosen}
        for rank, size in enumerate((30, 0, 7))
    ]
    expected = calls + (validate and options.get("synchronize", True))
    assert [len(numels) for numels in ranks.run(payloads, parts)] == [expected] * 3


def modules_alone(rank: int, scores: np.ndarray) -> list[np.ndarray] | None:
    if rank != 0:
        return None
    options: list[dict[str, Any]] = [
        {"relaxation": 0.2},
        {"tolerance": 0.1, "iterations": 40},
        {"hard": True},
        {"validate": True},
    ]
    modules = [SinkhornKnopp(**chosen).eval() for chosen in options]
    return [module(torch.tensor(scores)).numpy() for module in modules]


def test_one_rank_alone_may_use_every_option_in_eval(ranks: Ranks) -> None:
    scores = cosines(1, 12, 5)
    found = ranks.run(modules_alone, [scores] * 3)[0]
    soft = oracles.sinkhorn(scores, 0.05, 3)
    near = enough(CodesProblem(scores, 0.05, 40), 0.1)[1]
    for codes, expected in zip(found, [relaxed(scores), near, one_hot(soft), soft], strict=True):
        np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-12)
