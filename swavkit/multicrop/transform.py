"""``MultiCropTransform``: random crops of an image at several resolutions.

All random numbers of a sample are drawn at once on the CPU. The same generator therefore gives the
same crops on any device and for any batching, without device synchronization.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, Literal, overload

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import as_a_whole, on_cpu, on_device
from swavkit.multicrop import box_ops, color_ops, image_input, photometric
from swavkit.multicrop.crop_group import CropGroup, checked_groups, pixels
from swavkit.multicrop.image_input import Images, PILImage
from swavkit.multicrop.photometric import PhotometricDistortion, checked_generator

__all__ = ["MultiCropTransform"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)  # the published code has 0.228 in the first channel, a typo


class MultiCropTransform:
    """Random resized crops at several resolutions, mirrored, distorted and normalized.

    Each crop is a box of random area, aspect ratio and position, resized with antialiasing to the
    size of its group. If ten sampled boxes do not fit into the image, the largest central box of an
    allowed aspect ratio is used. All parameters are drawn per sample and per crop. A batch draws
    the same numbers as its images passed one after the other with the same generator.

    Args:
        crops: The groups. The first has the largest size, by number of pixels, and its crops give
            the codes.
        mean: Mean of each channel for pixels in [0, 1], or one float for all channels.
        std: Standard deviation, in the same form.
        smaller_first: Whether the first group may have a smaller size than another.
        eight_bit: Whether uint8 images on a CPU are resized in 8 bits, as in PIL. This is faster
            and rounds by up to 0.006 of the range; bicubic pixels are clamped after each axis, not
            only after both. Otherwise images are resized in float32 (float64), and results on a CPU
            and an accelerator agree within 2e-4, or 5e-5 without a photometric step.

    Shape:
        The input is a PIL image or a tensor (C, H, W); or, as a batch, a tensor (B, C, H, W) on any
        device or a list of B images of any sizes. Tensors are uint8, or floating-point in [0, 1].
        The output is a list with one tensor per crop in the order of the groups, (C, h, w) for an
        image and (B, C, h, w) for a batch, where (h, w) is the size of the group. Floating-point
        images keep their dtype; uint8 and PIL images give float32. A channels-last batch gives
        channels-last crops.

        Float16 and bfloat16 are processed in float32. NaN pixels are allowed: crops that show them
        are NaN there and may be NaN elsewhere; crops of other images are not affected.

        PIL images are turned upright by their EXIF orientation; boxes refer to the upright image.
        Transparent pixels are composited on white. Modes 1, L, LA, I;16, I and F have 1 channel,
        unless ``mean`` or ``std`` has 3 entries. All other modes are converted to RGB. Values of
        modes I;16 and I, in which PIL opens 16-bit files, are divided by 65535. Values of mode F
        must be in [0, 1].

    Raises:
        TypeError: If a group is not a ``CropGroup``, or the image has the wrong type or dtype.
        ValueError: If there is no crop, the first group is not the largest, a callable changes the
            shape, or the image has no pixels, the wrong number of dimensions, values out of range
            or channels that differ from ``mean`` and ``std``. Values of tensors are checked on a
            CPU only, and not under ``torch.compile``. Unchecked values outside [0, 1] are clamped
            by bicubic interpolation and by the photometric step, or kept if there is neither.

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
        lengths = {len(v) for v in (self.mean, self.std) if isinstance(v, tuple)}
        if len(lengths) == 2:
            raise ValueError(
                f"mean and std must have the same length, got mean {self.mean} and std {self.std}"
            )
        self._channels = lengths.pop() if lengths else None
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
        """Return the crops of an image or a batch.

        Args:
            image: A PIL image, a (C, H, W) tensor, a (B, C, H, W) batch, where B may be 0, or a
                list of images.
            generator: CPU generator. None is torch's global generator, which a data loader reseeds
                for each worker and epoch.
            seed: Seed of a new generator, for the same crops in each call; excludes ``generator``.
            return_boxes: Whether to also return the boxes and flips.

        Returns:
            A list with one tensor per crop, in the order of the groups. With ``return_boxes``, a
            tuple of this list, a list of boxes and a list of flips. Boxes are (4,) or (B, 4) int64:
            left, top, right, bottom in pixels, the last two exclusive. Flips are () or (B,) bool.
        """
        _checks.choice("return_boxes", return_boxes, (False, True))
        generator = _generator(generator, seed)
        images = image_input.load(image, self._channels)
        self._check_pixels(images)
        parameters = self._draw(images, generator)
        rounding = self.eight_bit and images.first.dtype == torch.uint8
        many_small = images.many_small(max(map(pixels, self.crops))) and not rounding
        if images.one_by_one and not many_small:
            crops = self._one_by_one(images, parameters)
        else:
            crops = self._batched(images, parameters)
            parameters = on_device(parameters, images.working_dtype, images.first.device)
        if images.single:
            crops, parameters = [crop[0] for crop in crops], parameters[0]
        if not return_boxes:
            return crops
        top, left, height, width, mirrored = parameters[..., : box_ops.BOX].unbind(-1)
        boxes = torch.stack([left, top, left + width, top + height], dim=-1).long()
        # Cloned: a view would keep the boxes of all crops alive, and save them with its own.
        flips = (mirrored > 0).unbind(-1)
        return crops, [box.clone() for box in boxes.unbind(-2)], [flip.clone() for flip in flips]

    def _check_pixels(self, images: Images) -> None:
        for index, group in enumerate(self.crops):
            if isinstance(group.photometric, PhotometricDistortion):
                name = f"the image for crops[{index}]"
                photometric.check_channels(group.photometric, name, images.channels)
        if images.first.is_floating_point() and on_cpu(images.first):
            images.refuse_values_outside_0_1()  # such as unscaled 0 to 255

    def _draw(self, images: Images, generator: torch.Generator | None) -> Tensor:
        """Return the parameters (B, V, ...) of boxes and photometric steps on the CPU."""
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
            steps.append(rows)  # custom steps draw their own numbers and ignore these
        return torch.cat([boxes, torch.cat(steps, dim=1)], dim=-1)

    def _one_by_one(self, images: Images, parameters: Tensor) -> list[Tensor]:
        """Cut, distort and normalize one crop at a time on the CPU, so that it stays in cache."""
        white, dtype, returned = images.largest_value, images.working_dtype, images.returned_dtype
        channels, memory_format = images.channels, images.memory_format
        mean, std, unit = (self._statistic(v, images) for v in (self.mean, self.std, 1 / white))
        scaled_mean, scale, scaled_scale = white * mean, 1 / std, 1 / (white * std)
        results = [
            torch.empty(
                (len(images.samples), channels, *box_ops.height_and_width(group.size)),
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
                box = numbers[: box_ops.BOX]
                cut = box_ops.cut(image, box, group.size, group.interpolation)
                if group.interpolation == "bicubic":
                    cut.clamp_(0, white)
                if group.photometric is None:
                    torch.sub(cut, scaled_mean, out=crop).mul_(scaled_scale)
                elif isinstance(group.photometric, PhotometricDistortion):
                    cut = torch.mul(cut, unit, out=_contiguous(crop))
                    color_ops.distort_(cut, numbers[box_ops.BOX :])
                    torch.sub(cut, mean, out=crop).mul_(scale)
                else:
                    torch.mul(cut, unit, out=crop)
        for position, (index, group) in enumerate(self._each_crop):
            if _is_custom(group.photometric):
                crops = self._custom_step(results[position], index, images.single)
                results[position] = (crops - mean) / std
        return [crops.to(returned) for crops in results]

    def _batched(self, images: Images, parameters: Tensor) -> list[Tensor]:
        """Cut, distort and normalize a whole batch on its device, one group at a time."""
        mean, std = (self._statistic(value, images) for value in (self.mean, self.std))
        scale, offset = 1 / std, -mean / std
        batch = images.batch()
        windows = not (on_cpu(batch) or as_a_whole(batch))  # a CPU gathers slowly
        steps = torch.split(parameters, [group.count for group in self.crops], dim=1)
        results = []
        for index, (group, numbers) in enumerate(zip(self.crops, steps, strict=True)):
            if not group.count:
                continue
            boxes, numbers = numbers[..., : box_ops.BOX], numbers[..., box_ops.BOX :]
            crops = box_ops.cut_batch(
                batch,
                on_device(boxes, images.working_dtype, batch.device),
                group.size,
                group.interpolation,
                white=images.largest_value,
                window=box_ops.window_of(boxes) if windows else None,
            )
            if group.interpolation == "bicubic":
                crops = crops.clamp_(0, 1)
            if isinstance(group.photometric, PhotometricDistortion):
                flat = photometric.distort(
                    group.photometric, crops.flatten(0, 1), numbers.flatten(0, 1)
                )
                crops = flat.view(crops.shape)
            each = list(crops.unbind(1))
            if _is_custom(group.photometric):
                each = [self._custom_step(one.contiguous(), index, images.single) for one in each]
            results += [torch.addcmul(offset, one, scale) for one in each]
        return [
            crops.to(images.returned_dtype).contiguous(memory_format=images.memory_format)
            for crops in results
        ]

    def _statistic(self, value: float | tuple[float, ...], images: Images) -> Tensor:
        column = torch.tensor(value, dtype=torch.float64, device="cpu").view(-1, 1, 1)
        return on_device(column, images.working_dtype, images.first.device)

    def _custom_step(self, crops: Tensor, index: int, single: bool) -> Tensor:
        """Call a group's custom photometric step and check its output."""
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
    """Return ``crop`` if it is contiguous, else an uninitialized contiguous tensor like it."""
    if crop.is_contiguous():
        return crop
    return torch.empty_like(crop, memory_format=torch.contiguous_format)


def _is_custom(step: Callable[[Tensor], Tensor] | None) -> bool:
    return not (step is None or isinstance(step, PhotometricDistortion))


def _per_channel(
    name: str, value: Any, check: Callable[[str, Any], float]
) -> float | tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        return check(name, value)
    return tuple(check(f"{name}[{index}]", number) for index, number in enumerate(value))


def _generator(generator: Any, seed: Any) -> torch.Generator | None:
    """Validate ``generator`` and ``seed`` and return the generator to draw from."""
    given = checked_generator(generator)
    if seed is None:
        return given
    if given is not None:
        raise ValueError("generator and seed must not both be given")
    seed = _checks.non_negative_int("seed", seed)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")
    return torch.Generator().manual_seed(seed)
