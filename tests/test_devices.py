"""Every part: no wait for a device, one device, deterministic bits, and any layout of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from swavkit import (
    ClusterMonitor,
    CodePredictionLoss,
    CropGroup,
    FeatureQueue,
    MultiCropTransform,
    PrototypeLayer,
    SinkhornKnopp,
    SwappedPredictionLoss,
    SwAVLoss,
    cluster_statistics,
    marginal_error,
    multi_crop_forward,
)
from tests.modes import RefuseSynchronisation

DIMENSION, PROTOTYPES, VIEWS, SAMPLES = 6, 5, 3, 8
DIFFERENTIABLE = ("features", "scores", "images", "large", "small", "other")
Inputs = dict[str, Tensor]
Part = tuple[Callable[[], Callable[..., Any]], Callable[[], Inputs]]


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def features(views: int = VIEWS) -> Tensor:
    return torch.randn(views, SAMPLES, DIMENSION)


def scores(views: int = VIEWS) -> Tensor:
    return torch.rand(views, SAMPLES, PROTOTYPES) * 2 - 1


def sample_weight() -> Tensor:
    return torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1])


def prototype_weight() -> Tensor:
    return torch.tensor([1, 2, 0.5, 0, 1])


# The parts: what makes a function, and what makes its arguments. A result is anything with tensors.


def transforming(interpolation: Any, whole: bool) -> Part:
    groups = (
        CropGroup(12, 2, (0.3, 1.0), interpolation=interpolation),
        CropGroup((6, 8), 2, (0.05, 0.3), interpolation=interpolation),
    )

    def pixels() -> Inputs:
        drawn = torch.randint(0, 256, (4, 3, 20, 24), dtype=torch.uint8)
        return {"images": drawn if whole else drawn / 255}

    def make() -> Callable[..., Any]:
        transform = MultiCropTransform(groups)
        return lambda images: transform(images, seed=1, return_boxes=True)

    return make, pixels


def network_of_crops() -> Part:
    def make() -> Callable[..., Any]:
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        network = nn.Sequential(*layers)
        return lambda **crops: [multi_crop_forward(network, list(crops.values())), network]

    sizes = {"large": 12, "small": 6, "other": 12}
    return make, lambda: {name: torch.rand(4, 3, size, size) for name, size in sizes.items()}


def prototypes(gradient: Any) -> Part:
    def make() -> Callable[..., Any]:
        layer = PrototypeLayer(DIMENSION, PROTOTYPES, gradient=gradient)

        def use(features: Tensor, frozen: Tensor) -> Any:
            results = layer(features), layer(features, frozen=frozen), layer.assign(features)
            directions = layer.directions
            gradients = torch.autograd.grad(results[0].sin().sum(), layer.weight, retain_graph=True)
            layer.normalize_()
            return results, directions, gradients, layer

        return use

    return make, lambda: {"features": features(), "frozen": torch.tensor(True)}


def prototypes_from_features(start: bool) -> Part:
    def make() -> Callable[..., Any]:
        layer = PrototypeLayer(DIMENSION, PROTOTYPES)

        def use(features: Tensor, dead: Tensor) -> Any:
            generator = None
            if not features.is_meta:
                generator = torch.Generator(features.device).manual_seed(1)
            if start:
                layer.initialize_(features, generator=generator)
                return layer
            return layer.reinitialize_(dead, features, generator=generator), layer

        return use

    return make, lambda: {
        "features": features(),
        "dead": torch.tensor([True, False, True, False, False]),
    }


def codes(weighted: bool = False, scheduled: bool = False, **settings: Any) -> Part:
    def make() -> Callable[..., Any]:
        sinkhorn = SinkhornKnopp(**settings)

        def use(scores: Tensor, epsilon: Tensor, **weights: Tensor) -> Any:
            if scheduled:
                sinkhorn.epsilon = epsilon
            several = [scores[0], scores[1:, ::2]]
            return sinkhorn(scores, **weights), sinkhorn(several)

        return use

    def inputs() -> Inputs:
        weights = {"sample_weight": sample_weight(), "prototype_weight": prototype_weight()}
        return {"scores": scores(), "epsilon": torch.tensor(0.1)} | (weights if weighted else {})

    return make, inputs


def errors_of_codes() -> Part:
    def use(codes: Tensor, **weights: Tensor) -> Any:
        return marginal_error(codes), marginal_error(codes, **weights)

    return lambda: use, lambda: {
        "codes": scores().softmax(-1),
        "sample_weight": sample_weight(),
        "prototype_weight": prototype_weight(),
    }


def queue(samples: int) -> Part:
    def make() -> Callable[..., Any]:
        held, emptied = (FeatureQueue(10, DIMENSION) for _ in range(2))

        def use(features: Tensor, valid: Tensor) -> Any:
            new = features[:, :samples]
            for each in (held, emptied):
                each.push(new)
                each.push(list(new), valid=valid[:samples])
                each.push(new.float())
            emptied.reset_parameters()
            return held.features.clone(), held.valid, held.age, held, emptied

        return use

    def inputs() -> Inputs:
        new = features(2).repeat(1, 2, 1)
        new[0, 1] = torch.nan
        return {"features": new, "valid": torch.arange(2 * SAMPLES) % 3 > 0}

    return make, inputs


def predictions(reduction: Any, hard: bool) -> Part:
    def make() -> Callable[..., Any]:
        swapped, at_the_same_place = SwappedPredictionLoss(), CodePredictionLoss(0.2, reduction)

        def use(scores: Tensor, codes: Tensor, index: Tensor, sample_weight: Tensor) -> Any:
            targets = index if hard else codes.detach()
            of_places = sample_weight.expand(2, -1)
            results = [at_the_same_place(scores[:2], targets, w) for w in (None, of_places)]
            if not hard:
                results += [swapped(scores, codes, w) for w in (None, sample_weight)]
                results += [swapped(list(scores), list(codes))]
            return results

        return use

    return make, lambda: {
        "scores": scores(),
        "codes": scores(2).softmax(-1),
        "index": torch.randint(0, PROTOTYPES, (2, SAMPLES)),
        "sample_weight": sample_weight(),
    }


def whole_loss(
    sizes: Any = PROTOTYPES,
    *,
    taught: bool = False,
    details: bool = False,
    weighted: bool = False,
    priors: bool = False,
    **settings: Any,
) -> Part:

    def make() -> Callable[..., Any]:
        criterion, teacher = (SwAVLoss(DIMENSION, sizes, **settings) for _ in range(2))

        def use(features: Tensor, of_teacher: Tensor, sample_weight: Tensor, prior: Tensor) -> Any:
            if priors:
                criterion.prototype_weight = prior
            inputs: dict[str, Any] = {"return_statistics": True, "return_details": details}
            if taught:
                inputs |= {"code_features": of_teacher, "code_prototypes": teacher.prototypes}
            if weighted:
                inputs["sample_weight"] = sample_weight
            results: list[Any] = []
            for mode in (True, True, False):  # the queue takes part, and freezing ends
                given = features if mode else list(features)
                loss, *others = criterion.train(mode)(given, **inputs)
                parameters = list(criterion.parameters())
                results += [others, torch.autograd.grad(loss, parameters, retain_graph=True), loss]
            return results, criterion

        return use

    return make, lambda: {
        "features": features(),
        "of_teacher": features(2),
        "sample_weight": sample_weight(),
        "prior": prototype_weight(),
    }


def monitored() -> Part:
    def make() -> Callable[..., Any]:
        layer = PrototypeLayer(DIMENSION, PROTOTYPES)
        monitor = ClusterMonitor(PROTOTYPES, window=2)

        def use(features: Tensor, scores: Tensor, codes: Tensor, sample_weight: Tensor) -> Any:
            statistics = cluster_statistics(scores, codes)
            weighted = cluster_statistics(list(scores), list(codes), sample_weight=sample_weight)
            loss = scores.mean()
            for _ in range(2):
                monitor.update(statistics, loss=loss, features=features, prototypes=layer)
            monitor.update(weighted, loss=1.0)
            return statistics, weighted, monitor

        return use

    return make, lambda: {
        "features": features(),
        "scores": scores(),
        "codes": scores(2).softmax(-1),
        "sample_weight": sample_weight(),
    }


HEADS = {"sizes": (PROTOTYPES, 3)}
QUEUE = {"queue_length": 10, "queue_start": 1, "freeze_steps": 1}
PARTS: dict[str, Part] = {
    "transform": transforming("bilinear", whole=True),
    "transform, floating": transforming("bilinear", whole=False),
    "transform, bicubic": transforming("bicubic", whole=True),
    "forward of crops": network_of_crops(),
    "prototypes": prototypes("tangent"),
    "prototypes, published": prototypes("published"),
    "initialize_": prototypes_from_features(start=True),
    "reinitialize_": prototypes_from_features(start=False),
    "codes": codes(),
    "codes, 1 iteration": codes(iterations=1),
    "codes, 8 iterations": codes(iterations=8, weighted=True),
    "codes, weighted": codes(weighted=True),
    "codes, hard": codes(hard=True, weighted=True),
    "codes, relaxed": codes(relaxation=0.5, weighted=True),
    "codes, relaxed and hard": codes(relaxation=0.5, hard=True, iterations=8),
    "codes, float32": codes(dtype=torch.float32, weighted=True),
    "codes, scheduled": codes(scheduled=True, weighted=True),
    "marginal error": errors_of_codes(),
    "queue": queue(4),
    "queue, more than it holds": queue(2 * SAMPLES),
    "predictions": predictions("mean", hard=False),
    "predictions, summed": predictions("sum", hard=True),
    "predictions, each": predictions("none", hard=True),
    "loss": whole_loss(memory="full"),
    "loss, auto": whole_loss(**QUEUE),
    "loss, streamed": whole_loss(memory="streamed", weighted=True, **QUEUE),
    "loss, streamed, heads": whole_loss(
        memory="streamed", prototype_gradient="published", **HEADS, **QUEUE
    ),
    "loss, heads": whole_loss(details=True, weighted=True, **HEADS, **QUEUE),
    "loss, teacher": whole_loss(memory="full", taught=True, weighted=True, **QUEUE),
    "loss, streamed, teacher": whole_loss(memory="streamed", taught=True, **HEADS, **QUEUE),
    "loss, hard": whole_loss(hard=True, priors=True, **QUEUE),
    "loss, streamed, relaxed": whole_loss(
        memory="streamed",
        relaxation=0.5,
        reduction="global_mean",
        priors=True,
        **QUEUE,
    ),
    "monitor": monitored(),
}
ANY_PART = pytest.mark.parametrize("part", PARTS)


def made(part: str, device: Any = "cpu") -> tuple[Callable[..., Any], Inputs]:
    """Return a part and its arguments, the same in each call."""
    torch.manual_seed(0)
    make, inputs = PARTS[part]
    with torch.device(device):
        return make(), inputs()


def results(use: Callable[..., Any], inputs: Inputs) -> list[Tensor]:
    """Return all tensors that a part gives, changes or holds, and the gradients of its inputs."""
    leaves = {
        name: value.detach().requires_grad_(name in DIFFERENTIABLE and value.is_floating_point())
        for name, value in inputs.items()
    }
    tensors = []
    for leaf in tree_leaves(use(**leaves)):
        tensors += leaf.state_dict().values() if isinstance(leaf, nn.Module) else [leaf]
    tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    differentiable = [tensor for tensor in tensors if tensor.requires_grad]
    if differentiable:
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        total = torch.stack([tensor.sin().sum() for tensor in differentiable]).sum()
        tensors += torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in tensors]


@cache
def expected(part: str, device: Any = "cpu") -> list[Tensor]:
    """Return the results of a part as they usually are."""
    return results(*made(part, device))


def assert_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


# No wait

# Their range is checked where a read costs nothing. On the meta device they are refused below.
CHECKED_ON_A_CPU = ("transform, floating", "predictions, summed", "predictions, each")


@pytest.mark.parametrize("part", [part for part in PARTS if part not in CHECKED_ON_A_CPU])
def test_no_part_waits_for_the_device(part: str, device: torch.device) -> None:
    use, inputs = made(part, device)
    with RefuseSynchronisation():
        results(use, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda: SinkhornKnopp(tolerance=0.1)(scores()),
        lambda: SinkhornKnopp(validate=True)(scores()),
        lambda: len(FeatureQueue(2, 3)),
    ],
    ids=["tolerance", "validate", "len(queue)"],
)
def test_what_waits_is_what_the_documentation_says(call: Callable[[], Any]) -> None:
    call()
    with RefuseSynchronisation(), pytest.raises(RuntimeError, match="waits for the device"):
        call()


# One device


@ANY_PART
def test_everything_is_on_the_device_of_the_inputs(part: str) -> None:
    use, inputs = made(part, "meta")
    # There, a tensor made without a device is on the CPU. Crops read numbers that were drawn there.
    fake = nullcontext() if "transform" in part else FakeTensorMode(allow_non_fake_inputs=True)
    with fake, RefuseSynchronisation():
        found = results(use, inputs)
    assert {tensor.device.type for tensor in found} == {"meta"}
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected(part)]


@ANY_PART
def test_the_default_device_does_not_matter(part: str) -> None:
    use, inputs = made(part)
    with torch.device("meta"):
        found = results(use, inputs)
    assert_close(found, expected(part))


# Deterministic


@ANY_PART
def test_two_runs_have_equal_bits_with_deterministic_algorithms(part: str) -> None:
    torch.use_deterministic_algorithms(True)  # also fills new memory with NaN, so a read shows
    try:
        first, second = (results(*made(part)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    assert_close(first, expected(part))


# Any layout

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda value: value.movedim(1, -1).contiguous().movedim(-1, 1),
    "every other sample": lambda value: value.repeat_interleave(2, -2)[..., ::2, :],
    "transposed": lambda value: value.mT.contiguous().mT,
    "expanded": lambda value: value[:1].expand_as(value),
}


@ANY_PART
def test_the_layout_in_memory_does_not_matter(part: str, device: torch.device) -> None:
    for arrange in LAYOUTS.values():
        use, inputs = made(part, device)
        arranged = {
            name: arrange(value) if value.dim() > 1 else value for name, value in inputs.items()
        }
        assert not any(value.is_contiguous() for value in arranged.values() if value.dim() > 2)
        wanted = expected(part, device)
        if any(not torch.equal(arranged[name], inputs[name]) for name in inputs):  # expanded
            contiguous = tree_map_only(Tensor, Tensor.contiguous, arranged)
            wanted = results(made(part, device)[0], contiguous)
        assert_close(results(use, arranged), wanted)
