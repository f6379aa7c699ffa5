"""Whole loss curves: of each form of the loss, precision and number of ranks, beside float32's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss
from tests.ranks import Ranks

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, SAMPLES, VIEWS, INPUTS, CLUSTERS, PROTOTYPES = 300, 48, 4, 16, 10, 20


def curve(rank: int, form: dict[str, Any]) -> list[float]:
    """Train on a part of each batch, and return the loss of each step."""
    settings = dict(form)
    dtype, autocast = settings.pop("dtype"), settings.pop("autocast", None)
    parts = settings.pop("parts", 1)
    torch.manual_seed(0)
    centers = torch.randn(CLUSTERS, INPUTS)
    network: nn.Module = nn.Sequential(
        nn.Linear(INPUTS, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8)
    ).to(dtype)
    criterion: nn.Module = SwAVLoss(
        8, PROTOTYPES, queue_length=96 // parts, queue_start=50, freeze_steps=20, **settings
    ).to(dtype)
    if parts > 1:
        network = DistributedDataParallel(network)
        if not settings.get("shard_prototypes"):
            criterion = DistributedDataParallel(criterion)
    optimizers = [
        torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        for module in (network, criterion)
    ]
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        labels = torch.randint(CLUSTERS, (SAMPLES,), generator=generator)
        noise = torch.randn(VIEWS, SAMPLES, INPUTS, generator=generator)
        views = (centers[labels] + 0.5 * noise).to(dtype).chunk(parts, dim=1)[rank % parts]
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            loss = criterion(network(views))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def expected(start_ranks: Callable[[int], Ranks]) -> np.ndarray:
    """The curve of one rank with the whole scores, in float64."""
    [losses] = start_ranks(1).run(curve, [{"dtype": torch.float64, "memory": "full"}])
    losses = np.array(losses)
    assert losses[-20:].mean() < 0.7 * losses[30:50].mean()  # It learns.
    return losses


@pytest.mark.parametrize(
    ("form", "atol"),
    [
        ({"dtype": torch.float64, "memory": "streamed"}, 1e-12),
        ({"dtype": torch.float64, "memory": "streamed", "parts": 2}, 1e-12),
        ({"dtype": torch.float64, "parts": 2}, 1e-12),
        ({"dtype": torch.float64, "parts": 2, "shard_prototypes": True}, 1e-12),
        ({"dtype": torch.float32}, 1e-4),
        ({"dtype": torch.float32, "memory": "streamed"}, 1e-4),
        ({"dtype": torch.float32, "autocast": torch.bfloat16}, 0.1),
        ({"dtype": torch.float32, "autocast": torch.float16}, 0.05),
    ],
    ids=str,
)
def test_a_whole_curve_is_that_of_one_rank_with_the_whole_scores(
    start_ranks: Callable[[int], Ranks], expected: np.ndarray, form: dict[str, Any], atol: float
) -> None:
    parts = form.get("parts", 1)
    curves = np.array(start_ranks(parts).run(curve, [form] * parts))
    found = curves.mean(axis=0)  # Of equally many samples.
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
