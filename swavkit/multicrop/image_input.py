"""Validation of input images and their conversion to tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, one_by_one

_MANY, _SMALL = 16, 48**2  # batching is faster on a CPU from 16 images, up to 48² pixels
_SLACK = 1e-3  # tolerance around [0, 1] for rounded bfloat16 pixels
_GRAYSCALE = ("1", "L", "LA")  # PIL modes, besides those of more than 8 bits
_WHITE_16_BIT = 65535  # PIL opens 16-bit files in modes I;16 and I
_ORIENTATION = 0x0112  # EXIF tag


@runtime_checkable
class PILImage(Protocol):
    """The interface of a PIL image used here, which avoids importing PIL."""

    @property
    def mode(self) -> str: ...

    @property
    def info(self) -> Any: ...

    def load(self) -> Any: ...

    def convert(self, mode: str) -> PILImage: ...

    def getexif(self) -> Any: ...


@dataclass(frozen=True)
class Images:
    """Images with a common dtype, device and number of channels.

    Attributes:
        samples: A (B, C, H, W) tensor, or a list of (C, H, W) tensors of any sizes.
        single: Whether the input was one image; then B is 1.
    """

    samples: Tensor | list[Tensor]
    single: bool

    @property
    def first(self) -> Tensor:
        """A tensor with the common dtype, device and number of channels."""
        return self.samples if isinstance(self.samples, Tensor) else self.samples[0]

    @property
    def channels(self) -> int:
        """The number of channels C."""
        return self.first.shape[-3]

    @property
    def one_by_one(self) -> bool:
        """Whether the images can be processed one at a time."""
        samples = [self.samples] if isinstance(self.samples, Tensor) else self.samples
        return all(one_by_one(sample) for sample in samples)

    def many_small(self, crop_pixels: int) -> bool:
        """Return whether the overhead of operations per image would dominate on a CPU.

        Args:
            crop_pixels: Number of pixels of the largest crop.
        """
        if not isinstance(self.samples, Tensor) or len(self.samples) < _MANY:
            return False
        return max(self.samples.shape[-2] * self.samples.shape[-1], crop_pixels) <= _SMALL

    @property
    def returned_dtype(self) -> torch.dtype:
        """The dtype of the crops."""
        return self.first.dtype if self.first.is_floating_point() else torch.float32

    @property
    def working_dtype(self) -> torch.dtype:
        """The dtype of the computation."""
        return at_least_float32(self.returned_dtype)

    @property
    def largest_value(self) -> int:
        """The value of white pixels."""
        return 255 if self.first.dtype == torch.uint8 else 1

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the batch, which the crops keep."""
        batch = self.samples
        if self.single or not isinstance(batch, Tensor) or batch.is_contiguous():
            return torch.contiguous_format
        last = batch.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if last else torch.contiguous_format

    def sizes(self) -> Tensor:
        """Return the heights and widths (B, 2) on the CPU."""
        if isinstance(self.samples, Tensor):
            size = torch.tensor(self.samples.shape[-2:], device="cpu")
            return size.expand(len(self.samples), 2)
        return torch.tensor([sample.shape[-2:] for sample in self.samples], device="cpu")

    def batch(self) -> Tensor:
        """Return (B, C, H, W), with smaller images zero-padded bottom and right."""
        if isinstance(self.samples, Tensor):
            return self.samples
        height = max(sample.shape[1] for sample in self.samples)
        width = max(sample.shape[2] for sample in self.samples)
        margins = [(width - one.shape[2], height - one.shape[1]) for one in self.samples]
        with autocast_disabled(self.first.device):  # autocast rejects the other half dtype
            return torch.stack(
                [
                    F.pad(sample, (0, right, 0, below))
                    for sample, (right, below) in zip(self.samples, margins, strict=True)
                ]
            )

    def refuse_values_outside_0_1(self) -> None:
        """Raise an error for values outside [0, 1]. Reads the values, so call it on a CPU only."""
        for index, sample in enumerate(self.samples):
            name = "image" if self.single else f"image[{index}]"
            _refuse_values_outside_0_1(f"{name} must be uint8 or lie in [0, 1]", sample)


def load(image: Any, channels: int | None) -> Images:
    """Validate and convert the input, with ``channels`` channels or, if None, any number."""
    if isinstance(image, (list, tuple)):
        if not image:
            raise ValueError("image must hold at least one image, got an empty list")
        samples = [
            _pixels(f"image[{index}]", one, channels, (3,), "(C, H, W)")
            for index, one in enumerate(image)
        ]
        for index, sample in enumerate(samples):
            _like_the_first(index, sample, samples[0])
        return Images(samples, single=False)
    pixels = _pixels("image", image, channels, (3, 4), "(C, H, W) or (B, C, H, W)")
    single = pixels.dim() == 3
    return Images(pixels[None] if single else pixels, single=single)


def _pixels(
    name: str, image: Any, channels: int | None, dimensions: tuple[int, ...], shape: str
) -> Tensor:
    """Return one image or batch as a uint8 or floating-point tensor."""
    if not isinstance(image, Tensor) and isinstance(image, PILImage):
        image = _pil_pixels(name, image, channels)
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a PIL image or a torch.Tensor, got {type(image).__name__}")
    if image.dtype not in (torch.uint8, *_checks.FLOATING_DTYPES):
        raise TypeError(
            f"{name} must be uint8 or floating-point of 16 to 64 bits, got {image.dtype}"
        )
    if image.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {image.layout}")
    if image.dim() not in dimensions:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(image.shape)}")
    if 0 in image.shape[-3:]:
        raise ValueError(f"{name} must have channels and pixels, got shape {tuple(image.shape)}")
    if channels is not None and channels != image.shape[-3]:
        raise ValueError(
            f"mean and std must have one number per channel of {name}, got {channels} numbers "
            f"and an image of {image.shape[-3]} channels, shape {tuple(image.shape)}"
        )
    return image


def _pil_pixels(name: str, image: PILImage, channels: int | None) -> Tensor:
    """Return a PIL image as (C, H, W): float32 in [0, 1] for modes I and F, else uint8."""
    wide = image.mode.startswith(("I", "F"))
    grayscale = channels != 3 and (wide or image.mode in _GRAYSCALE)
    try:
        image.load()
        # np.array copies: the tensor must own its memory.
        pixels = np.array(image) if wide else _eight_bit_pixels(image, grayscale)
        orientation = image.getexif().get(_ORIENTATION)
    except (OSError, SyntaxError, ValueError) as error:  # PIL's errors for corrupt files
        raise ValueError(f"{name} must be a readable PIL image, got one where {error}") from error
    upright = np.ascontiguousarray(_upright(np.atleast_3d(pixels), orientation))
    if not wide:
        return torch.from_numpy(upright).permute(2, 0, 1)
    white = 1 if image.mode == "F" else _WHITE_16_BIT
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        upright = np.where(upright == transparent, white, upright)
    wide_pixels = torch.from_numpy(upright.astype(np.float32)).permute(2, 0, 1) / white
    expected = f"{name} must have values in [0, {white}] as a PIL image of mode {image.mode!r}"
    _refuse_values_outside_0_1(expected, wide_pixels, white)
    return wide_pixels if grayscale else wide_pixels.expand(3, -1, -1)


def _eight_bit_pixels(image: PILImage, grayscale: bool) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return (H, W) or (H, W, C) pixels, with transparency composited on white."""
    transparent = image.mode[-1] in "Aa" or image.mode == "P" or "transparency" in image.info
    mode = ("L" if grayscale else "RGB") + "A" * transparent
    pixels = np.array(image if image.mode == mode else image.convert(mode))
    if not transparent:
        return pixels
    colors, alpha = pixels[..., :-1], pixels[..., -1:].astype(np.uint16)
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _upright(pixels: np.ndarray[Any, Any], orientation: Any) -> np.ndarray[Any, Any]:
    """Apply an EXIF orientation to (H, W, C) pixels; None and unknown values change nothing."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def _refuse_values_outside_0_1(expected: str, pixels: Tensor, white: int = 1) -> None:
    """Raise an error that begins with ``expected`` for values outside [0, 1]; NaN is ignored."""
    if not pixels.numel():
        return
    pixels = pixels.detach()
    low, high = (float(limit) for limit in pixels.aminmax())
    if math.isnan(low):
        known = pixels.nan_to_num(0.5, math.inf, -math.inf)
        low, high = (float(limit) for limit in known.aminmax())
    slack = _SLACK if white == 1 else 0  # integers are exact
    if not -slack <= low <= high <= 1 + slack:
        raise ValueError(f"{expected}, got values from {low * white:g} to {high * white:g}")


def _like_the_first(index: int, sample: Tensor, first: Tensor) -> None:
    if (sample.dtype, sample.device) != (first.dtype, first.device):
        raise TypeError(
            f"image[{index}] must have the dtype and device of image[0], {first.dtype} on "
            f"{first.device}, got {sample.dtype} on {sample.device}"
        )
    if len(sample) != len(first):
        raise ValueError(
            f"image[{index}] must have the channels of image[0], {len(first)}, got {len(sample)}"
        )
