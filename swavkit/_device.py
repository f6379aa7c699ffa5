"""How a batch of samples is best worked on, and how numbers of the host reach it without a wait."""

from __future__ import annotations

import torch
from torch import Tensor


def one_by_one(pixels: Tensor) -> bool:
    """Tell whether to take samples one after the other, in place.

    That is fastest on a CPU, where a sample stays in the cache. An accelerator, a compiler and the
    gradient want whole batches.
    """
    return not (
        pixels.device.type != "cpu" or pixels.requires_grad or torch.compiler.is_compiling()
    )


def on_device(values: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return ``values``, which are on the CPU, in another dtype and on a device."""
    values = values.to(dtype)
    if device.type == "cuda" and not torch.compiler.is_compiling():
        values = values.pin_memory()  # or the copy would wait for what the device has to do before
    return values.to(device, non_blocking=True)
