"""The published photometric step: colour jitter, greyscale and blur, drawn per sample.

The random numbers are drawn on the CPU before a pixel is touched; drawing and applying are separate
functions, so that the same generator replays the same distortion on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._precision import at_least_float32, autocast_disabled

__all__ = ["PhotometricDistortion"]

_LUMA = (0.2989, 0.587, 0.114)
_BLUR_REACH = 5.0  # in standard deviations; what lies beyond weighs less than 1e-6


@dataclass(frozen=True)
class PhotometricDistortion:
    """The published photometric step: colour jitter, greyscale, Gaussian blur, drawn per sample.

    Brightness, contrast, saturation and hue are changed in a random order, together with
    probability ``jitter_probability``. Brightness multiplies the pixels by a factor, contrast
    blends them with the mean grey of the crop, saturation with the grey of each pixel, each factor
    uniform in [1 - strength, 1 + strength]; hue turns the colour circle by up to ``hue`` of a
    revolution. Each result is clamped to [0, 1]. The blur mirrors the crop at its borders.

    Args:
        brightness: Strength in [0, 1], as the next two.
        contrast: See above.
        saturation: See above.
        hue: Largest shift, in [0, 0.5].
        jitter_probability: Of the four changes together.
        greyscale_probability: Of dropping the colour.
        blur_probability: Of the blur.
        blur_sigma: Range of the blur's standard deviation in pixels, drawn uniformly.

    Shape:
        A crop (C, H, W) or crops (B, C, H, W) in [0, 1], floating, give the same shape and dtype.
        C is 3, except where both the jitter and the greyscale have probability 0.

    Raises:
        TypeError: If a setting is no number or the crops are no floating tensor.
        ValueError: If a setting is out of range or the crops have a wrong shape.

    Example:
        >>> distort = PhotometricDistortion(blur_probability=0.0)
        >>> distort(torch.rand(4, 3, 8, 8), generator=torch.Generator()).shape
        torch.Size([4, 3, 8, 8])

    References:
        Caron et al. 2020, arXiv 2006.09882; the strengths are 0.8 · (0.8, 0.8, 0.8, 0.2), from
        Chen et al. 2020, arXiv 2002.05709.
    """

    brightness: float = 0.64
    contrast: float = 0.64
    saturation: float = 0.64
    hue: float = 0.16
    jitter_probability: float = 0.8
    greyscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _checks.float_between(name, getattr(self, name), 0, 1)
        _checks.float_between("hue", self.hue, 0, 0.5)
        for name in ("jitter_probability", "greyscale_probability", "blur_probability"):
            _checks.float_between(name, getattr(self, name), 0, 1)
        object.__setattr__(
            self, "blur_sigma", _checks.positive_range("blur_sigma", self.blur_sigma)
        )

    def __call__(self, crops: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the distorted ``crops``; ``generator`` is a CPU generator, default torch's own."""
        _checks.floating_tensor("crops", crops)
        if crops.dim() not in (3, 4):
            raise ValueError(
                f"crops must have shape (C, H, W) or (B, C, H, W), got {tuple(crops.shape)}"
            )
        if (self.jitter_probability or self.greyscale_probability) and crops.shape[-3] != 3:
            raise ValueError(
                f"PhotometricDistortion changes colours and needs 3 channels, got "
                f"{crops.shape[-3]}: give CropGroup photometric=None, a callable of your own, or "
                f"PhotometricDistortion(jitter_probability=0, greyscale_probability=0)"
            )
        batch = (crops if crops.dim() == 4 else crops[None]).to(at_least_float32(crops.dtype))
        draw = _draw_photometric(self, len(batch), generator)
        return _apply_photometric(batch, draw).to(crops.dtype).view(crops.shape)


# Parameters of N crops on the CPU, crops (N, C, H, W) on any device.


class _PhotometricDraw(NamedTuple):
    jittered: Tensor  # (N,) bool
    order: Tensor  # (N, 4) the steps of _COLOUR_STEPS in the order of each crop
    strengths: Tensor  # (N, 4) factors of brightness, contrast, saturation; shift of hue
    grey: Tensor  # (N,) bool
    blurred: Tensor  # (N,) bool
    sigma: Tensor  # (N,)
    radius: int  # of the blur's kernel: that of the largest sigma, so that crops do not interact


def _draw_photometric(
    settings: PhotometricDistortion, number: int, generator: torch.Generator | None
) -> _PhotometricDraw:
    uniform = torch.rand(number, 12, generator=generator, dtype=torch.float64, device="cpu")
    spread = uniform.new_tensor(
        [settings.brightness, settings.contrast, settings.saturation, settings.hue]
    )
    least, most = settings.blur_sigma
    return _PhotometricDraw(
        jittered=uniform[:, 0] < settings.jitter_probability,
        order=uniform[:, 1:5].argsort(1),
        strengths=spread.new_tensor([1, 1, 1, 0]) + spread * (2 * uniform[:, 5:9] - 1),
        grey=uniform[:, 9] < settings.greyscale_probability,
        blurred=uniform[:, 10] < settings.blur_probability,
        sigma=least + (most - least) * uniform[:, 11],
        radius=math.ceil(_BLUR_REACH * settings.blur_sigma[1]),
    )


def _apply_photometric(crops: Tensor, draw: _PhotometricDraw) -> Tensor:
    result = crops.clone()

    def change(chosen: Tensor, step: _Step, parameter: Tensor) -> None:
        rows = chosen.nonzero()[:, 0]
        if len(rows):
            place = rows.to(crops.device)
            numbers = parameter[rows].to(crops).view(-1, 1, 1, 1)
            result.index_copy_(0, place, step(result.index_select(0, place), numbers))

    # The crops whose turn it is change together, whatever the order of each.
    for turn in draw.order.unbind(1):
        for index, step in enumerate(_COLOUR_STEPS):
            change(draw.jittered & (turn == index), step, draw.strengths[:, index])
    change(draw.grey, _saturate, torch.zeros_like(draw.sigma))
    change(draw.blurred, partial(_blur, radius=draw.radius), draw.sigma)
    return result


def _grey(crops: Tensor) -> Tensor:
    return (crops * crops.new_tensor(_LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def _blend(crops: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * crops + (1 - factor) * other).clamp(0, 1)


def _brighten(crops: Tensor, factor: Tensor) -> Tensor:
    return _blend(crops, 0.0, factor)


def _contrast(crops: Tensor, factor: Tensor) -> Tensor:
    return _blend(crops, _grey(crops).mean((1, 2, 3), keepdim=True), factor)


def _saturate(crops: Tensor, factor: Tensor) -> Tensor:
    return _blend(crops, _grey(crops), factor)


def _turn_hue(crops: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by ``shift`` revolutions; the largest and smallest channel stay."""
    red, green, blue = crops.unbind(1)
    value = crops.amax(1)
    chroma = value - crops.amin(1)
    divisor = chroma.where(chroma > 0, 1)  # grey has no hue; any will do
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    corners = crops.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)
    distance = (corners + sixths[:, None] + 6 * shift).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _blur(crops: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur along rows and columns: M X Mᵀ, where M holds the kernel and the mirrored borders."""
    offsets = torch.arange(-radius, radius + 1, device=crops.device)
    kernel = (-0.5 * (offsets / sigma) ** 2).softmax(-1)  # (N, 1, 1, 2 radius + 1)

    def matrix(length: int) -> Tensor:
        period = max(1, 2 * (length - 1))
        source = torch.arange(length, device=crops.device)[:, None] + offsets
        source = length - 1 - (length - 1 - source.remainder(period)).abs()
        weights = kernel.new_zeros(len(crops), 1, length, length)
        shape = (len(crops), 1, length, len(offsets))
        return weights.scatter_add_(3, source.expand(shape), kernel.expand(shape))

    with autocast_disabled(crops.device):
        return matrix(crops.shape[2]) @ crops @ matrix(crops.shape[3]).mT


_Step = Callable[[Tensor, Tensor], Tensor]
_COLOUR_STEPS: tuple[_Step, ...] = (_brighten, _contrast, _saturate, _turn_hue)
