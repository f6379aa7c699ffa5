"""Processes that die, hang, are strangers to the group, or are arranged in a mesh."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from swavkit import SinkhornKnopp, SwAVLoss, marginal_error, sinkhorn_knopp
from swavkit.distributed.agreement import require_same
from tests import oracles
from tests.ranks import RankError, Ranks

pytestmark = pytest.mark.distributed

TIMEOUT = 4.0  # of the group, in seconds
PATIENCE = 10.0  # beyond it, on a busy machine
CPU = torch.device("cpu")


def scores_on(rank: int) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(rank).uniform(-1, 1, (4, 5)))


def one_loss(rank: int) -> None:
    criterion = SwAVLoss(4, 5, queue_length=8)
    criterion(torch.randn(3, 6, 4, requires_grad=True)).backward()


CALLS: dict[str, Callable[[int], Any]] = {
    "function": lambda rank: sinkhorn_knopp(scores_on(rank)),
    "codes": lambda rank: SinkhornKnopp()(scores_on(rank)),
    "relaxed": lambda rank: SinkhornKnopp(relaxation=0.2)(scores_on(rank)),
    "loss": one_loss,
    "error": lambda rank: marginal_error(scores_on(rank).softmax(dim=-1)),
    "settings": lambda rank: require_same({"size": 1}, dist.group.WORLD, CPU),
}


@pytest.fixture
def doomed() -> Iterator[Ranks]:
    """Three processes with a short timeout, to be thrown away."""
    ranks = Ranks(3, seconds=TIMEOUT)
    yield ranks
    ranks.close()


def outcome_of(call: Callable[[int], Any], rank: int) -> tuple[str, float]:
    begin = time.monotonic()
    try:
        call(rank)
    except RuntimeError as error:  # of torch.distributed, whose errors are subclasses
        return type(error).__name__, time.monotonic() - begin
    return "an answer", time.monotonic() - begin


def lose_rank_1(rank: int, name: str) -> tuple[str, float]:
    dist.barrier()  # all are connected
    if rank == 1:
        os._exit(1)
    return outcome_of(CALLS[name], rank)


@pytest.mark.parametrize("name", CALLS)
def test_when_a_process_dies_the_others_get_an_error_within_the_timeout(
    doomed: Ranks, name: str
) -> None:
    outcomes = doomed.run(lose_rank_1, [name] * 3, lost={1})
    for kind, seconds in (outcomes[0], outcomes[2]):
        assert kind != "an answer"
        assert seconds < TIMEOUT + PATIENCE


def lose_rank_1_in_between(rank: int) -> list[tuple[str, float]]:
    outcomes = []
    for step in range(3):
        if rank == 1 and step == 2:
            os._exit(1)
        outcomes.append(outcome_of(one_loss, rank))
    return outcomes


def test_steps_before_the_death_have_their_answers(doomed: Ranks) -> None:
    outcomes = doomed.run(lose_rank_1_in_between, lost={1})
    for of_rank in (outcomes[0], outcomes[2]):
        assert [kind == "an answer" for kind, _ in of_rank] == [True, True, False]
        assert of_rank[2][1] < TIMEOUT + PATIENCE


def hang_on_rank_1(rank: int) -> tuple[str, float] | None:
    dist.barrier()
    if rank == 1:
        time.sleep(TIMEOUT + 2)
        return None
    return outcome_of(CALLS["codes"], rank)


def test_when_a_process_hangs_the_others_get_an_error_after_the_timeout(doomed: Ranks) -> None:
    first, _, last = doomed.run(hang_on_rank_1)
    for outcome in (first, last):
        assert outcome is not None
        kind, seconds = outcome
        assert kind != "an answer"
        assert seconds < TIMEOUT + PATIENCE


def exit_if_told(rank: int, die: bool) -> str:
    if die:
        os._exit(1)
    return "alive"


def test_who_was_to_die_and_lives_is_an_error(doomed: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1: the process should have died, got 'alive'"):
        doomed.run(exit_if_told, [False, False, False], lost={1})


# Groups


def refusals_of_a_stranger(rank: int) -> list[str]:
    pair = dist.new_group([0, 1], timeout=datetime.timedelta(seconds=TIMEOUT))
    calls: list[Callable[[], Any]] = [
        lambda: SinkhornKnopp(process_group=pair)(scores_on(rank)),
        lambda: SwAVLoss(4, 5, process_group=pair)(torch.randn(2, 6, 4)),
    ]
    texts = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_a_rank_outside_the_group_gets_an_error(ranks: Ranks) -> None:
    text = "process_group must contain the calling rank, got a group without rank 2"
    assert ranks.run(refusals_of_a_stranger) == [[], [], [text, text]]


NO_GROUP = "process_group must be a torch.distributed.ProcessGroup or None, got "


@pytest.mark.parametrize("no_group", ["world", 0, [0, 1]])
@pytest.mark.parametrize(
    "make",
    [
        lambda group: SinkhornKnopp(process_group=group),
        lambda group: SwAVLoss(4, 5, process_group=group),
        lambda group: sinkhorn_knopp(torch.zeros(2, 3), process_group=group),
        lambda group: setattr(SinkhornKnopp(), "process_group", group),
    ],
    ids=["SinkhornKnopp", "SwAVLoss", "sinkhorn_knopp", "assigned"],
)
def test_what_is_no_group_is_an_error(make: Callable[[Any], nn.Module], no_group: Any) -> None:
    with pytest.raises(TypeError, match=rf"{NO_GROUP}{type(no_group).__name__}; a dimension of"):
        make(no_group)


def codes_in_a_mesh(rank: int, scores: np.ndarray) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    outcome: dict[str, Any] = {}
    try:
        SinkhornKnopp(process_group=mesh)
    except TypeError as error:
        outcome["mesh"] = str(error)
    groups = {
        "one dimension": mesh.get_group("data"),
        "a submesh": mesh["data"].get_group(),
        "both": dist.new_group(mesh.mesh.flatten().tolist()),
        "default": None,
    }
    for name, group in groups.items():
        outcome[name] = SinkhornKnopp(process_group=group)(torch.tensor(scores)).numpy()
    return outcome


def test_in_a_mesh_the_group_of_the_dimensions_with_different_data_shares_codes(
    start_ranks: Callable[[int], Ranks],
) -> None:
    # Ranks 0 and 1 are a pair of the tensor dimension, and so are 2 and 3.
    parts = [scores_on(rank).numpy() for rank in range(4)]
    of_data = start_ranks(4).run(codes_in_a_mesh, [parts[0], parts[0], parts[2], parts[2]])
    of_all = start_ranks(4).run(codes_in_a_mesh, parts)
    for results, names, groups in (
        (of_data, ("one dimension", "a submesh"), [(0, 2), (1, 3)]),
        (of_all, ("both", "default"), [(0, 1, 2, 3)]),
    ):
        shown = parts if results is of_all else [parts[0], parts[0], parts[2], parts[2]]
        for name in names:
            for group in groups:
                whole = oracles.sinkhorn(np.concatenate([shown[rank] for rank in group]), 0.05, 3)
                found = np.concatenate([results[rank][name] for rank in group])
                np.testing.assert_allclose(found, whole, rtol=0, atol=1e-12)
    for result in of_data:
        assert result["mesh"] == (
            f"{NO_GROUP}DeviceMesh; a dimension of a device mesh gives one by get_group()"
        )
