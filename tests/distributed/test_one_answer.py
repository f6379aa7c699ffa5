"""Any number of processes train like one with the batch of all, however it lies on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swavkit import SwAVLoss
from tests.distributed.one_answer import ATOL, EACH_VARIANT, STEPS, assert_one_answer
from tests.ranks import Ranks
from tests.strategies import seeds, splits

pytestmark = pytest.mark.distributed

# How a batch lies on the ranks: evenly, unevenly, on some without any of it.
SIZES = [(8,), (4, 4), (7, 1), (8, 0), (3, 3, 3), (5, 2, 1), (0, 6, 0), (2, 2, 2, 2), (4, 0, 3, 1)]


@EACH_VARIANT
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_training_does_not_depend_on_the_split(
    start_ranks: Callable[[int], Ranks],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    variant: dict[str, Any],
) -> None:
    assert_one_answer(start_ranks(len(sizes)), sizes, dtype=dtype, **variant)


@EACH_VARIANT
@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (3, 3, 3), "queue_length": 6},  # a queue that wraps around
        {"sizes": (5, 0, 2), "queue_length": 5 * STEPS, "queue_start": 3},  # one that never does
        {"sizes": (5, 0, 2), "num_prototypes": (5, 3), "freeze_steps": 4},
        {"sizes": (5, 1, 2), "weights": (0, 0, 0.5, 1, 3)},
        {"sizes": (5, 1, 2), "weights": (0, 1), "queue_length": 5 * STEPS},
        {"sizes": (4, 1), "group": (0, 2), "queue_length": 4 * STEPS},
        {"sizes": (1, 4), "group": (1, 2), "num_prototypes": (5, 3)},
        {"sizes": (4, 1, 1), "num_code_views": 1, "prototype_gradient": "published"},
        {"sizes": (4, 1, 1), "num_code_views": 3, "iterations": 8, "epsilon": 0.1},
    ],
    ids=str,
)
def test_nor_does_it_with_queues_heads_weights_and_groups(
    ranks: Ranks, options: dict[str, Any], variant: dict[str, Any]
) -> None:
    assert_one_answer(ranks, **options, **variant)


@st.composite
def shardings(draw: st.DrawFn) -> dict[str, Any]:
    """A batch on 1 to 4 ranks, and settings of the loss."""
    size = draw(st.integers(1, 4))
    samples = draw(st.integers(1, 9))
    queue = draw(st.sampled_from([0, samples * STEPS]))
    return {
        "sizes": draw(splits(samples, size)),
        "seed": draw(seeds),
        "dtype": draw(st.sampled_from(list(ATOL))),
        "weights": draw(st.sampled_from([(), (0, 1), (0.25, 2)])),
        "queue_length": queue,
        "num_prototypes": draw(st.sampled_from([4, (3, 5)])),
        "freeze_steps": draw(st.sampled_from([0, 5])),
    }


@pytest.mark.slow
@EACH_VARIANT
@given(shardings())
@settings(max_examples=15)
def test_any_sharding_trains_like_one_process(
    start_ranks: Callable[[int], Ranks], variant: dict[str, Any], sharding: dict[str, Any]
) -> None:
    ranks = start_ranks(len(sharding["sizes"]))
    assert_one_answer(ranks, **sharding, **variant)


# The mean of what


def losses(rank: int, part: dict[str, Any]) -> dict[str, float]:
    """Return the loss of one batch by either reduction, in training, in eval and alone."""
    features = torch.tensor(part["features"])
    outcome = {}
    for name, settings_of_it in {
        "mean": {"reduction": "mean"},
        "global": {"reduction": "global_mean"},
        "alone": {"reduction": "global_mean", "synchronize": False},
        "always": {"reduction": "global_mean", "synchronize": "always"},
    }.items():
        torch.manual_seed(0)
        criterion = SwAVLoss(4, 5, **settings_of_it).double()
        outcome[name] = criterion(features).item()
        outcome[f"{name}, in eval"] = criterion.eval()(features).item()
        torch.manual_seed(0)
        criterion = SwAVLoss(4, 5, **settings_of_it).double()
        criterion.sinkhorn.register_forward_hook(lambda module, given, codes: None)
        outcome[f"{name}, hooked"] = criterion(features).item()
    return outcome


def test_the_mean_over_all_samples_is_taken_where_a_call_synchronises(ranks: Ranks) -> None:
    sizes = (5, 2, 1)
    parts = [{"features": np.random.default_rng(size).normal(size=(3, size, 4))} for size in sizes]
    for size, outcome in zip(sizes, ranks.run(losses, parts), strict=True):
        scale = 3 * size / 8
        for name in ("global", "always"):
            np.testing.assert_allclose(outcome[name], scale * outcome["mean"], rtol=1e-12)
            np.testing.assert_allclose(outcome[f"{name}, hooked"], outcome[name], rtol=1e-12)
        np.testing.assert_allclose(outcome["always, in eval"], outcome["always"], rtol=1e-12)
        for name in ("global, in eval", "alone", "alone, in eval", "alone, hooked"):
            np.testing.assert_allclose(outcome[name], outcome["mean, in eval"], rtol=1e-12)


def nobody(rank: int) -> tuple[float, bool]:
    criterion = SwAVLoss(4, 5, reduction="global_mean")
    features = torch.zeros(3, 0, 4, requires_grad=True)
    loss = criterion(features)
    loss.backward()
    weight = criterion.prototypes.weight
    return loss.item(), features.grad is not None and not weight.grad.any().item()


def test_a_batch_that_is_empty_everywhere_has_a_loss_of_0(ranks: Ranks) -> None:
    assert ranks.run(nobody) == [(0.0, True)] * 3
