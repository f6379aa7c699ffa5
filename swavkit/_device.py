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


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values``, which are on the CPU, in another dtype and on a device."""
    values = values.to(dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()  # or the copy would wait for what the device has to do before
    return values.to(device, non_blocking=True)
