"""The processes of the tests themselves: they do what they are told and fail aloud."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, Ranks

pytestmark = pytest.mark.distributed


def total(rank: int, value: float) -> float:
    summed = torch.tensor(value)
    dist.all_reduce(summed)
    return summed.item()


def fail_on_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("nothing to see")
    dist.barrier()


def test_every_rank_gets_its_own_argument(ranks: Ranks) -> None:
    assert ranks.run(total, [1.0, 2.0, 4.0]) == [7.0] * 3


def test_a_failing_rank_shows_its_error_and_stops_the_others(ranks: Ranks) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1: .*nothing to see"):
        ranks.run(fail_on_one)
    assert not ranks.alive
