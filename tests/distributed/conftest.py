"""Processes shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="session")
def start_ranks() -> Iterator[Callable[[int], Ranks]]:
    """A function that returns ``size`` processes, the same ones again while they live."""
    started: dict[int, Ranks] = {}

    def start(size: int) -> Ranks:
        if size not in started or not started[size].alive:
            started[size] = Ranks(size)
        return started[size]

    yield start
    for ranks in started.values():
        ranks.close()


@pytest.fixture
def ranks(start_ranks: Callable[[int], Ranks]) -> Ranks:
    """Three processes."""
    return start_ranks(3)
