"""Any number of processes train like one with the batch of all, however it lies on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import SwAVLoss
from tests.ranks import Ranks
from tests.strategies import seeds, splits

pytestmark = pytest.mark.distributed

VIEWS, INPUTS, STEPS = 3, 6, 20

# Settings of the loss that change no number.
VARIANTS: list[dict[str, Any]] = [{}]
EACH_VARIANT = pytest.mark.parametrize("variant", VARIANTS, ids=str)

# Of one step and, as errors grow from step to step, of the last.
ATOL = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-5, 1e-3)}

# How a batch lies on the ranks: evenly, unevenly, on some without any of it.
SIZES = [(8,), (4, 4), (7, 1), (8, 0), (3, 3, 3), (5, 2, 1), (0, 6, 0), (2, 2, 2, 2), (4, 0, 3, 1)]


class Network(nn.Module):
    """A tiny encoder with its loss, the same wherever it is made."""

    def __init__(self, dtype: torch.dtype, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, 4))
        sizes = settings.pop("num_prototypes", 7)
        self.criterion = SwAVLoss(4, sizes, reduction="global_mean", **settings)
        self.to(dtype)

    def forward(self, inputs: Tensor, weight: Tensor | None, details: bool) -> tuple[Tensor, ...]:
        """Return the loss, and the codes of each head if ``details``."""
        features = self.encoder(inputs)
        if not details:
            return (self.criterion(features, sample_weight=weight),)
        loss, found = self.criterion(features, sample_weight=weight, return_details=True)
        heads = found if isinstance(self.criterion.prototypes, nn.ModuleList) else [found]
        return loss, *(of_head.codes for of_head in heads)


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


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
    return train(DistributedDataParallel(network, process_group=group), network, part)


def assert_one_answer(
    ranks: Ranks,
    sizes: Sequence[int],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    weights: Sequence[float] = (),
    group: Sequence[int] = (),
    **settings: Any,
) -> None:
    """Train on ranks that hold ``sizes`` of each batch, and on one process that holds all of it.

    Each sample is of one of the ``weights``; the ranks are those of the ``group``, if one is given.
    """
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(STEPS, VIEWS, sum(sizes), INPUTS))
    weight = generator.choice(weights, size=(STEPS, sum(sizes))) if weights else None
    whole = {"inputs": inputs, "weights": weight, "dtype": dtype}
    cuts = np.cumsum(sizes)[:-1]
    common = {"dtype": dtype, "settings": settings, "group": tuple(group)}
    arguments = [common | {"inputs": None}] * ranks.size
    for index, rank in enumerate(group or range(ranks.size)):
        arguments[rank] = common | {
            "inputs": np.split(inputs, cuts, axis=2)[index],
            "weights": None if weight is None else np.split(weight, cuts, axis=1)[index],
        }
    results = [result for result in ranks.run(train_on_rank, arguments) if result is not None]

    longer = {"queue_length": len(sizes) * settings.get("queue_length", 0)}
    network = Network(dtype, **settings | longer)
    alone = train(network, network, whole)
    for step, atol in enumerate(np.geomspace(*ATOL[dtype], STEPS)):
        mean_loss = np.mean([result["loss"][step] for result in results])
        np.testing.assert_allclose(mean_loss, alone["loss"][step], rtol=0, atol=atol)
        for head, expected in enumerate(alone["codes"][step]):
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


@EACH_VARIANT
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_training_does_not_depend_on_the_split(
    start_ranks: Callable[[int], Ranks],
    sizes: tuple[int, ...],
    dtype: torch.dtype,
    variant: dict[str, Any],
) -> None:
    assert_one_answer(start_ranks(len(sizes)), sizes, dtype=dtype, **variant)


@EACH_VARIANT
@pytest.mark.parametrize(
    "options",
    [
        {"sizes": (3, 3, 3), "queue_length": 6},  # a queue that wraps around
        {"sizes": (5, 0, 2), "queue_length": 5 * STEPS, "queue_start": 3},  # one that never does
        {"sizes": (5, 0, 2), "num_prototypes": (5, 3), "freeze_steps": 4},
        {"sizes": (5, 1, 2), "weights": (0, 0, 0.5, 1, 3)},
        {"sizes": (5, 1, 2), "weights": (0, 1), "queue_length": 5 * STEPS},
        {"sizes": (4, 1), "group": (0, 2), "queue_length": 4 * STEPS},
        {"sizes": (1, 4), "group": (1, 2), "num_prototypes": (5, 3)},
        {"sizes": (4, 1, 1), "num_code_views": 1, "prototype_gradient": "published"},
        {"sizes": (4, 1, 1), "num_code_views": 3, "iterations": 8, "epsilon": 0.1},
    ],
    ids=str,
)
def test_nor_does_it_with_queues_heads_weights_and_groups(
    ranks: Ranks, options: dict[str, Any], variant: dict[str, Any]
) -> None:
    assert_one_answer(ranks, **options, **variant)


@st.composite
def shardings(draw: st.DrawFn) -> dict[str, Any]:
    """A batch on 1 to 4 ranks, and settings of the loss."""
    size = draw(st.integers(1, 4))
    samples = draw(st.integers(1, 9))
    queue = draw(st.sampled_from([0, samples * STEPS]))
    return {
        "sizes": draw(splits(samples, size)),
        "seed": draw(seeds),
        "dtype": draw(st.sampled_from(list(ATOL))),
        "weights": draw(st.sampled_from([(), (0, 1), (0.25, 2)])),
        "queue_length": queue,
        "num_prototypes": draw(st.sampled_from([4, (3, 5)])),
        "freeze_steps": draw(st.sampled_from([0, 5])),
    }


@EACH_VARIANT
@given(shardings())
@settings(max_examples=15)
def test_any_sharding_trains_like_one_process(
    start_ranks: Callable[[int], Ranks], variant: dict[str, Any], sharding: dict[str, Any]
) -> None:
    ranks = start_ranks(len(sharding["sizes"]))
    assert_one_answer(ranks, **sharding, **variant)


# The mean of what


def losses(rank: int, part: dict[str, Any]) -> dict[str, float]:
    """Return the loss of one batch by either reduction, in training, in eval and alone."""
    features = torch.tensor(part["features"])
    outcome = {}
    for name, settings_of_it in {
        "mean": {"reduction": "mean"},
        "global": {"reduction": "global_mean"},
        "alone": {"reduction": "global_mean", "synchronize": False},
        "always": {"reduction": "global_mean", "synchronize": "always"},
    }.items():
        torch.manual_seed(0)
        criterion = SwAVLoss(4, 5, **settings_of_it).double()
        outcome[name] = criterion(features).item()
        outcome[f"{name}, in eval"] = criterion.eval()(features).item()
        torch.manual_seed(0)
        criterion = SwAVLoss(4, 5, **settings_of_it).double()
        criterion.sinkhorn.register_forward_hook(lambda module, given, codes: None)
        outcome[f"{name}, hooked"] = criterion(features).item()
    return outcome


def test_the_mean_over_all_samples_is_taken_where_a_call_synchronises(ranks: Ranks) -> None:
    sizes = (5, 2, 1)
    parts = [{"features": np.random.default_rng(size).normal(size=(3, size, 4))} for size in sizes]
    for size, outcome in zip(sizes, ranks.run(losses, parts), strict=True):
        scale = 3 * size / 8
        for name in ("global", "always"):
            np.testing.assert_allclose(outcome[name], scale * outcome["mean"], rtol=1e-12)
            np.testing.assert_allclose(outcome[f"{name}, hooked"], outcome[name], rtol=1e-12)
        np.testing.assert_allclose(outcome["always, in eval"], outcome["always"], rtol=1e-12)
        for name in ("global, in eval", "alone", "alone, in eval", "alone, hooked"):
            np.testing.assert_allclose(outcome[name], outcome["mean, in eval"], rtol=1e-12)


def nobody(rank: int) -> tuple[float, bool]:
    criterion = SwAVLoss(4, 5, reduction="global_mean")
    features = torch.zeros(3, 0, 4, requires_grad=True)
    loss = criterion(features)
    loss.backward()
    weight = criterion.prototypes.weight
    return loss.item(), features.grad is not None and not weight.grad.any().item()


def test_a_batch_that_is_empty_everywhere_has_a_loss_of_0(ranks: Ranks) -> None:
    assert ranks.run(nobody) == [(0.0, True)] * 3
