"""One pass per resolution: the features of one pass per crop, whatever the order of the crops."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from swavkit import multi_crop_forward
from tests.modes import CountingBackend
from tests.ranks import Ranks


class Recorder(torch.nn.Module):
    """A network without batch statistics that keeps the shapes of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(crops.shape))
        return self.layers(crops)


@pytest.mark.parametrize("sizes", [(8,), (8, 8, 6, 6, 6), (6, 8, 6, 7, 8)])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_one_pass_per_resolution_equals_one_pass_per_crop(sizes, batch, device):
    # In float64, for a device may convolve float32 in TF32, which depends on the batch.
    network = Recorder().double().to(device)
    crops = [torch.rand(batch, 3, size, size, dtype=torch.float64).to(device) for size in sizes]
    features = multi_crop_forward(network, crops)
    assert sorted(network.shapes) == sorted(
        (sizes.count(size) * batch, 3, size, size) for size in set(sizes)
    )
    assert features.shape == (len(sizes), batch, 5)
    for index, crop in enumerate(crops):
        torch.testing.assert_close(features[index], network.layers(crop))


def test_height_and_width_both_make_the_resolution():
    network = Recorder()
    crops = [torch.rand(2, 3, *size) for size in ((6, 8), (8, 6), (6, 8))]
    features = multi_crop_forward(network, crops)
    assert network.shapes == [(4, 3, 6, 8), (2, 3, 8, 6)]
    for index, crop in enumerate(crops):
        torch.testing.assert_close(features[index], network.layers(crop))


def test_gradients_are_those_of_one_pass_per_crop():
    network = Recorder().double()
    crops = [torch.rand(2, 3, size, size, dtype=torch.float64) for size in (6, 8, 6)]
    weights = torch.rand(3, 2, 5, dtype=torch.float64)
    (multi_crop_forward(network, crops) * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    sum((network(c) * w).sum() for c, w in zip(crops, weights, strict=True)).backward()
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# Networks that return more than the features


class Features(NamedTuple):
    maps: torch.Tensor
    pooled: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "key"),
    [
        (lambda features: (None, features), 1),
        (lambda features: [features, None], 0),
        (lambda features: {"maps": None, "pooled": features}, "pooled"),
        (lambda features: {3: features}, 3),
        (lambda features: Features(features.sum(), features), "pooled"),
        (lambda features: Features(features.sum(), features), 1),
        (lambda features: SimpleNamespace(pooled=features), "pooled"),
    ],
)
def test_a_key_says_where_the_features_are(wrap, key):
    network = Recorder()
    crops = [torch.rand(2, 3, size, size) for size in (6, 8, 6)]
    expected = multi_crop_forward(network, crops)
    features = multi_crop_forward(lambda batch: wrap(network(batch)), crops, key=key)
    assert torch.equal(features, expected)


# Tokens and feature maps

OUTPUTS = {
    "features": lambda maps: maps.mean((2, 3)),
    "tokens of one number": lambda maps: maps.mean(3)[:, :, :2].mT,
    "tokens": lambda maps: maps.flatten(2).mT,
    "maps of one size": lambda maps: maps[:, :, :3, :2],
    "maps": lambda maps: maps,
}
each_output = pytest.mark.parametrize("output", OUTPUTS)


@each_output
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 4])
def test_tokens_and_maps_are_those_of_one_pass_per_crop(output, together, batch):
    layer = torch.nn.Conv2d(3, 5, 3).double()
    seen = []

    def network(crops: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(crops))
        return {"here": OUTPUTS[output](layer(crops))}

    crops = [torch.rand(batch, 3, h, w).double() for h, w in ((6, 7), (8, 7), (6, 7), (6, 9))]
    views = multi_crop_forward(network, crops, key="here", together=together)
    assert seen == ([2 * batch, batch, batch] if together else [batch] * 4)
    expected = [OUTPUTS[output](layer(crop)) for crop in crops]
    assert isinstance(views, list) == (output in ("tokens", "maps"))
    if not isinstance(views, list):
        assert views.shape == (4, *expected[0].shape)
    for one, other in zip(views, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_output
@pytest.mark.parametrize("together", [True, False])
def test_tokens_and_maps_of_one_resolution_are_stacked(output, together):
    crops = [torch.rand(2, 3, 8, 8) for _ in range(3)]
    views = multi_crop_forward(OUTPUTS[output], crops, together=together)
    torch.testing.assert_close(views, torch.stack([OUTPUTS[output](crop) for crop in crops]))


@pytest.mark.parametrize("together", [True, False])
def test_the_gradient_reaches_through_a_list_of_maps(together):
    network = torch.nn.Conv2d(3, 5, 3).double()
    crops = [torch.rand(2, 3, size, size, dtype=torch.float64) for size in (6, 8, 6)]
    maps = multi_crop_forward(network, crops, together=together)
    sum(one.square().sum() for one in maps).backward()
    gradient = network.weight.grad.clone()
    network.zero_grad()
    sum(network(crop).square().sum() for crop in crops).backward()
    torch.testing.assert_close(gradient, network.weight.grad)


# One pass per crop


def test_one_pass_per_crop_has_batch_statistics_per_crop():
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten(2)).double()
    crops = [torch.rand(4, 3, 6, 6, dtype=torch.float64) * scale for scale in (1, 2, 3)]
    apart = multi_crop_forward(network, crops, together=False)
    assert network[0].num_batches_tracked == 3
    for one, crop in zip(apart, crops, strict=True):
        pixels = crop.numpy()
        mean, variance = pixels.mean((0, 2, 3)), pixels.var((0, 2, 3))
        expected = (pixels - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        np.testing.assert_allclose(one.detach(), expected.reshape(4, 3, 36), atol=1e-12)
    assert not torch.allclose(multi_crop_forward(network, crops), apart)


# Under autocast


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("crops_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("features_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_dtypes_meet_under_autocast(autocast, crops_dtype, features_dtype):
    network = Recorder()
    crops = [torch.rand(2, 3, size, size).to(crops_dtype) for size in (6, 8, 6)]
    expected = [network(crop.float()) for crop in crops]

    def in_low_precision(batch: torch.Tensor) -> torch.Tensor:
        assert batch.dtype == crops_dtype
        features = network(batch)
        assert features.dtype == autocast
        return features.to(features_dtype)

    with torch.autocast("cpu", dtype=autocast):
        features = multi_crop_forward(in_low_precision, crops)
    assert features.dtype == features_dtype
    for one, other in zip(features, expected, strict=True):
        torch.testing.assert_close(one.float(), other, atol=3e-2, rtol=3e-2)


# Under compile, in channels-last memory, under DDP


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("layers", [3, 1], ids=["features", "maps"])
def test_it_compiles_into_one_graph(layers, together):
    network = Recorder().layers[:layers]
    backend = CountingBackend()
    compiled = torch.compile(
        lambda crops: multi_crop_forward(network, crops, together=together),
        backend=backend,
        fullgraph=True,
    )
    for _ in range(3):
        crops = [torch.rand(2, 3, size, size) for size in (6, 8, 6)]
        torch.testing.assert_close(compiled(crops), multi_crop_forward(network, crops))
    assert backend.graphs == 1


def test_channels_last_crops_reach_the_network_as_such():
    seen = []

    def network(crops: torch.Tensor) -> torch.Tensor:
        seen.append(crops.is_contiguous(memory_format=torch.channels_last))
        return crops.mean((2, 3))

    crops = [torch.rand(2, 3, size, size) for size in (6, 8, 6)]
    last = [crop.contiguous(memory_format=torch.channels_last) for crop in crops]
    features = multi_crop_forward(network, last)
    assert seen == [True, True]
    torch.testing.assert_close(features, multi_crop_forward(network, crops))


class Encoder(torch.nn.Module):
    """With or without batch statistics, the same wherever it is made."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        normalisation = torch.nn.BatchNorm2d(5) if normalised else torch.nn.Identity()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3), normalisation, torch.nn.AdaptiveAvgPool2d(1),
            torch.nn.Flatten(), torch.nn.Linear(5, 4),
        )  # fmt: skip
        self.double()

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        return self.layers(crops)


class Model(torch.nn.Module):
    """The form that the documentation recommends: the pass of the crops inside what is wrapped."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.encoder = Encoder(normalised)

    def forward(self, crops: list[torch.Tensor]) -> torch.Tensor:
        return multi_crop_forward(self.encoder, crops)


def train_on_a_rank(rank: int, settings: tuple[bool, bool, np.ndarray]) -> tuple[Any, ...]:
    normalised, inside, images = settings
    if inside:
        model = DistributedDataParallel(Model(normalised))
    else:
        network = DistributedDataParallel(Encoder(normalised), broadcast_buffers=False)
        model = functools.partial(multi_crop_forward, network)
    parameters = list((model if inside else network).parameters())
    batch = torch.tensor(images)
    crops = [batch[..., :6, :6], batch, batch[..., 2:, 2:], batch.flip(-1)]
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = None
        features = model(crops)
        features.square().mean().backward()
    gradients = [parameter.grad.numpy() for parameter in parameters]
    return features.detach().numpy(), gradients


@pytest.mark.distributed
@pytest.mark.parametrize("normalised", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("inside", [False, True], ids=["around a wrapper", "inside a wrapper"])
def test_under_ddp(ranks, normalised, inside):
    images = np.random.default_rng(0).normal(size=(ranks.size, 2, 3, 8, 8))
    outcomes = ranks.run(train_on_a_rank, [(normalised, inside, part) for part in images])
    for _, gradients in outcomes[1:]:
        for one, other in zip(gradients, outcomes[0][1], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-12)
    if not normalised:  # then features and gradients are those of one process with all images
        batch = torch.tensor(images).flatten(0, 1)
        network = Encoder(normalised)
        crops = [batch[..., :6, :6], batch, batch[..., 2:, 2:], batch.flip(-1)]
        features = multi_crop_forward(network, crops)
        features.square().mean().backward()
        together = np.concatenate([features for features, _ in outcomes], axis=1)
        np.testing.assert_allclose(together, features.detach(), atol=1e-12)
        for parameter, gradient in zip(network.parameters(), outcomes[0][1], strict=True):
            np.testing.assert_allclose(gradient, parameter.grad, atol=1e-12)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    started = Ranks(2)
    yield started
    started.close()


# Bad input


@pytest.mark.parametrize(
    ("crops", "error", "message"),
    [
        ([], ValueError, r"crops must hold at least one tensor, got none"),
        (
            torch.rand(2, 2, 3, 8, 8),
            TypeError,
            r"crops must be a sequence of torch.Tensor, got Tensor",
        ),
        ([torch.rand(2, 3, 8, 8), None], TypeError, r"crops\[1\] must be a torch.Tensor"),
        (
            [torch.zeros(2, 3, 8, 8).byte()],
            TypeError,
            r"crops\[0\] must have a floating-point dtype",
        ),
        (
            [torch.rand(3, 8, 8)],
            ValueError,
            r"crops\[0\] must have shape \(B, C, H, W\), got \(3, 8, 8\)$",
        ),
        (
            [torch.rand(1, 2, 3, 8, 8)],
            ValueError,
            r"crops\[0\] must have shape \(B, C, H, W\), got \(1, 2, 3, 8, 8\)$",
        ),
        (
            [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8)],
            ValueError,
            r"crops\[1\] must have shape \(B, C, H, W\), got \(2, 3, 8\)$",
        ),
        (
            [torch.rand(2, 3, 8, 8), torch.rand(4, 3, 6, 6)],
            ValueError,
            r"crops\[1\] .* got \(4, 3, 6, 6\) beside \(2, 3, 8, 8\)",
        ),
        (
            [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, device="meta")],
            ValueError,
            r"crops\[1\] must be on device cpu, got meta",
        ),
    ],
)
def test_bad_crops_to_forward(crops, error, message):
    with pytest.raises(error, match=message):
        multi_crop_forward(Recorder(), crops)


@pytest.mark.parametrize(
    ("network", "error", "message"),
    [
        (lambda crops: (crops,), TypeError, r"crops of 8x8 must be a torch.Tensor, got tuple"),
        (
            lambda crops: crops.sum(),
            ValueError,
            r"must have shape \(4, D\), \(4, T, D\) or \(4, D, h, w\), got \(\)",
        ),
        (lambda crops: crops.mean((1, 2, 3)), ValueError, r"\(4, D, h, w\), got \(4,\)"),
        (lambda crops: crops[None], ValueError, r"\(4, D, h, w\), got \(1, 4, 3, 8, 8\)"),
        (lambda crops: crops[:2].flatten(1), ValueError, r"\(4, D, h, w\), got \(2, 192\)"),
        (
            lambda crops: crops.flatten(1),
            ValueError,
            r"crops of 6x6 must have D = 192 .* got \(2, 108\)",
        ),
        (lambda crops: crops.mean(1), ValueError, r"6x6 must have D = 8 .* got \(2, 6, 6\)"),
        (
            lambda crops: crops.repeat(1, crops.shape[-1], 1, 1),
            ValueError,
            r"6x6 must have D = 24 .* got \(2, 18, 6, 6\)",
        ),
        (
            lambda crops: crops if crops.shape[-1] == 8 else crops.flatten(2),
            ValueError,
            r"6x6 must have 4 dimensions as for the crops before, got shape \(2, 3, 36\)",
        ),
    ],
)
def test_what_a_network_returns_is_checked(network, error, message):
    crops = [torch.rand(2, 3, size, size) for size in (8, 6, 8)]
    with pytest.raises(error, match=message):
        multi_crop_forward(network, crops)


@pytest.mark.parametrize(
    ("output", "key", "error", "message"),
    [
        (torch.rand(2, 5), 0, TypeError, r"must be a tuple, list or dictionary for key=0, got a T"),
        ((torch.rand(2, 5),), 1, ValueError, r"crops of 8x8 must have something under key=1"),
        ({"pooled": torch.rand(2, 5)}, "x", ValueError, r"under key='x', got \['pooled'\]"),
        ((torch.rand(2, 5),), "x", ValueError, r"under key='x', got tuple"),
        ({"maps": None}, "maps", TypeError, r"crops of 8x8 must be a torch.Tensor, got NoneType"),
        ({"maps": None}, 1.5, TypeError, r"key must be an int, a str or None, got float"),
        ({"maps": None}, True, TypeError, r"key must be an int, a str or None, got bool"),
        ({"maps": None}, None, TypeError, r"got dict: pass key to select the features"),
    ],
)
def test_bad_keys(output, key, error, message):
    with pytest.raises(error, match=message):
        multi_crop_forward(lambda crops: output, [torch.rand(2, 3, 8, 8)], key=key)


@pytest.mark.parametrize("together", [None, 1, "yes"])
def test_together_is_a_boolean(together):
    network = Recorder()
    with pytest.raises(ValueError, match=rf"together must be True or False, got {together!r}"):
        multi_crop_forward(network, [torch.rand(2, 3, 8, 8)], together=together)
    assert not network.shapes
