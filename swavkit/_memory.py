"""Where large results are written."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from swavkit._device import on_cpu

_BYTES_OF_A_LARGE_RESULT = 2**22  # from here on NumPy asks for huge pages
_ALIGNMENT = 64


def empty(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return new memory on the device of ``like``.

    On a CPU the first touch of fresh pages can cost more than all arithmetic on them. NumPy asks
    the operating system for huge pages, where torch does so only if the environment says so; with
    4,096 × 3,000 numbers that is 5 ms for 13.
    """
    size = prod(shape) * dtype.itemsize
    # A subclass may stand for a tensor that has no memory.
    if size < _BYTES_OF_A_LARGE_RESULT or not on_cpu(like) or type(like) is not Tensor:
        return torch.empty(shape, dtype=dtype, device=like.device)
    memory = torch.from_numpy(np.empty(size + _ALIGNMENT, dtype=np.uint8))
    skipped = -memory.data_ptr() % _ALIGNMENT // dtype.itemsize
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    # Not a view of the bytes: autograd has rules for those.
    new = torch.empty(0, dtype=dtype, device=memory.device)
    return new.set_(memory.untyped_storage(), skipped, tuple(shape), tuple(strides))
