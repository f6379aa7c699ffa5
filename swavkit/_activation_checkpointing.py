"""Support for activation checkpointing: a recomputed forward changes no state.

``torch.utils.checkpoint`` discards the saved tensors of a forward and recomputes them in the
backward pass. A recomputation would start from the state after the first run and give different
values. A stateful module therefore keeps its saved tensors, so its gradient needs no recomputed
value. What follows it in the checkpoint may need the recomputed loss, which is NaN with a queue.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


def is_recomputed(queue: object, freeze_steps: int, details: bool) -> bool:
    """Return whether the current forward is a recomputation; never under torch.compile.

    Args:
        queue: The feature queue, or ``None``. Codes and loss depend on it.
        freeze_steps: The number of steps with frozen prototypes. If it is not 0, the gradient
            depends on the step count.
        details: Whether details or statistics are requested.

    Raises:
        RuntimeError: If results that depend on state since changed would be used.
    """
    if torch.compiler.is_compiling():  # a compiled step recomputes operations, not calls
        return False
    functions = _functions_of_checkpoints()
    if not functions:
        return False
    state = "a queue" if queue is not None else "freeze_steps" if freeze_steps else None
    if state is not None and "backward" in functions:  # of a reentrant one, which saved nothing
        raise RuntimeError(
            f"SwAVLoss with {state} cannot be recomputed in the backward pass, because its "
            "state has changed; expected a checkpoint with use_reentrant=False, or one around "
            "the encoder only"
        )
    if queue is not None and details:
        raise RuntimeError(
            "details and statistics of SwAVLoss with a queue cannot be recomputed in the "
            "backward pass, because its state has changed; expected a checkpoint that ends "
            "before it"
        )
    return True


def keeping_what_it_saves(method: Method) -> Method:
    """Decorate a method so that autograd keeps its saved tensors inside a checkpoint."""

    @wraps(method)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        # torch.func transforms do not support hooks; the method raises its own error for them.
        in_transform = torch._C._functorch.maybe_current_level() is not None
        if torch.compiler.is_compiling() or in_transform:
            return method(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(_pack_with_version, _unpack_unchanged):
            return method(*args, **kwargs)

    return keeping  # type: ignore[return-value]


def _functions_of_checkpoints() -> set[str]:
    """Return the functions of checkpoints that recompute the current forward in a backward pass.

    A hook may also run a forward in a backward pass, so they are searched on the call stack.
    """
    functions: set[str] = set()
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        return functions
    frame = inspect.currentframe()
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if "checkpoint" in name and not name.startswith("swavkit."):  # of torch or another library
            functions.add(frame.f_code.co_name)
        frame = frame.f_back
    return functions


def _pack_with_version(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version


def _unpack_unchanged(packed: tuple[Tensor, int]) -> Tensor:
    """Return the saved tensor, with the version check that autograd omits under hooks."""
    saved, version = packed
    if saved._version != version:
        raise RuntimeError(
            f"a {tuple(saved.shape)} tensor that SwAVLoss needs for the gradient was changed in "
            f"place after the forward pass: it is at version {saved._version}, expected version "
            f"{version}"
        )
    return saved
