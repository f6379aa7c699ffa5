"""The one file that talks to other processes.

It knows groups, reductions and nothing of the method. ``None`` as a group means "this process
alone", for which every reduction is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # for the annotations of others
    from torch.distributed import ProcessGroup as ProcessGroup
    from torch.distributed.checkpoint.storage import StorageReader as StorageReader


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
        _require_group(group)
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
        TypeError: If ``group`` is something else.
        ValueError: If this process is not a member of ``group``.
    """
    _require_group(group)
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


def share_of_mean(own: Tensor, total: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return what makes of a process's mean its part of the mean over all samples of the group.

    The average over processes of all means times this is the mean over all samples. It is 0 for a
    process without samples.

    Args:
        own: How many samples this process has, or their summed weight.
        total: The sum of ``own`` over the group.
        group: The processes.
    """
    return own * rank_and_size(group)[1] / torch.where(total == 0, 1, total)


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


def in_one_collective(
    reduction: Callable[[Tensor, ProcessGroup | None], Tensor],
    several: Sequence[Tensor],
    group: ProcessGroup | None,
) -> list[Tensor]:
    """Return what a reduction gives for each of the tensors, having sent them together.

    Args:
        reduction: :func:`sum_over_ranks`, :func:`max_over_ranks` or :func:`gather_over_ranks`.
        several: Tensors of any shapes, one at least, which may be overwritten. They travel in the
            widest of their dtypes and come back in their own.
        group: The processes.
    """
    if len(several) == 1:
        return [reduction(several[0], group)]
    if group is None:
        return [reduction(values, None) for values in several]
    together = reduction(torch.cat([values.flatten() for values in several]), group)
    parts = torch.split(together, [values.numel() for values in several], dim=-1)
    return [
        part.reshape(together.shape[:-1] + values.shape).to(values.dtype)
        for part, values in zip(parts, several, strict=True)
    ]


def rank_and_size(group: ProcessGroup | None) -> tuple[int, int]:
    """Return the place of this process in the group, and the number of processes."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def device_for(group: ProcessGroup | None, preferred: torch.device) -> torch.device:
    """Return a device from which the group can send: ``preferred``, unless it cannot.

    A group of NCCL alone takes no tensors of the CPU, where a module still is before it is moved.
    """
    if group is None:
        return preferred
    types = [device.type for device in group._device_types]
    return preferred if preferred.type in types or not types else torch.device(types[0])


def global_ranks(group: ProcessGroup) -> list[int]:
    """Return the ranks that the group's processes have in the whole job."""
    return dist.get_process_group_ranks(group)


def is_sharded(values: Tensor) -> bool:
    """Tell whether this process may hold only a part of ``values``, a ``DTensor``."""
    return hasattr(values, "device_mesh")  # the class takes longer to import than this package


def shard_of(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the tensor whose row r is the ``values`` of process r, each holding its own row.

    It is a ``DTensor`` sharded over its first dimension, which shares the memory of ``values``; for
    one process it is a view of ``values``.
    """
    own = values.unsqueeze(0)
    if group is None:
        return own
    # Not at the top of the file: it takes longer to import than all of this package.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, values.device.type)
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)


def own_row(values: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Return this process's row of what :func:`shard_of` returned; ``None`` for other tensors."""
    if group is None:
        return values[0] if len(values) == 1 else None
    from torch.distributed.tensor import DTensor

    return values.to_local()[0] if isinstance(values, DTensor) else None


def rows_of(number: int, rank: int, size: int) -> slice:
    """Return which of ``number`` rows are on a process, as ``Shard(0)`` deals them out.

    All processes have as many but for the last ones, which have fewer or none.
    """
    most = -(-number // size)
    return slice(min(rank * most, number), min((rank + 1) * most, number))


def sharded(own: Tensor, dim: int, number: int, group: ProcessGroup) -> Tensor:
    """Return the ``DTensor`` of ``number`` entries along ``dim``, some of them this process's own.

    It shares the memory of ``own``, if that is contiguous. They must lie as :func:`rows_of` says.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, own.device.type)
    shape = torch.Size([*own.shape[:dim], number, *own.shape[dim + 1 :]])
    stride = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return DTensor.from_local(
        own.contiguous(), mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride
    )


def local_part(values: Tensor) -> Tensor:
    """Return what this process has of a ``DTensor``, in the same memory, differentiably."""
    own: Tensor = values.to_local()  # type: ignore[attr-defined]
    return own


def saved_tensors(
    checkpoint: str | os.PathLike[str] | StorageReader,
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor in a ``torch.distributed.checkpoint``.

    Args:
        checkpoint: Its path, or a storage reader.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = (
        FileSystemReader(checkpoint) if isinstance(checkpoint, (str, os.PathLike)) else checkpoint
    )
    return {
        key: (entry.size, entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _reduce(values: Tensor, operation: str, group: ProcessGroup | None) -> Tensor:
    if group is not None:
        values = values.contiguous()
        dist.all_reduce(values, op=getattr(dist.ReduceOp, operation), group=group)
    return values


def _require_group(group: Any) -> None:
    """Refuse what is no process group, a device mesh for one."""
    if group is None or not dist.is_available() or torch.compiler.is_compiling():
        return
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}; a dimension of a device mesh gives one by get_group()"
        )
