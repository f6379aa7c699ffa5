"""What a training step sends: few collectives, each as long as the prototypes of all code views."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from swavkit import SwAVLoss
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

VIEWS, K, RANKS = 4, 50, 3
HEADS = (K, 20, 7)


def sent_in_a_step(criterion: SwAVLoss, rank: int, of_codes: dict[str, Any]) -> list[list[int]]:
    """Return the number of entries of each, forward and backward, once nothing is compared."""
    for name, value in of_codes.items():
        setattr(criterion.sinkhorn, name, value)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):  # the first two compare settings
        features = torch.randn(VIEWS, 3 + rank, 8, generator=generator).requires_grad_()
        with Collectives() as forward:
            loss = criterion(features)
        with Collectives() as backward:
            loss.backward()
    return [forward.numels, backward.numels]


def collectives_of_a_step(rank: int, settings: dict[str, Any]) -> list[list[int]]:
    criterion = SwAVLoss(8, **settings)
    return sent_in_a_step(criterion, rank, {})


SETTINGS: list[dict[str, Any]] = [
    {},
    {"queue_length": 16},
    {"num_code_views": 1},
    {"num_code_views": 3},
    {"freeze_steps": 9},
    {"reduction": "global_mean"},
    {"reduction": "global_mean", "queue_length": 16, "freeze_steps": 9},
]


@pytest.mark.parametrize("memory", ["full", "streamed"])
@pytest.mark.parametrize("num_prototypes", [K, HEADS], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_makes_one_collective_more_than_iterations(
    ranks: Ranks, settings: dict[str, Any], iterations: int, num_prototypes: Any, memory: str
) -> None:
    of_all_heads = K if num_prototypes == K else sum(HEADS)
    views, heads = settings.get("num_code_views", 2), 1 if num_prototypes == K else len(HEADS)
    least = views * of_all_heads
    own = {"iterations": iterations, "num_prototypes": num_prototypes, "memory": memory}
    for forward, backward in ranks.run(collectives_of_a_step, [settings | own] * RANKS):
        if settings.get("reduction") == "global_mean":
            assert forward.pop(0) == 1  # the summed weight
        assert len(forward) == iterations + 1  # a maximum, and a sum in each iteration
        # With the maximum goes a largest mass of each code view and head.
        assert all(least <= numel <= least + max(4, views * heads) for numel in forward)
        assert not backward


def heads_together_and_alone(rank: int, argument: tuple[dict[str, Any], ...]) -> list[list[int]]:
    """Return what is sent forward by all heads together, and by each in a loss of its own."""
    settings, of_codes = argument
    together = SwAVLoss(8, HEADS, **settings)
    singles = [SwAVLoss(8, size, **settings) for size in HEADS]
    for single, head in zip(singles, together.prototypes, strict=True):
        single.prototypes.load_state_dict(head.state_dict())
    return [sent_in_a_step(each, rank, of_codes)[0] for each in (together, *singles)]


@pytest.mark.parametrize("memory", ["full", "streamed"])
@pytest.mark.parametrize(
    ("iterations", "of_codes"),
    [(3, {}), (3, {"hard": True}), (1, {"relaxation": 0.1}), (3, {"relaxation": 0.1})],
    ids=str,
)
def test_heads_send_together_what_each_would_at_the_same_time(
    ranks: Ranks, iterations: int, of_codes: dict[str, Any], memory: str
) -> None:
    settings = {"iterations": iterations, "memory": memory}
    relaxed = "relaxation" in of_codes
    for together, *alone in ranks.run(heads_together_and_alone, [(settings, of_codes)] * RANKS):
        assert together == [sum(sent) for sent in zip(*alone, strict=True)]
        for size, sent in zip(HEADS, alone, strict=True):
            # The largest mass of a sample is sent along with the maximum. Relaxed masses may be
            # too small to be summed, so that they are gathered; and their total is sent along with
            # the first.
            later = 2 * size * (RANKS if relaxed else 1)
            assert sent == [2 * (size + 1), 2 * (size + relaxed)] + [later] * (iterations - 1)


@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_a_head_that_is_within_the_tolerance_sends_no_more(ranks: Ranks, memory: str) -> None:
    settings = {"iterations": 40, "memory": memory}
    arguments = [(settings, {"tolerance": 0.05})] * RANKS
    for together, *alone in ranks.run(heads_together_and_alone, arguments):
        assert len({len(sent) for sent in alone}) > 1
        assert max(map(len, alone)) < 41
        assert together == [sum(sent) for sent in itertools.zip_longest(*alone, fillvalue=0)]
