"""``crop_masks``: masks and label maps cut by the boxes of a ``MultiCropTransform``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swavkit import _checks
from swavkit.multicrop.box_ops import height_and_width
from swavkit.multicrop.crop_group import checked_size

__all__ = ["crop_masks"]

# CUDA devices do not index tensors of these dtypes.
_SIGNED = {
    torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64
}  # fmt: skip


def crop_masks(masks: Tensor, boxes: Tensor, flips: Tensor, size: int | Sequence[int]) -> Tensor:
    """Cut masks or label maps by the box and flip of one crop per image.

    Each pixel of the result is the pixel of the mask at its center (nearest neighbor), so labels
    are never mixed. Pixels lie where those of the crops lie that
    ``MultiCropTransform(...)(..., return_boxes=True)`` returns with the boxes.

    Args:
        masks: (H, W) for a single image; (B, H, W) or (B, C, H, W) for a batch. Any dtype. H and W
            are those of the images.
        boxes: (4,) or (B, 4) int64: left, top, right, bottom in pixels, the last two exclusive.
            Each box must lie in its mask and hold a pixel; this is not checked.
        flips: () or (B,) bool: whether to mirror the box horizontally.
        size: Height and width of the result: an int, or (height, width). Any size is allowed, such
            as the number of patches of a network along each axis.

    Returns:
        (h, w), (B, h, w) or (B, C, h, w) in the dtype of ``masks``.

    Raises:
        TypeError: If an argument is not a tensor, or has the wrong dtype.
        ValueError: If an argument has the wrong shape or device, or ``size`` is out of range.

    Example:
        >>> labels = torch.arange(6).view(2, 3)
        >>> crop_masks(labels, torch.tensor([1, 0, 3, 2]), torch.tensor(True), (2, 4))
        tensor([[2, 2, 1, 1],
                [5, 5, 4, 4]])
    """
    _check(masks, boxes, flips)
    height, width = height_and_width(checked_size("size", size))
    batch = masks[None] if masks.dim() == 2 else masks
    batch = batch[:, None] if batch.dim() == 3 else batch
    left, top, right, bottom = boxes.view(-1, 4, 1).unbind(1)  # (B, 1)
    rows = _nearest(top, bottom, height)
    columns = _nearest(left, right, width)
    columns = columns.flip(1).where(flips.view(-1, 1), columns)
    images = torch.arange(batch.shape[0], device=masks.device).view(-1, 1, 1, 1)
    channels = torch.arange(batch.shape[1], device=masks.device).view(1, -1, 1, 1)
    if batch.dtype in _SIGNED:
        batch = batch.view(_SIGNED[batch.dtype])
    cut = batch[images, channels, rows[:, None, :, None], columns[:, None, None, :]]
    cut = cut.reshape(*masks.shape[:-2], height, width)
    return cut.view(masks.dtype) if masks.dtype in _SIGNED else cut


def _nearest(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Return the indices (B, size) of the pixels that hold the centers of ``size`` pixels."""
    centers = 2 * torch.arange(size, device=start.device) + 1  # in half pixels, hence exact
    return start + (end - start) * centers // (2 * size)


def _check(masks: Tensor, boxes: Tensor, flips: Tensor) -> None:
    for name, value in (("masks", masks), ("boxes", boxes), ("flips", flips)):
        _checks.tensor(name, value)
    if masks.dim() not in (2, 3, 4):
        raise ValueError(
            f"masks must have shape (H, W), (B, H, W) or (B, C, H, W), got {tuple(masks.shape)}"
        )
    if 0 in masks.shape[-2:]:
        raise ValueError(f"masks must have pixels, got shape {tuple(masks.shape)}")
    of_images = masks.shape[:1] if masks.dim() > 2 else ()
    for name, value, dtype, shape in (
        ("boxes", boxes, torch.int64, (*of_images, 4)),
        ("flips", flips, torch.bool, tuple(of_images)),
    ):
        if value.dtype != dtype:
            raise TypeError(f"{name} must have dtype {dtype}, got {value.dtype}")
        if not _checks.same_shape(value.shape, shape):
            raise ValueError(
                f"{name} must have shape {shape} for masks of shape {tuple(masks.shape)}, got "
                f"{tuple(value.shape)}"
            )
        _checks.same_device(name, value, masks)
