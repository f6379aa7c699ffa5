"""What a training step sends: few collectives, each as long as the prototypes of all code views."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swavkit import SwAVLoss
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

VIEWS, K = 4, 50


def collectives_of_a_step(rank: int, settings: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return the number of entries of each, forward and backward, once the first calls are over."""
    criterion = SwAVLoss(8, K, **settings)
    for _ in range(6):
        features = torch.randn(VIEWS, 3 + rank, 8, requires_grad=True)
        with Collectives() as forward:
            loss = criterion(features)
        with Collectives() as backward:
            loss.backward()
    return forward.numels, backward.numels


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [{}, {"queue_length": 16}, {"num_code_views": 1}, {"num_code_views": 3}, {"freeze_steps": 9}],
    ids=str,
)
def test_a_step_makes_one_collective_more_than_iterations(
    ranks: Ranks, settings: dict[str, Any], iterations: int
) -> None:
    code_views = settings.get("num_code_views", 2)
    arguments = [{**settings, "iterations": iterations}] * 3
    for forward, backward in ranks.run(collectives_of_a_step, arguments):
        assert len(forward) == iterations + 1  # 4 as published: a maximum, and a sum in each
        assert all(code_views * K <= numel <= code_views * K + 4 for numel in forward)
        assert not backward
