"""Whether somebody looks at a part of a module, by hooks, or has replaced it."""

from __future__ import annotations

from torch import nn


def is_plainly(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a part is what it was made as, and nothing is hooked onto it."""
    hooks = (
        part._forward_pre_hooks
        or part._forward_hooks
        or part._backward_pre_hooks
        or part._backward_hooks
    )
    return type(part) is kind and not ("forward" in vars(part) or hooks)
