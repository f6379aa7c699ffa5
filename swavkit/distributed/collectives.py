"""All communication between ranks.

A group of ``None`` stands for a single rank, for which every reduction is the identity.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:  # re-exported for annotations in other modules
    from torch.distributed import ProcessGroup as ProcessGroup
    from torch.distributed.checkpoint.storage import StorageReader as StorageReader


class GroupHandle:
    """A reference to a process group that can be deep-copied and pickled with a module.

    A ``ProcessGroup`` itself supports neither. A deep copy of the handle shares the group. Pickling
    drops an explicit group. The loaded module then raises an error until a new group is set,
    because falling back to the default group would silently change the participating ranks.

    Args:
        group: The process group; if ``None``, the default group, looked up at each use.
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
                "set process_group of the module (the sinkhorn of a SwAVLoss) to a group of the "
                "present ranks, or to None for the default group"
            )
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupHandle:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_group": None, "_dropped": self._dropped or self._group is not None}


def participants(group: ProcessGroup | None, synchronize: bool) -> ProcessGroup | None:
    """Return the group to reduce over, or ``None`` if this rank works alone.

    Args:
        group: A process group; if ``None``, the default group of an initialized job.
        synchronize: Whether to reduce over ranks at all.

    Raises:
        TypeError: If ``group`` is neither a process group nor ``None``.
        ValueError: If this rank is not a member of ``group``.
    """
    _require_group(group)
    if not (synchronize and dist.is_available() and dist.is_initialized()):
        return None
    chosen = group if group is not None else dist.group.WORLD
    if dist.get_rank(chosen) < 0:
        raise ValueError(
            f"process_group must contain the calling rank, got a group without rank "
            f"{dist.get_rank()}"
        )
    return chosen if dist.get_world_size(chosen) > 1 else None


def sum_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the sum of ``values`` over the group; may overwrite ``values``."""
    return _reduce(values, "SUM", group)


def max_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the maximum of ``values`` over the group; may overwrite ``values``."""
    return _reduce(values, "MAX", group)


def gather_over_ranks(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return the ``values`` of all ranks of the group, stacked in a new first dimension."""
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
    """Reduce several tensors in one collective.

    Args:
        reduction: :func:`sum_over_ranks`, :func:`max_over_ranks` or :func:`gather_over_ranks`.
        several: At least one tensor, of any shapes; may be overwritten. The tensors are sent in
            their promoted dtype, and each result has the dtype of its tensor.
        group: The process group.
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
    """Return the rank of this process in the group, and the number of ranks."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def number_of_ranks(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group or, for ``None``, of the job; -1 outside the group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def device_for(group: ProcessGroup | None, preferred: torch.device) -> torch.device:
    """Return ``preferred`` if the group supports it, otherwise a device that it supports.

    A group with only NCCL supports no CPU tensors, and a module is on the CPU until it is moved.
    """
    if group is None:
        return preferred
    types = [device.type for device in group._device_types]
    return preferred if preferred.type in types or not types else torch.device(types[0])


def global_ranks(group: ProcessGroup) -> list[int]:
    """Return the global ranks of the group's members."""
    return dist.get_process_group_ranks(group)


def is_sharded(values: Tensor) -> bool:
    """Return whether ``values`` is a ``DTensor``, of which this rank may hold only a part."""
    return hasattr(values, "device_mesh")  # importing DTensor takes longer than this package


def shard_of(values: Tensor, group: ProcessGroup | None) -> Tensor:
    """Stack the ``values`` of all ranks in a new first dimension, sharded over that dimension.

    The result is a ``DTensor`` that shares the memory of ``values``; on one rank, a view of
    ``values``.
    """
    own = values.unsqueeze(0)
    if group is None:
        return own
    # Imported here because DTensor takes longer to import than all of this package.
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, values.device.type)
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)


def own_row(values: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """Return this rank's row of a result of :func:`shard_of`; ``None`` for other tensors."""
    if group is None:
        return values[0] if len(values) == 1 else None
    from torch.distributed.tensor import DTensor

    return values.to_local()[0] if isinstance(values, DTensor) else None


def rows_of(number: int, rank: int, size: int) -> slice:
    """Return the slice of ``number`` rows that ``Shard(0)`` places on a rank.

    Each rank has ``number / size`` rows, rounded up; the last ranks have fewer or none.
    """
    rows_per_rank = -(-number // size)
    return slice(min(rank * rows_per_rank, number), min((rank + 1) * rows_per_rank, number))


def sharded(own: Tensor, dim: int, number: int, group: ProcessGroup) -> Tensor:
    """Return a ``DTensor`` with ``number`` entries along ``dim``, given this rank's ``own`` part.

    It shares the memory of ``own`` if that is contiguous. ``own`` must be the part that
    :func:`rows_of` gives.
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
    """Return this rank's part of a ``DTensor``; differentiable, and shares its memory."""
    own: Tensor = values.to_local()  # type: ignore[attr-defined]
    return own


def part_of_rows(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` (N, ...), which all ranks have, as a ``DTensor`` with the rows of ``like``.

    Nothing is sent. ``like`` must have its rows sharded, or whole, over each mesh dimension.
    """
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements)


def rows_are_sharded(values: Tensor) -> bool:
    """Return whether a ``DTensor`` is sharded over its rows and over no other dimension."""
    placements = values.placements  # type: ignore[attr-defined]
    return all(placement.is_replicate() or placement.is_shard(0) for placement in placements)


def full_tensor(values: Tensor) -> Tensor:
    """Return all of ``values``, gathered from all ranks of its mesh if it is a ``DTensor``."""
    if not is_sharded(values):
        return values
    whole: Tensor = values.full_tensor()  # type: ignore[attr-defined]
    return whole


def saved_tensors(
    checkpoint: str | os.PathLike[str] | StorageReader,
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return the shape and dtype of each tensor in a ``torch.distributed.checkpoint``.

    Args:
        checkpoint: The path of the checkpoint, or a storage reader.
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
    """Raise ``TypeError`` unless ``group`` is a process group or ``None``."""
    if group is None or not dist.is_available() or torch.compiler.is_compiling():
        return
    if not isinstance(group, dist.ProcessGroup) and group != dist.GroupMember.NON_GROUP_MEMBER:
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup or None, got "
            f"{type(group).__name__}; a dimension of a device mesh gives one by get_group()"
        )
