"""Resizing and the photometric step in NumPy, from their definitions, and images to try them on."""

from __future__ import annotations

import colorsys
import contextlib
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch

from swavkit import CropGroup

PLAIN = (
    CropGroup(12, 2, (0.3, 1.0), photometric=None),
    CropGroup(6, 3, (0.05, 0.3), photometric=None),
)
DISTORTED = (CropGroup(12, 2, (0.3, 1.0)), CropGroup(6, 3, (0.05, 0.3)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """Set defaults of the session that code must not follow: device meta and float64."""
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def random_crops(
    number: int, channels: int = 3, size: int = 9, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Crops with flat and with saturated places, where hue and blending have their corner cases."""
    crops = torch.rand(number, channels, size, size, generator=seeded(5), dtype=torch.float64)
    crops[:, :, 0, 0] = 0.4
    crops[:, :, 0, 1] = 0.0
    crops[:, :, 0, 2] = 1.0
    crops[:, 0, 1, 0] = crops[:, -1, 1, 0]
    crops[:, 0, 1, 1] = crops[:, channels // 2, 1, 1]
    return crops.to(dtype)


def triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def cubic(x: float) -> float:
    """Keys 1981, equation 8, with the a of PIL."""
    x, a = abs(x), -0.5
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


FILTERS = {"bilinear": triangle, "bicubic": cubic}


def resize_weights(length: int, size: int, interpolation: str = "bilinear") -> np.ndarray:
    """Row i: a filter around the center of output pixel i, widened where pixels are merged."""
    step = length / size
    reach = max(step, 1.0)
    weights = np.zeros((size, length))
    for i, j in itertools.product(range(size), range(length)):
        weights[i, j] = FILTERS[interpolation]((j + 0.5 - (i + 0.5) * step) / reach)
    return weights / weights.sum(1, keepdims=True)


def resized_box(
    image: np.ndarray,
    box: Sequence[float],
    size: int | tuple[int, int],
    interpolation: str = "bilinear",
    *,
    eight_bit: bool = False,
) -> np.ndarray:
    """Cut (top, left, height, width, mirrored) out of (C, H, W); nothing is clamped.

    With ``eight_bit``, pixels are rounded to 0 to 255 after each axis, the horizontal one first.
    """
    top, left, height, width, mirrored = (int(number) for number in box)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    crop = image[:, top : top + height, left : left + width]
    crop = crop @ resize_weights(width, columns, interpolation).T
    crop = np.clip(np.round(crop), 0, 255) if eight_bit else crop
    crop = resize_weights(height, rows, interpolation) @ crop
    crop = np.clip(np.round(crop), 0, 255) if eight_bit else crop
    return crop[:, :, ::-1] if mirrored else crop


def box_gradient(
    gradient: np.ndarray, box: Sequence[float], pixels: tuple[int, int, int]
) -> np.ndarray:
    """Return the gradient of an image of shape ``pixels``, given that of its bilinear crop."""
    top, left, height, width, mirrored = (int(number) for number in box)
    gradient = gradient[:, :, ::-1] if mirrored else gradient
    of_rows = resize_weights(height, gradient.shape[1])
    of_columns = resize_weights(width, gradient.shape[2])
    result = np.zeros(pixels)
    result[:, top : top + height, left : left + width] = of_rows.T @ gradient @ of_columns
    return result


def nearest_box(mask: np.ndarray, box: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Cut (top, left, height, width, mirrored) out of (..., H, W) without mixing pixels."""
    top, left, height, width, mirrored = (int(number) for number in box)
    crop = np.empty((*mask.shape[:-2], *size), mask.dtype)
    for i, j in np.ndindex(size):
        row, column = ((Fraction(2 * k + 1, 2) * n / s).__floor__()
                       for k, n, s in ((i, height, size[0]), (j, width, size[1])))  # fmt: skip
        place = size[1] - 1 - j if mirrored else j
        crop[..., i, place] = mask[..., top + row, left + column]
    return crop


def grey(crop: np.ndarray) -> np.ndarray:
    if len(crop) != 3:
        return crop.mean(0)
    return 0.2989 * crop[0] + 0.587 * crop[1] + 0.114 * crop[2]


def brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop, 0, 1)


def contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop + (1 - factor) * grey(crop).mean(), 0, 1)


def saturation(crop: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(factor * crop + (1 - factor) * grey(crop), 0, 1)


def hue(crop: np.ndarray, shift: float) -> np.ndarray:
    result = np.empty_like(crop)
    for row, column in np.ndindex(crop.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*crop[:, row, column])
        result[:, row, column] = colorsys.hsv_to_rgb((h + shift) % 1.0, s, v)
    return result


def blur(crop: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = np.pad(crop, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
    for axis in (1, 2):
        padded = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return padded


def distorted(crop: np.ndarray, parameters: Sequence[float], radius: int = 10) -> np.ndarray:
    """Apply a row of parameters, as listed in ``swavkit/multicrop/color_ops.py``, step by step."""
    blends = (brightness, contrast, saturation)
    kinds, factors, before = parameters[:3], parameters[3:6], parameters[6:9]
    shift, grey_factor, sigma = parameters[9:]
    turns = list(zip(kinds, factors, before, strict=True))
    for kind, factor, _ in (turn for turn in turns if turn[2]):
        crop = blends[int(kind)](crop, factor)
    if len(crop) == 3:
        crop = hue(crop, shift)
    for kind, factor, _ in (turn for turn in turns if not turn[2]):
        crop = blends[int(kind)](crop, factor)
    crop = saturation(crop, grey_factor)
    return blur(crop, sigma, radius) if sigma else crop
