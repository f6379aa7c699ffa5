"""Triton, if it is installed. Where it cannot run its kernels, torch computes the same.

Triton comes with torch for CUDA. It is imported along with this file, so the package imports this
file only where a kernel is about to run.
"""
# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from swavkit import _checks

__all__ = ["attempt", "jit", "takes", "tl", "triton"]

try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    triton = tl = None

Result = TypeVar("Result")


def jit(do_not_specialize: Sequence[str]) -> Callable[..., Any]:
    """Return ``triton.jit`` that compiles a kernel once for all values of these arguments."""
    if triton is None:
        return lambda kernel: kernel
    decorator: Callable[..., Any] = triton.jit(do_not_specialize=do_not_specialize)
    return decorator


def takes(values: Tensor) -> bool:
    """Tell whether a kernel can read these values: their device, dtype and layout."""
    if triton is None or type(values) is not Tensor:
        return False
    on_device = values.is_cuda or (triton.knobs.runtime.interpret and values.device.type == "cpu")
    return bool(
        on_device
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and (values.stride(-1) == 1 or values.shape[-1] == 1)
    )


def attempt(what: str, file: Any, kernels: Callable[[], Result]) -> Result | None:
    """Return the result of some kernels, or ``None`` if Triton cannot run those of ``file``.

    The first time, warn and note that ``file`` is not ``usable``.
    """
    if not file.usable:
        return None
    try:
        return kernels()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # such as one for a C compiler that is not there
        file.usable = False
        warnings.warn(
            f"Triton cannot run its kernels for {what}; torch computes them from now on: "
            f"{type(error).__name__}: {error}",
            stacklevel=_checks.callers_stacklevel(),
        )
        return None
