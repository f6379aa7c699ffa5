"""The queues of all processes, saved together and loaded by another number of processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from swavkit import FeatureQueue, SwAVLoss, load_sharded_state_dict, sharded_state_dict
from tests.ranks import RankError, Ranks
from tests.states import same, snapshot

pytestmark = pytest.mark.distributed

ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit")

VIEWS, DIMENSION = 2, 3


@dataclass(frozen=True)
class Sample:
    """A sample as it was pushed: when, where, and which."""

    step: int
    rank: int
    number: int  # its features are made of it
    valid: bool = True

    @property
    def features(self) -> np.ndarray:
        """(views, D), different in every entry."""
        entries = np.arange(VIEWS * DIMENSION).reshape(VIEWS, DIMENSION)
        return np.float64(self.number * entries.size + entries + 1)


Steps = list[list[list[Sample]]]  # by rank, by step


def steps_of(sizes: list[list[int]], valid: Callable[[int], bool] = lambda number: True) -> Steps:
    """Return samples, given how many (ranks, steps) there are; numbered as one batch has them."""
    numbers = itertools.count()
    by_step = [
        [
            [
                Sample(step, rank, number, valid(number))
                for number in itertools.islice(numbers, size)
            ]
            for rank, size in enumerate(of_step)
        ]
        for step, of_step in enumerate(zip(*sizes, strict=True))
    ]
    return [list(of_rank) for of_rank in zip(*by_step, strict=True)]


def push_all(queue: FeatureQueue, steps: list[list[Sample]]) -> FeatureQueue:
    for samples in steps:
        features = torch.zeros(VIEWS, len(samples), DIMENSION, dtype=torch.float64)
        for index, sample in enumerate(samples):
            features[:, index] = torch.tensor(sample.features)
        queue.push(features, valid=torch.tensor([s.valid for s in samples], dtype=torch.bool))
    return queue


def queue_of(length: int) -> FeatureQueue:
    return FeatureQueue(length, DIMENSION, VIEWS, dtype=torch.float64)


def dealt(steps: Steps, length: int, size: int, saved_length: int) -> list[list[Sample]]:
    """Return what each of ``size`` processes must hold after the load, the newest first."""
    held = [
        sample
        for of_rank in steps
        for sample in [sample for of_step in of_rank for sample in of_step][-saved_length:]
        if sample.valid
    ]
    held.sort(key=lambda sample: (-sample.step, -sample.number))
    return [held[: size * length][rank::size] for rank in range(size)]


def contents(queue: FeatureQueue) -> tuple[np.ndarray, list[int]]:
    """Return the valid features (n, views, D) and their ages, the newest first."""
    slots = [(int(queue.position) - 1 - back) % queue.length for back in range(queue.length)]
    slots = [slot for slot in slots if queue.valid[slot]]
    return queue.features[:, slots].transpose(0, 1).numpy(), queue.age[slots].tolist()


def assert_holds(found: tuple[np.ndarray, list[int]], expected: list[Sample], steps: int) -> None:
    features, ages = found
    assert len(features) == len(expected)
    for row, age, sample in zip(features, ages, expected, strict=True):
        np.testing.assert_array_equal(row, sample.features)
        assert age == steps - 1 - sample.step


# Dealing out


@st.composite
def histories(draw: st.DrawFn) -> tuple[Steps, int, int]:
    """Samples of 1 to 4 processes, some not valid, the length of their queues, and another."""
    ranks, steps = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(
        st.lists(
            st.lists(st.integers(0, 5), min_size=steps, max_size=steps),
            min_size=ranks,
            max_size=ranks,
        )
    )
    absent = draw(st.sets(st.integers(0, 40), max_size=6))
    lengths = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    return steps_of(sizes, lambda number: number not in absent), *lengths


def stacked_state(steps: Steps, length: int) -> dict[str, Tensor]:
    """Return the states of the processes' queues, as a load leaves them on every process."""
    states = [push_all(queue_of(length), of_rank).state_dict() for of_rank in steps]
    return {key: torch.stack([state[key] for state in states]) for key in states[0]}


def load_dealt(
    rank: int, argument: tuple[dict[str, np.ndarray], int]
) -> tuple[tuple[np.ndarray, list[int]], int, list[int]]:
    state, length = argument
    queue = push_all(queue_of(length), steps_of([[length]])[0])  # which must all go
    load_sharded_state_dict(queue, {key: torch.tensor(value) for key, value in state.items()})
    found, rejected = contents(queue), int(queue.rejected)
    before = int(queue.position)
    push_all(queue, [[Sample(0, 0, 99)]])
    return found, rejected, [before, int(queue.position), int(queue.age[before])]


@given(histories())
def test_one_process_gets_the_newest_of_all(problem: tuple[Steps, int, int]) -> None:
    steps, saved_length, length = problem
    state = {key: value.numpy() for key, value in stacked_state(steps, saved_length).items()}
    found, _, (before, after, age) = load_dealt(0, (state, length))
    assert_holds(found, *dealt(steps, length, 1, saved_length), len(steps[0]))
    # And it goes on as a ring.
    assert (after - before) % length == 1 % length
    assert age == 0


def test_states_are_dealt_out_where_they_are_whatever_the_default_device() -> None:
    steps = steps_of(UNEVEN[:3])
    state, queue = stacked_state(steps, 4), queue_of(5)
    with torch.device("meta"):
        load_sharded_state_dict(queue, state)
    assert_holds(contents(queue), *dealt(steps, 5, 1, 4), 3)


@settings(max_examples=40)
@given(problem=histories())
def test_each_of_three_gets_its_share_of_the_newest(
    start_ranks: Callable[[int], Ranks], problem: tuple[Steps, int, int]
) -> None:
    steps, saved_length, length = problem
    state = {key: value.numpy() for key, value in stacked_state(steps, saved_length).items()}
    results = start_ranks(3).run(load_dealt, [(state, length)] * 3)
    expected = dealt(steps, length, 3, saved_length)
    for (found, _, _), share in zip(results, expected, strict=True):
        assert_holds(found, share, len(steps[0]))


@given(histories())
def test_what_one_process_gets_is_what_one_process_with_the_whole_batch_would_hold(
    problem: tuple[Steps, int, int],
) -> None:
    steps, saved_length, _ = problem
    steps = steps_of([[len(of_step) for of_step in of_rank] for of_rank in steps])  # all valid
    whole = [list(itertools.chain(*of_step)) for of_step in zip(*steps, strict=True)]
    alone = push_all(queue_of(saved_length), whole)
    loaded = queue_of(saved_length)
    load_sharded_state_dict(loaded, stacked_state(steps, saved_length))
    for found, expected in zip(contents(loaded), contents(alone), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_sum_of_the_rejected_stays(ranks: Ranks) -> None:
    state = stacked_state(steps_of([[2], [1]]), 4)
    state["rejected"] = torch.tensor([3, 4])
    given = {key: value.numpy() for key, value in state.items()}
    assert [rejected for _, rejected, _ in ranks.run(load_dealt, [(given, 4)] * 3)] == [7, 0, 0]


# Through torch.distributed.checkpoint


def save(rank: int, argument: tuple[Path, int, list[list[Sample]]]) -> None:
    path, length, steps = argument
    queue = push_all(queue_of(length), steps)
    dcp.save({"model": sharded_state_dict(queue)}, checkpoint_id=path)


def load(rank: int, argument: tuple[Path, int]) -> tuple[tuple[np.ndarray, list[int]], Any]:
    path, length = argument
    queue = queue_of(length)
    state = {"model": sharded_state_dict(queue, checkpoint=path)}
    dcp.load(state, checkpoint_id=path)
    matched = str(load_sharded_state_dict(queue, state["model"]))
    assert matched == "<All keys matched successfully>"
    return contents(queue), {key: value.numpy() for key, value in snapshot(queue).items()}


UNEVEN = [[3, 1, 4], [0, 2, 0], [5, 5, 5], [1, 0, 1]]


@pytest.mark.parametrize(
    ("saving", "loading", "saved_length", "length"),
    [
        (4, 2, 4, 4),  # more than there is room for
        (4, 2, 4, 8),  # as much room as there was
        (2, 4, 8, 8),
        (1, 3, 5, 5),
        (3, 1, 5, 5),
        (3, 3, 5, 2),
        (2, 2, 3, 9),
    ],
)
def test_another_number_of_processes_gets_the_newest_and_nothing_invented(
    start_ranks: Callable[[int], Ranks],
    tmp_path: Path,
    saving: int,
    loading: int,
    saved_length: int,
    length: int,
) -> None:
    steps = steps_of(UNEVEN[:saving], lambda number: number % 7 != 3)
    start_ranks(saving).run(save, [(tmp_path, saved_length, of_rank) for of_rank in steps])
    results = start_ranks(loading).run(load, [(tmp_path, length)] * loading)
    expected = dealt(steps, length, loading, saved_length)
    for (found, _), share in zip(results, expected, strict=True):
        assert_holds(found, share, 3)


@pytest.mark.parametrize("size", [1, 3])
def test_as_many_processes_get_back_their_own_slot_by_slot(
    start_ranks: Callable[[int], Ranks], tmp_path: Path, size: int
) -> None:
    steps = steps_of(UNEVEN[:size], lambda number: number % 7 != 3)
    start_ranks(size).run(save, [(tmp_path, 4, of_rank) for of_rank in steps])
    results = start_ranks(size).run(load, [(tmp_path, 4)] * size)
    for (_, state), of_rank in zip(results, steps, strict=True):
        own = push_all(queue_of(4), of_rank).state_dict()
        for key, value in own.items():
            np.testing.assert_array_equal(state[key], value.numpy())


@ALONE
def test_a_process_of_no_job_loads_what_a_job_saved_and_the_reverse(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    assert not dist.is_initialized()
    steps = steps_of(UNEVEN[:3])
    start_ranks(3).run(save, [(tmp_path / "job", 4, of_rank) for of_rank in steps])
    found, _ = load(0, (tmp_path / "job", 6))
    assert_holds(found, *dealt(steps, 6, 1, 4), 3)

    alone = steps_of(UNEVEN[2:3])
    save(0, (tmp_path / "alone", 7, alone[0]))
    results = start_ranks(3).run(load, [(tmp_path / "alone", 2)] * 3)
    for (found, _), share in zip(results, dealt(alone, 2, 3, 7), strict=True):
        assert_holds(found, share, 3)


@ALONE
def test_room_for_what_was_saved_is_on_the_cpu_whatever_the_default_device(tmp_path: Path) -> None:
    alone = steps_of(UNEVEN[2:3])
    save(0, (tmp_path, 7, alone[0]))
    queue = queue_of(2)
    with torch.device("meta"):
        state = {"model": sharded_state_dict(queue, checkpoint=tmp_path)}
    assert {value.device.type for value in state["model"].values()} == {"cpu"}
    dcp.load(state, checkpoint_id=tmp_path)
    load_sharded_state_dict(queue, state["model"])
    assert_holds(contents(queue), *dealt(alone, 2, 1, 7), 3)


def shapes_and_placements(rank: int) -> dict[str, Any]:
    criterion = SwAVLoss(4, 5, queue_length=8)
    state = sharded_state_dict(criterion)
    plain = {key for key, value in state.items() if not isinstance(value, DTensor)}
    assert all(
        value.placements == (Shard(0),) and value.to_local().shape[0] == 1
        for key, value in state.items()
        if key not in plain
    )
    # The shard is the queue's own memory.
    local = state["queue.features"].to_local()
    assert local.data_ptr() == criterion.queue.features.data_ptr()
    return {key: tuple(value.shape) for key, value in state.items()} | {"plain": plain}


def test_each_tensor_of_the_queue_is_sharded_by_process_and_nothing_else_is(ranks: Ranks) -> None:
    assert (
        ranks.run(shapes_and_placements)
        == [
            {
                "plain": {"steps", "prototypes.weight"},
                "steps": (),
                "prototypes.weight": (5, 4),
                "queue.features": (3, 2, 8, 4),
                "queue.valid": (3, 8),
                "queue.position": (3,),
                "queue.rejected": (3,),
                "queue.written": (3, 8),
                "queue.pushes": (3,),
            }
        ]
        * 3
    )


def save_in_a_pair(rank: int, path: Path) -> str | None:
    pair = dist.new_group([0, 2])
    queue = push_all(queue_of(4), steps_of([[3, rank]])[0])
    if rank == 1:
        try:
            sharded_state_dict(queue, process_group=pair)
        except ValueError as error:
            return str(error)
        return None
    dcp.save(sharded_state_dict(queue, process_group=pair), checkpoint_id=path, process_group=pair)
    other = queue_of(4)
    state = sharded_state_dict(other, checkpoint=path, process_group=pair)
    dcp.load(state, checkpoint_id=path, process_group=pair)
    load_sharded_state_dict(other, state, process_group=pair)
    assert same(snapshot(other), snapshot(queue))
    return None


def test_a_group_saves_and_loads_its_own(ranks: Ranks, tmp_path: Path) -> None:
    stranger = "process_group must contain the calling rank, got a group without rank 1"
    assert ranks.run(save_in_a_pair, [tmp_path] * 3) == [None, stranger, None]


def save_in_single(rank: int, path: Path) -> None:
    queue = push_all(queue_of(4).float(), steps_of([[3 + rank]])[0])
    dcp.save(sharded_state_dict(queue), checkpoint_id=path)


def load_into_half(rank: int, path: Path) -> list[Any]:
    loaded = []
    for length in (4, 5):
        queue = queue_of(length).half()
        state = sharded_state_dict(queue, checkpoint=path)
        dcp.load(state, checkpoint_id=path)
        load_sharded_state_dict(queue, state)
        loaded.append((queue.features.dtype, len(queue)))
    return loaded


def test_what_was_saved_in_single_precision_loads_into_a_queue_in_half(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run(save_in_single, [tmp_path] * 3)
    half = torch.float16
    assert ranks.run(load_into_half, [tmp_path] * 3) == [
        [(half, 3), (half, 4)],
        [(half, 4), (half, 4)],
        [(half, 4), (half, 3)],
    ]


# What does not fit


def refusal_of(queue: FeatureQueue, path: Path) -> str:
    before = snapshot(queue)
    try:
        state = {"model": sharded_state_dict(queue, checkpoint=path)}
        dcp.load(state, checkpoint_id=path)
        load_sharded_state_dict(queue, state["model"])
    except ValueError as error:
        assert same(snapshot(queue), before)
        return str(error)
    return "loaded"


def load_into_others(rank: int, path: Path) -> list[str]:
    return [
        refusal_of(FeatureQueue(4, DIMENSION + 1, VIEWS), path),
        refusal_of(FeatureQueue(9, DIMENSION, VIEWS + 1), path),
    ]


@pytest.mark.parametrize("loading", [2, 3])
def test_other_views_or_features_are_an_error_that_changes_nothing(
    start_ranks: Callable[[int], Ranks], tmp_path: Path, loading: int
) -> None:
    start_ranks(3).run(save, [(tmp_path, 4, of_rank) for of_rank in steps_of(UNEVEN[:3])])
    text = (
        "features must have shape (ranks, {} views, length, {} features), got (3, 2, 4, 3)"
    ).format
    expected = [text(2, 4), text(3, 3)]
    assert start_ranks(loading).run(load_into_others, [tmp_path] * loading) == [expected] * loading


def load_without_saying_from_where(rank: int, path: Path) -> None:
    state = {"model": sharded_state_dict(queue_of(4))}
    dcp.load(state, checkpoint_id=path)


def test_another_number_of_processes_is_an_error_unless_the_checkpoint_is_named(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    start_ranks(3).run(save, [(tmp_path, 4, of_rank) for of_rank in steps_of(UNEVEN[:3])])
    with pytest.raises(RankError, match="Size mismatch between saved"):
        start_ranks(2).run(load_without_saying_from_where, [tmp_path] * 2)


@ALONE
def test_two_queues_of_the_same_name_and_other_sizes_are_told_apart_or_refused(
    tmp_path: Path,
) -> None:
    small, large = queue_of(2), push_all(queue_of(5), steps_of([[4]])[0])
    dcp.save(
        {"a": sharded_state_dict(small), "b": sharded_state_dict(large)}, checkpoint_id=tmp_path
    )
    with pytest.raises(ValueError, match=r"one size of features, got \(1, 2, 2, 3\) and \(1, 2, 5"):
        sharded_state_dict(queue_of(3), checkpoint=tmp_path)
    outer = nn.ModuleDict({"b": queue_of(3)})
    state = sharded_state_dict(outer, checkpoint=tmp_path)
    dcp.load(state, checkpoint_id=tmp_path)
    load_sharded_state_dict(outer, state)
    assert len(outer["b"]) == 3


def test_a_missing_key_is_an_error_unless_the_load_is_not_strict() -> None:
    queue = queue_of(4)
    state = sharded_state_dict(queue)
    del state["position"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"position"'):
        load_sharded_state_dict(queue, state)
    assert load_sharded_state_dict(nn.Linear(1, 1), {}, strict=False).missing_keys


@ALONE
def test_a_queue_in_two_places_is_saved_and_loaded_in_both(tmp_path: Path) -> None:
    def twice() -> nn.ModuleList:
        queue = queue_of(4)
        return nn.ModuleList([queue, nn.Sequential(queue)])

    modules = twice()
    push_all(modules[0], steps_of([[3, 2]])[0])
    state = sharded_state_dict(modules)
    assert {tuple(value.shape) for key, value in state.items() if key.endswith("valid")} == {(1, 4)}
    dcp.save(state, checkpoint_id=tmp_path)
    loaded = twice()
    state = sharded_state_dict(loaded, checkpoint=tmp_path)
    dcp.load(state, checkpoint_id=tmp_path)
    load_sharded_state_dict(loaded, state)
    assert same(snapshot(loaded), snapshot(modules))


# A whole training


class Network(nn.Module):
    """A tiny encoder with its criterion, the same wherever it is made."""

    def __init__(self, queue_length: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        self.criterion = SwAVLoss(4, 5, queue_length=queue_length)
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(inputs))
        return loss


def train(
    rank: int, argument: dict[str, Any]
) -> tuple[list[float], dict[str, np.ndarray], list[float]]:
    """Load, train and save as told; return the losses, the parameters and the first ages."""
    network = Network(argument["queue_length"])
    if argument["engine"] == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(network.encoder, mesh=mesh)
        fully_shard(network, mesh=mesh)
        parallel: nn.Module = network
    else:
        parallel = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.3, momentum=0.9)
    if "load" in argument:
        path = argument["load"]
        state = {
            "model": sharded_state_dict(network, checkpoint=path),
            "optimizer": get_optimizer_state_dict(network, optimizer),
        }
        dcp.load(state, checkpoint_id=path)
        load_sharded_state_dict(network, state["model"])
        set_optimizer_state_dict(network, optimizer, state["optimizer"])
    losses = []
    for batch in torch.tensor(argument["inputs"]):
        optimizer.zero_grad()
        loss = parallel(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if "save" in argument:
        state = {
            "model": sharded_state_dict(network),
            "optimizer": get_optimizer_state_dict(network, optimizer),
        }
        dcp.save(state, checkpoint_id=argument["save"])
    parameters = {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy()
        for name, value in network.named_parameters()
    }
    return losses, parameters, sorted(network.criterion.queue.age.tolist())


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_a_run_that_was_stopped_on_four_processes_goes_on_on_two(
    start_ranks: Callable[[int], Ranks], tmp_path: Path, engine: str
) -> None:
    inputs = np.random.default_rng(0).normal(size=(5, 3, 12, 6))  # steps, views, samples

    def arguments(size: int, steps: slice, **more: Any) -> list[dict[str, Any]]:
        return [
            {"engine": engine, "inputs": part[steps], "queue_length": 24 // size, **more}
            for part in np.split(inputs, size, axis=2)
        ]

    unbroken = start_ranks(4).run(train, arguments(4, slice(None)))
    before = start_ranks(4).run(train, arguments(4, slice(3), save=tmp_path))
    after = start_ranks(2).run(train, arguments(2, slice(3, None), load=tmp_path))
    losses = [
        *np.mean([losses for losses, _, _ in before], axis=0),
        *np.mean([losses for losses, _, _ in after], axis=0),
    ]
    expected = np.mean([losses for losses, _, _ in unbroken], axis=0)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-10)
    for _, parameters, ages in after:
        assert ages == [0] * 6 + [1] * 6
        for name, value in unbroken[0][1].items():
            np.testing.assert_allclose(parameters[name], value, rtol=0, atol=1e-10)
