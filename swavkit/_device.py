"""Where tensors are, how they are best worked on, and how numbers of the host reach them."""

from __future__ import annotations

import torch
from torch import Tensor


def one_by_one(pixels: Tensor) -> bool:
    """Tell whether samples may be taken one after the other, in place.

    On a CPU a sample then stays in the cache. An accelerator, a compiler and the gradient want
    whole batches.
    """
    return on_cpu(pixels) and not (pixels.requires_grad and torch.is_grad_enabled())


def on_cpu(tensor: Tensor) -> bool:
    """Tell whether operations run on a CPU, one after the other, as they are written.

    So parts that stay in the cache save time, and the host may look at values without a wait.
    """
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def capturing(device: torch.device) -> bool:
    """Tell whether a CUDA graph is being captured, in which nothing may be read on the host."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def traceable(setting: float, device: torch.device) -> float | Tensor:
    """Return a setting as it is, or as a 0-dim tensor while torch.compile traces.

    Traced as a number, a setting that changes would become a constant of a cached graph, which then
    keeps an old value, or is compiled anew for every value.
    """
    if not torch.compiler.is_compiling():
        return setting
    return torch.ones((), dtype=torch.float64, device=device) * setting


def scaled_sum(
    summand: Tensor, values: Tensor, factor: float | Tensor, out: Tensor | None = None
) -> Tensor:
    """Return ``summand + factor * values`` in the dtype of ``summand``."""
    if isinstance(factor, Tensor):
        return torch.add(summand, values.to(summand.dtype) * factor, out=out)
    return torch.add(summand, values, alpha=factor, out=out)


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values``, which are on the CPU, in another dtype and on a device."""
    values = values.to(dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()  # or the copy would wait for what the device has to do before
    return values.to(device, non_blocking=True)
