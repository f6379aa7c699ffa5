"""Communication between the ranks that ``torchrun`` started; a no-op on one rank."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

RANK, SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device: torch.device) -> None:
    """Initialize the process group, if there are other ranks."""
    if SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Destroy the process group."""
    if SIZE > 1:
        gc.collect()  # DDP holds the group in a cycle, and its threads would outlive the program
        dist.destroy_process_group()


def averaged(module: nn.Module) -> nn.Module:
    """Return the module, wrapped to average its gradients if there are other ranks."""
    return DistributedDataParallel(module) if SIZE > 1 else module


def everyones(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values = [value]
    if SIZE > 1:
        values *= SIZE
        dist.all_gather_object(values, value)
    return values


def of_the_first(values: Tensor) -> Tensor:
    """Return the values of rank 0."""
    if SIZE > 1:
        dist.broadcast(values, 0)
    return values


def add_up(values: Tensor) -> Tensor:
    """Sum over ranks, in place, and return the sum."""
    if SIZE > 1:
        dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """Return the mean over ranks."""
    return add_up(values) / SIZE


def say(text: str) -> None:
    """Print a line on rank 0 only."""
    if RANK == 0:
        print(text, flush=True)
