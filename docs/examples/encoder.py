"""The networks of the examples, their features, and the distortion of digit crops."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, STD = 0.5, 0.5  # of the pixels that the network sees
DIGIT_MEAN, DIGIT_STD = -0.74, 0.62  # of MNIST's, after that


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


class PlainNetwork(nn.Module):
    """The network of minimal.py, of any width and depth.

    Args:
        channels: Of the images.
        feature_dim: Of the projected features.
        width: Channels of the first stage; the last has four times as many.
        depth: Convolutions of each stage.
    """

    def __init__(self, channels: int, feature_dim: int, width: int = 16, depth: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage in range(3):
            for place in range(depth):
                size = 5 if stage == place == 0 else 3
                new = width * 2**stage
                stride = 1 if place else 2
                layers += [nn.Conv2d(channels, new, size, stride, padding=size // 2)]
                layers += [nn.BatchNorm2d(new), nn.ReLU()]
                channels = new
        self.encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = plain_head(16 * width, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def plain_head(features: int, feature_dim: int) -> nn.Sequential:
    """Return the projection head of minimal.py."""
    return nn.Sequential(
        nn.Linear(features, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, feature_dim)
    )


class PatchEncoder(nn.Module):
    """A small vision transformer: a class token, and a token for each patch.

    Args:
        channels: Of the images.
        size: Height and width of full-resolution crops, which have ``side`` x ``side`` patches.
            Smaller crops have patches of the same size.
        dim: Features of a token.
        side: Patches in a row.
        depth: Layers.
    """

    def __init__(
        self, channels: int, size: int, dim: int = 64, side: int = 4, depth: int = 2
    ) -> None:
        super().__init__()
        self.patches = side**2
        self.embed = nn.Conv2d(channels, dim, size // side, stride=size // side)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.positions = nn.Parameter(torch.randn(1, dim, side, side))
        layer = nn.TransformerEncoderLayer(
            dim, 4, 2 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False
        )

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the tokens (N, 1 + P, D), the class token first.

        Args:
            images: (N, C, H, W).
            mask: (N, P) bool, the patches that are not shown.
        """
        # Of digits, most pixels are black. Features that share a large mean have cosines near 1.
        patches = self.embed((images - DIGIT_MEAN) / DIGIT_STD)
        positions = F.interpolate(self.positions, list(patches.shape[2:]), mode="bilinear")
        tokens = patches.flatten(2).mT  # (N, P, D)
        if mask is not None:
            tokens = torch.where(mask.unsqueeze(-1), self.mask_token, tokens)
        tokens = tokens + positions.flatten(2).mT
        first = self.first.expand(len(images), -1, -1)
        return self.layers(torch.cat([first, tokens], dim=1))

    def class_token(self, images: Tensor) -> Tensor:
        """Return (N, D)."""
        return self(images)[:, 0]

    def mean_patch(self, images: Tensor) -> Tensor:
        """Return (N, D)."""
        return self(images)[:, 1:].mean(dim=1)


def mask_patches(count: Tensor, patches: int) -> Tensor:
    """Draw ``count[i]`` of the patches of image i; return a bool mask (N, patches)."""
    order = torch.rand(len(count), patches, device=count.device).argsort(dim=1).argsort(dim=1)
    return order < count.unsqueeze(1)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher's parameters towards the student's: an exponential moving average."""
    for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
        own.lerp_(new, 1 - momentum)


@torch.no_grad()
def features_of(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features of uint8 images on the CPU, without distortion."""
    return torch.cat([module((batch / 255 - MEAN) / STD).cpu() for batch in images.split(500)])


def pixels_of(images: Tensor) -> Tensor:
    """Return the pixels as features, with 0 for black: centered pixels were worse by 2 points."""
    return images.flatten(1).cpu() / 255
