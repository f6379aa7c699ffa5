"""Features and prototypes similar to those of a trained network, from a fixed seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CPU = torch.device("cpu")


def clustered(*shape: int, prototypes: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return features (..., D) near prototypes, at cosine about 0.7, and prototypes (K, D)."""
    generator = torch.Generator().manual_seed(0)
    feature_dim = shape[-1]
    directions = F.normalize(torch.randn(prototypes, feature_dim, generator=generator), dim=-1)
    nearest = torch.randint(prototypes, shape[:-1], generator=generator)
    noise = torch.randn(*shape, generator=generator) / feature_dim**0.5  # of norm about 1
    return (directions[nearest] + noise).to(device), directions.to(device)
