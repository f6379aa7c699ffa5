"""The one file that talks to other processes.

It knows groups, reductions and nothing of the method. ``None`` as a group means "this process
alone", for which every reduction is the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup  # for the annotations of others


class GroupHandle:
    """A module's process group, as a module can keep it.

    A ``ProcessGroup`` can be neither deep-copied nor pickled. A deep copy of the handle shares the
    group. Pickling drops a group that was given explicitly: using the loaded module is then an
    error until it gets a group again, because falling back to the default group would silently
    change who takes part.

    Args:
        group: The group, or ``None`` for the default one, looked up at each use.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._dropped = False

    def get(self) -> ProcessGroup | None:
        """Return the group.

        Raises:
            RuntimeError: If the group was dropped by pickling.
        """
        if self._dropped:
            raise RuntimeError(
                "process_group was dropped when this module was pickled; expected a new one: "
                "set process_group of the SinkhornKnopp module to a group of the present "
                "processes, or to None for the default group"
            )
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_group": None, "_dropped": self._dropped or self._group is not None}


def participants(group: ProcessGroup | None, synchronize: bool) -> ProcessGroup | None:
    """Return the group to reduce over, or ``None`` if this process works alone.

    Args:
        group: A group, or ``None`` for the default group of an initialised job.
        synchronize: Whether to reduce over other processes at all.

    Raises:
        ValueError: If this process is not a member of ``group``.
    """
    if not (synchronize and dist.is_available() and dist.is_initialized()):
        return None
    chosen = group if group is not None else dist.group.WORLD
    if dist.get_rank(chosen) < 0:
        raise ValueError(
            f"process_group must contain the calling process, got a group without rank "
            f"{dist.get_rank()}"
        )
    return chosen if dist.get_world_size(chosen) > 1 else None


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of ``values`` over the group; may overwrite ``values``."""
    return _reduce(values, "SUM", group)


def max_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the largest of ``values`` over the group; may overwrite ``values``."""
    return _reduce(values, "MAX", group)


def gather_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the ``values`` of every process of the group, stacked in a new first dimension."""
    if group is None:
        return values.unsqueeze(0)
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, values.contiguous(), group=group)
    return torch.stack(gathered)


def _reduce(values: Tensor, operation: str, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        values = values.contiguous()
        dist.all_reduce(values, op=getattr(dist.ReduceOp, operation), group=group)
    return values
