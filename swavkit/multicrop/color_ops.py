"""Color jitter, grayscale and blur of pixels: one crop in place, or a whole batch at once.

Both take the same parameters, a row of ``PARAMETERS`` numbers for each crop:

====  ====================================================================================
0-2   which of brightness (0), contrast (1) and saturation (2) comes first, second and third
3-5   the factor of each, 1 for none
6-8   1 where it comes before the hue, else 0
9     the shift of the hue in revolutions, 0 for none
10    the factor of the grayscale: 0 for gray, 1 for none
11    the standard deviation of the blur in pixels, 0 for none
====  ====================================================================================

Brightness, contrast and saturation are one formula: a blend of the crop with black, with its mean
gray, or with the gray of each pixel. So is the grayscale. A batch, whose samples have the steps in
different orders, therefore makes the three blends twice, before and after the hue, with factor 1
where a sample has no step.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit.multicrop.separable import filtered

PARAMETERS = 12
BRIGHTNESS, CONTRAST, SATURATION = range(3)

_LUMA = (0.2989, 0.587, 0.114)
_BLUR_REACH = 5.0  # in standard deviations; what lies beyond weighs less than 1e-6


def blur_radius(sigma: float) -> int:
    """Return how far a blur reaches, in pixels."""
    return max(1, math.ceil(_BLUR_REACH * sigma))


# One crop (C, H, W), contiguous and on the CPU, in place; parameters are Python numbers.


def distort_(crop: Tensor, parameters: Sequence[float]) -> None:
    """Apply the photometric step to one crop."""
    shift, gray, sigma = parameters[9:]
    steps = list(zip(parameters[:3], parameters[3:6], parameters[6:9], strict=True))
    for kind, factor, before in steps:
        if before and factor != 1:
            _blend_(crop, int(kind), factor)
    if shift:
        _turn_hue_(crop, shift)
    for kind, factor, before in steps:
        if not before and factor != 1:
            _blend_(crop, int(kind), factor)
    if gray != 1:
        _blend_(crop, SATURATION, gray)
    if sigma:
        _blur_(crop, sigma)


def _blend_(crop: Tensor, kind: int, factor: float) -> None:
    if kind == BRIGHTNESS:
        crop.mul_(factor)
    elif kind == CONTRAST:
        means = crop.mean((1, 2)).tolist()
        mean = sum(map(operator.mul, _luma(len(crop)), means))
        crop.mul_(factor).add_((1 - factor) * mean)
    else:
        gray = torch.mv(crop.flatten(1).T, crop.new_tensor(_luma(len(crop)))).view(crop.shape[1:])
        crop.mul_(factor).add_(gray, alpha=1 - factor)
    crop.clamp_(0, 1)


def _turn_hue_(crop: Tensor, shift: float) -> None:
    """Turn the hue; see ``_turn_hue``, of which this is the fastest form on a CPU.

    Memory is used again, and a lerp by 0 or 1 selects: three times as fast as a mask does.
    """
    red, green, blue = crop.unbind(0)
    value, least = crop.amax(0), crop.amin(0)
    chroma = value - least
    not_red, not_green = (value - red).sign_(), value.sub_(green).sign_()
    divisor = chroma.mul(6).clamp_(min=torch.finfo(crop.dtype).tiny)  # gray has no hue; any will do
    turns = (red - green).div_(divisor).add_(2 / 3)  # where blue is the largest
    other = (blue - red).div_(divisor).add_(1 / 3).lerp_(turns, not_green)
    turns = torch.sub(green, blue, out=turns).div_(divisor).lerp_(other, not_red)
    turns.add_(1 + shift).frac_()
    centers, slopes, offsets = _hue_shares(crop.dtype)
    share = (turns - centers).abs_().mul_(slopes).add_(offsets).clamp_(0, 1)
    torch.addcmul(least, chroma, share, out=crop)


@functools.cache
def _hue_shares(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the hue of each channel lies, how its share falls from there, and from what."""
    rows = (1 / 2, 1 / 3, 2 / 3), (6, -6, -6), (-1, 2, 2)
    centers, slopes, offsets = torch.tensor(rows, dtype=dtype, device="cpu").view(3, 3, 1, 1)
    return centers, slopes, offsets


def _blur_(crop: Tensor, sigma: float) -> None:
    """Blur along columns and rows, as sums of shifted copies of the padded crop."""
    radius = blur_radius(sigma)
    channels, height, width = crop.shape
    if radius >= min(height, width):  # torch cannot mirror that much
        crop.copy_(_blur(crop[None], crop.new_tensor([sigma]), radius)[0])
        return
    padded = F.pad(crop, (radius,) * 4, mode="reflect")
    strides = padded.stride()
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    kernel = [weight / sum(weights) for weight in weights]
    # On the flat memory: what runs over from one row into the next lies outside the result.
    flat = padded.flatten()
    for stride in strides[1:]:
        shifted = flat.unfold(0, len(flat) - 2 * radius * stride, stride).unbind(0)
        flat = shifted[0] * kernel[0]
        for copy, weight in zip(shifted[1:], kernel[1:], strict=True):
            flat.add_(copy, alpha=weight)
    crop.copy_(flat.as_strided((channels, height, width), strides))


# A batch (B, C, H, W) on any device, differentiable; parameters are (B, PARAMETERS) there.


def distort(crops: Tensor, parameters: Tensor, *, colors: bool, blur: int) -> Tensor:
    """Apply the photometric step to each crop of a batch.

    Args:
        crops: (B, C, H, W).
        parameters: (B, PARAMETERS) in the dtype and on the device of the crops.
        colors: Whether any crop may have its colors changed.
        blur: Radius of the widest blur that any crop may have, 0 for none.
    """
    if colors:
        column = parameters[..., None, None, None]  # (B, PARAMETERS, 1, 1, 1)
        kinds, factors, before = column[:, :3], column[:, 3:6], column[:, 6:9] > 0
        for turn in range(3):
            crops = _blend(crops, kinds[:, turn], factors[:, turn].where(before[:, turn], 1))
        if crops.shape[1] == 3:
            shift = column[:, 9]
            crops = _turn_hue(crops, shift).where(shift != 0, crops)
        for turn in range(3):
            crops = _blend(crops, kinds[:, turn], factors[:, turn].where(~before[:, turn], 1))
        crops = _blend(crops, torch.full_like(column[:, 10], SATURATION), column[:, 10])
    if blur:
        crops = _blur(crops, parameters[:, 11], blur)
    return crops


def _blend(crops: Tensor, kind: Tensor, factor: Tensor) -> Tensor:
    gray = _gray(crops)
    other = torch.where(kind == CONTRAST, gray.mean((1, 2, 3), keepdim=True), gray)
    other = other * (kind != BRIGHTNESS)
    return (factor * crops + (1 - factor) * other).clamp(0, 1)


def _gray(crops: Tensor) -> Tensor:
    # With Python numbers: a tensor of them would have to be copied to the device.
    planes = zip(_luma(crops.shape[1]), crops.unbind(1), strict=True)
    return torch.stack([weight * plane for weight, plane in planes], dim=1).sum(1, keepdim=True)


def _luma(channels: int) -> tuple[float, ...]:
    """Return the share of each channel in the gray of a pixel; without colors, equal ones."""
    return _LUMA if channels == 3 else (1 / channels,) * channels


def _turn_hue(crops: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of HSV by ``shift`` revolutions; the largest and smallest channel stay."""
    red, green, blue = crops.unbind(1)
    value, least = crops.amax(1), crops.amin(1)
    chroma = value - least
    divisor = chroma.where(chroma > 0, 1)  # gray has no hue; any will do
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    corners = (5 - 2 * torch.arange(3, device=crops.device)).view(3, 1, 1)
    distance = (corners + sixths[:, None] + 6 * shift).remainder(6)
    return value[:, None] - chroma[:, None] * torch.minimum(distance, 4 - distance).clamp(0, 1)


def _blur(crops: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur along rows and columns: M X Mᵀ, where M holds the kernel and the mirrored borders."""
    kernel = _kernel(sigma, radius)
    rows, columns = (_mirrored(kernel, length) for length in crops.shape[2:])
    return filtered(crops, rows, columns)


def _kernel(sigma: Tensor, radius: int) -> Tensor:
    """Return the weights (B, 2 radius + 1) of Gaussian blurs; those of 0 leave all as it is."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    return (-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2).softmax(-1)


def _mirrored(kernel: Tensor, length: int) -> Tensor:
    """Return the matrices (B, length, length) of a convolution with mirrored borders."""
    radius = kernel.shape[1] // 2
    period = max(1, 2 * (length - 1))
    offsets = torch.arange(-radius, radius + 1, device=kernel.device)
    source = torch.arange(length, device=kernel.device)[:, None] + offsets
    source = length - 1 - (length - 1 - source.remainder(period)).abs()
    shape = (len(kernel), length, kernel.shape[1])
    weights = kernel.new_zeros(len(kernel), length, length)
    return weights.scatter_add(2, source.expand(shape), kernel[:, None].expand(shape))
