"""Arithmetic in float32 or better, whatever the dtype that comes in and whatever autocast says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_NOTHING = nullcontext()


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64 and float32 for every narrower dtype."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(factor: Tensor) -> torch.dtype:
    """Return the dtype in which ``torch.nn.functional.linear`` would multiply ``factor``."""
    kind = factor.device.type
    if kind == "meta" or factor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return factor.dtype
    return torch.get_autocast_dtype(kind)


def autocast_disabled(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which products on ``device`` keep the dtype of their factors."""
    # meta knows no autocast, and asking torch whether would break a graph
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
