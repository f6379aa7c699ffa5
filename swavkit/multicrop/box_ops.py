"""Boxes of random resized crops, and cutting them out of images: one by one, or a whole batch.

A box is a row (top, left, height, width, mirrored) in pixels of the image. The random numbers come
in from outside, so nothing here draws or reads a device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit.multicrop.separable import filtered

_TRIES = 10  # boxes that may miss the image before the largest central one is taken
NUMBERS = 2 * _TRIES + 3  # random numbers of a box
BOX = 5  # numbers of a box itself


def draw_boxes(
    uniform: Tensor, sizes: Tensor, scale: Tensor, ratio: Tensor, flip: Tensor
) -> Tensor:
    """Return the boxes (B, V, 5) of V crops of each of B images.

    Args:
        uniform: (B, V, NUMBERS) numbers in [0, 1), float64.
        sizes: (B, 2) height and width of each image.
        scale: (V, 2) range of each crop's area as a fraction of the image's.
        ratio: (V, 2) range of width over height.
        flip: (V,) probability of mirroring.
    """
    image_height, image_width = sizes.to(uniform.dtype).view(-1, 1, 2).unbind(2)  # (B, 1)
    areas, ratios = uniform[..., :_TRIES], uniform[..., _TRIES : 2 * _TRIES]
    down, right, mirror = uniform[..., 2 * _TRIES :].unbind(-1)
    area = (image_height * image_width)[..., None] * _between(scale[:, :1], scale[:, 1:], areas)
    aspect = _between(ratio[:, :1].log(), ratio[:, 1:].log(), ratios).exp()
    # The largest box of a permitted shape stands behind the tries as one that always fits.
    widest = torch.minimum(image_width, (image_height * ratio[:, 1]).round()).clamp(min=1)
    highest = torch.minimum(image_height, (image_width / ratio[:, 0]).round()).clamp(min=1)
    width = torch.cat([(area * aspect).sqrt().round(), widest[..., None]], dim=-1)
    height = torch.cat([(area / aspect).sqrt().round(), highest[..., None]], dim=-1)
    fits = (width >= 1) & (width <= image_width[..., None])
    fits &= (height >= 1) & (height <= image_height[..., None])
    chosen = fits.byte().argmax(dim=-1, keepdim=True)  # the first one that fits
    width, height = width.gather(-1, chosen)[..., 0], height.gather(-1, chosen)[..., 0]
    central = chosen[..., 0] == _TRIES
    down, right = down.where(~central, 0.5), right.where(~central, 0.5)
    # Every place is equally likely; a central box has 1/2 of the rest on either side, rounded down.
    top = (down * (image_height - height + (~central).to(down))).floor()
    left = (right * (image_width - width + (~central).to(right))).floor()
    return torch.stack([top, left, height, width, (mirror < flip).to(top)], dim=-1)


def cut(image: Tensor, box: Sequence[float], size: int) -> Tensor:
    """Return the pixels of a box, resized to (C, size, size); uint8 ones stay so, rounded.

    Args:
        image: (C, H, W) on the CPU.
        box: Python numbers.
        size: Of the crop.
    """
    top, left, height, width, mirrored = map(int, box)
    pixels = image.narrow(1, top, height).narrow(2, left, width)
    # In 8 bits torch mistakes the order of memory, or fails, where a length of 1 leaves it open.
    inexact = image.dtype == torch.uint8 and 1 in (height, width, size)
    source = (pixels.float() if inexact else pixels)[None]
    crop = F.interpolate(source, size=(size, size), mode="bilinear", antialias=True)[0]
    if inexact:
        crop = crop.round_().to(torch.uint8)
    return crop.flip(-1) if mirrored else crop


def cut_batch(batch: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Return the boxes (B, 5) of images (B, C, H, W), resized to (B, C, size, size).

    Resizing with antialiasing is linear and separable, and so is a mirror: each crop is
    W_y · I · W_xᵀ with two matrices of its own, so any boxes are two batched products.
    """
    height, width = batch.shape[-2:]
    top, left, box_height, box_width, mirrored = boxes.to(batch.dtype).unbind(1)
    rows = _resizing(top, box_height, torch.zeros_like(mirrored), height, size)
    columns = _resizing(left, box_width, mirrored, width, size)
    return filtered(batch, rows, columns)


def _between(low: Tensor, high: Tensor, uniform: Tensor) -> Tensor:
    return low + (high - low) * uniform


def _resizing(start: Tensor, length: Tensor, mirrored: Tensor, total: int, size: int) -> Tensor:
    """Return the weights (B, size, total) of ``total`` pixels in each pixel of a crop.

    Row i is a triangle around the center of output pixel i, widened where pixels are merged.
    """
    inside = torch.arange(total, device=start.device, dtype=start.dtype) - start[:, None]
    target = torch.arange(size, device=start.device, dtype=start.dtype)
    target = torch.where(mirrored[:, None] > 0, size - 1 - target, target)
    step = (length / size)[:, None, None]
    distance = (inside[:, None, :] + 0.5 - (target[:, :, None] + 0.5) * step).abs()
    weights = (1 - distance / step.clamp(min=1)).clamp(min=0)
    of_box = (inside >= 0) & (inside < length[:, None])
    weights = weights * of_box[:, None, :]
    return weights / weights.sum(dim=-1, keepdim=True)
