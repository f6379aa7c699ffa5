"""Random resized crops: sampling of boxes, and cropping of single images and of batches.

A box is a row (top, left, height, width, mirrored) in pixels of the image. The caller passes the
random numbers. No function here draws any or synchronizes with a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit.multicrop.separable import filtered

_TRIES = 10  # sampled boxes before the fallback to the largest central box
NUMBERS = 2 * _TRIES + 3  # random numbers per box
BOX = 5  # entries of a box
Size: TypeAlias = int | tuple[int, int]  # of a square, or (height, width)
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]


def height_and_width(size: Size) -> tuple[int, int]:
    """Return the height and width of a size."""
    return size if isinstance(size, tuple) else (size, size)


def draw_boxes(
    uniform: Tensor, sizes: Tensor, scale: Tensor, ratio: Tensor, flip: Tensor
) -> Tensor:
    """Return boxes (B, V, 5) for V crops of each of B images.

    Args:
        uniform: (B, V, NUMBERS) random numbers in [0, 1), float64.
        sizes: (B, 2) heights and widths of the images.
        scale: (V, 2) range of the crop area as a fraction of the image area.
        ratio: (V, 2) range of the aspect ratio, width over height.
        flip: (V,) probability of mirroring.
    """
    image_height, image_width = sizes.to(uniform.dtype).view(-1, 1, 2).unbind(2)  # (B, 1)
    areas, ratios = uniform[..., :_TRIES], uniform[..., _TRIES : 2 * _TRIES]
    down, right, mirror = uniform[..., 2 * _TRIES :].unbind(-1)
    area = (image_height * image_width)[..., None] * _between(scale[:, :1], scale[:, 1:], areas)
    aspect = _between(ratio[:, :1].log(), ratio[:, 1:].log(), ratios).exp()
    # The fallback, the largest box of an allowed aspect ratio, follows the samples. It always fits.
    widest = torch.minimum(image_width, (image_height * ratio[:, 1]).round()).clamp(min=1)
    tallest = torch.minimum(image_height, (image_width / ratio[:, 0]).round()).clamp(min=1)
    width = torch.cat([(area * aspect).sqrt().round(), widest[..., None]], dim=-1)
    height = torch.cat([(area / aspect).sqrt().round(), tallest[..., None]], dim=-1)
    fits = (width >= 1) & (width <= image_width[..., None])
    fits &= (height >= 1) & (height <= image_height[..., None])
    chosen = fits.byte().argmax(dim=-1, keepdim=True)  # index of the first that fits
    width, height = width.gather(-1, chosen)[..., 0], height.gather(-1, chosen)[..., 0]
    central = chosen[..., 0] == _TRIES
    down, right = down.where(~central, 0.5), right.where(~central, 0.5)
    # Every position is equally likely. The fallback is centered, rounded toward the top left.
    top = (down * (image_height - height + (~central).to(down))).floor()
    left = (right * (image_width - width + (~central).to(right))).floor()
    return torch.stack([top, left, height, width, (mirror < flip).to(top)], dim=-1)


def cut(
    image: Tensor, box: Sequence[float], size: Size, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Return the pixels of a box, resized with antialiasing; uint8 stays uint8, rounded.

    Bicubic values are clamped for uint8 only: other dtypes do not say which values are valid.

    Args:
        image: (C, H, W) on the CPU.
        box: One box, as Python numbers.
        size: Size of the crop.
        interpolation: Filter of the resizing.
    """
    top, left, height, width, mirrored = map(int, box)
    pixels = image.narrow(1, top, height).narrow(2, left, width)
    lengths = height_and_width(size)
    # A length of 1 makes the memory format ambiguous: torch then fails on uint8 or misreads it.
    inexact = image.dtype == torch.uint8 and 1 in (height, width, *lengths)
    source = (pixels.float() if inexact else pixels)[None]
    if lengths[1] == 1:  # torch 2.13 returns a wrong column, but a right row
        row = F.interpolate(source.mT, size=lengths[::-1], mode=interpolation, antialias=True)
        crop = row[0].mT
    else:
        crop = F.interpolate(source, size=lengths, mode=interpolation, antialias=True)[0]
    if inexact:
        crop = crop.round_().clamp_(0, 255).to(torch.uint8)
    return crop.flip(-1) if mirrored else crop


def cut_batch(
    batch: Tensor, boxes: Tensor, size: Size, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """Return the pixels of boxes (B, 5) in images (B, C, H, W), resized to (B, C, h, w).

    Antialiased resizing and mirroring are linear and separable. Each crop is W_y · I · W_xᵀ with
    its own two matrices, so a batch of arbitrary boxes takes two batched products. Bicubic values
    are not clamped.
    """
    crop_height, crop_width = height_and_width(size)
    height, width = batch.shape[-2:]
    top, left, box_height, box_width, mirrored = boxes.to(batch.dtype).unbind(1)
    upright = torch.zeros_like(mirrored)
    rows = _resizing(top, box_height, upright, height, crop_height, interpolation)
    columns = _resizing(left, box_width, mirrored, width, crop_width, interpolation)
    return filtered(batch, rows, columns)


def _between(low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _resizing(
    start: Tensor,
    length: Tensor,
    mirrored: Tensor,
    total: int,
    size: int,
    interpolation: Interpolation,
) -> Tensor:
    """Return the resizing matrices (B, size, total) along one axis.

    Row i is a filter around the center of output pixel i, widened for downsampling: a triangle, or
    the cubic of Keys 1981 with a = -0.5, which is that of PIL and of torch with antialiasing.
    """
    position = torch.arange(total, device=start.device, dtype=start.dtype) - start[:, None]
    target = torch.arange(size, device=start.device, dtype=start.dtype)
    target = torch.where(mirrored[:, None] > 0, size - 1 - target, target)
    step = (length / size)[:, None, None]
    distance = (position[:, None, :] + 0.5 - (target[:, :, None] + 0.5) * step).abs()
    distance = distance / step.clamp(min=1)
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        inner = (1.5 * distance - 2.5) * distance**2 + 1
        outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, inner, outer.where(distance < 2, 0))
    in_box = (position >= 0) & (position < length[:, None])
    weights = weights * in_box[:, None, :]
    return weights / weights.sum(dim=-1, keepdim=True)
