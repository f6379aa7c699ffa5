"""``PhotometricDistortion``: the published color jitter, grayscale and blur, drawn per sample.

Drawing the parameters and applying them are separate functions. All random numbers are drawn on the
CPU, so a generator in the same state gives the same distortion on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import as_a_whole, at_least_float32, on_device, one_by_one
from swavkit.multicrop import color_ops

__all__ = ["PhotometricDistortion"]

NUMBERS = 12  # random numbers per crop


@dataclass(frozen=True)
class PhotometricDistortion:
    """The published color jitter, grayscale and Gaussian blur, drawn per sample.

    The jitter changes brightness, contrast, saturation and hue in random order, all four with
    probability ``jitter_probability`` or none. The default strengths, (0.8, 0.8, 0.8, 0.2) with
    probability 0.8, are those of the authors' code. Brightness multiplies the pixels by a factor,
    contrast blends them with the mean gray of the crop, saturation with the gray of each pixel.
    Each factor is uniform in [1 - strength, 1 + strength]. Hue is shifted by up to ``hue``
    revolutions. Each result is clamped to [0, 1]. The blur mirrors the crop at its borders.

    Args:
        brightness: Strength in [0, 1].
        contrast: Strength in [0, 1].
        saturation: Strength in [0, 1].
        hue: Largest shift in revolutions, in [0, 0.5].
        jitter_probability: Probability of the color jitter.
        greyscale_probability: Probability of conversion to grayscale.
        blur_probability: Probability of the blur.
        blur_sigma: Range of the blur's standard deviation in pixels; sampled uniformly.
        other_channels: Behavior for images without 3 channels. ``"error"`` raises an error.
            ``"skip"`` omits saturation, hue and grayscale; contrast uses the mean of all channels.

    Shape:
        Floating-point crops (C, H, W) or (B, C, H, W) in [0, 1] give the same shape and dtype. C
        must be 3, unless ``other_channels`` is ``"skip"`` or jitter and grayscale both have
        probability 0.

    Raises:
        TypeError: If a setting is not a number or the crops are not a floating-point tensor.
        ValueError: If a setting is out of range or the crops have the wrong shape.

    Example:
        >>> distort = PhotometricDistortion(blur_probability=0.0)
        >>> distort(torch.rand(4, 3, 8, 8), generator=torch.Generator()).shape
        torch.Size([4, 3, 8, 8])

    References:
        Caron et al. 2020, arXiv 2006.09882, after Chen et al. 2020, arXiv 2002.05709.
    """

    brightness: float = 0.8
    contrast: float = 0.8
    saturation: float = 0.8
    hue: float = 0.2
    jitter_probability: float = 0.8
    greyscale_probability: float = 0.2
    blur_probability: float = 0.5
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    other_channels: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            _checks.float_between(name, getattr(self, name), 0, 1)
        _checks.float_between("hue", self.hue, 0, 0.5)
        for name in ("jitter_probability", "greyscale_probability", "blur_probability"):
            _checks.float_between(name, getattr(self, name), 0, 1)
        object.__setattr__(
            self, "blur_sigma", _checks.positive_range("blur_sigma", self.blur_sigma)
        )
        _checks.choice("other_channels", self.other_channels, ("error", "skip"))

    def __call__(self, crops: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return distorted crops. ``generator`` is on the CPU; None is torch's global generator."""
        _checks.floating_tensor("crops", crops)
        if crops.dim() not in (3, 4):
            raise ValueError(
                f"crops must have shape (C, H, W) or (B, C, H, W), got {tuple(crops.shape)}"
            )
        check_channels(self, "crops", crops.shape[-3])
        generator = checked_generator(generator)
        batch = (crops if crops.dim() == 4 else crops[None]).to(at_least_float32(crops.dtype))
        uniform = random_numbers(len(batch), NUMBERS, generator=generator)
        parameters = draw(self, uniform, batch.shape[1])
        distorted = batch.clone(memory_format=torch.contiguous_format)
        if one_by_one(batch):
            for crop, numbers in zip(distorted, parameters.tolist(), strict=True):
                color_ops.distort_(crop, numbers)
        else:
            distorted = distort(self, distorted, parameters).contiguous()
        return distorted.to(crops.dtype).view(crops.shape)


def checked_generator(generator: Any) -> torch.Generator | None:
    """Return the generator to draw from, if it is one."""
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
    if generator is not None and generator.device.type != "cpu":
        raise ValueError(
            f"generator must be on the CPU, from which crops on every device are drawn, got one on "
            f"{generator.device}"
        )
    return generator


def random_numbers(*shape: int, generator: torch.Generator | None) -> Tensor:
    """Draw uniform numbers in [0, 1) on the CPU; None is torch's global generator."""
    if generator is None:  # torch.compile rejects generator=None for dynamic batch sizes
        return torch.rand(shape, dtype=torch.float64, device="cpu")
    return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def check_channels(settings: PhotometricDistortion, name: str, channels: int) -> None:
    """Raise an error if the settings change colors but the images do not have 3 channels."""
    if channels != 3 and changes_colors(settings) and settings.other_channels == "error":
        raise ValueError(
            f"{name} must have 3 channels for PhotometricDistortion to change their colors, got "
            f"{channels}: pass CropGroup photometric=None, a callable of your own, or "
            f'PhotometricDistortion(other_channels="skip")'
        )


def changes_colors(settings: PhotometricDistortion) -> bool:
    """Return whether jitter or grayscale has a positive probability."""
    return bool(settings.jitter_probability or settings.greyscale_probability)


def draw(settings: PhotometricDistortion, uniform: Tensor, channels: int) -> Tensor:
    """Convert random numbers (..., NUMBERS) to parameters (..., PARAMETERS)."""
    jittered = uniform[..., :1] < settings.jitter_probability
    order = uniform[..., 1:4].argsort(-1)
    hue_position = (4 * uniform[..., 4:5]).floor()  # steps before the hue shift, 0 to 3
    spread = 2 * uniform[..., 5:9] - 1
    in_color = channels == 3
    factors = torch.stack(
        [
            1 + settings.brightness * spread[..., 0],
            1 + settings.contrast * spread[..., 1],
            1 + settings.saturation * in_color * spread[..., 2],
        ],
        dim=-1,
    ).where(jittered, 1)
    shift = (settings.hue * in_color * spread[..., 3:]).where(jittered, 0)
    gray = 1 - ((uniform[..., 9:10] < settings.greyscale_probability) & in_color).to(shift)
    low, high = settings.blur_sigma
    sigma = low + (high - low) * uniform[..., 11:]
    sigma = sigma.where(uniform[..., 10:11] < settings.blur_probability, 0)
    before = (torch.arange(3, device="cpu") < hue_position).to(shift)
    kinds = order.to(shift)
    return torch.cat([kinds, factors.gather(-1, order), before, shift, gray, sigma], dim=-1)


def distort(settings: PhotometricDistortion, crops: Tensor, parameters: Tensor) -> Tensor:
    """Distort crops (B, C, H, W), float32 or float64, on any device; they may be overwritten.

    Args:
        settings: The settings from which the parameters were drawn.
        crops: The crops.
        parameters: (B, PARAMETERS) on the CPU.
    """
    radius = color_ops.blur_radius(settings.blur_sigma[1]) if settings.blur_probability else 0
    colors = changes_colors(settings)
    there = on_device(parameters, crops.dtype, crops.device)
    if as_a_whole(crops):
        return color_ops.distort(crops, there, colors=colors, blur=radius)
    color_ops.distort_rows_(crops, there, parameters.numpy(), colors=colors, blur=radius)
    return crops
