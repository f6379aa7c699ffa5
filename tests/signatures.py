"""What the signature of a function or module says of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def described(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Return the default and the annotation of each parameter."""
    parameters = inspect.signature(function).parameters.items()
    return {name: (parameter.default, parameter.annotation) for name, parameter in parameters}
