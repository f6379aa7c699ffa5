"""Multi-crop: several random crops of an image at several resolutions, for any method.

The random numbers are drawn on the CPU and become Python numbers, boxes and factors before a pixel
is touched. So drawing and applying are separate functions, the same generator replays the same
crops on any device, and nothing reads a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit import _checks
from swavkit._precision import at_least_float32
from swavkit.photometric import PhotometricDistortion

__all__ = [
    "CropGroup",
    "MultiCropTransform",
    "multi_crop_forward",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)  # the published code has 0.228 in the first place, a slip

_TRIES = 10  # boxes that may miss the image before the central one is taken


@runtime_checkable
class _PILImage(Protocol):
    """What this module asks of a PIL image, so that PIL need not be imported."""

    @property
    def mode(self) -> str: ...

    def convert(self, mode: str) -> _PILImage: ...


@dataclass(frozen=True)
class CropGroup:
    """One resolution of a multi-crop: how many crops, how large a part of the image each shows.

    Args:
        size: Height and width of the crops in pixels, at least 1.
        count: Number of crops, at least 1.
        scale: Range of a crop's area as a fraction of the image's, 0 < low <= high <= 1, drawn
            uniformly.
        ratio: Range of a crop's width over its height before it is made square, 0 < low <= high,
            drawn log-uniformly.
        flip: Probability of mirroring left and right.
        photometric: A :class:`PhotometricDistortion`, any callable, or None. A callable is given
            a crop (C, size, size) where the transform was given an image, the stacked crops (B, C,
            size, size) where it was given a batch, in [0, 1] and float32 (float64 for float64
            images), and returns the same shape.

    Raises:
        TypeError: If a setting is of a wrong kind.
        ValueError: If a setting is out of range.

    Example:
        >>> CropGroup(size=96, count=6, scale=(0.05, 0.14), photometric=None).ratio
        (0.75, 1.3333333333333333)

    References:
        Caron et al. 2020, arXiv 2006.09882, section 3.2.
    """

    size: int
    count: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    photometric: Callable[[Tensor], Tensor] | None = PhotometricDistortion()

    def __post_init__(self) -> None:
        _checks.positive_int("size", self.size)
        _checks.positive_int("count", self.count)
        object.__setattr__(self, "scale", _checks.positive_range("scale", self.scale, most=1))
        object.__setattr__(self, "ratio", _checks.positive_range("ratio", self.ratio))
        _checks.float_between("flip", self.flip, 0, 1)
        if self.photometric is not None and not callable(self.photometric):
            raise TypeError(
                f"photometric must be a callable or None, got {type(self.photometric).__name__}"
            )


class MultiCropTransform:
    """Random resized crops at several resolutions, mirrored, distorted and normalised.

    Each crop is a box of random area, shape and place, resized to a square (bilinear, with
    antialiasing). Where ten boxes in a row do not fit into the image, the largest central one of a
    permitted shape is taken. Everything is drawn per sample and per crop.

    Args:
        crops: The groups; the first holds the largest size, and its crops give the codes.
        mean: Mean of each channel of pixels in [0, 1], or one float for all.
        std: Standard deviation, in the same form.

    Shape:
        An image, PIL or a tensor (C, H, W), gives a list of (C, size, size), one entry a crop,
        group after group; a batch (B, C, H, W) on any device gives (B, C, size, size). Images are
        uint8, or floating and in [0, 1]; floating images keep their dtype, uint8 and PIL give
        float32. Float16 and bfloat16 are worked on in float32. A PIL image of mode L has 1 channel,
        unless ``mean`` or ``std`` name 3; every other 8-bit mode is converted to RGB.

    Raises:
        TypeError: If a group is no ``CropGroup``, or the image is no image or of another dtype.
        ValueError: If there is no group, the first is not the largest, the image has no pixels, a
            wrong rank, or not the channels of ``mean`` and ``std``, or a callable changes a shape.

    Example:
        >>> groups = (CropGroup(16, 2, (0.14, 1.0)), CropGroup(8, 3, (0.05, 0.14)))
        >>> crops = MultiCropTransform(groups)(torch.rand(4, 3, 32, 32))
        >>> [tuple(crop.shape) for crop in crops[1:3]]
        [(4, 3, 16, 16), (4, 3, 8, 8)]

    References:
        Caron et al. 2020, arXiv 2006.09882, section 3.2; the boxes are those of Szegedy et al.
        2015, arXiv 1409.4842.
    """

    def __init__(
        self,
        crops: Sequence[CropGroup] = (
            CropGroup(224, 2, (0.14, 1.0)),
            CropGroup(96, 6, (0.05, 0.14)),
        ),
        *,
        mean: float | Sequence[float] = IMAGENET_MEAN,
        std: float | Sequence[float] = IMAGENET_STD,
    ) -> None:
        if not isinstance(crops, (list, tuple)):
            raise TypeError(f"crops must be a sequence of CropGroup, got {type(crops).__name__}")
        if not crops:
            raise ValueError("crops must hold at least one CropGroup, got none")
        for index, group in enumerate(crops):
            if not isinstance(group, CropGroup):
                raise TypeError(f"crops[{index}] must be a CropGroup, got {type(group).__name__}")
            if group.size > crops[0].size:
                raise ValueError(
                    f"crops[0] must hold the largest size, because its crops give the codes, got "
                    f"size {crops[0].size} there and {group.size} in crops[{index}]"
                )
        self.crops = tuple(crops)
        self.mean = _per_channel("mean", mean, _checks.finite_float)
        self.std = _per_channel("std", std, _checks.positive_float)
        named = {len(v) for v in (self.mean, self.std) if isinstance(v, tuple)}
        if len(named) == 2:
            raise ValueError(
                f"mean and std must have the same length, got mean {self.mean} and std {self.std}"
            )
        self._channels = named.pop() if named else None

    def __repr__(self) -> str:
        groups = "".join(f"\n    {group}," for group in self.crops)
        return f"MultiCropTransform(({groups}\n), mean={self.mean}, std={self.std})"

    def __call__(
        self, image: Tensor | _PILImage, *, generator: torch.Generator | None = None
    ) -> list[Tensor]:
        """Return the crops of an image or of a batch.

        Args:
            image: A PIL image, a (C, H, W) tensor or a (B, C, H, W) batch; B may be 0.
            generator: CPU generator to draw from; None is torch's global one, which a data loader
                seeds anew for each worker and epoch.

        Returns:
            One tensor a crop, in the order of the groups.
        """
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(
                f"generator must be a torch.Generator or None, got {type(generator).__name__}"
            )
        pixels = _checked_image(image, self._channels)
        batch = pixels if pixels.dim() == 4 else pixels[None]
        if pixels.dtype == torch.uint8:
            batch, dtype = batch.to(torch.float32) / 255, torch.float32
        else:
            batch, dtype = batch.to(at_least_float32(pixels.dtype)), pixels.dtype
        mean = batch.new_tensor(self.mean).view(-1, 1, 1)
        std = batch.new_tensor(self.std).view(-1, 1, 1)
        results = []
        for index, group in enumerate(self.crops):
            boxes = _draw_boxes(group, group.count * len(batch), batch.shape[-2:], generator)
            for view in range(group.count):
                crops = _cut(batch, boxes[view * len(batch) :][: len(batch)], group.size)
                crops = crops if pixels.dim() == 4 else crops[0]
                if group.photometric is not None and crops.numel():
                    name = f"crops[{index}].photometric"
                    crops = _distort(name, group.photometric, crops, generator)
                results.append(((crops - mean) / std).to(dtype))
        return results


def multi_crop_forward(network: Callable[[Tensor], Tensor], crops: Sequence[Tensor]) -> Tensor:
    """Run ``network`` once per resolution and return the features in the order of the crops.

    Crops of one resolution go through the network together, in the order of their first appearance,
    so batch statistics are taken per resolution.

    Args:
        network: Takes (N, C, H, W) crops, returns (N, D) features, with the same D for all.
        crops: V tensors (B, C, H, W), resolutions in any order.

    Returns:
        (V, B, D) features.

    Raises:
        TypeError: If the crops or what the network returns are no floating tensors.
        ValueError: If there is no crop, the crops differ in B or C, or the network returns another
            shape.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        >>> crops = [torch.rand(4, 3, size, size) for size in (16, 16, 8)]
        >>> multi_crop_forward(network, crops).shape
        torch.Size([3, 4, 3])

    References:
        Caron et al. 2020, arXiv 2006.09882, section 3.2.
    """
    if not isinstance(crops, (list, tuple)):
        raise TypeError(f"crops must be a sequence of torch.Tensor, got {type(crops).__name__}")
    if not crops:
        raise ValueError("crops must hold at least one tensor, got none")
    positions: dict[tuple[int, int], list[int]] = {}
    for index, crop in enumerate(crops):
        _checks.floating_tensor(f"crops[{index}]", crop)
        if crop.dim() != 4 or crop.shape[:2] != crops[0].shape[:2]:
            raise ValueError(
                f"crops[{index}] must have shape (B, C, H, W) with B and C as in crops[0], got "
                f"{tuple(crop.shape)} beside {tuple(crops[0].shape)}"
            )
        positions.setdefault((crop.shape[2], crop.shape[3]), []).append(index)
    features: dict[int, Tensor] = {}
    for (height, width), members in positions.items():
        output = network(torch.cat([crops[index] for index in members]))
        name = f"the output of network for crops of {height}x{width}"
        _checks.floating_tensor(name, output)
        if output.dim() != 2 or len(output) != len(members) * len(crops[0]):
            raise ValueError(
                f"{name} must have shape ({len(members) * len(crops[0])}, D), got "
                f"{tuple(output.shape)}"
            )
        views = output.reshape(len(members), len(crops[0]), output.shape[1])
        features.update(zip(members, views, strict=True))
        if output.shape[1] != features[0].shape[1]:
            raise ValueError(
                f"{name} must have D = {features[0].shape[1]} as for the crops before, got "
                f"{tuple(output.shape)}"
            )
    return torch.stack([features[index] for index in range(len(crops))])


def _per_channel(
    name: str, value: Any, check: Callable[[str, Any], float]
) -> float | tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        return check(name, value)
    return tuple(check(f"{name}[{index}]", number) for index, number in enumerate(value))


def _checked_image(image: Any, channels: int | None) -> Tensor:
    """Return ``image`` as a (C, H, W) or (B, C, H, W) tensor, uint8 or floating."""
    if isinstance(image, _PILImage):
        image = _pil_pixels(image, channels)
    if not isinstance(image, Tensor):
        raise TypeError(f"image must be a PIL image or a torch.Tensor, got {type(image).__name__}")
    if not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise TypeError(f"image must be uint8 or floating-point, got {image.dtype}")
    if image.dim() not in (3, 4):
        raise ValueError(
            f"image must have shape (C, H, W) or (B, C, H, W), got {tuple(image.shape)}"
        )
    if 0 in image.shape[-3:]:
        raise ValueError(f"image must have channels and pixels, got shape {tuple(image.shape)}")
    if channels is not None and channels != image.shape[-3]:
        raise ValueError(
            f"mean and std must have one number per channel of the image, got {channels} numbers "
            f"and an image of {image.shape[-3]} channels, shape {tuple(image.shape)}"
        )
    return image


def _pil_pixels(image: _PILImage, channels: int | None) -> Tensor:
    """Return the (C, H, W) uint8 pixels of a PIL image."""
    if image.mode.startswith(("I", "F")):
        raise TypeError(
            f"image must be an 8-bit PIL image, got mode {image.mode!r}: its range is not known, "
            f"give a floating tensor in [0, 1] instead"
        )
    grey = image.mode == "L" and channels != 3
    pixels = np.array(image if grey else image.convert("RGB"))
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.atleast_3d(pixels), -1, 0)))


def _draw_boxes(
    group: CropGroup, number: int, image_size: Sequence[int], generator: torch.Generator | None
) -> list[list[int]]:
    """Return ``number`` rows of (top, left, height, width, mirrored) in an image (H, W)."""
    image_height, image_width = image_size
    uniform = torch.rand(
        number, 2 * _TRIES + 3, generator=generator, dtype=torch.float64, device="cpu"
    )
    least, most = group.scale
    area = image_height * image_width * (least + (most - least) * uniform[:, :_TRIES])
    flattest, steepest = group.ratio
    ratio = flattest * (steepest / flattest) ** uniform[:, _TRIES : 2 * _TRIES]
    # The largest box of a permitted shape stands behind the tries as one that always fits.
    widest = max(1, min(image_width, round(image_height * group.ratio[1])))
    highest = max(1, min(image_height, round(image_width / group.ratio[0])))
    width = F.pad((area * ratio).sqrt().round(), (0, 1), value=widest)
    height = F.pad((area / ratio).sqrt().round(), (0, 1), value=highest)
    fits = (width >= 1) & (width <= image_width) & (height >= 1) & (height <= image_height)
    chosen = fits.byte().argmax(1, keepdim=True)  # the first one that fits
    width, height = width.gather(1, chosen)[:, 0], height.gather(1, chosen)[:, 0]
    down, right, mirror = uniform[:, 2 * _TRIES :].unbind(1)
    central = chosen[:, 0] == _TRIES
    top = torch.where(central, (image_height - height) / 2, down * (image_height - height + 1))
    left = torch.where(central, (image_width - width) / 2, right * (image_width - width + 1))
    boxes = torch.stack([top.floor(), left.floor(), height, width, mirror < group.flip], 1)
    return boxes.long().tolist()


def _cut(batch: Tensor, boxes: Sequence[Sequence[int]], size: int) -> Tensor:
    """Cut one box out of each image of ``batch`` (B, C, H, W): (B, C, size, size)."""
    crops = [batch.new_empty(0, batch.shape[1], size, size)]  # for a batch of no images
    for index, (top, left, height, width, mirrored) in enumerate(boxes):
        box = batch[index : index + 1, :, top : top + height, left : left + width]
        crop = F.interpolate(box, size=(size, size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if mirrored else crop)
    return torch.cat(crops)


def _distort(
    name: str,
    photometric: Callable[[Tensor], Tensor],
    crops: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Apply a group's photometric step, and look at what came back."""
    if isinstance(photometric, PhotometricDistortion):
        return photometric(crops, generator=generator)
    distorted = photometric(crops)
    _checks.floating_tensor(f"the output of {name}", distorted)
    if distorted.shape != crops.shape:
        raise ValueError(
            f"the output of {name} must have the shape of its input, {tuple(crops.shape)}, got "
            f"{tuple(distorted.shape)}"
        )
    return distorted
