"""Prototypes replaced by features: which, by what, equal dtypes, momentum, and that it helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from swavkit import FeatureQueue, PrototypeLayer, SwAVLoss, cluster_statistics
from tests import oracles, tolerances
from tests.modes import RefuseSynchronisation
from tests.optimizers import Lars, adamw, sgd
from tests.strategies import reals, seeds

K, D = 6, 4


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def usable_rows(features: np.ndarray) -> np.ndarray:
    """Return the unit rows of the features that have a direction."""
    rows = [row for row in features.reshape(-1, D) if np.isfinite(row).all() and row.any()]
    return oracles.unit_rows(np.array(rows).reshape(-1, D))


def rows_taken(new: np.ndarray, rows: np.ndarray, atol: float) -> list[int]:
    """Return for each new row which of the distinct ``rows`` it is."""
    taken = []
    for row in new:
        distances = [np.abs(row - other).max() for other in rows]
        taken.append(int(np.argmin(distances)))
        assert distances[taken[-1]] <= atol
    return taken


# What is replaced


@given(st.data(), seeds, st.integers(0, 9), st.sampled_from([torch.float32, torch.float64]))
def test_rows_of_the_index_become_different_unit_features_and_no_other_changes_a_bit(
    data: st.DataObject, seed: int, samples: int, features_dtype: torch.dtype
) -> None:
    weight_dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
    asked = data.draw(st.lists(st.integers(0, K - 1), max_size=8))  # repetitions too
    bad = data.draw(st.lists(st.sampled_from([0.0, math.nan, math.inf]), max_size=samples))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, D, generator=generator).to(features_dtype)
    features *= 10.0 ** torch.randint(-8, 9, (samples, 1), generator=generator)
    for row, value in enumerate(bad):
        features[row] *= value
    layer = PrototypeLayer(D, K).to(weight_dtype)
    layer.weight.data.mul_(torch.arange(1, K + 1).unsqueeze(1))  # norms other than 1
    parameter, before = layer.weight, layer.weight.detach().clone()
    mask = torch.zeros(K, dtype=torch.bool)
    mask[asked] = True
    index = data.draw(st.sampled_from([mask, torch.tensor(asked, dtype=torch.int64)]))
    replaced = layer.reinitialize_(index, features, generator=generator)

    rows = usable_rows(features.double().numpy())
    expected = torch.zeros(K, dtype=torch.bool)
    expected[sorted(set(asked))[: len(rows)]] = True
    assert torch.equal(replaced, expected)
    assert torch.equal(layer.weight[~replaced], before[~replaced])
    coarsest = max(tolerances.ATOL[dtype] for dtype in (weight_dtype, features_dtype))
    taken = rows_taken(as_array(layer.weight[replaced]), rows, coarsest)
    assert len(set(taken)) == len(taken)
    assert layer.weight is parameter
    assert layer.weight.requires_grad
    assert not replaced.requires_grad


@given(reals(5, D), seeds)
def test_features_are_counted_over_all_leading_dimensions(features: np.ndarray, seed: int) -> None:
    layers = [PrototypeLayer(D, K).double() for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    rows = torch.tensor(features)
    for layer, given_features in zip(layers, (rows, rows[:, None, None]), strict=True):
        generator = torch.Generator().manual_seed(seed)
        layer.reinitialize_(torch.tensor([4, 0]), given_features, generator=generator)
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_every_feature_is_drawn_as_often(device: torch.device) -> None:
    layer, counts = PrototypeLayer(D, K).to(device), torch.zeros(D, device=device)
    generator = torch.Generator(device).manual_seed(0)
    features = torch.eye(D, device=device)
    for _ in range(600):
        layer.reinitialize_(torch.tensor([1, 3], device=device), features, generator=generator)
        counts += layer.weight[[1, 3]].detach().sum(dim=0)
    # 300 of each, here within five standard errors.
    assert (counts - 300).abs().max() < 5 * math.sqrt(600 / 4)


def test_one_feature_and_none(device: torch.device) -> None:
    layer = PrototypeLayer(D, K).to(device)
    before = layer.weight.detach().clone()
    index = torch.tensor([5, 2], device=device)
    assert not layer.reinitialize_(index, torch.empty(0, D, device=device)).any()
    assert not layer.reinitialize_(index[:0], torch.ones(9, D, device=device)).any()
    assert torch.equal(layer.weight, before)
    replaced = layer.reinitialize_(index, torch.tensor([0.0, 3, 0, 4], device=device))
    assert replaced.nonzero().flatten().tolist() == [2]
    expected = torch.tensor([0, 0.6, 0, 0.8], device=device)
    torch.testing.assert_close(layer.weight[2].detach(), expected)


def test_the_empty_slots_of_a_queue_make_no_prototype(device: torch.device) -> None:
    queue = FeatureQueue(8, D).to(device)
    layer = PrototypeLayer(D, K).to(device)
    queue.push(torch.nn.functional.normalize(torch.randn(2, 2, D, device=device), dim=-1))
    every = torch.ones(K, dtype=torch.bool, device=device)
    assert layer.reinitialize_(every, queue.features).tolist() == [True] * 4 + [False] * 2
    taken = rows_taken(as_array(layer.weight[:4]), usable_rows(as_array(queue.features)), 1e-6)
    assert sorted(taken) == [0, 1, 2, 3]


def test_dead_and_duplicate_prototypes_are_found_by_a_line_each() -> None:
    layer = PrototypeLayer(D, K).double()
    layer.initialize_(torch.cat([torch.eye(D), -torch.eye(D)[:2]]).double())
    layer.weight.data[4] = 3 * layer.weight.data[1]
    scores = layer(torch.eye(D).double()).expand(2, D, K)
    dead = cluster_statistics(scores, scores.softmax(dim=-1)).assigned == 0
    cosines = layer.directions @ layer.directions.T
    duplicates = (cosines.triu(diagonal=1) > 0.99).any(dim=0)
    assert dead.nonzero().flatten().tolist() == [4, 5]
    assert duplicates.nonzero().flatten().tolist() == [4]
    assert torch.equal(layer.reinitialize_(dead | duplicates, -torch.eye(D).double()), dead)


def test_the_seed_of_a_generator_decides(device: torch.device) -> None:
    layers = [PrototypeLayer(D, K).to(device) for _ in range(3)]
    features = torch.randn(30, D, device=device)
    every, state = torch.ones(K, dtype=torch.bool, device=device), torch.get_rng_state()
    for layer, seed in zip(layers, (3, 3, 4), strict=True):
        generator = torch.Generator(device).manual_seed(seed)
        layer.reinitialize_(every, features, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layers[0].weight, layers[1].weight)
    assert not torch.equal(layers[0].weight, layers[2].weight)


# Where it runs


def test_a_mask_is_not_read_on_the_host(device: torch.device) -> None:
    layer = PrototypeLayer(D, K).to(device)
    mask = torch.arange(K, device=device) % 2 == 0
    for samples in (0, 2, 30):
        with RefuseSynchronisation():
            layer.reinitialize_(mask, torch.randn(samples, D, device=device))


@pytest.mark.parametrize("dynamic", [None, True])
def test_with_a_mask_it_compiles_for_any_number_of_features(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    layer, eager = (PrototypeLayer(D, K) for _ in range(2))
    eager.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer.reinitialize_, fullgraph=True, dynamic=dynamic, backend="eager")
    mask = torch.arange(K) % 2 == 0
    for samples in (7, 9, 30, 2):
        features = torch.randn(samples, D)
        for seeded in (compiled, eager.reinitialize_):
            torch.manual_seed(3)
            seeded(mask, features)
        torch.testing.assert_close(layer.weight, eager.weight, rtol=0, atol=1e-6)


# Momentum of the optimizer


@pytest.mark.parametrize("optimizer_of", [sgd, adamw, Lars])
@pytest.mark.parametrize("cleared", [True, False])
def test_without_momentum_new_rows_stay_where_they_are(
    optimizer_of: Callable[[Any], torch.optim.Optimizer], cleared: bool
) -> None:
    prototypes = PrototypeLayer(D, K).double()
    optimizer = optimizer_of(prototypes.parameters())
    # Before the first step there is no state to clear.
    index, others = torch.tensor([1, 4]), torch.tensor([0, 2, 3, 5])
    for step in range(5):
        if step == 0 and cleared:
            clear(optimizer, prototypes, prototypes.reinitialize_(index, torch.randn(9, D)))
        optimizer.zero_grad()
        prototypes(torch.randn(8, D).double()).sin().sum().backward()
        optimizer.step()
    replaced = prototypes.reinitialize_(index, torch.randn(9, D))
    if cleared:
        clear(optimizer, prototypes, replaced)
    start = prototypes.directions
    optimizer.zero_grad()
    prototypes(torch.randn(8, D).double()).sin().sum().backward()
    prototypes.weight.grad[index] = 0
    optimizer.step()
    cosines = (start * prototypes.directions).sum(dim=1)  # weight decay changes only norms
    assert (cosines[others] < 1 - 1e-8).all()
    assert (cosines[index] > 1 - 1e-12).all() == cleared


def clear(optimizer: torch.optim.Optimizer, prototypes: PrototypeLayer, replaced: Tensor) -> None:
    """As in the docstring."""
    for value in optimizer.state[prototypes.weight].values():
        if torch.is_tensor(value) and value.shape == prototypes.weight.shape:
            value.mul_(replaced.logical_not().unsqueeze(1))


# That it helps


def batches_of(pixels: Tensor) -> Iterator[Tensor]:
    """Two views of 128 digits with a fifth of the pixels dropped in each."""
    generator = torch.Generator().manual_seed(1)
    while True:
        batch = pixels[torch.randint(len(pixels), (128,), generator=generator)]
        yield batch * (torch.rand(2, *batch.shape, generator=generator) > 0.2)


def used_after_training(*, reinitialize: bool) -> tuple[int, int]:
    """Return how many prototypes are nearest to a digit before and after the last 50 steps."""
    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 32)
    network, criterion = nn.Sequential(*layers), SwAVLoss(32, 100)
    prototypes = criterion.prototypes
    with torch.no_grad():
        prototypes.weight[40:] = prototypes.weight[40]  # equal ones have equal gradients
    optimizer = torch.optim.SGD([*network.parameters(), prototypes.weight], 0.03, momentum=0.9)
    batches = batches_of(pixels)

    def train(steps: int) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            criterion(network(next(batches).flatten(0, 1)).view(2, 128, 32)).backward()
            optimizer.step()
        with torch.no_grad():
            features: Tensor = network.eval()(pixels)
        network.train()
        return features

    features = train(200)
    assigned = torch.bincount(prototypes.assign(features), minlength=100)
    if reinitialize:
        clear(optimizer, prototypes, prototypes.reinitialize_(assigned == 0, features))
    return int(assigned.count_nonzero()), len(prototypes.assign(train(50)).unique())


def test_replacing_dead_prototypes_of_digits_brings_them_into_use() -> None:
    before, without = used_after_training(reinitialize=False)
    same_start, after = used_after_training(reinitialize=True)
    assert max(before, without) <= 41  # each of 40, and the first of the equal ones
    assert same_start == before
    assert after > without + 30


# Bad input


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        ([1, 2], TypeError, r"index must be a torch\.Tensor, got list"),
        (1, TypeError, r"index must be a torch\.Tensor, got int"),
        (
            torch.zeros(2),
            TypeError,
            r"index must have dtype torch\.bool or torch\.int64, got torch\.float32",
        ),
        (
            torch.zeros(2, dtype=torch.int32),
            TypeError,
            r"index must have dtype torch\.bool or torch\.int64, got torch\.int32",
        ),
        (
            torch.zeros(2, dtype=torch.bool),
            ValueError,
            r"index must have shape \(6,\), got \(2,\)",
        ),
        (
            torch.tensor([[1], [2]]),
            ValueError,
            r"index must have 1 dimension as indices, got shape \(2, 1\)",
        ),
        (torch.tensor(1), ValueError, "index must have 1 dimension as indices"),
        (torch.tensor([1, 6]), ValueError, r"index must be in \[0, 5\], got 6"),
        (torch.tensor([-1, 1]), ValueError, r"index must be in \[0, 5\], got -1"),
        (
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "index must be on device cpu, got meta",
        ),
        (
            torch.zeros(6, dtype=torch.bool, device="meta"),
            ValueError,
            "index must be on device cpu, got meta",
        ),
    ],
)
def test_a_bad_index_is_named(index: Any, error: type[Exception], text: str) -> None:
    layer = PrototypeLayer(D, K)
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=text):
        layer.reinitialize_(index, torch.randn(9, D))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("features", "error", "text"),
    [
        (torch.zeros(9, 3), ValueError, r"features must have 4 features in its last dimension"),
        (torch.zeros(9, 4, dtype=torch.int64), TypeError, "features must have a floating-point"),
        (torch.zeros(9, 4, device="meta"), ValueError, "features must be on device cpu, got meta"),
        ([[0.0] * 4], TypeError, r"features must be a torch\.Tensor, got list"),
    ],
)
def test_bad_features_are_named(features: Any, error: type[Exception], text: str) -> None:
    layer = PrototypeLayer(D, K)
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=text):
        layer.reinitialize_(torch.tensor([1]), features)
    assert torch.equal(layer.weight, before)


def test_a_bad_group_is_named() -> None:
    with pytest.raises(TypeError, match="process_group must be a "):
        PrototypeLayer(D, K).reinitialize_(torch.tensor([1]), torch.randn(9, D), process_group=2)


def test_a_weight_that_is_computed_is_refused() -> None:
    layer = parametrizations.weight_norm(PrototypeLayer(D, K))
    with pytest.raises(RuntimeError, match=r"weight must be a parameter .*, got one that is"):
        layer.reinitialize_(torch.tensor([1]), torch.randn(9, D))
