"""Color jitter, grayscale and blur of one crop in place, or of a whole batch.

All forms take the same ``PARAMETERS`` numbers per crop:

====  ====================================================================================
0-2   order of brightness (0), contrast (1) and saturation (2)
3-5   factor of each, in this order; 1 for no change
6-8   1 if the step precedes the hue shift, else 0
9     hue shift in revolutions; 0 for none
10    grayscale factor: 0 for gray, 1 for no change
11    standard deviation of the blur in pixels; 0 for none
====  ====================================================================================

Brightness, contrast, saturation and grayscale are blends of the crop with black, with its mean
gray, or with the gray of each pixel. The samples of a batch have the steps in different orders. The
differentiable batched form therefore runs the three blends before and again after the hue shift,
with factor 1 for a sample without that step. The batched form in place takes the samples with the
same number of steps before the hue shift together, and leaves out the others.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit._tensors import on_device
from swavkit.multicrop.separable import filtered

PARAMETERS = 12
BRIGHTNESS, CONTRAST, SATURATION = range(3)

_LUMA = (0.2989, 0.587, 0.114)
_BLUR_RADIUS = 5.0  # kernel radius in standard deviations; truncates less than 1e-6


def blur_radius(sigma: float) -> int:
    """Return the radius of the blur kernel in pixels."""
    return max(1, math.ceil(_BLUR_RADIUS * sigma))


# In place, for one contiguous crop (C, H, W) on the CPU. Parameters are Python numbers.


def distort_(crop: Tensor, parameters: Sequence[float]) -> None:
    """Distort one crop in place."""
    shift, gray, sigma = parameters[9:]
    steps = list(zip(parameters[:3], parameters[3:6], parameters[6:9], strict=True))
    for kind, factor, before in steps:
        if before and factor != 1:
            _blend_(crop, int(kind), factor)
    if shift:
        _shift_hue_(crop, shift)
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


def _shift_hue_(crop: Tensor, shift: float) -> None:
    """Shift the hue in place; an equivalent of ``_shift_hue`` that is faster on a CPU.

    It reuses buffers and selects by ``lerp`` with weights 0 and 1, three times as fast as a mask.
    """
    red, green, blue = crop.unbind(0)
    value, least = crop.amax(0), crop.amin(0)
    chroma = value - least
    not_red, not_green = (value - red).sign_(), value.sub_(green).sign_()
    divisor = chroma.mul(6).clamp_(min=torch.finfo(crop.dtype).tiny)  # avoids 0 / 0 for gray
    turns = (red - green).div_(divisor).add_(2 / 3)  # if blue is the largest
    other = (blue - red).div_(divisor).add_(1 / 3).lerp_(turns, not_green)
    turns = torch.sub(green, blue, out=turns).div_(divisor).lerp_(other, not_red)
    turns.add_(1 + shift).frac_()
    centers, slopes, offsets = _hue_shares(crop.dtype)
    share = (turns - centers).abs_().mul_(slopes).add_(offsets).clamp_(0, 1)
    torch.addcmul(least, chroma, share, out=crop)


@functools.cache
def _hue_shares(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return center, slope and offset of each channel's share of the chroma, a function of hue."""
    rows = (1 / 2, 1 / 3, 2 / 3), (6, -6, -6), (-1, 2, 2)
    centers, slopes, offsets = torch.tensor(rows, dtype=dtype, device="cpu").view(3, 3, 1, 1)
    return centers, slopes, offsets


def _blur_(crop: Tensor, sigma: float) -> None:
    """Blur each axis in place by summing shifted copies of the padded crop."""
    radius = blur_radius(sigma)
    channels, height, width = crop.shape
    if radius >= min(height, width):  # F.pad cannot reflect that far
        crop.copy_(_blur(crop[None], crop.new_tensor([sigma]), radius)[0])
        return
    padded = F.pad(crop, (radius,) * 4, mode="reflect")
    strides = padded.stride()
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    kernel = [weight / sum(weights) for weight in weights]
    # On flat memory: values that wrap into the next row lie outside the result.
    flat = padded.flatten()
    for stride in strides[1:]:
        shifted = flat.unfold(0, len(flat) - 2 * radius * stride, stride).unbind(0)
        flat = shifted[0] * kernel[0]
        for copy, weight in zip(shifted[1:], kernel[1:], strict=True):
            flat.add_(copy, alpha=weight)
    crop.copy_(flat.as_strided((channels, height, width), strides))


# For a batch (B, C, H, W) and parameters (B, PARAMETERS) on any device.


def distort(crops: Tensor, parameters: Tensor, *, colors: bool, blur: int) -> Tensor:
    """Distort each crop of a batch; differentiable.

    Args:
        crops: (B, C, H, W).
        parameters: (B, PARAMETERS) in the dtype and on the device of the crops.
        colors: Whether to change colors; if False, the color parameters are ignored.
        blur: Largest blur radius in the batch; 0 for no blur.
    """
    if colors:
        crops = _jitter(crops, parameters, range(3), range(3))
        crops = _to_gray(crops, parameters)
    if blur:
        crops = _blur(crops, parameters[:, 11], blur)
    return crops


def distort_rows_(
    crops: Tensor,
    parameters: Tensor,
    known: np.ndarray[Any, np.dtype[Any]],
    *,
    colors: bool,
    blur: int,
) -> None:
    """Distort a batch in place; each step reads only the crops that it changes.

    Args:
        crops: (B, C, H, W).
        parameters: (B, PARAMETERS) in the dtype and on the device of the crops.
        known: The parameters on the CPU, which tell the crops of each step without waiting for the
            device.
        colors: Whether to change colors; if False, the color parameters are ignored.
        blur: Largest blur radius in the batch; 0 for no blur.
    """
    jittered = (known[:, 3:6] != 1).any(1) | (known[:, 9] != 0)
    hue_position = known[:, 6:9].sum(1)
    chosen = [np.flatnonzero(jittered & (hue_position == steps)) for steps in range(4)]
    chosen += [np.flatnonzero(known[:, 10] != 1), np.flatnonzero(known[:, 11])]
    indices = on_device(torch.from_numpy(np.concatenate(chosen)), torch.int64, crops.device)
    *jitters, grays, blurs = torch.split(indices, [len(rows) for rows in chosen])
    if colors:
        for steps, rows in enumerate(jitters):
            part, numbers = crops.index_select(0, rows), parameters.index_select(0, rows)
            part = _jitter(part, numbers, range(steps), range(steps, 3))
            crops.index_copy_(0, rows, part)
        part, numbers = crops.index_select(0, grays), parameters.index_select(0, grays)
        crops.index_copy_(0, grays, _to_gray(part, numbers))
    if blur:
        part, numbers = crops.index_select(0, blurs), parameters.index_select(0, blurs)
        crops.index_copy_(0, blurs, _blur(part, numbers[:, 11], blur))


def _jitter(crops: Tensor, parameters: Tensor, before: range, after: range) -> Tensor:
    """Return crops after the given steps before the hue shift, the shift, and those after it."""
    column = parameters[..., None, None, None]  # (B, PARAMETERS, 1, 1, 1)
    kinds, factors, precedes, shift = column[:, :3], column[:, 3:6], column[:, 6:9], column[:, 9]
    contrast, saturation = ((kinds == kind).to(crops.dtype) for kind in (CONTRAST, SATURATION))
    first, second = factors.where(precedes > 0, 1), factors.where(precedes == 0, 1)
    for step in before:
        crops = _blend(crops, contrast[:, step], saturation[:, step], first[:, step])
    if crops.shape[1] == 3:
        crops = _shift_hue(crops, shift).where(shift != 0, crops)
    for step in after:
        crops = _blend(crops, contrast[:, step], saturation[:, step], second[:, step])
    return crops


def _blend(crops: Tensor, contrast: Tensor, saturation: Tensor, factor: Tensor) -> Tensor:
    """Blend crops with their mean gray if ``contrast`` is 1, their gray, or black."""
    gray = _gray(crops)
    other = torch.addcmul(contrast * gray.mean((1, 2, 3), keepdim=True), saturation, gray)
    return torch.lerp(other, crops, factor).clamp_(0, 1)


def _to_gray(crops: Tensor, parameters: Tensor) -> Tensor:
    return torch.lerp(_gray(crops), crops, parameters[:, 10, None, None, None])


def _gray(crops: Tensor) -> Tensor:
    # Not a matrix product, which TF32 would round, and Python numbers, because a tensor of weights
    # would have to be copied to the device.
    weights = _luma(crops.shape[1])
    gray = weights[0] * crops[:, :1]
    for channel in range(1, len(weights)):
        gray = torch.add(gray, crops[:, channel : channel + 1], alpha=weights[channel])
    return gray


def _luma(channels: int) -> tuple[float, ...]:
    """Return the weight of each channel in gray; equal weights unless there are 3 channels."""
    return _LUMA if channels == 3 else (1 / channels,) * channels


def _shift_hue(crops: Tensor, shift: Tensor) -> Tensor:
    """Shift the HSV hue by ``shift`` revolutions, keeping value and chroma."""
    red, green, blue = crops[:, :1], crops[:, 1:2], crops[:, 2:]
    value, least = crops.amax(1, keepdim=True), crops.amin(1, keepdim=True)
    chroma = value - least
    sixths = torch.where(  # of a revolution, times chroma
        value == red,
        green - blue,
        torch.where(
            value == green,
            torch.add(blue - red, chroma, alpha=2),
            torch.add(red - green, chroma, alpha=4),
        ),
    )
    sixths = sixths / chroma.where(chroma > 0, 1)  # avoids 0 / 0 for gray
    corners = (5 - 2 * torch.arange(3, device=crops.device)).view(3, 1, 1)
    distance = (sixths + (6 * shift + corners)).remainder_(6).sub_(2).abs_().clamp_(1, 2)
    return torch.addcmul(torch.sub(value, chroma, alpha=2), chroma, distance)


def _blur(crops: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Blur each axis: M X Mᵀ, with convolution matrices M of mirrored borders."""
    kernel = _kernel(sigma, radius)
    height, width = crops.shape[2:]
    rows = _mirrored(kernel, height)[:, None]
    columns = rows if width == height else _mirrored(kernel, width)[:, None]
    return filtered(crops.transpose(1, 2), rows, columns)[:, 0].transpose(1, 2)


def _kernel(sigma: Tensor, radius: int) -> Tensor:
    """Return Gaussian kernels (B, 2 radius + 1); ``sigma`` 0 gives the identity."""
    offsets = torch.arange(-radius, radius + 1, device=sigma.device, dtype=sigma.dtype)
    return (-0.5 * (offsets / sigma.clamp(min=1e-3)[:, None]) ** 2).softmax(-1)


def _mirrored(kernel: Tensor, length: int) -> Tensor:
    """Return the matrices (B, length, length) of convolutions with mirrored borders."""
    radius = kernel.shape[1] // 2
    period = max(1, 2 * (length - 1))
    offsets = torch.arange(-radius, radius + 1, device=kernel.device)
    source = (torch.arange(length, device=kernel.device)[:, None] + offsets).remainder(period)
    source = torch.where(source < length, source, period - source)
    shape = (len(kernel), length, kernel.shape[1])
    weights = kernel.new_zeros(len(kernel), length, length)
    return weights.scatter_add(2, source.expand(shape), kernel[:, None].expand(shape))
