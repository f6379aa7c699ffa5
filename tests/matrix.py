"""The components of the matrix: for each, the lines of a user, and what they must give.

Rows of features and prototypes are ±1 times a power of 2, so that their cosines are multiples of
1/8, which every dtype holds exactly. Half precision and autocast then may round gradients, but
neither codes nor losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

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
    SwAVStatistics,
    cluster_statistics,
    marginal_error,
    multi_crop_forward,
)
from tests import image_oracles, oracles, tolerances

VIEWS, CODE_VIEWS, SAMPLES, DIMENSION, PROTOTYPES, SLOTS = 3, 2, 6, 16, 5, 8
EPSILON, ITERATIONS, TEMPERATURE = 0.05, 3, 0.1  # the defaults
GROUPS = (
    CropGroup(6, 1, (0.3, 1.0), photometric=None),
    CropGroup(4, 1, (0.1, 0.3), photometric=None),
)


class Mode(NamedTuple):
    """How a component runs, and what is compared."""

    execution: str  # "eager", or "compiled" into one graph
    context: str  # of the forward pass: "plain", or under "autocast"
    direction: str  # "forward", "backward", or "backward inside" autocast

    def __str__(self) -> str:
        return " ".join(self)


# Whether a compiled backward pass runs without autocast is decided by torch.compile, for nn.Linear
# too, where it compiles the forward pass: it does so only if that was under autocast.
NOT_OURS = Mode("compiled", "plain", "backward inside")
MODES = [
    mode
    for mode in itertools.starmap(
        Mode,
        itertools.product(
            ("eager", "compiled"), ("plain", "autocast"), ("forward", "backward", "backward inside")
        ),
    )
    if mode != NOT_OURS
]


class Case(NamedTuple):
    """A component with its input, and the answers of the oracle."""

    call: Callable[..., Any]
    inputs: Sequence[Tensor]
    dtype: torch.dtype  # of the results
    expected: Sequence[Any]
    read: Callable[[], Sequence[Tensor]] | None = None  # the results, if not what the call returns
    atol: float | None = None  # that of the dtype by default
    leaves: Sequence[Tensor] = ()
    gradients: Callable[[list[np.ndarray]], Sequence[np.ndarray]] = lambda of_results: ()
    products: bool = False  # whether autocast makes products in its own dtype


class Cell:
    """A device, a dtype of inputs and parameters, and whether autocast is on."""

    def __init__(self, device: torch.device, dtype: torch.dtype, context: str = "plain") -> None:
        self.device, self.dtype = device, dtype
        of_autocast = torch.float16 if dtype == torch.float16 else torch.bfloat16
        enabled = context == "autocast"
        self.inside = torch.autocast(device.type, dtype=of_autocast)
        self.context = self.inside if enabled else nullcontext()
        # The dtype of products of features and prototypes, as ``nn.Linear`` has it.
        self.products = of_autocast if enabled and dtype != torch.float64 else dtype
        self.random = np.random.default_rng(0)

    @property
    def sums(self) -> torch.dtype:
        """The dtype of losses and statistics."""
        return torch.promote_types(self.dtype, torch.float32)

    def tensor(self, values: np.ndarray) -> Tensor:
        tensor = torch.tensor(values, device=self.device, dtype=self.dtype)
        return tensor.requires_grad_()

    def uniform(self, *shape: int, low: float = 0.0) -> Tensor:
        return self.tensor(self.random.uniform(low, 1, shape))

    def codes(self, *shape: int) -> Tensor:
        return self.tensor(self.random.dirichlet(np.ones(shape[-1]), shape[:-1]))

    def rows(self, *shape: int) -> Tensor:
        """Rows of ±1 times a power of 2."""
        powers = 2.0 ** self.random.integers(-1, 2, (*shape[:-1], 1))
        return self.tensor(self.random.choice([-1.0, 1.0], shape) * powers)

    def with_rows(self, module: nn.Module) -> nn.Module:
        """Return the module on the device, in the dtype, and with such rows as weights."""
        module.to(self.device, self.dtype)
        for weight in module.parameters():
            weight.data = self.rows(*weight.shape).detach()
        return module


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def crops(cell: Cell) -> Case:
    transform, images = MultiCropTransform(GROUPS), cell.uniform(2, 3, 10, 12)
    torch.manual_seed(0)
    _, *drawn = transform(images, return_boxes=True)
    mean, std = (np.reshape(each, (3, 1, 1)) for each in (transform.mean, transform.std))
    boxes = [
        [
            (top, left, bottom - top, right - left, flip)
            for (left, top, right, bottom), flip in zip(box.tolist(), flips.tolist(), strict=True)
        ]
        for box, flips in zip(*drawn, strict=True)
    ]
    (pixels,) = arrays(images)
    expected = [
        np.stack(
            [
                image_oracles.resized_box(*each, group.size)
                for each in zip(pixels, of_crop, strict=True)
            ]
        )
        for group, of_crop in zip(GROUPS, boxes, strict=True)
    ]

    def gradients(of_crops: list[np.ndarray]) -> list[np.ndarray]:
        result = np.zeros(pixels.shape)
        for of_crop, rows in zip(of_crops, boxes, strict=True):
            for sample, row in enumerate(rows):
                part = of_crop[sample] / std
                result[sample] += image_oracles.box_gradient(part, row, pixels[sample].shape)
        return [result]

    return Case(
        transform.__call__,
        [images],
        cell.dtype,
        [(crop - mean) / std for crop in expected],
        leaves=[images],
        gradients=gradients,
    )


def forward_of_crops(cell: Cell) -> Case:
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4, bias=False))
    cell.with_rows(network)
    given = [
        cell.tensor(cell.random.integers(-1, 2, (2, 3, size, size)).astype(float))
        for size in (4, 2, 4)
    ]
    weight, *pixels = arrays(network[2].weight, *given)

    def gradients(of_features: list[np.ndarray]) -> list[np.ndarray]:
        of_weight, of_crops = np.zeros(weight.shape), [np.zeros(crop.shape) for crop in pixels]
        for view, sample in np.ndindex(len(pixels), 2):
            upstream, crop = of_features[0][view, sample], pixels[view][sample]
            of_weight += np.outer(upstream, crop.mean((1, 2)))
            of_crops[view][sample] = (weight.T @ upstream)[:, None, None] / crop[0].size
        return [of_weight, *of_crops]

    return Case(
        lambda *crops: multi_crop_forward(network, crops),
        given,
        cell.products,
        [np.stack([crop.mean((2, 3)) @ weight.T for crop in pixels])],
        leaves=[network[2].weight, *given],
        gradients=gradients,
        products=True,
    )


def prototypes(cell: Cell) -> Case:
    layer = cell.with_rows(PrototypeLayer(DIMENSION, PROTOTYPES))
    features = cell.rows(SAMPLES, DIMENSION)
    values = arrays(features, layer.weight)
    return Case(
        layer,
        [features],
        cell.products,
        [oracles.cosines(*values)],
        leaves=[features, layer.weight],
        gradients=lambda of_scores: oracles.cosine_gradients(*values, of_scores[0]),
        products=True,
    )


def codes(cell: Cell) -> Case:
    scores = cell.uniform(CODE_VIEWS, SAMPLES, PROTOTYPES, low=-1)
    (values,) = arrays(scores)
    return Case(
        SinkhornKnopp(),
        [scores],
        cell.dtype,
        [np.stack([oracles.sinkhorn(view, EPSILON, ITERATIONS) for view in values])],
        atol=tolerances.of_codes(cell.dtype, epsilon=EPSILON, largest=1),
    )


def error_of_codes(cell: Cell) -> Case:
    given = cell.codes(CODE_VIEWS, SAMPLES, PROTOTYPES)
    expected = [oracles.marginal_error(view) for view in arrays(given)[0]]
    return Case(marginal_error, [given], cell.sums, [np.array(expected)])


def queue(cell: Cell) -> Case:
    features = cell.rows(CODE_VIEWS, SAMPLES, DIMENSION)
    held = FeatureQueue(SLOTS, DIMENSION, CODE_VIEWS, dtype=cell.dtype).to(cell.device)
    ring = oracles.Ring(SLOTS)
    for _ in range(2):
        ring.push(arrays(features)[0])
    held.push(features)
    expected = [np.stack(ring.slots, axis=1)]
    return Case(held.push, [features], cell.dtype, expected, read=lambda: [held.features])


def swapped_prediction(cell: Cell) -> Case:
    scores = cell.uniform(VIEWS, SAMPLES, PROTOTYPES, low=-1)
    given = cell.codes(CODE_VIEWS, SAMPLES, PROTOTYPES)
    values = *arrays(scores, given), TEMPERATURE
    return Case(
        SwappedPredictionLoss(),
        [scores, given.detach()],
        cell.sums,
        [oracles.loss(*values)],
        leaves=[scores],
        gradients=lambda of_loss: [of_loss[0] * oracles.loss_gradient(*values)],
    )


def code_prediction(cell: Cell) -> Case:
    scores, given = cell.uniform(SAMPLES, PROTOTYPES, low=-1), cell.codes(SAMPLES, PROTOTYPES)
    values = *arrays(scores, given), TEMPERATURE
    return Case(
        CodePredictionLoss(),
        [scores, given.detach()],
        cell.sums,
        [oracles.code_prediction_loss(*values)],
        leaves=[scores],
        gradients=lambda of_loss: [of_loss[0] * oracles.code_prediction_gradient(*values)],
    )


def whole_loss(cell: Cell, memory: str, queue_length: int = 0) -> Case:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, queue_length=queue_length)
    weight = cell.with_rows(criterion).prototypes.weight
    features = cell.rows(VIEWS, SAMPLES, DIMENSION)
    ring = None
    if queue_length:
        ring = oracles.Ring(queue_length)
        queued = cell.rows(CODE_VIEWS, queue_length, DIMENSION)
        criterion.queue.push(queued)
        ring.push(arrays(queued)[0])
    views, directions = arrays(features, weight)
    given = oracles.swav_codes(views[:CODE_VIEWS], directions, EPSILON, ITERATIONS, ring)
    scores = np.stack([oracles.cosines(view, directions) for view in views])

    def gradients(of_loss: list[np.ndarray]) -> list[np.ndarray]:
        of_scores = of_loss[0] * oracles.loss_gradient(scores, given, TEMPERATURE)
        of_features, of_weight = oracles.cosine_gradients(
            views.reshape(-1, DIMENSION), directions, of_scores.reshape(-1, PROTOTYPES)
        )
        return [of_features.reshape(views.shape), of_weight]

    return Case(
        criterion,
        [features],
        cell.sums,
        [oracles.loss(scores, given, TEMPERATURE)],
        leaves=[features, weight],
        gradients=gradients,
        products=True,
    )


def statistics(cell: Cell) -> Case:
    scores = cell.uniform(VIEWS, SAMPLES, PROTOTYPES, low=-1)
    given = cell.codes(CODE_VIEWS, SAMPLES, PROTOTYPES)
    found = oracles.cluster_statistics(*arrays(scores, given), TEMPERATURE)
    expected = [found[name] for name in SwAVStatistics._fields]
    return Case(cluster_statistics, [scores, given], cell.sums, expected)


def monitor(cell: Cell) -> Case:
    scores = cell.uniform(VIEWS, SAMPLES, PROTOTYPES, low=-1)
    given = cell.codes(CODE_VIEWS, SAMPLES, PROTOTYPES)
    features, directions = cell.rows(SAMPLES, DIMENSION), cell.rows(PROTOTYPES, DIMENSION)
    found = cluster_statistics(scores, given)
    watching = ClusterMonitor(PROTOTYPES).to(cell.device)
    expected = oracles.cluster_figures(
        [dict(zip(found._fields, arrays(*found), strict=True))], [2.0]
    )
    expected |= oracles.feature_figures(arrays(features)[0])
    expected["duplicates"] = oracles.num_duplicates(arrays(directions)[0])

    def update(features: Tensor, directions: Tensor) -> None:
        watching.update(found, loss=2.0, features=features, prototypes=directions)

    def figures() -> list[Tensor]:
        computed = watching.compute()
        return [computed[name] for name in expected]

    return Case(
        update, [features, directions], torch.float32, list(expected.values()), read=figures
    )


# Codes, queue and statistics get no gradient: their cells are those of the forward pass.
FORWARD_ONLY: dict[str, Callable[[Cell], Case]] = {
    "SinkhornKnopp": codes,
    "marginal_error": error_of_codes,
    "FeatureQueue": queue,
    "cluster_statistics": statistics,
    "ClusterMonitor": monitor,
}
COMPONENTS: dict[str, Callable[[Cell], Case]] = {
    "MultiCropTransform": crops,
    "multi_crop_forward": forward_of_crops,
    "PrototypeLayer": prototypes,
    "SwappedPredictionLoss": swapped_prediction,
    "CodePredictionLoss": code_prediction,
    "SwAVLoss full": lambda cell: whole_loss(cell, "full"),
    "SwAVLoss streamed": lambda cell: whole_loss(cell, "streamed"),
    "SwAVLoss with a queue": lambda cell: whole_loss(cell, "auto", SLOTS),
    **FORWARD_ONLY,
}
CELLS = [
    (component, dtype, mode)
    for component, dtype, mode in itertools.product(COMPONENTS, tolerances.DTYPES, MODES)
    if mode.direction == "forward" or component not in FORWARD_ONLY
]
