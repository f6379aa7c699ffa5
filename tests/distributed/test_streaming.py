"""The loss block by block on several processes: that of one with the data of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from swavkit import SwAVLoss
from swavkit.fused import score_blocks
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

DIMENSION, VIEWS, STEPS = 4, 3, 3


@dataclass(frozen=True)
class Work:
    """What one process has to compute: features (steps, V, B, D) and weights (steps, B)."""

    features: np.ndarray
    weight: np.ndarray | None
    memory: str
    sizes: tuple[int, ...]
    queue_length: int
    rows: int = 6  # of a block: so many features
    iterations: int = 3
    relaxation: float = float("inf")
    tolerance: float | None = None


def train(rank: int, work: Work) -> dict[str, Any]:
    """Return each step's loss and gradients, and how much was sent."""
    torch.manual_seed(0)
    criterion = SwAVLoss(
        DIMENSION,
        work.sizes,
        queue_length=work.queue_length,
        queue_start=1,
        iterations=work.iterations,
        memory=work.memory,
    ).double()
    criterion.sinkhorn.relaxation = work.relaxation
    criterion.sinkhorn.tolerance = work.tolerance
    losses, to_features, to_weights = [], [], []
    small = {"_ENTRIES_OF_A_BLOCK": 1, "_FEATURES_OF_A_BLOCK": work.rows}
    with Collectives() as sent, patch.multiple(score_blocks, **small):
        for step, features in enumerate(torch.tensor(work.features)):
            features.requires_grad_()
            weight = None if work.weight is None else torch.tensor(work.weight[step])
            loss = criterion(features, sample_weight=weight)
            gradients = torch.autograd.grad(loss, [features, *criterion.parameters()])
            losses.append(loss.item())
            to_features.append(gradients[0].numpy())
            to_weights.append(np.concatenate([each.numpy().ravel() for each in gradients[1:]]))
    return {
        "losses": np.array(losses),
        "to_features": np.stack(to_features),
        "to_weights": np.stack(to_weights),
        "sent": sent.numels,
    }


def shards(samples: Sequence[int], weighted: bool) -> list[dict[str, Any]]:
    """Return features, and weights if asked for, that are different on each rank."""
    generator = np.random.default_rng(0)
    return [
        {
            "features": generator.normal(size=(STEPS, VIEWS, count, DIMENSION)),
            "weight": generator.integers(0, 4, (STEPS, count)) / 2 if weighted else None,
        }
        for count in samples
    ]


def assert_as_one_process(ranks: Ranks, parts: list[dict[str, Any]], **settings: Any) -> None:
    """The local means, weighted with their samples, are the mean of all; so are the gradients."""
    settings = {"sizes": (7,), "queue_length": 0} | settings
    results = {
        memory: ranks.run(train, [Work(**part, **settings, memory=memory) for part in parts])
        for memory in ("streamed", "full")
    }
    whole = {
        "features": np.concatenate([part["features"] for part in parts], axis=2),
        "weight": None
        if parts[0]["weight"] is None
        else np.concatenate([part["weight"] for part in parts], axis=1),
    }
    together = settings | {"queue_length": settings["queue_length"] * len(parts)}
    alone = train(0, Work(**whole, **together, memory="full"))

    masses = np.array(  # (ranks, steps)
        [
            np.full(STEPS, part["features"].shape[2])
            if part["weight"] is None
            else part["weight"].sum(axis=1)
            for part in parts
        ],
        dtype=float,
    )
    masses /= masses.sum(axis=0)
    for memory, of_ranks in results.items():
        for name, combine in [
            ("losses", lambda values: np.sum(values, axis=0)),
            ("to_weights", lambda values: np.sum(values, axis=0)),
            ("to_features", lambda values: np.concatenate(values, axis=2)),
        ]:
            parts_of_it = [
                result[name] * mass.reshape(-1, *[1] * (result[name].ndim - 1))
                for result, mass in zip(of_ranks, masses, strict=True)
            ]
            np.testing.assert_allclose(
                combine(parts_of_it), alone[name], rtol=0, atol=1e-11, err_msg=f"{memory}: {name}"
            )
    assert [result["sent"] for result in results["streamed"]] == [
        result["sent"] for result in results["full"]
    ]
    several = len(parts) > 1
    assert bool(results["streamed"][0]["sent"]) == several
    if several:  # the codes are those of the whole batch, and not of its parts
        local = train(0, Work(**parts[0], **settings, memory="streamed"))
        if len(parts[0]["features"][0, 0]):
            difference = np.abs(local["losses"] - results["streamed"][0]["losses"])
            assert difference.max() > 1e-3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "samples", [(9,), (4, 4), (9, 1), (0, 7), (5, 2, 6), (8, 0, 3), (0, 0, 9)], ids=str
)
def test_any_shards_are_one_batch(
    start_ranks: Callable[[int], Ranks], samples: tuple[int, ...], weighted: bool
) -> None:
    assert_as_one_process(start_ranks(len(samples)), shards(samples, weighted))


@pytest.mark.parametrize("samples", [(5, 2, 6), (8, 0, 3)], ids=str)
def test_the_queues_of_all_ranks_take_part(ranks: Ranks, samples: tuple[int, ...]) -> None:
    # Long enough for all that is pushed, because one process would forget in another order.
    assert_as_one_process(ranks, shards(samples, False), queue_length=30)
    assert_as_one_process(ranks, shards(samples, True), queue_length=30, sizes=(7, 1, 4))


@pytest.mark.parametrize(
    "settings", [{"iterations": 12}, {"relaxation": 0.1}, {"iterations": 50, "tolerance": 0.2}]
)
def test_other_ways_to_the_codes_send_as_much(ranks: Ranks, settings: dict[str, Any]) -> None:
    assert_as_one_process(ranks, shards((5, 0, 6), True), **settings)


def test_ranks_may_differ_in_what_they_hold(ranks: Ranks) -> None:
    """Nothing that is sent depends on it: one rank may ask for details, and others have more."""
    parts = shards((5, 2, 6), False)
    settings: dict[str, Any] = {"sizes": (7, 4), "queue_length": 10}
    mixed = [
        Work(**part, **settings, memory=memory, rows=rows)
        for part, memory, rows in zip(
            parts, ["streamed", "full", "streamed"], [3, 1, 100], strict=True
        )
    ]
    full = [Work(**part, **settings, memory="full") for part in parts]
    for found, expected in zip(ranks.run(train, mixed), ranks.run(train, full), strict=True):
        assert found["sent"] == expected["sent"]
        for name in ("losses", "to_features", "to_weights"):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-11)
