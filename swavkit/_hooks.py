"""Whether somebody looks at a part of a module, by hooks, or has replaced it."""

from __future__ import annotations

from torch import nn


def computes_plainly(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a part is what it was made as, and no hook comes before what it computes."""
    return type(part) is kind and not ("forward" in vars(part) or part._forward_pre_hooks)


def is_plainly(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Tell whether a part is what it was made as, and nothing is hooked onto it."""
    return computes_plainly(part, kind) and not (
        part._forward_hooks or part._backward_hooks or part._backward_pre_hooks
    )
