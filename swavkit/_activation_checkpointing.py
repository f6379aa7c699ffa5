"""Activation checkpointing: a forward that is repeated in the backward pass changes no state.

``torch.utils.checkpoint`` drops what a forward saves and repeats the forward when the backward pass
wants it. A repetition finds the state as the first run has left it, and so other values. A module
with state keeps what it saves instead: then nothing that a repetition computes is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Method = TypeVar("Method", bound=Callable[..., Any])


class Recomputation:
    """Finds repetitions of a module's forward, and refuses those whose results would be used."""

    def __init__(self) -> None:
        self._first_had_graph = True

    def detected(self, queue: object, freeze_steps: int, details: bool) -> bool:
        """Tell whether the present forward is a repetition; never under torch.compile.

        Args:
            queue: The queue on which codes and loss depend, if there is one.
            freeze_steps: For how many steps the gradient depends on their number.
            details: Whether codes are asked for.

        Raises:
            RuntimeError: If what this forward computes from a state that may have moved on is used.
        """
        if torch.compiler.is_compiling():  # a compiled step repeats operations, not calls
            return False
        if not _is_repetition():
            self._first_had_graph = torch.is_grad_enabled()
            return False
        state = "a queue" if queue is not None else "freeze_steps" if freeze_steps else None
        if state is not None and not self._first_had_graph:
            raise RuntimeError(
                f"SwAVLoss with {state} cannot be repeated in the backward pass, since its state "
                "has moved on; expected a checkpoint with use_reentrant=False, or one around the "
                "encoder only"
            )
        if queue is not None and details:
            raise RuntimeError(
                "the details of SwAVLoss with a queue cannot be recomputed in the backward pass, "
                "since its state has moved on; expected a checkpoint that ends before"
            )
        return True


def keeping_what_it_saves(method: Method) -> Method:
    """Let autograd keep what it saves in a method, whatever a checkpoint around it wants."""

    @wraps(method)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        # A transform of torch.func takes no hooks; the method refuses it in words of its own.
        in_transform = torch._C._functorch.maybe_current_level() is not None
        if torch.compiler.is_compiling() or in_transform:
            return method(*args, **kwargs)
        with torch.autograd.graph.saved_tensors_hooks(_with_version, _unchanged):
            return method(*args, **kwargs)

    return keeping  # type: ignore[return-value]


def _is_repetition() -> bool:
    """Tell whether a checkpoint repeats the present forward, in a backward pass.

    A hook of a backward pass may call a forward of its own. A checkpoint is on the stack, which is
    looked at in a backward pass only.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass is running
        return False
    frame = inspect.currentframe()
    while frame is not None:
        if "checkpoint" in frame.f_globals.get("__name__", ""):  # torch's, or that of a library
            return True
        frame = frame.f_back
    return False


def _with_version(saved: Tensor) -> tuple[Tensor, int]:
    return saved.detach(), saved._version


def _unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """Return what was saved; hooks of ours switch off this check of autograd's own."""
    saved, version = kept
    if saved._version != version:
        raise RuntimeError(
            f"a {tuple(saved.shape)} tensor that SwAVLoss needs for the gradient was changed in "
            f"place after the forward pass: it is at version {saved._version}, expected version "
            f"{version}"
        )
    return saved
