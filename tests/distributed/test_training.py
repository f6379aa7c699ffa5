"""Training on several processes is training on one with the data of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss, sinkhorn_knopp, swapped_prediction_loss
from tests import oracles
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

VIEWS, INPUTS = 3, 6
STEPS = 5


class Network(nn.Module):
    """A tiny encoder with its criterion, the same wherever it is made."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 4))
        self.criterion = SwAVLoss(4, 7, **settings)
        self.double()

    def forward(self, inputs: Tensor, sample_weight: Tensor | None = None) -> tuple[Any, ...]:
        loss, details = self.criterion(
            self.encoder(inputs), sample_weight=sample_weight, return_details=True
        )
        return loss, details.codes, details.scores


def batches(sizes: Sequence[int], steps: int = STEPS) -> list[np.ndarray]:
    """(steps, V, B, inputs) for each rank, different on each."""
    generator = np.random.default_rng(0)
    return [generator.normal(size=(steps, VIEWS, size, INPUTS)) for size in sizes]


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in tensors])


def record(
    network: nn.Module, step_loss: Callable[[Tensor], Tensor], inputs: np.ndarray
) -> dict[str, Any]:
    """Train by SGD and return the loss, all gradients and all parameters of each step."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3, momentum=0.9)
    history: dict[str, list[Any]] = {"loss": [], "gradient": [], "parameters": []}
    for batch in torch.tensor(inputs):
        optimizer.zero_grad()
        loss = step_loss(batch)
        loss.backward()
        optimizer.step()
        history["loss"].append(loss.item())
        history["gradient"].append(flat([parameter.grad for parameter in parameters]))
        history["parameters"].append(flat(parameters))
    return {name: np.array(values) for name, values in history.items()}


def train_under_ddp(rank: int, argument: dict[str, Any]) -> dict[str, Any]:
    network = Network(**argument.get("settings", {}))
    parallel = DistributedDataParallel(network)
    weight = argument.get("sample_weight")
    codes, scores = [], []

    def step_loss(batch: Tensor) -> Tensor:
        loss, step_codes, step_scores = parallel(
            batch, None if weight is None else torch.tensor(weight)
        )
        codes.append(step_codes.numpy())
        scores.append(step_scores.numpy())
        return loss

    return record(network, step_loss, argument["inputs"]) | {"codes": codes, "scores": scores}


def assert_trained_alike(results: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """The ranks' mean loss, their common gradients and parameters are those of one process."""
    mean_loss = np.mean([result["loss"] for result in results], axis=0)
    np.testing.assert_allclose(mean_loss, alone["loss"], rtol=0, atol=1e-10)
    for result in results:
        for name in ("gradient", "parameters"):
            np.testing.assert_array_equal(result[name], results[0][name])
            np.testing.assert_allclose(result[name], alone[name], rtol=0, atol=1e-10)


def by_hand(
    network: Network, shards: Sequence[Tensor], memories: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Return the mean of the shards' losses, and their (V, b, D) features.

    Codes are computed on the samples of all shards and on ``memories``, the (A, N, D) features that
    each rank remembers.
    """
    features = [network.encoder(shard) for shard in shards]
    scores = [network.criterion.prototypes(feature) for feature in features]
    rows = [score[:2] for score in scores] + [
        network.criterion.prototypes(memory) for memory in memories
    ]
    codes = sinkhorn_knopp(torch.cat(rows, dim=1), synchronize=False)
    parts = codes.split([row.shape[1] for row in rows], dim=1)
    losses = [
        swapped_prediction_loss(score, part)
        for score, part in zip(scores, parts, strict=False)  # the memories' codes are not used
    ]
    return torch.stack(losses).mean(), features


def split(sizes: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda batch: batch.split(list(sizes), dim=1)


def test_even_batches_train_like_one_process_on_all_of_them(ranks: Ranks) -> None:
    shards = batches((4, 4, 4))
    results = ranks.run(train_under_ddp, [{"inputs": shard} for shard in shards])
    network = Network()
    alone = record(network, lambda batch: network(batch)[0], np.concatenate(shards, axis=2))
    assert_trained_alike(results, alone)
    assert not np.allclose(alone["parameters"][0], alone["parameters"][-1])


def test_freezing_leaves_the_prototypes_to_ddp_and_moves_them_later(ranks: Ranks) -> None:
    shards = batches((4, 4, 4))
    settings = {"freeze_steps": 2}
    results = ranks.run(
        train_under_ddp, [{"inputs": shard, "settings": settings} for shard in shards]
    )
    network = Network(**settings)
    prototypes = network.criterion.prototypes.weight.numel()
    alone = record(network, lambda batch: network(batch)[0], np.concatenate(shards, axis=2))
    assert_trained_alike(results, alone)
    frozen = results[0]["gradient"][:, -prototypes:]  # the criterion comes last
    np.testing.assert_array_equal(frozen[:2], 0)
    assert np.all(np.abs(frozen[2:]).max(axis=1) > 0)


@pytest.mark.parametrize(
    ("sizes", "queue_start"), [((4, 4, 4), 0), ((4, 4, 4), 3), ((7, 0, 2), 0)], ids=str
)
def test_codes_are_shared_with_the_queues_of_all_ranks(
    ranks: Ranks, sizes: tuple[int, ...], queue_start: int
) -> None:
    length = 6  # not a multiple of a batch, and less than one
    shards = batches(sizes)
    settings = {"queue_length": length, "queue_start": queue_start}
    results = ranks.run(
        train_under_ddp, [{"inputs": shard, "settings": settings} for shard in shards]
    )

    network = Network()
    memories = [torch.zeros(2, 0, 4, dtype=torch.float64) for _ in sizes]
    done = 0

    def step_loss(batch: Tensor) -> Tensor:
        nonlocal done
        used = memories if done >= queue_start else []
        loss, features = by_hand(network, split(sizes)(batch), used)
        for index, feature in enumerate(features):
            memory = torch.cat([memories[index], feature[:2].detach()], dim=1)
            memories[index] = memory[:, -length:]
        done += 1
        return loss

    alone = record(network, step_loss, np.concatenate(shards, axis=2))
    assert_trained_alike(results, alone)


@pytest.mark.parametrize("sizes", [(5, 2, 1), (7, 0, 2), (0, 6, 0)], ids=str)
def test_uneven_batches_share_codes_and_average_local_means(
    ranks: Ranks, sizes: tuple[int, ...]
) -> None:
    shards = batches(sizes)
    results = ranks.run(train_under_ddp, [{"inputs": shard} for shard in shards])
    network = Network()
    alone = record(
        network,
        lambda batch: by_hand(network, split(sizes)(batch))[0],
        np.concatenate(shards, axis=2),
    )
    assert_trained_alike(results, alone)
    for size, result in zip(sizes, results, strict=True):
        if size == 0:
            np.testing.assert_array_equal(result["loss"], 0)
    for step in range(STEPS):
        scores = np.concatenate([result["scores"][step][:2] for result in results], axis=1)
        codes = np.concatenate([result["codes"][step] for result in results], axis=1)
        for view in range(2):
            expected = oracles.sinkhorn(scores[view], 0.05, 3)
            np.testing.assert_allclose(codes[view], expected, rtol=0, atol=1e-12)


def test_batches_padded_with_samples_of_no_weight_train_like_uneven_ones(ranks: Ranks) -> None:
    sizes, padded = (5, 2, 0), batches((5, 5, 5))
    shards = [shard[:, :, :size] for shard, size in zip(padded, sizes, strict=True)]
    network = Network()
    alone = record(
        network,
        lambda batch: by_hand(network, split(sizes)(batch))[0],
        np.concatenate(shards, axis=2),
    )
    arguments = [
        {"inputs": shard, "sample_weight": np.arange(5) < size}
        for shard, size in zip(padded, sizes, strict=True)
    ]
    assert_trained_alike(ranks.run(train_under_ddp, arguments), alone)


def accumulate(
    network: nn.Module, call: Callable[[Tensor], Tensor], pauses: Callable[[], Any], inputs: Any
) -> np.ndarray:
    """Return the gradients summed over all batches, in two rounds with a step after each."""
    parameters = list(network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    gradients = []
    for _ in range(2):
        optimizer.zero_grad()
        for index, batch in enumerate(torch.tensor(inputs)):
            with pauses() if index < len(inputs) - 1 else nullcontext():
                call(batch).backward()
        gradients.append(flat([parameter.grad for parameter in parameters]))
        optimizer.step()
    return np.array(gradients)


def accumulate_under_ddp(rank: int, inputs: np.ndarray) -> np.ndarray:
    network = Network()
    parallel = DistributedDataParallel(network)
    return accumulate(network, lambda batch: parallel(batch)[0], parallel.no_sync, inputs)


def test_gradients_accumulate_without_synchronisation_of_ddp(ranks: Ranks) -> None:
    shards = batches((4, 4, 4), steps=3)
    network = Network()
    alone = accumulate(
        network, lambda batch: network(batch)[0], nullcontext, np.concatenate(shards, axis=2)
    )
    for gradients in ranks.run(accumulate_under_ddp, shards):
        np.testing.assert_allclose(gradients, alone, rtol=0, atol=1e-10)
