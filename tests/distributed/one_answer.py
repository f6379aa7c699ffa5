"""Training on several processes, beside training on one with the batch of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss
from tests.ranks import Ranks

VIEWS, INPUTS, STEPS = 3, 6, 6

# Settings of the loss that change no number.
VARIANTS: list[dict[str, Any]] = [{}, {"memory": "streamed"}]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=str)

# Of one step and, as errors grow from step to step, of the last.
ATOL = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 2e-4)}


def called(module: nn.Module, *inputs: Any, **named: Any) -> Any:
    return module(*inputs, **named)


class Network(nn.Module):
    """A tiny encoder with its loss, the same wherever it is made."""

    def __init__(self, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 4))
        sizes = settings.pop("num_prototypes", 7)
        self.criterion = SwAVLoss(4, sizes, reduction="global_mean", **settings)
        self.to(dtype)
        self.call_encoder: Callable[..., Any] = called
        self.call_criterion: Callable[..., Any] = called

    def forward(self, inputs: Tensor, weight: Tensor | None, details: bool) -> tuple[Tensor, ...]:
        """Return the loss, and the codes of each head if ``details``, where they exist."""
        features = self.call_encoder(self.encoder, inputs)
        if not details or self.criterion.memory == "streamed":
            return (self.call_criterion(self.criterion, features, sample_weight=weight),)
        loss, found = self.call_criterion(
            self.criterion, features, sample_weight=weight, return_details=True
        )
        heads = found if isinstance(self.criterion.prototypes, nn.ModuleList) else [found]
        return loss, *(of_head.codes for of_head in heads)


def under_ddp(network: Network, group: Any) -> nn.Module:
    return DistributedDataParallel(network, process_group=group)


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    whole = [
        tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        for tensor in (tensor.detach() for tensor in tensors)
    ]
    return np.concatenate([tensor.double().numpy().ravel() for tensor in whole])


def train(call: Callable[..., Any], network: Network, part: dict[str, Any]) -> dict[str, Any]:
    """Make the steps; return of each the loss, the codes, the gradients and the parameters."""
    parameters = list(network.parameters())
    dtype = parameters[0].dtype
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    history: dict[str, list[Any]] = {"loss": [], "codes": [], "gradient": [], "parameters": []}
    for step, batch in enumerate(part["inputs"]):
        optimizer.zero_grad()
        weight = part["weights"]
        weight = None if weight is None else torch.tensor(weight[step], dtype=dtype)
        loss, *codes = call(torch.tensor(batch, dtype=dtype), weight, step % 2 == 0)
        loss.backward()
        history["loss"].append(loss.item())
        history["codes"].append([of_head.double().numpy() for of_head in codes])
        history["gradient"].append(flat([parameter.grad for parameter in parameters]))
        optimizer.step()
        history["parameters"].append(flat(parameters))
    queue, steps = network.criterion.queue, int(network.criterion.steps)
    rows = np.zeros((0, 0))
    if queue is not None:
        rows = queue.features[:, queue.valid].transpose(0, 1).flatten(1).double().numpy()
    return history | {"queue": rows, "steps": steps}


def train_on_rank(rank: int, part: dict[str, Any]) -> dict[str, Any] | None:
    group = dist.new_group(part["group"]) if part["group"] else None
    if part["inputs"] is None:
        return None
    network = Network(part["dtype"], process_group=group, **part["settings"])
    return train(part["engine"](network, group), network, part)


def assert_one_answer(
    ranks: Ranks,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weights: Sequence[float] = (),
    group: Sequence[int] = (),
    engine: Callable[[Network, Any], Callable[..., Any]] = under_ddp,
    **settings: Any,
) -> None:
    """Train on ranks that hold ``sizes`` of each batch, and on one process that holds all of it.

    Each sample is of one of the ``weights``; the ranks are those of the ``group``, if one is given.
    ``engine`` makes of a network and a group what is called in place of the network.
    """
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(STEPS, VIEWS, sum(sizes), INPUTS))
    weight = generator.choice(weights, size=(STEPS, sum(sizes))) if weights else None
    whole = {"inputs": inputs, "weights": weight, "dtype": dtype}
    cuts = np.cumsum(sizes)[:-1]
    common = {"dtype": dtype, "settings": settings, "group": tuple(group), "engine": engine}
    arguments = [common | {"inputs": None}] * ranks.size
    for index, rank in enumerate(group or range(ranks.size)):
        arguments[rank] = common | {
            "inputs": np.split(inputs, cuts, axis=2)[index],
            "weights": None if weight is None else np.split(weight, cuts, axis=1)[index],
        }
    results = [result for result in ranks.run(train_on_rank, arguments) if result is not None]

    longer = {"queue_length": len(sizes) * settings.get("queue_length", 0)}
    network = Network(dtype, **settings | longer | {"memory": "full"})
    alone = train(network, network, whole)
    for step, atol in enumerate(np.geomspace(*ATOL[dtype], STEPS)):
        mean_loss = np.mean([result["loss"][step] for result in results])
        np.testing.assert_allclose(mean_loss, alone["loss"][step], rtol=0, atol=atol)
        asked = results[0]["codes"][step]
        for head, expected in enumerate(alone["codes"][step] if asked else []):
            codes = np.concatenate([result["codes"][step][head] for result in results], axis=1)
            np.testing.assert_allclose(codes, expected, rtol=0, atol=atol)
        for result in results:
            for name in ("gradient", "parameters"):
                np.testing.assert_allclose(result[name][step], alone[name][step], rtol=0, atol=atol)
    for result, size in zip(results, sizes, strict=True):
        np.testing.assert_array_equal(result["parameters"], results[0]["parameters"])
        assert result["steps"] == STEPS
        if size == 0:
            np.testing.assert_array_equal(result["loss"], 0)
    rows = [result["queue"] for result in results]
    of_all, expected = (
        found[np.argsort(found[:, 0])] if found.size else found
        for found in (np.concatenate(rows), alone["queue"])
    )
    np.testing.assert_allclose(of_all, expected, rtol=0, atol=atol)
