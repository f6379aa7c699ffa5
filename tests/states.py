"""The state of a module, to see whether something has changed it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Tell whether two states have the same keys, dtypes and values."""
    return first.keys() == second.keys() and all(
        first[k].dtype == second[k].dtype and torch.equal(first[k], second[k]) for k in first
    )
