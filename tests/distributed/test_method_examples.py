"""The examples of other methods on several ranks: what they send, and that it is of all ranks."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit import PrototypeLayer, sinkhorn_knopp
from tests import method_oracles as oracles
from tests.modes import Collectives
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"
METHODS = ["dino", "capi", "deepclusterv2", "selav2"]
A, P, K, EPSILON = 2, 6, 7, 0.05
SAMPLES = [5, 2]  # of each rank


@pytest.fixture
def two_ranks(start_ranks: Callable[[int], Ranks]) -> Ranks:
    return start_ranks(2)


@contextmanager
def example(rank: int, name: str) -> Iterator[ModuleType]:
    """Import an example as torchrun would have it, in a group that exists already."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        with pytest.MonkeyPatch.context() as patch:
            processes = importlib.import_module("processes")
            patch.setattr(processes, "RANK", rank)
            patch.setattr(processes, "SIZE", len(SAMPLES))
            patch.setattr(processes, "join", lambda device: None)
            patch.setattr(processes, "leave", lambda: None)
            yield importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def scores_of(rank: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def dino_codes(rank: int, argument: tuple[Tensor, Tensor, Tensor]) -> Any:
    classes, patches, mask = argument
    with example(rank, "dino") as dino:
        buffer, weight = dino.masked_tokens(mask, size=12)
        with Collectives() as together:
            codes = dino.teacher_codes(classes, patches.flatten(0, 1)[buffer], weight, EPSILON)
    with Collectives() as alone:
        sinkhorn_knopp(classes.flatten(0, 1), epsilon=EPSILON)
    return len(together.numels), len(alone.numels), codes, buffer, weight


def test_dino_finds_both_kinds_of_codes_over_all_ranks_in_as_many_collectives_as_one(
    two_ranks: Ranks,
) -> None:
    classes = [scores_of(rank, A, samples, K) for rank, samples in enumerate(SAMPLES)]
    patches = [scores_of(rank, A * samples, P, K) for rank, samples in enumerate(SAMPLES)]
    masks = [scores_of(rank, A * samples, P) > 0.6 for rank, samples in enumerate(SAMPLES)]
    assert masks[0].sum() != masks[1].sum()
    assert max(int(mask.sum()) for mask in masks) <= 12
    everyone = zip(classes, patches, masks, strict=True)
    results = two_ranks.run(dino_codes, list(everyone))
    of_classes = oracles.class_codes(torch.cat(classes, dim=1).numpy(), EPSILON)
    mask = torch.cat(masks).numpy()
    of_patches = oracles.patch_codes(torch.cat(patches).numpy(), mask, EPSILON)
    found = 0
    for rank, (together, alone, codes, buffer, weight) in enumerate(results):
        assert together == alone == 4  # a maximum, and a sum in each of 3 iterations
        start = sum(SAMPLES[:rank])
        own = of_classes[:, start : start + SAMPLES[rank]]
        np.testing.assert_allclose(codes[0].numpy(), own, rtol=0, atol=1e-10)
        for token, present, code in zip(buffer.tolist(), weight > 0, codes[1], strict=True):
            if present:
                image, place = divmod(token, P)
                expected = of_patches[A * start + image, place]
                np.testing.assert_allclose(code.numpy(), expected, rtol=0, atol=1e-10)
                found += 1
    assert found == mask.sum()


def kmeans(rank: int, argument: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    with example(rank, "deepclusterv2") as deepcluster:
        return deepcluster.spherical_kmeans(*argument, iterations=10)


def test_kmeans_on_uneven_ranks_is_that_on_one(two_ranks: Ranks) -> None:
    """One cluster is empty on all ranks, and another has features on the first rank only."""
    first = F.normalize(scores_of(0, 13, 4).abs() + torch.eye(4).double()[0], dim=1)
    second = F.normalize(scores_of(1, 6, 4).abs() + torch.eye(4).double()[1], dim=1)
    start = torch.cat([first[:3], -first[:1]])
    results = two_ranks.run(kmeans, [(first, start), (second, start)])
    features = torch.cat([first, second]).numpy()
    centroids, index = oracles.spherical_kmeans(features, start.numpy(), 10)
    for own, _ in results:
        np.testing.assert_allclose(own.numpy(), centroids, rtol=0, atol=1e-12)
    assert torch.cat([own for _, own in results]).tolist() == index
    assert 3 not in index
    assert len(set(index[13:])) < len(set(index[:13]))


def clustered(rank: int, bank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices, the centroids, and the features of this rank that it would start from."""
    with example(rank, "deepclusterv2") as deepcluster:
        head = PrototypeLayer(4, 3).double()
        torch.manual_seed(rank)
        (index,) = deepcluster.cluster(bank, [head])
        torch.manual_seed(rank)
        return index, head.weight.detach(), bank[0, torch.randperm(bank.shape[1])[:3]]


def test_all_ranks_start_kmeans_from_features_of_the_first(two_ranks: Ranks) -> None:
    banks = [F.normalize(scores_of(rank, A, 9 + 4 * rank, 4), dim=-1) for rank in range(2)]
    results = two_ranks.run(clustered, banks)
    features = torch.cat([bank[0] for bank in banks]).numpy()
    centroids, index = oracles.spherical_kmeans(features, results[0][2].numpy(), 10)
    assert torch.cat([own for own, _, _ in results]).tolist() == index
    for _, own, _ in results:
        np.testing.assert_allclose(own.numpy(), centroids, rtol=0, atol=1e-12)


def program(rank: int, name: str) -> tuple[dict[str, float], list[Tensor]]:
    """Return what an example returns, and the weights that its rank has in the end."""
    with example(rank, name) as module, pytest.MonkeyPatch.context() as patch:
        methods = importlib.import_module("methods")
        load, trained = methods.load_images, []

        def load_few(*arguments: str, **settings: Any) -> Any:
            images = load(*arguments, **settings)
            rows = slice(101)  # 51 on the first rank, 50 on the second
            few = {"train": images.train[rows], "train_labels": images.train_labels[rows]}
            return dataclasses.replace(images, **few)

        def keep(*models: Any, **settings: Any) -> None:
            train(*models, **settings)
            modules = [model for model in models if isinstance(model, torch.nn.Module)]
            trained.extend(copy.deepcopy(list(each.parameters())) for each in modules)

        train = module.train
        patch.setattr(methods, "load_images", load_few)
        patch.setattr(module, "train", keep)
        sizes = ["--epochs", "2", "--prototypes", "4", "--batch-size", "16"]
        accuracies = module.main(["--data", "digits", "--device", "cpu", *sizes])
        return accuracies, [weight.detach() for model in trained for weight in model]


@pytest.mark.parametrize("name", METHODS)
def test_ranks_train_the_same_weights(two_ranks: Ranks, name: str) -> None:
    (accuracies, weights), (others, same) = two_ranks.run(program, [name] * 2)
    assert len(accuracies) == 2
    assert all(math.isfinite(accuracy) for accuracy in accuracies.values())
    assert others == {}
    for weight, other in zip(weights, same, strict=True):
        torch.testing.assert_close(weight, other, rtol=0, atol=1e-6)
