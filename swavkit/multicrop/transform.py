"""``MultiCropTransform``: random crops of an image at several resolutions.

All random numbers of a sample are drawn at once, on the CPU. The same generator therefore gives the
same crops on any device and for any batching, and nothing reads a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, overload

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import on_cpu, on_device
from swavkit.multicrop import box_ops, color_ops, image_input, photometric
from swavkit.multicrop.crop_group import CropGroup, checked_groups
from swavkit.multicrop.image_input import Images, PILImage
from swavkit.multicrop.photometric import PhotometricDistortion

__all__ = ["MultiCropTransform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)  # the published code has 0.228 in the first channel, a typo


class MultiCropTransform:
    """Random resized crops at several resolutions, mirrored, distorted and normalized.

    Each crop is a box of random area, shape and place, resized to a square (bilinear, with
    antialiasing). Where ten boxes in a row do not fit into the image, the largest central one of a
    permitted shape is taken. Everything is drawn per sample and per crop, and a batch is drawn as
    its images would be, one after the other, from the same generator.

    Args:
        crops: The groups; the first holds the largest size, and its crops give the codes.
        mean: Mean of each channel of pixels in [0, 1], or one float for all.
        std: Standard deviation, in the same form.
        smaller_first: Whether the first group may be smaller than another: its crops then give the
            codes all the same.
        eight_bit: Whether uint8 images on a CPU are resized in 8 bits, as PIL does it. That is
            faster and rounds: by up to 0.006 of the range. Otherwise images are resized in float32
            (float64) everywhere, and a CPU and an accelerator agree within 1e-4.

    Shape:
        An image, PIL or a tensor (C, H, W), gives a list of (C, size, size), one entry a crop,
        group after group; a batch (B, C, H, W) on any device gives (B, C, size, size), and so does
        a list of B images of any sizes. Images are uint8, or floating and in [0, 1]; floating
        images keep their dtype, uint8 and PIL give float32. Float16 and bfloat16 are worked on in
        float32. A channels-last batch gives channels-last crops. A NaN pixel is permitted and makes
        the crops that show it NaN there; other pixels of the crops of its image may become NaN too,
        those of other images do not.

        A PIL image is turned upright as its EXIF orientation says, and boxes are in pixels of the
        upright image. Transparent pixels are composited on white. Modes 1, L, LA, I;16, I and F
        have 1 channel, unless ``mean`` or ``std`` name 3; every other mode is converted to RGB.
        Values of modes I;16 and I, as which PIL opens 16-bit files, are divided by 65535; those of
        mode F must be in [0, 1].

    Raises:
        TypeError: If a group is no ``CropGroup``, or the image is no image or of another dtype.
        ValueError: If there is no crop, the first group is not the largest, the image has no
            pixels, a wrong rank, values out of range, or not the channels of ``mean`` and ``std``,
            or a callable changes a shape. The values of tensors are checked on a CPU only, and not
            under ``torch.compile``; elsewhere values outside [0, 1] are clamped by the photometric
            step, or stay as they are without one.

    Example:
        >>> groups = (CropGroup(16, 2, (0.14, 1.0)), CropGroup(8, 3, (0.05, 0.14)))
        >>> transform = MultiCropTransform(groups)
        >>> [tuple(crop.shape) for crop in transform(torch.rand(4, 3, 32, 32))[1:3]]
        [(4, 3, 16, 16), (4, 3, 8, 8)]
        >>> crops, boxes, flips = transform(torch.rand(3, 40, 60), seed=7, return_boxes=True)
        >>> boxes[0]  # left, top, right, bottom
        tensor([29,  6, 56, 40])

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
        smaller_first: bool = False,
        eight_bit: bool = False,
    ) -> None:
        _checks.choice("smaller_first", smaller_first, (False, True))
        _checks.choice("eight_bit", eight_bit, (False, True))
        self.crops = checked_groups(crops, smaller_first)
        self.mean = _per_channel("mean", mean, _checks.finite_float)
        self.std = _per_channel("std", std, _checks.positive_float)
        self.smaller_first, self.eight_bit = smaller_first, eight_bit
        named = {len(v) for v in (self.mean, self.std) if isinstance(v, tuple)}
        if len(named) == 2:
            raise ValueError(
                f"mean and std must have the same length, got mean {self.mean} and std {self.std}"
            )
        self._channels = named.pop() if named else None
        self._each_crop = [(i, g) for i, g in enumerate(self.crops) for _ in range(g.count)]
        runs = [(step, len(list(run))) for step, run in groupby(self._each_crop, _step_of)]
        self._steps, self._widths = [step for step, _ in runs], [width for _, width in runs]
        self._limits = [
            torch.tensor(
                [getattr(group, name) for _, group in self._each_crop],
                dtype=torch.float64,
                device="cpu",
            )
            for name in ("scale", "ratio", "flip")
        ]

    def __repr__(self) -> str:
        groups = "".join(f"\n    {group}," for group in self.crops)
        return (
            f"MultiCropTransform(({groups}\n), mean={self.mean}, std={self.std}, "
            f"smaller_first={self.smaller_first}, eight_bit={self.eight_bit})"
        )

    @overload
    def __call__(
        self,
        image: Tensor | PILImage | Sequence[Tensor | PILImage],
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        return_boxes: Literal[False] = False,
    ) -> list[Tensor]: ...

    @overload
    def __call__(
        self,
        image: Tensor | PILImage | Sequence[Tensor | PILImage],
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        return_boxes: Literal[True],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]: ...

    def __call__(
        self,
        image: Tensor | PILImage | Sequence[Tensor | PILImage],
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        return_boxes: bool = False,
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the crops of an image or of a batch.

        Args:
            image: A PIL image, a (C, H, W) tensor, a (B, C, H, W) batch, where B may be 0, or a
                list of images.
            generator: CPU generator to draw from; None is torch's global one, which a data loader
                seeds anew for each worker and epoch.
            seed: Draws the same crops each time, instead of from a generator.
            return_boxes: Whether to return the boxes and flips too.

        Returns:
            One tensor a crop, in the order of the groups. With ``return_boxes`` these, then the box
            of each crop, (4,) or (B, 4) int64: left, top, right and bottom in pixels of the image,
            the last two exclusive; then whether it was mirrored, () or (B,) bool.
        """
        _checks.choice("return_boxes", return_boxes, (False, True))
        generator = _source(generator, seed)
        images = image_input.load(image, self._channels)
        self._check_pixels(images)
        parameters = self._draw(images, generator)
        rounding = self.eight_bit and images.first.dtype == torch.uint8
        many_small = images.many_small(max(group.size for group in self.crops)) and not rounding
        if images.one_by_one and not many_small:
            crops = self._one_by_one(images, parameters)
        else:
            parameters = on_device(parameters, images.working_dtype, images.first.device)
            crops = self._together(images, parameters)
        if images.single:
            crops, parameters = [crop[0] for crop in crops], parameters[0]
        if not return_boxes:
            return crops
        top, left, height, width, mirrored = parameters[..., : box_ops.BOX].unbind(-1)
        boxes = torch.stack([left, top, left + width, top + height], dim=-1).long()
        # Copies: a view would keep, and save, those of all crops.
        flips = (mirrored > 0).unbind(-1)
        return crops, [box.clone() for box in boxes.unbind(-2)], [flip.clone() for flip in flips]

    def _check_pixels(self, images: Images) -> None:
        for index, group in enumerate(self.crops):
            if isinstance(group.photometric, PhotometricDistortion):
                name = f"the image for crops[{index}]"
                photometric.check_channels(group.photometric, name, images.channels)
        if images.first.is_floating_point() and on_cpu(images.first):
            images.refuse_values_outside_0_1()  # they would turn white, or stay unnormalized

    def _draw(self, images: Images, generator: torch.Generator | None) -> Tensor:
        """Return the parameters (B, V, ...) of all crops on the CPU: boxes, photometric steps."""
        numbers = box_ops.NUMBERS + photometric.NUMBERS
        uniform = photometric.random_numbers(
            len(images.samples), len(self._each_crop), numbers, generator=generator
        )
        of_boxes, of_steps = uniform[..., : box_ops.NUMBERS], uniform[..., box_ops.NUMBERS :]
        boxes = box_ops.draw_boxes(of_boxes, images.sizes(), *self._limits)
        steps = []
        for step, rows in zip(self._steps, torch.split(of_steps, self._widths, dim=1), strict=True):
            if isinstance(step, PhotometricDistortion):
                rows = photometric.draw(step, rows, images.channels)
            steps.append(rows)  # a step of the user's has random numbers of its own
        return torch.cat([boxes, torch.cat(steps, dim=1)], dim=-1)

    def _one_by_one(self, images: Images, parameters: Tensor) -> list[Tensor]:
        """Cut, distort and normalize crop by crop on the CPU, each while it is in the cache."""
        most, dtype, returned = images.largest_value, images.working_dtype, images.returned_dtype
        channels, memory_format = images.channels, images.memory_format
        mean, std, unit = (self._statistic(v, images) for v in (self.mean, self.std, 1 / most))
        scaled_mean, scale, scaled_scale = most * mean, 1 / std, 1 / (most * std)
        results = [
            torch.empty(
                (len(images.samples), channels, group.size, group.size),
                dtype=dtype,
                device="cpu",
                memory_format=memory_format,
            )
            for _, group in self._each_crop
        ]
        for sample, rows in enumerate(parameters.tolist()):
            image = images.samples[sample]
            if not (self.eight_bit and image.dtype == torch.uint8):
                image = image.contiguous().to(dtype)
            for crops, (_, group), numbers in zip(results, self._each_crop, rows, strict=True):
                crop = crops[sample]
                cut = box_ops.cut(image, numbers[: box_ops.BOX], group.size)
                if group.photometric is None:
                    torch.sub(cut, scaled_mean, out=crop).mul_(scaled_scale)
                elif isinstance(group.photometric, PhotometricDistortion):
                    cut = torch.mul(cut, unit, out=_contiguous(crop))
                    color_ops.distort_(cut, numbers[box_ops.BOX :])
                    torch.sub(cut, mean, out=crop).mul_(scale)
                else:
                    torch.mul(cut, unit, out=crop)
        for position, (index, group) in enumerate(self._each_crop):
            if _is_users(group.photometric):
                crops = self._users_step(results[position], index, images.single)
                results[position] = (crops - mean) / std
        return [crops.to(returned) for crops in results]

    def _together(self, images: Images, parameters: Tensor) -> list[Tensor]:
        """Cut, distort and normalize a whole batch, crop by crop, on its device."""
        mean, std = (self._statistic(value, images) for value in (self.mean, self.std))
        batch = images.batch()
        results = []
        for position, (index, group) in enumerate(self._each_crop):
            numbers = parameters[:, position]
            box, step = numbers[:, : box_ops.BOX], numbers[:, box_ops.BOX :]
            crops = box_ops.cut_batch(batch, box, group.size)
            if isinstance(group.photometric, PhotometricDistortion):
                crops = photometric.distort(group.photometric, crops, step)
            elif group.photometric is not None:
                crops = self._users_step(crops, index, images.single)
            crops = ((crops - mean) / std).to(images.returned_dtype)
            results.append(crops.contiguous(memory_format=images.memory_format))
        return results

    def _statistic(self, value: float | tuple[float, ...], images: Images) -> Tensor:
        column = torch.tensor(value, dtype=torch.float64, device="cpu").view(-1, 1, 1)
        return on_device(column, images.working_dtype, images.first.device)

    def _users_step(self, crops: Tensor, index: int, single: bool) -> Tensor:
        """Call a group's photometric step, which is the user's, and look at what came back."""
        step = self.crops[index].photometric
        if step is None or not crops.numel():
            return crops
        given = crops[0] if single else crops
        distorted = step(given)
        name = f"the output of crops[{index}].photometric"
        _checks.floating_tensor(name, distorted)
        if distorted.shape != given.shape:
            raise ValueError(
                f"{name} must have the shape of its input, {tuple(given.shape)}, got "
                f"{tuple(distorted.shape)}"
            )
        return distorted[None] if single else distorted


def _step_of(crop: tuple[int, CropGroup]) -> Callable[[Tensor], Tensor] | None:
    return crop[1].photometric


def _contiguous(crop: Tensor) -> Tensor:
    """Return the memory of a crop where it is contiguous, else memory like it."""
    if crop.is_contiguous():
        return crop
    return torch.empty_like(crop, memory_format=torch.contiguous_format)


def _is_users(step: Callable[[Tensor], Tensor] | None) -> bool:
    return not (step is None or isinstance(step, PhotometricDistortion))


def _per_channel(
    name: str, value: Any, check: Callable[[str, Any], float]
) -> float | tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        return check(name, value)
    return tuple(check(f"{name}[{index}]", number) for index, number in enumerate(value))


def _source(generator: Any, seed: Any) -> torch.Generator | None:
    """Return what random numbers are drawn from."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator must be one of the CPU, from which crops on every device are drawn, got "
            f"one of {generator.device}"
        )
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError("generator and seed must not both be given")
    return torch.Generator().manual_seed(_checks.non_negative_int("seed", seed))
