"""The guide of docs/start.rst: accumulated gradients are those of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swavkit import SwAVLoss, multi_crop_forward
from tests import tolerances

BATCH, STEPS = 12, 5


def training(dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, SwAVLoss, Any]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(32), nn.LayerNorm(32), nn.Linear(32, 8))
    network(torch.zeros(1, 3, 4, 4))
    criterion = SwAVLoss(8, 6, queue_length=20, queue_start=1, freeze_steps=2, **settings)
    network, criterion = network.to(dtype), criterion.to(dtype)
    parameters = [*network.parameters(), *criterion.parameters()]
    return network, criterion, torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


def whole(network: nn.Module, criterion: SwAVLoss, crops: list[Tensor]) -> Tensor:
    loss = criterion(multi_crop_forward(network, crops))
    loss.backward()
    return loss


def in_parts(network: nn.Module, criterion: SwAVLoss, crops: list[Tensor], size: int) -> Tensor:
    micro_batches = [[crop[i : i + size] for crop in crops] for i in range(0, BATCH, size)]
    with torch.no_grad():
        parts = [multi_crop_forward(network, micro_batch) for micro_batch in micro_batches]
    features = torch.cat(parts, dim=1).requires_grad_()
    loss = criterion(features)
    loss.backward()
    assert features.grad is not None
    for micro_batch, gradient in zip(micro_batches, features.grad.split(size, dim=1), strict=True):
        multi_crop_forward(network, micro_batch).backward(gradient)
    return loss


@pytest.mark.parametrize("memory", ["full", "streamed"])
@pytest.mark.parametrize("size", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_micro_batches_train_as_the_whole_batch(dtype: torch.dtype, size: int, memory: str) -> None:
    ours, theirs = (training(dtype, memory=memory) for _ in range(2))
    tolerance = {"rtol": 0.0, "atol": tolerances.ATOL[dtype]}
    for step in range(STEPS):
        torch.manual_seed(step)
        crops = list(torch.rand(4, BATCH, 3, 4, 4, dtype=dtype).unbind())
        losses = in_parts(*ours[:2], crops, size), whole(*theirs[:2], crops)
        torch.testing.assert_close(*losses, **tolerance)
        for _, _, optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        prototypes = ours[1].prototypes.weight
        if step < 2:  # frozen
            torch.testing.assert_close(prototypes, training(dtype)[1].prototypes.weight)
        assert ours[1].steps == step + 1
    assert len(ours[1].queue or ()) == 20
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()), **tolerance)
