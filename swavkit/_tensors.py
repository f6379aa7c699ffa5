"""Tensors: their dtypes, devices and memory.

Arithmetic is done in float32 or better, whatever the dtype of the input and whatever autocast says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod

import numpy as np
import torch
from torch import Tensor

_NOTHING = nullcontext()
_BYTES_OF_A_LARGE_RESULT = 2**22  # from here on NumPy asks for huge pages
_ALIGNMENT = 64


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


def one_by_one(pixels: Tensor) -> bool:
    """Tell whether samples may be taken one after the other, in place.

    On a CPU a sample then stays in the cache. An accelerator, a compiler and the gradient want
    whole batches.
    """
    return on_cpu(pixels) and not as_a_whole(pixels)


def as_a_whole(pixels: Tensor) -> bool:
    """Tell whether a compiler or the gradient wants every step to take all samples at once."""
    differentiated = pixels.requires_grad and torch.is_grad_enabled()
    return differentiated or torch.compiler.is_compiling()


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether operations run on a CPU, one after the other, as they are written.

    So parts that stay in the cache save time, and the host may look at values without a wait.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, in which nothing may be read on the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def traceable(setting: float | Tensor, device: torch.device) -> float | Tensor:
    """Return a number as it is, or as a 0-dim tensor while torch.compile traces.

    Traced as a number, a setting that changes would become a constant of a cached graph, which then
    keeps an old value, or is compiled anew for every value. A tensor is moved to ``device``.
    """
    if isinstance(setting, Tensor):
        return setting.to(device, torch.float64, non_blocking=True)
    if not torch.compiler.is_compiling():
        return setting
    return torch.ones((), dtype=torch.float64, device=device) * setting


def scaled_sum(
    summand: Tensor, values: Tensor, factor: float | Tensor, out: Tensor | None = None
) -> Tensor:
    """Return ``summand + factor * values`` in the dtype of ``summand``."""
    if isinstance(factor, Tensor):
        return torch.addcmul(summand, values, factor, out=out)
    return torch.add(summand, values, alpha=factor, out=out)


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values``, which are on the CPU, in another dtype and on a device."""
    values = values.to(dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()  # or the copy would wait for what the device has to do before
    return values.to(device, non_blocking=True)


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
