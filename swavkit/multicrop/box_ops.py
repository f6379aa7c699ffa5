"""Random resized crops: sampling of boxes, and cropping of single images and of batches.

A box is a row (top, left, height, width, mirrored) in pixels of the image. The caller passes the
random numbers. No function here draws any or synchronizes with a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit._tensors import at_least_float32
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
    batch: Tensor,
    boxes: Tensor,
    size: Size,
    interpolation: Interpolation = "bilinear",
    *,
    white: int = 1,
    window: tuple[int, int] | None = None,
) -> Tensor:
    """Return the pixels of boxes (B, ..., 5) in images (B, C, H, W), resized to (B, ..., C, h, w).

    Antialiased resizing and mirroring are linear and separable. Each crop is W_y · I · W_xᵀ with
    its own two matrices, so a batch of arbitrary boxes takes two batched products. Bicubic values
    are not clamped. The result is float32, or float64 for float64 images.

    Args:
        batch: The images.
        boxes: Any number of boxes for each image.
        size: Size of the crops.
        interpolation: Filter of the resizing.
        white: Value of white pixels, by which the result is divided.
        window: Height and width that hold each of the boxes. The matrices are 0 outside the boxes,
            so if the boxes are small, only windows of this size are multiplied.
    """
    dtype = at_least_float32(batch.dtype)
    per_image = boxes.to(dtype).view(len(batch), prod(boxes.shape[1:-1]), BOX)
    images = batch.transpose(1, 2)
    if window is not None and 2 * prod(window) <= prod(batch.shape[-2:]):
        images, per_image = _windows(images, per_image, window)
    top, left, height, width, mirrored = per_image.unbind(-1)  # (B, V), or (B · V, 1) of windows
    crop_height, crop_width = height_and_width(size)
    upright = torch.zeros_like(mirrored)
    rows = _resizing(top, height, upright, images.shape[1], crop_height, interpolation)
    columns = _resizing(left, width, mirrored, images.shape[3], crop_width, interpolation, white)
    images = images.to(dtype, memory_format=torch.contiguous_format)
    crops = filtered(images, rows, columns).transpose(2, 3)
    return crops.view(*boxes.shape[:-1], *crops.shape[2:])


def window_of(boxes: Tensor) -> tuple[int, int] | None:
    """Return a height and width that hold each of the boxes (..., 5), which are on the CPU."""
    if not boxes.numel():
        return None
    height, width = boxes[..., 2:4].flatten(0, -2).numpy().max(0)
    return int(height), int(width)


def _windows(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return a window (B · V, h, C, w) of (B, H, C, W) around each box, and the boxes in them."""
    count, height, channels, width = images.shape
    device = images.device
    starts = [
        torch.clamp(boxes[..., axis], max=total - length).view(-1, 1)
        for axis, total, length in ((0, height, size[0]), (1, width, size[1]))
    ]
    rows, columns = (
        start.long() + torch.arange(length, device=device)
        for start, length in zip(starts, size, strict=True)
    )
    of_image = torch.arange(count * boxes.shape[1], device=device) // boxes.shape[1]
    windows = images[
        of_image.view(-1, 1, 1, 1),
        rows[:, :, None, None],
        torch.arange(channels, device=device).view(1, 1, -1, 1),
        columns[:, None, None, :],
    ]
    boxes = boxes.reshape(-1, 1, BOX)
    corner = torch.stack(starts, dim=-1)
    return windows, torch.cat([boxes[..., :2] - corner, boxes[..., 2:]], dim=-1)


def _between(low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _resizing(
    start: Tensor,
    length: Tensor,
    mirrored: Tensor,
    total: int,
    size: int,
    interpolation: Interpolation,
    white: int = 1,
) -> Tensor:
    """Return the resizing matrices (B, V, size, total) along one axis, divided by ``white``.

    Row i is a filter around the center of output pixel i, widened for downsampling: a triangle, or
    the cubic of Keys 1981 with a = -0.5, which is that of PIL and of torch with antialiasing. A row
    has few weights other than 0, which are computed alone and put in their places.
    """
    target = torch.arange(size, device=start.device, dtype=start.dtype)
    target = torch.where(mirrored[..., None] > 0, size - 1 - target, target)[..., None]
    length = length[..., None, None]
    support = 1 if interpolation == "bilinear" else 2
    # In halves of 1 / size pixels, positions are integers, and their differences are exact.
    center = (2 * target + 1) * length
    reach = 2 * length.clamp(min=size)
    first = ((center - support * reach + size) / (2 * size)).floor()
    taps = 2 * support * max(1, -(-total // size)) + 1
    position = first + torch.arange(taps, device=start.device, dtype=start.dtype)
    distance = (2 * size * position + size - center).abs() / reach
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        inner = (1.5 * distance - 2.5) * distance**2 + 1
        outer = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, inner, outer.where(distance < 2, 0))
    weights = weights * ((position >= 0) & (position < length))
    weights = weights / (white * weights.sum(dim=-1, keepdim=True))
    place = (position + start[..., None, None]).clamp(0, total - 1).long()
    return weights.new_zeros(*weights.shape[:-1], total).scatter_add(-1, place, weights)
