"""Laws of codes, of the swapped prediction loss and of transforms, as assertions.

An error names the law that does not hold and the problem. The most specific laws come first and the
agreement with the oracle last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from itertools import combinations
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from swavkit.testing import oracle
from swavkit.testing.oracle import Array
from swavkit.testing.strategies import CodesProblem, LossProblem

__all__ = [
    "assert_codes",
    "assert_sinkhorn_laws",
    "assert_swapped_loss_laws",
    "assert_transform_laws",
]

_ROUNDING = 1e-6  # of pixels


def assert_codes(
    codes: Tensor | Array,
    *,
    sample_weight: Tensor | Array | None = None,
    prototype_weight: Tensor | Array | None = None,
    tolerance: float = math.inf,
    atol: float = 1e-6,
) -> None:
    """Assert that codes are distributions over the prototypes and use them in their proportions.

    Args:
        codes: (B, K), with B > 0. Codes of samples of weight 0 may be anything.
        sample_weight: (B,) multiplicities of the samples; 1 by default.
        prototype_weight: (K,) relative masses of the prototypes; equal by default.
        tolerance: The largest relative error of the mass of a prototype. By default it is not
            checked, because a few iterations leave a larger error than many.
        atol: The largest error of the sum of a row.

    Raises:
        AssertionError: If a law does not hold.

    Example:
        >>> from swavkit import sinkhorn_knopp
        >>> scores = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
        >>> assert_codes(sinkhorn_knopp(scores, iterations=100), tolerance=1e-3)
        >>> assert_codes(torch.eye(3)[[0, 0, 1]], tolerance=1e-3)
        Traceback (most recent call last):
        ...
        AssertionError: every prototype is used by its mass: the relative error is 1, above 0.001
    """
    found = _array(codes)
    weights = [None if each is None else _array(each) for each in (sample_weight, prototype_weight)]
    present = found if weights[0] is None else found[weights[0] > 0]
    _assert_distributions(present, atol, "these codes")
    error = oracle.marginal_error(found, *weights)
    if tolerance < math.inf and not error <= tolerance:
        _fail(
            "every prototype is used by its mass",
            f"the relative error is {error:.6g}, above {tolerance:.6g}",
        )


def assert_sinkhorn_laws(
    function: Callable[..., Tensor], problem: CodesProblem, *, atol: float = 1e-9
) -> None:
    """Assert the laws of Sinkhorn-Knopp for a function and a problem.

    - Codes are at least 0 and those of a sample sum to 1.
    - Permuted samples have the permuted codes, and permuted prototypes too.
    - A constant added to all scores of a prototype changes nothing.
    - The codes are those of :func:`sinkhorn_codes`.

    Args:
        function: Called as ``function(scores, epsilon=…, iterations=…)`` with float64 (B, K)
            scores, and with ``sample_weight`` and ``prototype_weight`` if the problem has them.
        problem: One of :func:`codes_problems`, or your own.
        atol: The largest error of a code.

    Raises:
        AssertionError: If a law does not hold.

    Example:
        >>> from swavkit import sinkhorn_knopp
        >>> from swavkit.testing import CodesProblem
        >>> problem = CodesProblem(np.array([[0.9, 0.1], [0.8, 0.1]]), epsilon=0.1, iterations=3)
        >>> assert_sinkhorn_laws(sinkhorn_knopp, problem)
    """
    scores, case = problem.scores, _described(problem)
    same = partial(_assert_close, atol=atol, case=case)
    settings: dict[str, Any] = {"epsilon": problem.epsilon, "iterations": problem.iterations}
    sample_weight, prototype_weight = problem.sample_weight, problem.prototype_weight

    def codes(scores: Array, samples: Any = ..., prototypes: Any = ...) -> Array:
        """Return the codes of a problem with permuted samples and prototypes."""
        given = dict(settings)
        if sample_weight is not None:
            given["sample_weight"] = torch.tensor(sample_weight[samples])
        if prototype_weight is not None:
            given["prototype_weight"] = torch.tensor(prototype_weight[prototypes])
        return _array(function(torch.tensor(scores[samples][:, prototypes]), **given))

    found = codes(scores)
    if found.shape != scores.shape:
        _fail("codes have the shape of the scores", f"{found.shape} for {case}")
    _assert_distributions(found, atol, case)
    # A turn by one place also moves samples between the parts of a batch.
    turned = np.roll(np.arange(len(scores)), 1)
    same("permuted samples have permuted codes", codes(scores, samples=turned), found[turned])
    turned = np.roll(np.arange(scores.shape[1]), 1)
    same(
        "permuted prototypes have permuted codes",
        codes(scores, prototypes=turned),
        found[:, turned],
    )
    constant = np.eye(scores.shape[1])[0]
    same(
        "a constant added to the scores of a prototype changes nothing",
        codes(scores + constant),
        found,
    )
    expected = oracle.sinkhorn_codes(
        scores, problem.epsilon, problem.iterations, sample_weight, prototype_weight
    )
    same("codes are those of the published equations", found, expected)


def assert_swapped_loss_laws(
    loss: Callable[..., Tensor], problem: LossProblem, *, atol: float = 1e-9
) -> None:
    """Assert the laws of the swapped prediction loss for a function and a problem.

    - The loss is a scalar and at least the mean entropy of the codes.
    - The gradient sums to 0 over the prototypes.
    - A view does not predict its own code.
    - The order of samples and of views without codes does not count.
    - The loss and its gradient are those of :func:`swapped_loss` and
      :func:`swapped_loss_gradient`.

    Args:
        loss: Called as ``loss(scores, codes, temperature=…)`` with float64 (V, B, K) scores and
            (A, B, K) codes.
        problem: One of :func:`loss_problems`, or your own.
        atol: The largest error of the loss and of an entry of its gradient, absolute up to 1 and
            relative above.

    Raises:
        AssertionError: If a law does not hold.

    Example:
        >>> from swavkit import swapped_prediction_loss
        >>> from swavkit.testing import LossProblem
        >>> problem = LossProblem(np.eye(6).reshape(3, 2, 6), np.full((2, 2, 6), 1 / 6), 0.1)
        >>> assert_swapped_loss_laws(swapped_prediction_loss, problem)
    """
    scores, codes, case = problem.scores, problem.codes, _described(problem)
    same = partial(_assert_close, atol=atol, case=case)

    def value(scores: Tensor, codes: Array) -> Tensor:
        return loss(scores, torch.tensor(codes), temperature=problem.temperature)

    leaf = torch.tensor(scores, requires_grad=True)
    differentiable = value(leaf, codes)
    found = _array(differentiable)
    if found.shape != ():
        _fail("the loss is a scalar", f"its shape is {found.shape} for {case}")
    mass = codes.sum(axis=-1, keepdims=True)
    logs = np.log(np.divide(codes, mass, out=np.ones_like(codes), where=codes > 0))
    bound = -float(np.sum(codes * logs)) / (len(codes) * codes.shape[1])
    if not found >= bound - atol * (1 + bound):
        _fail(
            "the loss is at least the entropy of the codes",
            f"{found:.6g} is below {bound:.6g} for {case}",
        )
    (gradient,) = map(_array, torch.autograd.grad(differentiable, leaf))
    sums = gradient.sum(axis=-1)
    same("the gradient sums to 0 over the prototypes", sums, np.zeros_like(sums))
    if len(codes) == 1:
        same("a view does not predict its own code", gradient[0], np.zeros_like(gradient[0]))
    views = np.arange(len(scores))
    views[len(codes) :] = np.roll(views[len(codes) :], 1)
    same(
        "the order of views without codes does not count",
        _array(value(torch.tensor(scores[views]), codes)),
        found,
    )
    turned = np.roll(np.arange(scores.shape[1]), 1)
    same(
        "the order of samples does not count",
        _array(value(torch.tensor(scores[:, turned]), codes[:, turned])),
        found,
    )
    equation = (scores, codes, problem.temperature)
    same(
        "the loss is that of the published equation",
        found,
        np.array(oracle.swapped_loss(*equation)),
    )
    same(
        "the gradient is that of the published equation",
        gradient,
        oracle.swapped_loss_gradient(*equation),
    )


def assert_transform_laws(
    transform: Callable[..., Sequence[Tensor]],
    images: Tensor,
    sizes: Sequence[int | tuple[int, int]],
    *,
    value_range: tuple[float, float] = (-math.inf, math.inf),
    seed: int = 0,
) -> None:
    """Assert the laws of a transform that draws several random crops.

    - There is a floating-point crop of each size, in this order, with values in the range, and the
      images stay as they are.
    - The same generator gives the same crops, another one gives others.
    - Crops of the same size differ, and so do the crops of equal images in a batch.

    Args:
        transform: Called as ``transform(images, generator=…)``.
        images: An image (C, H, W) or a batch (B, C, H, W), with enough texture for two random crops
            to differ.
        sizes: The size of each crop, one int for a square or (height, width).
        value_range: The least and the largest value of a crop, up to a rounding error of 1e-6.
        seed: The seed of the generators.

    Raises:
        AssertionError: If a law does not hold.

    Example:
        >>> from swavkit import CropGroup, MultiCropTransform
        >>> groups = CropGroup(16, 2, (0.14, 1.0)), CropGroup(8, 3, (0.05, 0.14))
        >>> transform = MultiCropTransform(groups, mean=0.0, std=1.0)
        >>> images = torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
        >>> assert_transform_laws(transform, images, [16, 16, 8, 8, 8], value_range=(0, 1))
    """
    case = f"images of shape {tuple(images.shape)} and seed {seed}"

    def crops(images: Tensor, seed: int) -> list[Tensor]:
        return list(transform(images, generator=torch.Generator().manual_seed(seed)))

    original = images.clone()
    found = crops(images, seed)
    if not torch.equal(images, original):
        _fail("the transform leaves the images as they are", f"it changed {case}")
    pairs = [(size, size) if isinstance(size, int) else tuple(size) for size in sizes]
    wanted = [(*images.shape[:-2], *pair) for pair in pairs]
    shapes = [tuple(crop.shape) for crop in found]
    if shapes != wanted:
        _fail("there is a crop of each size", f"{shapes} instead of {wanted} for {case}")
    low, high = value_range
    for index, crop in enumerate(found):
        if not crop.dtype.is_floating_point:
            _fail("crops are floating-point", f"crop {index} is {crop.dtype} for {case}")
        if not ((crop >= low - _ROUNDING) & (crop <= high + _ROUNDING)).all():
            _fail(
                "values are in the range",
                f"crop {index} has {crop.min():.6g} to {crop.max():.6g}, not {low} to {high}, "
                f"for {case}",
            )
    if not _same(found, crops(images, seed)):
        _fail("the same generator gives the same crops", f"other crops for {case}")
    if _same(found, crops(images, seed + 1)):
        _fail("another generator gives other crops", f"the same crops for {case}")
    for one, other in combinations(range(len(found)), 2):
        if shapes[one] == shapes[other] and torch.equal(found[one], found[other]):
            _fail("crops of the same size differ", f"{one} and {other} are equal for {case}")
    if images.dim() == 4:
        twins = crops(torch.stack([images[0], images[0]]), seed)
        if _same([crop[0] for crop in twins], [crop[1] for crop in twins]):
            _fail("equal images of a batch have crops of their own", f"equal crops for {case}")


def _assert_distributions(codes: Array, atol: float, case: str) -> None:
    if not (codes >= 0).all():
        _fail("every code is at least 0", f"the smallest is {codes.min():.6g} for {case}")
    sums = codes.sum(axis=1)
    _assert_close("the code of a sample sums to 1", sums, np.ones_like(sums), atol, case)


def _same(crops: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(crop, other) for crop, other in zip(crops, others, strict=True))


def _array(values: Tensor | Array) -> Array:
    return torch.as_tensor(values).detach().double().cpu().numpy()


def _described(problem: CodesProblem | LossProblem) -> str:
    """Return the settings and values of a problem, such that they can be pasted into a test."""
    values = {each.name: getattr(problem, each.name) for each in fields(problem)}
    return ", ".join(
        f"{name}={np.asarray(value).tolist()}"
        for name, value in values.items()
        if value is not None
    )


def _assert_close(law: str, found: Array, expected: Array, atol: float, case: str) -> None:
    """Compare entries up to ``atol``, relative to those above 1."""
    if found.shape != expected.shape:
        _fail(law, f"shape {found.shape} instead of {expected.shape} for {case}")
    error = np.abs(found - expected) / np.maximum(1, np.abs(expected))
    if not (error <= atol).all():
        place = np.unravel_index(np.argmax(error), error.shape)
        at = f" at {[int(index) for index in place]}" if place else ""
        _fail(law, f"{found[place]:.6g} instead of {expected[place]:.6g}{at} for {case}")


def _fail(law: str, case: str) -> NoReturn:
    raise AssertionError(f"{law}: {case}")
