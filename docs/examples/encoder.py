"""The network of pretrain.py, its features, and the distortion of digit crops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = 0.5, 0.5  # of the pixels that the network sees


def distort_digits(crops: Tensor) -> Tensor:
    """Rotate and shear gray digits, change their contrast and brightness, and add noise.

    Color jitter does not affect gray digits, and mirroring makes them invalid.

    Args:
        crops: (B, C, H, W) in [0, 1]; each sample gets its own parameters.
    """
    count, device = len(crops), crops.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, device=device)

    angle, shear = uniform(-math.pi / 12, math.pi / 12), uniform(-0.2, 0.2)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(count, device=device)
    rows = [cos, shear * cos - sin, zero, sin, shear * sin + cos, zero]
    transform = torch.stack(rows, dim=1).view(count, 2, 3)
    grid = F.affine_grid(transform, list(crops.shape), align_corners=False)
    turned = F.grid_sample(crops, grid, align_corners=False)
    brightness, contrast = uniform(0.6, 1.4).view(-1, 1, 1, 1), uniform(0.6, 1.4).view(-1, 1, 1, 1)
    mean = turned.mean(dim=(1, 2, 3), keepdim=True)
    return (mean + (turned - mean) * contrast) * brightness + 0.1 * torch.randn_like(crops)


class Block(nn.Module):
    """Two convolutions with a residual connection."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.around = nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.body(images) + self.around(images))


class Network(nn.Module):
    """A small residual encoder, and the projection head that is used in training only."""

    def __init__(self, channels: int, feature_dim: int, width: int = 16) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Sequential(
            nn.Linear(4 * width, 4 * width),
            nn.BatchNorm1d(4 * width),
            nn.ReLU(),
            nn.Linear(4 * width, feature_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


@torch.no_grad()
def features_of(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features of uint8 images on the CPU, without distortion."""
    return torch.cat([module((batch / 255 - MEAN) / STD).cpu() for batch in images.split(500)])


def pixels_of(images: Tensor) -> Tensor:
    """Return the pixels as features, with 0 for black: centered pixels were worse by 2 points."""
    return images.flatten(1).cpu() / 255
