"""Autocast: products as nn.Linear makes them, everything else as without it, also backward."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from swavkit import (
    FeatureQueue,
    PrototypeLayer,
    SwAVLoss,
    multi_crop_forward,
    swapped_prediction_loss,
)
from tests import oracles, tolerances

DIMENSION, PROTOTYPES, VIEWS, SAMPLES = 16, 10, 4, 8
HALVES = (torch.float16, torch.bfloat16)
PAIRS = list(itertools.product(HALVES, HALVES))
FORMS: dict[str, dict[str, Any]] = {
    "full": {"memory": "full"},
    "streamed": {"memory": "streamed"},
    "auto above its limit": {"memory": "auto"},
    "full with a queue": {"memory": "full", "queue_length": 12},
    "streamed with a queue": {"memory": "streamed", "queue_length": 12},
    "two heads": {"memory": "full", "num_prototypes": (PROTOTYPES, 5)},
    "two heads streamed": {"memory": "streamed", "num_prototypes": (PROTOTYPES, 5)},
}


def criterion_of(form: str, monkeypatch: pytest.MonkeyPatch) -> SwAVLoss:
    if form == "auto above its limit":
        monkeypatch.setattr("swavkit._head_losses.SCORES_OF_PARTS_ON_CPU", 0)
    settings = {"num_prototypes": PROTOTYPES} | FORMS[form]
    return SwAVLoss(DIMENSION, **settings)


def features_of(dtype: torch.dtype = torch.float32, samples: int = SAMPLES) -> Tensor:
    return torch.randn(VIEWS, samples, DIMENSION, dtype=dtype, requires_grad=True)


class Products(TorchDispatchMode):
    """Notes the dtype of every matrix product whose inner dimension is that of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm") and args[-2].shape[-1] == DIMENSION:
            self.dtypes.add(args[-1].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_product_is_made_in_the_dtype_of_autocast(
    form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion, features = criterion_of(form, monkeypatch), features_of()
    with Products() as products:
        criterion(features)
        assert products.dtypes == {torch.float32}
        products.dtypes.clear()
        with torch.autocast("cpu", dtype=dtype):
            criterion(features)
        assert products.dtypes == {dtype}


@pytest.mark.parametrize("gradient", ["tangent", "published"])
@pytest.mark.parametrize("form", FORMS)
def test_a_backward_pass_inside_autocast_gives_the_same_gradients(
    form: str, gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion, features = criterion_of(form, monkeypatch), features_of()
    for head in criterion._heads():
        head.gradient = gradient
    loss = criterion(features)
    leaves = [features, *criterion.parameters()]
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_loss_of_scores_has_the_same_gradient_inside_autocast() -> None:
    scores = torch.randn(VIEWS, SAMPLES, PROTOTYPES, requires_grad=True)
    loss = swapped_prediction_loss(scores, scores.detach()[:2].softmax(-1))
    (expected,) = torch.autograd.grad(loss, scores, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(loss, scores)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", [pytest.param("full", marks=pytest.mark.slow), "streamed"])
def test_float16_trains_at_the_default_scale_of_a_gradient_scaler(memory: Any) -> None:
    centers = torch.randn(PROTOTYPES, 1, 6, 6)
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(128, DIMENSION)),
    )
    # Features of a large norm have a small gradient, so that the network's own fit float16, too.
    nn.init.normal_(network[-1].weight)
    criterion = SwAVLoss(
        DIMENSION, PROTOTYPES, memory=memory, queue_length=32, queue_start=20, freeze_steps=20
    )
    parameters = [*network.parameters(), *criterion.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    assert scaler.get_scale() == 2.0**16
    losses = []
    for _ in range(200):
        labels = torch.randint(PROTOTYPES, (32,))
        crops = centers[labels] + 0.2 * torch.randn(VIEWS, 32, 1, 6, 6)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = criterion(multi_crop_forward(network, list(crops)))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert loss.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in parameters)
        scaler.step(optimizer)
        scaler.update()
        assert all(parameter.isfinite().all() for parameter in parameters)
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**16  # no step was skipped
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


# Any two half precisions


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("of_features", "of_autocast"), PAIRS, ids=str)
def test_features_of_one_half_precision_serve_under_autocast_of_the_other(
    form: str, of_features: torch.dtype, of_autocast: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    criterion, features = criterion_of(form, monkeypatch), features_of(of_features)
    weight = torch.rand(SAMPLES).to(of_features)
    with torch.autocast("cpu", dtype=of_autocast):
        for given in (features, list(features)):
            loss = criterion(given, sample_weight=weight)
            assert loss.dtype == torch.float32
            assert loss.isfinite()
    loss.backward()


@pytest.mark.parametrize(("of_queue", "of_autocast"), PAIRS, ids=str)
def test_a_queue_of_one_half_precision_serves_under_autocast_of_the_other(
    of_queue: torch.dtype, of_autocast: torch.dtype
) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=12, queue_dtype=of_queue)
    queue = FeatureQueue(12, DIMENSION, dtype=of_queue)
    with torch.autocast("cpu", dtype=of_autocast):
        for dtype in (torch.float32, *HALVES):
            assert criterion(list(features_of(dtype))).isfinite()
            queue.push([torch.randn(3, DIMENSION, dtype=dtype) for _ in range(2)])
    assert len(criterion.queue) == 12
    assert len(queue) == 9


@pytest.mark.parametrize("of_autocast", HALVES, ids=str)
@pytest.mark.parametrize("of_crops", HALVES, ids=str)
def test_crops_of_one_half_precision_go_through_a_network_under_autocast_of_the_other(
    of_crops: torch.dtype, of_autocast: torch.dtype
) -> None:
    layer = PrototypeLayer(DIMENSION, PROTOTYPES)
    crops = [torch.randn(3, DIMENSION, 1, 1, dtype=of_crops) for _ in range(3)]
    with torch.autocast("cpu", dtype=of_autocast):
        scores = multi_crop_forward(lambda batch: layer(batch.flatten(1)), crops)
    assert scores.dtype == of_autocast


# Codes that sum to hundreds, in half precision


@pytest.mark.parametrize("mass", [1e-3, 1.0, 300.0, 30_000.0])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_right_whatever_the_codes_sum_to(
    dtype: torch.dtype, mass: float, weighted: bool
) -> None:
    scores = torch.randn(3, 6, PROTOTYPES).to(dtype).requires_grad_()
    codes = mass * torch.rand(2, 6, PROTOTYPES).softmax(-1)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5]) if weighted else None
    loss = swapped_prediction_loss(scores, codes, temperature=0.5, sample_weight=weight)
    # The factor keeps the result itself inside the range of float16.
    (found,) = torch.autograd.grad(loss / mass, scores)
    expected = oracles.loss_gradient(scores.detach().double().numpy(), codes.double().numpy(), 0.5)
    if weight is not None:
        expected *= (weight / weight.mean()).double().numpy()[:, None]
    np.testing.assert_allclose(
        found.double().numpy(), expected / mass, rtol=0, atol=4 * tolerances.ATOL[dtype]
    )


# Nothing returned is a view of something much larger


@pytest.mark.parametrize("queue_length", [0, 1000])
def test_details_own_what_they_hold_and_no_more(queue_length: int) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=queue_length)
    _, details = criterion(features_of(), return_details=True)
    for held in details:
        assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
