"""Prototypes replaced by features of all ranks: equal on each, whole, sharded and under FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from swavkit import PrototypeLayer, SwAVLoss
from tests import oracles
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

K, D = 7, 4
DEAD = [1, 2, 4, 6]
FORMS = "plain", "DDP", "sharded", "FSDP2"


def whole(tensor: Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy().copy()


def network_of(form: str) -> nn.Module:
    """Return a module whose ``prototypes`` are a layer in this form, with the same rows in each."""
    torch.manual_seed(0)
    weight = 3 * torch.randn(K, D, dtype=torch.float64)
    network = SwAVLoss(D, K, shard_prototypes=form == "sharded").double()
    network.prototypes.load_state_dict({"weight": weight})
    if form == "DDP":
        DistributedDataParallel(network)
    return fully_shard(network) if form == "FSDP2" else network


def replaced(rank: int, argument: dict[str, Any]) -> dict[str, Any]:
    """Replace prototypes, and clear the momentum of an optimizer as in the docstring."""
    network = network_of(argument["form"])
    prototypes = network.prototypes
    before = whole(prototypes.weight)
    optimizer = torch.optim.AdamW([prototypes.weight], lr=0.01, weight_decay=0)
    prototypes.weight.grad = torch.ones_like(prototypes.weight) * 1e-9
    optimizer.step()
    moved = whole(prototypes.weight)
    mask = prototypes.reinitialize_(
        torch.tensor(argument["index"]),
        torch.tensor(argument["features"]),
        generator=torch.Generator().manual_seed(argument.get("seed", rank)),
    )
    for value in optimizer.state[prototypes.weight].values():
        if torch.is_tensor(value) and value.shape == prototypes.weight.shape:
            value.mul_(mask.logical_not().unsqueeze(1))
    new = whole(prototypes.weight)
    assert isinstance(mask, DTensor) == isinstance(prototypes.weight, DTensor)
    prototypes.weight.grad.zero_()
    optimizer.step()
    return {
        "before": before,
        "moved": moved,
        "new": new,
        "later": whole(prototypes.weight),
        "mask": whole(mask),
    }


def features_of(sizes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [5 * generator.normal(size=(size, D)) for size in sizes]


def check(results: list[dict[str, Any]], features: list[np.ndarray], dead: list[int]) -> None:
    rows = oracles.unit_rows(np.concatenate(features))
    expected = np.isin(np.arange(K), dead[: len(rows)])
    for result in results:
        for name, value in result.items():
            np.testing.assert_array_equal(value, results[0][name])
        np.testing.assert_array_equal(result["mask"], expected)
        np.testing.assert_array_equal(result["new"][~expected], result["moved"][~expected])
        new = result["new"][expected]
        distances = np.abs(new[:, None] - rows).max(axis=2).reshape(len(new), len(rows))
        assert (distances.min(axis=1, initial=1) < 1e-12).all() or not len(new)
        nearest = distances.argmin(axis=1) if len(new) else []
        assert len(set(nearest)) == len(new)
        np.testing.assert_array_equal(result["later"][expected], new)
        assert (result["later"][~expected] != result["new"][~expected]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(5, 5, 5), (0, 9, 2), (1, 0, 1), (0, 0, 0), (0, 0, 30)], ids=str)
@pytest.mark.parametrize("seed", [{}, {"seed": 3}], ids=["different seeds", "equal seeds"])
def test_all_ranks_get_the_same_features_of_any_of_them(
    ranks: Ranks, form: str, sizes: tuple[int, ...], seed: dict[str, int]
) -> None:
    features = features_of(sizes)
    arguments = [{"form": form, "index": DEAD, "features": own, **seed} for own in features]
    check(ranks.run(replaced, arguments), features, DEAD)


@pytest.mark.parametrize("form", FORMS)
def test_a_prototype_is_replaced_if_it_is_dead_on_every_rank(ranks: Ranks, form: str) -> None:
    features = features_of((4, 4, 4))
    alive = [[0, 1, 2], [3, 0], [5]]
    arguments = [
        {"form": form, "index": ~np.isin(np.arange(K), theirs), "features": own}
        for theirs, own in zip(alive, features, strict=True)
    ]
    check(ranks.run(replaced, arguments), features, [4, 6])
    arguments[1]["index"] = [0, 3]  # indices, and fewer
    check(ranks.run(replaced, arguments), features, [3])


@pytest.mark.parametrize("form", FORMS)
def test_more_ranks_than_prototypes_need(start_ranks: Callable[[int], Ranks], form: str) -> None:
    features = features_of((3, 0, 2, 3))  # the last rank has a single prototype of seven
    arguments = [{"form": form, "index": DEAD, "features": own} for own in features]
    check(start_ranks(4).run(replaced, arguments), features, DEAD)


def test_features_of_each_rank_are_drawn_as_often(ranks: Ranks) -> None:
    counts = sum(np.array(each) for each in ranks.run(drawn)[:1])
    # 100 of each of the 6 features, here within five standard errors.
    assert np.abs(counts - 100).max() < 5 * np.sqrt(100)


def drawn(rank: int) -> list[float]:
    layer, counts = PrototypeLayer(6, 2), torch.zeros(6)
    generator = torch.Generator().manual_seed(rank)
    own = torch.eye(6)[[slice(0, 1), slice(1, 4), slice(4, 6)][rank]]
    for _ in range(300):
        layer.reinitialize_(torch.tensor([0, 1]), own, generator=generator)
        counts += layer.weight.detach().sum(dim=0)
    return counts.tolist()


def alone(rank: int) -> list[Any]:
    layer = PrototypeLayer(D, K)
    index = torch.tensor([rank])
    group = dist.new_group([0, 1])
    masks = [layer.reinitialize_(index, torch.ones(1, D), synchronize=False)]
    if rank < 2:
        masks.append(layer.reinitialize_(index[:0], torch.ones(1, D), process_group=group))
    else:
        with pytest.raises(ValueError, match="process_group must contain the calling rank"):
            layer.reinitialize_(index, torch.ones(1, D), process_group=group)
    for form in ("sharded", "FSDP2"):
        prototypes = network_of(form).prototypes
        with pytest.raises(ValueError, match="synchronize must be True for a sharded weight"):
            prototypes.reinitialize_(index, torch.ones(1, D).double(), synchronize=False)
    sharded = network_of("sharded").prototypes
    own = dist.group.WORLD
    masks.append(sharded.reinitialize_(index[:0], torch.ones(1, D).double(), process_group=own))
    if rank < 2:
        with pytest.raises(ValueError, match="process_group must be None or the group of the lay"):
            sharded.reinitialize_(index, torch.ones(1, D).double(), process_group=group)
    columns = fully_shard(PrototypeLayer(6, K), shard_placement_fn=lambda _: Shard(1))
    with pytest.raises(ValueError, match="weight must be sharded over its rows, got another"):
        columns.reinitialize_(index, torch.ones(1, 6))
    return [whole(mask).nonzero()[0].tolist() for mask in masks]


def test_the_group_is_obeyed_or_refused(ranks: Ranks) -> None:
    assert ranks.run(alone) == [[[0], [], []], [[1], [], []], [[2], []]]
