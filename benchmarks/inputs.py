"""Features and prototypes as a network in training has them, from a fixed seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clustered(*shape: int, prototypes: int) -> tuple[Tensor, Tensor]:
    """Return features (..., D) near some of the prototypes, cosine about 0.7, and these, (K, D)."""
    generator = torch.Generator().manual_seed(0)
    feature_dim = shape[-1]
    directions = F.normalize(torch.randn(prototypes, feature_dim, generator=generator), dim=-1)
    nearest = torch.randint(prototypes, shape[:-1], generator=generator)
    noise = torch.randn(*shape, generator=generator) / feature_dim**0.5  # of norm 1, about
    return directions[nearest] + noise, directions
