"""Reductions over processes: of one tensor, and of several that travel together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swavkit.distributed.collectives import (
    device_for,
    gather_over_ranks,
    in_one_collective,
    max_over_ranks,
    participants,
    sum_over_ranks,
)
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

REDUCTIONS = {"sum": sum_over_ranks, "max": max_over_ranks, "gather": gather_over_ranks}
ORACLES: dict[str, Any] = {"sum": np.sum, "max": np.max, "gather": np.stack}
SHAPES = [(2, 5), (), (0, 3), (4,), (1, 2, 3)]


def tensors_of(rank: int) -> list[Tensor]:
    """Return tensors of several shapes and dtypes, of which some have gaps in memory."""
    generator = np.random.default_rng(rank)
    values = [torch.tensor(generator.normal(size=shape)) for shape in SHAPES]
    values[0] = values[0].T.contiguous().T
    values[3] = values[3].float() + 2.0**-30  # which float32 has no room for beside a number
    return values


def reduced(rank: int, reduction: str) -> tuple[list[Tensor], list[Tensor], list[int]]:
    group = participants(None, True)
    with Collectives() as sent:
        together = in_one_collective(REDUCTIONS[reduction], tensors_of(rank), group)
    return together, [REDUCTIONS[reduction](each, group) for each in tensors_of(rank)], sent.numels


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_several_tensors_travel_as_one_and_come_back_as_they_were(
    ranks: Ranks, reduction: str
) -> None:
    entries = sum(int(np.prod(shape)) for shape in SHAPES)
    given = [tensors_of(rank) for rank in range(3)]
    expected = [
        ORACLES[reduction]([each.double().numpy() for each in of_ranks], axis=0)
        for of_ranks in zip(*given, strict=True)
    ]
    for together, singly, numels in ranks.run(reduced, [reduction] * 3):
        assert numels == [entries * (3 if reduction == "gather" else 1)]
        for index, value in enumerate(expected):
            assert together[index].dtype == given[0][index].dtype
            assert together[index].shape == value.shape
            atol = 1e-6 if together[index].dtype == torch.float32 else 1e-14
            np.testing.assert_allclose(together[index], value, rtol=0, atol=atol)
            np.testing.assert_allclose(singly[index], value, rtol=0, atol=atol)


def one_reduced(rank: int) -> tuple[bool, list[int]]:
    values = torch.full((4,), rank + 1.0)
    with Collectives() as sent:
        (total,) = in_one_collective(sum_over_ranks, [values], participants(None, True))
    return total is values and values.tolist() == [6.0] * 4, sent.numels


def test_one_tensor_by_itself_is_not_copied(ranks: Ranks) -> None:
    assert ranks.run(one_reduced) == [(True, [4])] * 3


def test_for_one_process_several_tensors_are_what_they_are() -> None:
    values = tensors_of(0)
    for reduction in (sum_over_ranks, max_over_ranks):
        found = in_one_collective(reduction, values, None)
        assert all(each is value for each, value in zip(found, values, strict=True))
    for each, value in zip(in_one_collective(gather_over_ranks, values, None), values, strict=True):
        assert torch.equal(each, value[None])


class Group:
    """What is asked of a process group to see where its tensors may be."""

    def __init__(self, *types: str) -> None:
        self._device_types = [torch.device(kind) for kind in types]


def test_a_group_that_takes_no_tensor_of_the_cpu_gets_one_of_its_own_device() -> None:
    cpu, first = torch.device("cpu"), torch.device("cuda", 1)
    assert device_for(None, cpu) == cpu
    assert device_for(Group("cuda"), cpu) == torch.device("cuda")  # NCCL alone
    assert device_for(Group("cuda"), first) == first
    assert device_for(Group("cpu", "cuda"), cpu) == cpu  # the default: both backends
    assert device_for(Group("cpu"), first) == cpu


def devices_of_gloo(rank: int) -> list[str]:
    group = participants(None, True)
    return [device_for(group, torch.device(kind)).type for kind in ("cpu", "meta")]


def test_gloo_takes_tensors_of_the_cpu(ranks: Ranks) -> None:
    assert [preferred for preferred, _ in ranks.run(devices_of_gloo)] == ["cpu"] * 3
    assert "meta" not in {other for _, other in ranks.run(devices_of_gloo)}
