"""The processes that ``torchrun`` has started, or this one alone."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Meet the other processes, if there are any."""
    if SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Let go of the others."""
    if SIZE > 1:
        gc.collect()  # DDP holds the group in a cycle, and its threads would outlive the program
        dist.destroy_process_group()


def everyones(value: Any) -> list[Any]:
    """Return the values of all processes."""
    values = [value]
    if SIZE > 1:
        values *= SIZE
        dist.all_gather_object(values, value)
    return values


def of_the_first(values: Tensor) -> Tensor:
    """Return what the first process has."""
    if SIZE > 1:
        dist.broadcast(values, 0)
    return values


def mean(values: Tensor) -> Tensor:
    """Return the mean over processes."""
    if SIZE > 1:
        dist.all_reduce(values)
    return values / SIZE


def say(text: str) -> None:
    """Print a line, once on all processes together."""
    if RANK == 0:
        print(text, flush=True)
