"""Settings that differ between processes are found before anything hangs or mixes up numbers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from swavkit.distributed import agreement
from swavkit.distributed.agreement import Agreement, checksum, require_same
from swavkit.distributed.collectives import participants, sum_over_ranks
from tests.modes import Collectives, CountingBackend
from tests.ranks import Ranks, refusal

pytestmark = pytest.mark.distributed

CPU = torch.device("cpu")
BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
SETTINGS: dict[str, Any] = {
    "num_prototypes": 3000,
    "epsilon": 0.05,
    "hard": False,
    "tolerance": None,
    "relaxation": float("inf"),
    "the dtype of scores": torch.float32,
}


def compare(rank: int, record: dict[str, Any]) -> tuple[str | None, list[int]]:
    with Collectives() as collectives:
        text = refusal(lambda: require_same(record, dist.group.WORLD, CPU))
    return text, collectives.numels


def test_equal_settings_pass_in_one_collective_of_a_fixed_size(ranks: Ranks) -> None:
    short: dict[str, Any] = {"num_prototypes": 3}
    long = {f"setting {index}": 0.1 * index for index in range(31)}
    outcomes = [ranks.run(compare, [record] * 3) for record in (short, SETTINGS, long)]
    assert outcomes == [[(None, [3 * 32])] * 3] * 3


@pytest.mark.parametrize(
    ("name", "values", "got"),
    [
        ("num_prototypes", (3000, 3000, 300), "3000 on ranks 0, 1 and 300 on rank 2"),
        ("num_prototypes", (1, 2, 3), "1 on rank 0, 2 on rank 1 and 3 on rank 2"),
        ("epsilon", (0.05, 0.1, 0.05), "0.05 on ranks 0, 2 and 0.1 on rank 1"),
        ("epsilon", (0.05, 0.05, 1.0), "0.05 on ranks 0, 1 and 1 on rank 2"),
        ("hard", (True, False, False), "True on rank 0 and False on ranks 1, 2"),
        ("tolerance", (None, 0.01, None), "None on ranks 0, 2 and 0.01 on rank 1"),
        ("relaxation", (2.5, float("inf"), 2.5), "2.5 on ranks 0, 2 and inf on rank 1"),
        (
            "the dtype of scores",
            (torch.float32, torch.bfloat16, torch.float32),
            "torch.float32 on ranks 0, 2 and torch.bfloat16 on rank 1",
        ),
        (
            "checksum",
            tuple(torch.tensor(2**52 - 1 - (rank == 1)) for rank in range(3)),
            "4503599627370495 on ranks 0, 2 and 4503599627370494 on rank 1",
        ),
    ],
)
def test_a_setting_that_differs_is_named_with_all_values_and_ranks_on_all_of_them(
    ranks: Ranks, name: str, values: tuple[Any, ...], got: str
) -> None:
    outcomes = ranks.run(compare, [SETTINGS | {name: value} for value in values])
    text = f"{name} must be the same on all ranks, got {got}"
    assert outcomes == [(text, [3 * 32])] * 3


def test_all_settings_that_differ_are_named(ranks: Ranks) -> None:
    records = [SETTINGS | {"num_prototypes": rank, "epsilon": 0.5 + rank} for rank in range(3)]
    (first, _), *others = ranks.run(compare, records)
    assert first is not None
    lines = first.splitlines()
    assert [line.split()[0] for line in lines] == ["num_prototypes", "epsilon"]
    assert [text for text, _ in others] == [first, first]


def test_records_of_other_settings_are_an_error_on_all(ranks: Ranks) -> None:
    (first, _), *others = ranks.run(compare, [SETTINGS, SETTINGS, {"other": 1, **SETTINGS}])
    assert first is not None
    assert first.startswith("all ranks of a group must call the same module of the same")
    assert "on ranks 0, 1 and settings no. " in first
    assert [text for text, _ in others] == [first, first]


def advised(rank: int) -> str | None:
    advice = {"checksum": "wrap the module in DDP", "epsilon": "not this"}
    record = {"checksum": rank, "epsilon": 0.05}
    return refusal(lambda: require_same(record, dist.group.WORLD, CPU, advice=advice))


def test_advice_ends_the_report_of_its_setting(ranks: Ranks) -> None:
    text = "0 on rank 0, 1 on rank 1 and 2 on rank 2; wrap the module in DDP"
    assert ranks.run(advised) == [f"checksum must be the same on all ranks, got {text}"] * 3


def compare_in_a_pair(rank: int, value: int) -> str | None:
    pair = dist.new_group([0, 2])
    return refusal(lambda: require_same({"size": value}, pair if rank != 1 else None, CPU))


def test_a_group_compares_its_own_and_names_ranks_as_the_whole_job_does(ranks: Ranks) -> None:
    text = "size must be the same on all ranks, got 5 on rank 0 and 7 on rank 2"
    assert ranks.run(compare_in_a_pair, [5, 6, 7]) == [text, None, text]


def test_a_list_of_ranks_or_values_is_cut_where_it_gets_long() -> None:
    many = agreement._with_ranks(["3"] * 20 + ["4"], range(21))
    assert many == "3 on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more and 4 on rank 20"
    many = agreement._with_ranks([f"{rank}" for rank in range(12)], range(12))
    assert many.endswith("7 on rank 7 and 4 more values")


def test_a_record_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 32 settings, got 32"):
        require_same({f"setting {index}": 0 for index in range(32)}, None, CPU)


@pytest.mark.parametrize("dtype", BITS)
def test_a_checksum_sees_every_bit_and_the_order_of_rows(dtype: torch.dtype) -> None:
    values = torch.randn(7, 5).to(dtype)
    known = int(checksum(values))
    assert 0 <= known < 2**52
    assert int(checksum(values.clone())) == known
    assert int(checksum(values.T.contiguous().T)) == known
    assert int(checksum(values.flip(0))) != known
    for index in range(values.numel()):
        for bit in range(8 * values.element_size() - 1):
            other = values.clone()
            other.view(BITS[dtype]).view(-1)[index] ^= 1 << bit
            assert int(checksum(other)) != known
        other = values.clone()
        other.view(-1)[index] *= -1
        assert int(checksum(other)) != known
    assert int(checksum(2 * values)) != known


# At the first eager calls of a module


class Shared(nn.Module):
    """A module with a collective whose size depends on its input."""

    def __init__(self, *, repeatedly: bool = False) -> None:
        super().__init__()
        self.group: Any = None
        self.agreement = Agreement(repeatedly=repeatedly)

    def forward(self, values: Tensor) -> Tensor:
        group = participants(self.group, self.training)
        self.agreement.require(lambda: {"size": len(values)}, group, values.device)
        return sum_over_ranks(values * 2, group)


def collectives_of(work: Callable[[], Any]) -> list[int]:
    with Collectives() as collectives:
        work()
    return collectives.numels


RECORD, VALUES = 3 * 32, 4


def first_calls(rank: int) -> dict[str, list[list[int]]]:
    values = torch.ones(VALUES)
    outcome = {}

    def calls(module: nn.Module, number: int = 3) -> list[list[int]]:
        return [collectives_of(lambda: module(values)) for _ in range(number)]

    module = Shared()
    outcome["evaluated"] = calls(module.eval(), 1)
    outcome["used"] = calls(module.train())
    repeated = Shared(repeatedly=True)
    outcome["repeatedly"] = calls(repeated, 9)
    outcome["repeatedly, copied"] = calls(copy.deepcopy(repeated))
    outcome["repeatedly, pickled"] = calls(pickle.loads(pickle.dumps(repeated)))
    outcome["copied"] = calls(copy.deepcopy(module))
    outcome["pickled"] = calls(pickle.loads(pickle.dumps(module)))
    module.group = dist.new_group([0, 1, 2])
    outcome["another group"] = calls(module)
    outcome["asked for"] = [
        collectives_of(partial(module.agreement.require, dict, module.group, CPU, again=again))
        for again in (False, True)
    ]
    return outcome


def test_settings_are_compared_once_a_module_and_group(ranks: Ranks) -> None:
    once = [[RECORD, VALUES], [VALUES], [VALUES]]
    expected = {
        "evaluated": [[]],
        "used": once,
        "repeatedly": [
            [RECORD, VALUES] if call in (1, 2, 4, 8) else [VALUES] for call in range(1, 10)
        ],
        "repeatedly, copied": [[RECORD, VALUES], [RECORD, VALUES], [VALUES]],
        "repeatedly, pickled": [[RECORD, VALUES], [RECORD, VALUES], [VALUES]],
        "copied": once,
        "pickled": once,
        "another group": once,
        "asked for": [[], [RECORD]],
    }
    assert ranks.run(first_calls) == [expected] * 3


def failing_first_call(rank: int, size: int) -> tuple[list[str | None], list[float]]:
    module = Shared()
    texts = [refusal(lambda: module(torch.ones(size))) for _ in range(2)]
    return texts, module(torch.full((3,), float(rank))).tolist()


def test_different_sizes_are_an_error_until_they_are_equal(ranks: Ranks) -> None:
    text = "size must be the same on all ranks, got 4 on ranks 0, 2 and 7000 on rank 1"
    expected = ([text, text], [6.0] * 3)
    assert ranks.run(failing_first_call, [4, 7000, 4]) == [expected] * 3


def compiled_calls(rank: int, eager_first: bool) -> tuple[int, list[int], list[list[float]]]:
    """Return the number of graphs, how many comparisons each call made, and the results."""
    backend = CountingBackend()
    module, values = Shared(), torch.full((VALUES,), float(rank))
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    compared, results = [], []
    targets = [module] * eager_first + [compiled, compiled, module, compiled, module, compiled]
    for target in targets:
        with mock.patch.object(agreement, "require_same", wraps=require_same) as comparison:
            results.append(target(values).tolist())
        compared.append(comparison.call_count)
    return backend.graphs, compared, results


@pytest.mark.parametrize("eager_first", [False, True])
def test_a_module_compiles_once_whether_it_was_used_before_or_in_between(
    ranks: Ranks, eager_first: bool
) -> None:
    for graphs, compared, results in ranks.run(compiled_calls, [eager_first] * 3):
        assert graphs == 1
        assert results == [[6.0] * VALUES] * len(compared)
        # At the first eager call, and in no compiled one.
        assert compared == ([1, 0, 0, 0, 0, 0, 0] if eager_first else [0, 0, 1, 0, 0, 0])
