"""The published recipe as swavkit and torchvision pipelines, and photographs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swavkit import CropGroup, MultiCropTransform, PhotometricDistortion

# Steps that are enabled one after the other, to measure the time of each.
STEPS = ("crop, resize, mirror, normalize", "color jitter", "grayscale", "blur")
GROUPS = ((224, 2, (0.14, 1.0)), (96, 6, (0.05, 0.14)))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field")
LONGEST_SIDES = (500, 375, 256)

MODULES = {"torchvision": "torchvision", "OpenCV": "cv2"}

Pipeline = Callable[[Any], list[Tensor]]


def missing() -> list[str]:
    """Return the compared packages that are not installed."""
    return [name for name, module in MODULES.items() if not importlib.util.find_spec(module)]


def photographs() -> list[Any]:
    """Return photographs of scikit-image as PIL images, each at several sizes."""
    import skimage.data
    from PIL import Image

    whole = [Image.fromarray(getattr(skimage.data, name)()) for name in PHOTOGRAPHS]
    return [scaled(image, longest) for image in whole for longest in LONGEST_SIDES]


def scaled(image: Any, longest: int) -> Any:
    factor = longest / max(image.size)
    return image.resize([round(factor * side) for side in image.size], reducing_gap=None)


def tensors(images: Sequence[Any]) -> list[Tensor]:
    """Return PIL images as contiguous uint8 (3, H, W)."""
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous() for image in images]


def ours(steps: int = len(STEPS), *, eight_bit: bool = False) -> MultiCropTransform:
    """Return the swavkit pipeline of the first ``steps`` steps of the recipe."""
    distortion = PhotometricDistortion(
        jitter_probability=0.8 if steps > 1 else 0,
        greyscale_probability=0.2 if steps > 2 else 0,
        blur_probability=0.5 if steps > 3 else 0,
    )
    groups = [CropGroup(*group, photometric=distortion if steps > 1 else None) for group in GROUPS]
    return MultiCropTransform(groups, mean=MEAN, std=STD, eight_bit=eight_bit)


def torchvision_pipeline(
    steps: int = len(STEPS), *, blur: Callable[[Any], Any] | None = None
) -> Pipeline:
    """Return the torchvision v2 pipeline; ``blur`` replaces torchvision's own blur."""
    from torchvision.transforms import v2

    photometric = [
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([blur or v2.GaussianBlur(23, sigma=(0.1, 2.0))], p=0.5),
    ][: steps - 1]
    crops = [
        v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, antialias=True),
                v2.RandomHorizontalFlip(),
                *photometric,
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        for size, count, scale in GROUPS
        for _ in range(count)
    ]
    return Each(crops)


class Each:
    """Makes one crop of an image with each of several transforms."""

    def __init__(self, crops: Sequence[Callable[[Any], Tensor]]) -> None:
        self.crops = crops

    def __call__(self, image: Any) -> list[Tensor]:
        return [crop(image) for crop in self.crops]


class OpenCVBlur(torch.nn.Module):
    """The blur of a PIL image in the authors' program."""

    def forward(self, image: Any) -> Any:
        import cv2
        from PIL import Image

        cv2.setNumThreads(1)  # the figures are per core
        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        return Image.fromarray(cv2.GaussianBlur(np.asarray(image), (23, 23), sigma))


class PILBlur(torch.nn.Module):
    """PIL's own blur, which repeats box blurs."""

    def forward(self, image: Any) -> Any:
        from PIL import ImageFilter

        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(radius=sigma))
