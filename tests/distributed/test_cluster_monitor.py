"""The monitor on several ranks: figures of the samples of all of them, in one collective."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from swavkit import ClusterMonitor, PrototypeLayer, SwAVLoss, SwAVStatistics, cluster_statistics
from swavkit.monitor.diagnosis import Diagnosis
from tests import oracles
from tests.modes import Collectives
from tests.ranks import Ranks
from tests.states import same, snapshot
from tests.test_cluster_monitor import (
    ALWAYS,
    OF_FEATURES,
    OF_LOSS,
    D,
    K,
    as_arrays,
    floats,
    statistics_of,
)

pytestmark = pytest.mark.distributed

RANKS, WINDOW = 3, 3
SIZES = [[6, 2, 4, 7], [3, 0, 5, 1], [0, 0, 0, 0]]  # samples of each rank and step
COLUMNS = 12  # scalars of a step


def step_of(rank: int, step: int) -> tuple[SwAVStatistics, float, np.ndarray]:
    """Return the statistics of a rank and step, its loss and its features (2, B, D)."""
    samples = SIZES[rank][step]
    features = np.random.default_rng(100 * rank + step).normal(size=(2, samples, D))
    loss = 0.0 if samples == 0 else 1.0 + rank + 0.3 * step
    return statistics_of(10 * rank + step, samples), loss, features


def updated(rank: int, **settings: Any) -> ClusterMonitor:
    monitor = ClusterMonitor(K, window=WINDOW, **settings)
    layer = PrototypeLayer(D, K)
    with torch.no_grad():
        layer.weight[1] = layer.weight[0]
    for step in range(len(SIZES[rank])):
        statistics, loss, features = step_of(rank, step)
        monitor.update(statistics, loss=loss, features=torch.tensor(features), prototypes=layer)
    return monitor


def expected_of(members: tuple[int, ...]) -> dict[str, float]:
    """Return the figures of the window of some ranks, by the oracle."""
    steps = len(SIZES[0])
    given = [step_of(rank, step) for rank in members for step in range(steps - WINDOW, steps)]
    last = [step_of(rank, steps - 1)[2].reshape(-1, D) for rank in members]
    figures = oracles.cluster_figures([as_arrays(each[0]) for each in given], [x[1] for x in given])
    figures |= oracles.feature_figures(np.concatenate(last))
    return figures | {"nonfinite": 0, "duplicates": 2}


def assert_figures(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys() == ALWAYS | OF_LOSS | OF_FEATURES | {"duplicates"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-6, err_msg=name)


def figures_and_collectives(rank: int) -> tuple[dict[str, float], list[int]]:
    with Collectives() as of_updates:
        monitor = updated(rank)
    assert not of_updates.numels
    before = snapshot(monitor)
    with Collectives() as sent:
        figures = monitor.compute()
    assert same(snapshot(monitor), before)
    return floats(figures), sent.numels


def test_figures_are_of_all_ranks_in_one_collective(ranks: Ranks) -> None:
    entries = 3 + 2 * K + WINDOW * COLUMNS + D * D + D + 1
    for found, sent in ranks.run(figures_and_collectives):
        assert sent == [entries]
        assert_figures(found, expected_of((0, 1, 2)))


def figures_in_eval_and_of_a_pair(rank: int) -> dict[str, Any]:
    pair = dist.new_group([0, 1])
    outcome: dict[str, Any] = {"eval": floats(updated(rank).eval().compute())}
    if rank == 2:
        with pytest.raises(ValueError, match="process_group must contain the calling rank"):
            updated(rank, process_group=pair).compute()
        return outcome
    monitor = updated(rank, process_group=pair)
    outcome["pair"] = floats(monitor.compute())
    outcome["copied"] = floats(
        updated(rank, process_group=copy.deepcopy(monitor).process_group).compute()
    )
    loaded = pickle.loads(pickle.dumps(monitor))
    with pytest.raises(RuntimeError, match="process_group was dropped when this module was"):
        loaded.compute()
    loaded.process_group = pair
    outcome["set"] = floats(loaded.compute())
    return outcome


def test_a_group_is_shared_by_copies_and_dropped_by_pickling(ranks: Ranks) -> None:
    outcomes = ranks.run(figures_in_eval_and_of_a_pair)
    expected = expected_of((0, 1))
    for outcome in outcomes:
        assert_figures(outcome["eval"], expected_of((0, 1, 2)))
    for outcome in outcomes[:2]:
        assert_figures(outcome["pair"], expected)
        assert_figures(outcome["copied"], expected)
        for name, value in outcome["set"].items():  # without features and prototypes
            np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=2e-6)


def without_updates(rank: int) -> list[str]:
    monitor = ClusterMonitor(K)
    errors = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            monitor.compute()
        errors.append(str(error.value))
    if rank == 1:  # the others have no step, and take part all the same
        monitor.update(statistics_of(0))
    monitor.compute()
    return errors


def test_all_ranks_refuse_figures_before_an_update(ranks: Ranks) -> None:
    for errors in ranks.run(without_updates):
        assert all("got none on any rank" in error for error in errors)


def diagnosed_and_drawn(rank: int) -> tuple[dict[str, Any], list[float]]:
    from swavkit.monitor import monitor as module

    seen: dict[str, Any] = {}
    original = module.diagnose
    module.diagnose = lambda figures, **others: [seen.update(others)]  # type: ignore[assignment]
    monitor = updated(rank)
    try:
        monitor.diagnose()
    finally:
        module.diagnose = original
    lines = monitor.plot().axes[1].get_lines()
    return seen, next(list(line.get_ydata()) for line in lines if line.get_label() == "loss")


def test_samples_and_curves_are_of_all_ranks(ranks: Ranks) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    window = slice(len(SIZES[0]) - WINDOW, len(SIZES[0]))
    samples = sum(sum(of_rank[window]) for of_rank in SIZES) / WINDOW
    losses = []
    for step in range(window.start, window.stop):
        given = [step_of(rank, step) for rank in range(RANKS)]
        of_step = oracles.cluster_figures([as_arrays(x[0]) for x in given], [x[1] for x in given])
        losses.append(of_step["loss"])
    for seen, curve in ranks.run(diagnosed_and_drawn):
        assert seen["samples"] == pytest.approx(samples)
        assert seen["steps"] == len(SIZES[0])
        np.testing.assert_allclose(curve, losses, rtol=2e-6)


def diagnosed_after_different_steps(rank: int) -> list[Diagnosis]:
    monitor = ClusterMonitor(K)
    scores = torch.eye(K)[:1].expand(2, 8, K)  # all at one prototype
    for _ in range(199 + rank):
        monitor.update(cluster_statistics(scores, scores), loss=9.0)
    return monitor.diagnose()


def test_diagnoses_are_the_same_on_ranks_with_different_steps(ranks: Ranks) -> None:
    first, *others = ranks.run(diagnosed_after_different_steps)
    assert "collapsed" in [each.name for each in first]
    assert others == [first] * (RANKS - 1)


def diagnosed_after_steps_of_the_first_rank(rank: int) -> list[Diagnosis]:
    monitor = ClusterMonitor(K)
    scores = torch.eye(K)[:1].expand(2, 8, K)
    for _ in range(200 if rank == 0 else 0):
        monitor.update(cluster_statistics(scores, scores), loss=9.0)
    return monitor.diagnose()


def test_a_rank_without_updates_does_not_make_the_training_younger(ranks: Ranks) -> None:
    for found in ranks.run(diagnosed_after_steps_of_the_first_rank):
        assert "collapsed" in [each.name for each in found]


def sharded_prototypes(rank: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(7, D, generator=generator)
    weight[6] = 2 * weight[0]  # on another rank
    weight[5] = weight[4]
    sharded = SwAVLoss(D, 7, shard_prototypes=True).prototypes
    sharded.load_state_dict({"weight": weight})
    fsdp = PrototypeLayer(D, 7)
    fsdp.load_state_dict({"weight": weight})
    fully_shard(fsdp)
    found = []
    for prototypes in (sharded, sharded.weight, fsdp, weight):
        monitor = ClusterMonitor(7)
        monitor.update(statistics_of(rank, prototypes=7), prototypes=prototypes)
        found.append(monitor.compute()["duplicates"].item())
    return found


def test_sharded_prototypes_are_gathered(ranks: Ranks) -> None:
    for found in ranks.run(sharded_prototypes):
        assert found == [4.0] * 4


def nonfinite_on(rank: int, argument: list[list[int]]) -> float:
    monitor = ClusterMonitor(K)
    for members in argument:
        monitor.update(statistics_of(rank), loss=float("nan") if rank in members else 1.0)
    return monitor.compute()["nonfinite"].item()


def test_a_step_that_is_not_finite_on_several_ranks_is_one(ranks: Ranks) -> None:
    members: list[list[int]] = [[], [1], [0, 1, 2], [], [0, 2]]
    assert ranks.run(nonfinite_on, [members] * RANKS) == [3.0] * RANKS


def found_of_local_and_global_codes(rank: int) -> dict[bool, list[str]]:
    found = {}
    for synchronize in (False, True):
        torch.manual_seed(0)  # or the ranks have different prototypes
        criterion = SwAVLoss(D, 10, synchronize=synchronize)
        monitor = ClusterMonitor(10)
        features = torch.randn(2, 5 + rank, D)
        loss, statistics = criterion(features, return_statistics=True)
        monitor.update(statistics, loss=loss, features=features, prototypes=criterion.prototypes)
        found[synchronize] = [diagnosis.name for diagnosis in monitor.diagnose(criterion)]
    return found


def test_local_codes_are_named_on_both_ranks(start_ranks: Callable[[int], Ranks]) -> None:
    expected = {False: ["local_codes"], True: []}
    assert start_ranks(2).run(found_of_local_and_global_codes) == [expected] * 2


def found_of_groups_of_one_rank(rank: int) -> list[list[str]]:
    """Return what monitors of the rank and of the job find for codes of the rank alone."""
    group = [dist.new_group([member]) for member in range(2)][rank]
    criterion = SwAVLoss(D, 100, queue_length=30, process_group=group)
    features = torch.randn(2, 10, D)
    found = []
    for of_monitor in (group, None):
        monitor = ClusterMonitor(100, process_group=of_monitor)
        _, statistics = criterion(features, return_statistics=True)
        monitor.update(statistics)
        found.append([diagnosis.name for diagnosis in monitor.diagnose(criterion)])
    return found


def test_codes_of_a_group_see_the_samples_and_queues_of_the_group(
    start_ranks: Callable[[int], Ranks],
) -> None:
    expected = ["too_few_samples"]  # 40 for 100 prototypes, and no codes that are local by mistake
    assert start_ranks(2).run(found_of_groups_of_one_rank) == [[expected, expected]] * 2


def found_of_a_stale_queue(rank: int) -> list[Diagnosis]:
    criterion = SwAVLoss(D, K, queue_length=20)
    monitor = ClusterMonitor(K, window=50)
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(2, 20, D, generator=generator)
    for _ in range(200):
        monitor.update(statistics_of(rank), features=features)
    if rank == 1:  # an offset for half of the samples, which this rank alone would not see
        features = features + 4
    assert criterion.queue is not None
    criterion.queue.push(features)
    return monitor.diagnose(criterion)


def test_ranks_agree_on_a_stale_queue(ranks: Ranks) -> None:
    found = ranks.run(found_of_a_stale_queue)
    assert found[0] == found[1] == found[2]


class Model(nn.Module):
    """An encoder with a monitor beside it, as one module for DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, K)
        self.monitor = ClusterMonitor(K, window=WINDOW)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scores = self.encoder(inputs)
        codes = torch.softmax(scores[:2].detach(), dim=-1)
        self.monitor.update(cluster_statistics(scores, codes))
        return scores.sum()


def under_ddp(rank: int) -> tuple[float, float, dict[str, float]]:
    model = DistributedDataParallel(Model())
    for _ in range(2):
        model(torch.randn(3, rank + 1, D)).backward()
    monitor = model.module.monitor
    return monitor.updates.item(), monitor.scalars[1, 0].item(), floats(monitor.compute())


def test_ddp_leaves_the_window_of_each_rank_alone(ranks: Ranks) -> None:
    outcomes = ranks.run(under_ddp)
    for rank, (updates, samples, figures) in enumerate(outcomes):
        assert (updates, samples) == (2, rank + 1)
        assert figures == outcomes[0][2]
