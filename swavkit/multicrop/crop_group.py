"""``CropGroup``, the settings of the crops of one resolution, and validation of groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from swavkit import _checks
from swavkit.multicrop.box_ops import Interpolation, Size, height_and_width
from swavkit.multicrop.photometric import PhotometricDistortion

__all__ = ["CropGroup"]


@dataclass(frozen=True)
class CropGroup:
    """Settings of the crops of one resolution.

    Args:
        size: Height and width of the crops in pixels, at least 1: an int for square crops, or
            (height, width).
        count: Number of crops; 0 disables the group.
        scale: Range of the crop area as a fraction of the image area, 0 < low <= high <= 1;
            sampled uniformly.
        ratio: Range of the aspect ratio of the box, width over height, before resizing,
            0 < low <= high; sampled log-uniformly. It does not depend on ``size``: boxes of the
            default range are stretched for a size of (64, 128).
        flip: Probability of a horizontal flip.
        photometric: A :class:`PhotometricDistortion`, any callable, or None. A callable receives
            a crop (C, height, width) of an image, or the stacked crops (B, C, height, width) of a
            batch, in [0, 1] and float32 (float64 for float64 images). It must return the same shape
            and draws its own random numbers.
        interpolation: ``"bilinear"`` or ``"bicubic"``, both antialiased. Bicubic pixels are clamped
            to [0, 1].

    Raises:
        TypeError: If a setting has the wrong type.
        ValueError: If a setting is out of range.

    Example:
        >>> CropGroup(size=96, count=6, scale=(0.05, 0.14), photometric=None).ratio
        (0.75, 1.3333333333333333)
        >>> CropGroup((112, 224), 2, (0.3, 1.0), interpolation="bicubic").size
        (112, 224)

    References:
        Caron et al. 2020, arXiv 2006.09882, section 3.2.
    """

    size: Size
    count: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    photometric: Callable[[Tensor], Tensor] | None = PhotometricDistortion()
    interpolation: Interpolation = field(default="bilinear", kw_only=True)

    def __post_init__(self) -> None:
        group = f"CropGroup({self.size}, {self.count}): "  # prefix of the messages, names the group
        object.__setattr__(self, "size", checked_size(f"{group}size", self.size))
        _checks.non_negative_int(f"{group}count", self.count)
        scale = _checks.positive_range(f"{group}scale", self.scale, most=1)
        object.__setattr__(self, "scale", scale)
        ratio = _checks.positive_range(f"{group}ratio", self.ratio)
        object.__setattr__(self, "ratio", ratio)
        _checks.float_between(f"{group}flip", self.flip, 0, 1)
        if self.photometric is not None and not callable(self.photometric):
            raise TypeError(
                f"{group}photometric must be a callable or None, got "
                f"{type(self.photometric).__name__}"
            )
        _checks.choice(f"{group}interpolation", self.interpolation, ("bilinear", "bicubic"))


def checked_size(name: str, value: Any) -> Size:
    """Return ``value`` if it is a positive int, or a pair of them as a tuple."""
    if not isinstance(value, (list, tuple)):
        return _checks.positive_int(name, value)
    if len(value) != 2:
        raise ValueError(f"{name} must be an int or (height, width), got {value!r}")
    height, width = (_checks.positive_int(f"{name}[{i}]", one) for i, one in enumerate(value))
    return height, width


def checked_groups(crops: Any, smaller_first: bool) -> tuple[CropGroup, ...]:
    """Validate the groups, including that the first one in use has the most pixels per crop."""
    if not isinstance(crops, (list, tuple)):
        raise TypeError(f"crops must be a sequence of CropGroup, got {type(crops).__name__}")
    if not crops:
        raise ValueError("crops must hold at least one CropGroup, got none")
    for index, group in enumerate(crops):
        if not isinstance(group, CropGroup):
            raise TypeError(f"crops[{index}] must be a CropGroup, got {type(group).__name__}")
    used = [index for index, group in enumerate(crops) if group.count]
    if not used:
        raise ValueError(f"crops must hold a group with a count of 1 or more, got {crops}")
    first = used[0]
    for index in used:
        if pixels(crops[index]) > pixels(crops[first]) and not smaller_first:
            raise ValueError(
                f"crops[{first}] must hold the largest size, because its crops give the codes, got "
                f"size {crops[first].size} there and {crops[index].size} in crops[{index}]; "
                f"smaller_first=True permits it"
            )
    return tuple(crops)


def pixels(group: CropGroup) -> int:
    """Return the number of pixels of a crop."""
    height, width = height_and_width(group.size)
    return height * width
