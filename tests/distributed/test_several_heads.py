"""Several heads on several processes, frozen at first: as one process with the data of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss
from tests.optimizers import Lars, adamw, sgd
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

HEADS = (5, 3)
FROZEN, STEPS = 3, 6


class Model(nn.Module):
    """A linear encoder and its loss, as one module for DDP."""

    def __init__(self, queue_length: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.criterion = SwAVLoss(4, HEADS, freeze_steps=FROZEN, queue_length=queue_length)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs))
        return loss


def train(
    model: nn.Module,
    criterion: SwAVLoss,
    optimizer_of: Callable[[Any], torch.optim.Optimizer],
    inputs: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return the loss and each head's directions after each step."""
    optimizer = optimizer_of(model.parameters())
    losses, directions = [], []
    for batch in torch.tensor(inputs):
        optimizer.zero_grad()  # to none, so that a parameter without a gradient would be found
        loss = model(batch)
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
        directions.append(torch.cat([head.directions for head in criterion.prototypes]).numpy())
    return {"losses": np.array(losses), "directions": np.array(directions)}


def train_under_ddp(rank: int, argument: tuple[Any, np.ndarray]) -> dict[str, np.ndarray]:
    optimizer_of, inputs = argument
    torch.manual_seed(rank)  # DDP starts all of them from the weights of rank 0
    model = Model()
    return train(DistributedDataParallel(model), model.criterion, optimizer_of, inputs)


@pytest.mark.parametrize("optimizer_of", [sgd, adamw, Lars])
def test_heads_and_freezing_under_ddp_are_those_of_one_process(
    ranks: Ranks, optimizer_of: Callable[[Any], torch.optim.Optimizer]
) -> None:
    inputs = np.random.default_rng(0).normal(size=(3, STEPS, 3, 4, 6))  # of 3 ranks
    results = ranks.run(train_under_ddp, [(optimizer_of, shard) for shard in inputs])
    torch.manual_seed(0)
    model = Model(queue_length=3 * 12)  # as long as those of all ranks
    start = torch.cat([head.directions for head in model.criterion.prototypes]).numpy()
    alone = train(model, model.criterion, optimizer_of, np.concatenate(inputs, axis=2))

    mean_loss = np.mean([result["losses"] for result in results], axis=0)
    np.testing.assert_allclose(mean_loss, alone["losses"], rtol=0, atol=1e-10)
    for result in results:
        np.testing.assert_allclose(result["directions"], alone["directions"], rtol=0, atol=1e-10)
        cosines = (result["directions"] * start).sum(axis=-1)  # (steps, heads' rows)
        np.testing.assert_allclose(cosines[:FROZEN], 1, rtol=0, atol=1e-12)
        assert (cosines[FROZEN:] < 1 - 1e-8).all()
