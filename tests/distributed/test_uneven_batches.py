"""Ranks with different numbers of batches: the ways that the documentation gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss, multi_crop_forward
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

BATCHES = (2, 4)  # of each rank
SIZES = 8, 6  # of the crops

Crops = list[Tensor]  # (B, 3, size, size), a size each
Loop = Callable[[nn.Module, Iterable[Crops], int], Iterator[Tensor]]


class Model(nn.Module):
    """As in the documentation, with a tiny encoder."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)
        )
        self.criterion = SwAVLoss(4, 5, reduction="global_mean")
        self.double()

    def forward(self, crops: Crops) -> Tensor:
        return self.criterion(multi_crop_forward(self.encoder, crops))


def loader(rank: int) -> list[Crops]:
    generator = torch.Generator().manual_seed(rank)
    return [
        [torch.rand(7, 3, size, size, generator=generator).double() for size in SIZES]
        for _ in range(BATCHES[rank])
    ]


def of_all_ranks(op: Any, number: int) -> int:
    counted = torch.tensor(number)
    dist.all_reduce(counted, op=op)
    return int(counted)


def shortest(model: nn.Module, batches: list[Crops]) -> Iterator[Tensor]:
    steps = of_all_ranks(dist.ReduceOp.MIN, len(batches))
    for crops in islice(batches, steps):
        yield model(crops)


def longest(model: nn.Module, batches: list[Crops]) -> Iterator[Tensor]:
    steps = of_all_ranks(dist.ReduceOp.MAX, len(batches))
    remaining = iter(batches)
    empty = [torch.empty(0, 3, size, size).double() for size in SIZES]
    for _ in range(steps):
        yield model(next(remaining, empty))


def unknown(model: nn.Module, batches: list[Crops]) -> Iterator[Tensor]:
    try:
        with model.join(throw_on_early_termination=True):
            for crops in batches:
                yield model(crops)
    except RuntimeError as error:
        if "exhausted" not in str(error):
            raise


def train(model: nn.Module, losses: Iterable[Tensor]) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    steps = 0
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
    return {"steps": steps, "parameters": [p.detach().numpy().copy() for p in model.parameters()]}


def two_epochs(rank: int, loop: Loop) -> list[dict[str, Any]]:
    model = DistributedDataParallel(Model())
    return [train(model, loop(model, loader(rank))) for _ in range(2)]


def alone(steps: int) -> list[dict[str, Any]]:
    """Two epochs of one process with the batches of all ranks, of which some have ended."""
    ranks = [loader(rank) for rank in range(len(BATCHES))]
    batches = [
        [torch.cat(crops) for crops in zip(*(b[step] for b in ranks if step < len(b)), strict=True)]
        for step in range(steps)
    ]
    model = Model()
    return [train(model, map(model, batches)) for _ in range(2)]


@pytest.mark.parametrize(
    ("loop", "steps"),
    [(shortest, min(BATCHES)), (longest, max(BATCHES)), (unknown, min(BATCHES))],
)
def test_epochs_of_uneven_ranks_are_those_of_one_process(
    start_ranks: Callable[[int], Ranks], loop: Loop, steps: int
) -> None:
    expected = alone(steps)
    for epochs in start_ranks(len(BATCHES)).run(two_epochs, [loop] * len(BATCHES)):
        for epoch, one in zip(epochs, expected, strict=True):
            assert epoch["steps"] == one["steps"] == steps
            for ours, theirs in zip(epoch["parameters"], one["parameters"], strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
