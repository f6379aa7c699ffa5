"""Where Triton cannot run its kernels, torch computes the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from swavkit import _checks

Result = TypeVar("Result")


def attempt(what: str, file: Any, kernels: Callable[[], Result]) -> Result | None:
    """Return the result of some kernels.

    If Triton cannot run them, warn, note that ``file`` is not ``usable``, and return ``None``.
    """
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
