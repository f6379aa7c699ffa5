"""A long training: what a step keeps is replaced by the next one, so memory does not grow."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch

from swavkit import ClusterMonitor, SwAVLoss

pytestmark = pytest.mark.slow

STEPS, WARM_UP = 4_000, 1_000
STATUS = Path("/proc/self/statm")
MOST_GROWTH = 2**20  # bytes; if a step kept a number, 3,000 steps would take more


def resident_bytes() -> int:
    return int(STATUS.read_text().split()[1]) * 4096


def objects() -> Counter[str]:
    """Count the objects of each type that the garbage collector knows."""
    gc.collect()
    return Counter(type(each).__name__ for each in gc.get_objects())


@pytest.mark.skipif(not STATUS.exists(), reason="this system counts no peak of memory")
def test_memory_does_not_grow() -> None:
    criterion = SwAVLoss(8, (12, 7), queue_length=32, queue_start=5, freeze_steps=10)
    network = torch.nn.Linear(6, 8)
    optimizer = torch.optim.Adam([*network.parameters(), *criterion.parameters()])
    monitor = ClusterMonitor(12, window=50)
    for step in range(STEPS):
        features = network(torch.randn(3, 8, 6))
        loss, statistics = criterion(features, return_statistics=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.update(statistics[0], loss=loss, features=features)
        if step % 100 == 0:
            monitor.compute()
        if step == WARM_UP:
            before, bytes_before = objects(), resident_bytes()
    grown = objects() - before
    assert sum(grown.values()) < 200, grown
    assert resident_bytes() - bytes_before < MOST_GROWTH
    assert loss.isfinite()
    assert criterion.steps == STEPS
