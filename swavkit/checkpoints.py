"""Model state with the queues of all ranks, for ``torch.distributed.checkpoint``."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from swavkit.distributed.collectives import (
    own_row,
    participants,
    rank_and_size,
    saved_tensors,
    shard_of,
)
from swavkit.feature_queue import FeatureQueue

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup, StorageReader

__all__ = ["load_sharded_state_dict", "sharded_state_dict"]


def sharded_state_dict(
    module: nn.Module,
    *,
    checkpoint: str | os.PathLike[str] | StorageReader | None = None,
    process_group: ProcessGroup | None = None,
) -> dict[str, Any]:
    """Return ``module.state_dict()`` with the queues of all ranks as shards.

    ``torch.distributed.checkpoint`` saves the copy of a plain tensor from one rank only, but each
    rank has its own queue. Here each tensor of a :class:`FeatureQueue` becomes a ``DTensor`` with
    an additional first dimension, one row per rank, and is sharded over it. All other entries are
    unchanged. To save::

        dcp.save({"model": sharded_state_dict(model)}, checkpoint_id=path)

    and to load, on any number of ranks::

        state = {"model": sharded_state_dict(model, checkpoint=path)}
        dcp.load(state, checkpoint_id=path)
        load_sharded_state_dict(model, state["model"])

    Args:
        module: The model, the loss, or a queue; plain, in ``DistributedDataParallel`` or FSDP2.
        checkpoint: The checkpoint to be loaded into the result: a path or a
            ``torch.distributed.checkpoint.StorageReader``. If it was saved with another number of
            ranks or another queue length, the queue entries are CPU tensors of the saved shapes.
        process_group: The process group; the default group if ``None``. Without an initialized
            ``torch.distributed``, this rank alone.

    Raises:
        ValueError: If the checkpoint holds queues of different sizes under the same name.
    """
    group = participants(process_group, synchronize=True)
    state: dict[str, Any] = module.state_dict()
    saved = {} if checkpoint is None else saved_tensors(checkpoint)
    for queue, keys in _queues(module):
        found = {name: _saved_shape(names, saved) for name, names in keys.items()}
        shards = {name: shard_of(getattr(queue, name), group) for name in keys}
        if any(like is not None and like[0] != shards[name].shape for name, like in found.items()):
            shards = {
                name: values if like is None else torch.empty(like[0], dtype=like[1], device="cpu")
                for (name, values), like in zip(shards.items(), found.values(), strict=True)
            }
        state |= _by_key(shards, keys)
    return state


def load_sharded_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    *,
    strict: bool = True,
    process_group: ProcessGroup | None = None,
) -> Any:
    """Load a :func:`sharded_state_dict` after ``torch.distributed.checkpoint`` has filled it.

    With the number of ranks and the queue length unchanged, each queue is restored exactly.
    Otherwise all valid features are sorted by age in steps, within a step by rank and then by order
    in the batch. The newest that fit are dealt to the ranks in turn, so that all ranks get equally
    recent features, and numbers of them that differ by at most one. No feature is duplicated or
    invented; the remaining slots are not valid. Ages, and the sum of ``rejected`` over all ranks,
    are preserved.

    Args:
        module: The module that ``state_dict`` was made from.
        state_dict: The loaded state.
        strict: As in ``torch.nn.Module.load_state_dict``, whose result is returned.
        process_group: The process group, as given to :func:`sharded_state_dict`.

    Raises:
        ValueError: If the number of views or features differs from that of the module's queues.
        RuntimeError: As for ``torch.nn.Module.load_state_dict``.
    """
    group = participants(process_group, synchronize=True)
    plain = copy.copy(state_dict)
    for queue, keys in _queues(module):
        stacked = {name: state_dict[names[0]] for name, names in keys.items() if names[0] in plain}
        if len(stacked) < len(keys):
            continue  # load_state_dict reports the missing keys
        rows = {name: own_row(values, group) for name, values in stacked.items()}
        own = {name: row for name, row in rows.items() if row is not None}
        if len(own) < len(rows) or own["features"].shape != queue.features.shape:
            _require_fitting(keys["features"][0], stacked["features"], queue)
            own = _reshard(stacked, queue.length, *rank_and_size(group))
        plain |= _by_key(own, keys)
    return module.load_state_dict(plain, strict=strict)


def _queues(module: nn.Module) -> list[tuple[FeatureQueue, dict[str, list[str]]]]:
    """Return the queues of a module, each with the keys of its tensors in the state dict.

    Keys are found by the identity of the tensors, because wrappers prefix only some names. A queue
    registered twice has two keys per tensor.
    """
    keys: dict[int, list[str]] = {}
    for key, value in module.state_dict().items():
        keys.setdefault(id(value), []).append(key)
    return [
        (queue, {name: keys[id(tensor)] for name, tensor in queue.state_dict().items()})
        for queue in module.modules()
        if isinstance(queue, FeatureQueue)
    ]


def _by_key(values: dict[str, Tensor], keys: dict[str, list[str]]) -> dict[str, Tensor]:
    return {key: values[name] for name, names in keys.items() for key in names}


def _saved_shape(
    keys: list[str], saved: dict[str, tuple[torch.Size, torch.dtype]]
) -> tuple[torch.Size, torch.dtype] | None:
    """Return shape and dtype of the checkpoint entry whose name ends with one of ``keys``."""
    suffixes = tuple(f".{key}" for key in keys)
    found = {entry for name, entry in saved.items() if f".{name}".endswith(suffixes)}
    if len(found) > 1:
        raise ValueError(
            f"checkpoint must hold one size of {keys[0]}, got "
            + " and ".join(sorted(str(tuple(shape)) for shape, _ in found))
        )
    return found.pop() if found else None


def _require_fitting(key: str, features: Tensor, queue: FeatureQueue) -> None:
    """Check that the queue can hold saved features (ranks, views, length, features)."""
    expected = (queue.num_views, queue.feature_dim)
    if features.dim() != 4 or (features.shape[1], features.shape[3]) != expected:
        raise ValueError(
            f"{key} must have shape (ranks, {queue.num_views} views, length, "
            f"{queue.feature_dim} features), got {tuple(features.shape)}"
        )


def _reshard(stacked: dict[str, Tensor], length: int, rank: int, size: int) -> dict[str, Tensor]:
    """Return the state of one of ``size`` queues from stacked saved states, one row per rank."""
    features, valid, position = stacked["features"], stacked["valid"], stacked["position"]
    saved = features.shape[2]
    device = features.device
    age = stacked["pushes"].unsqueeze(1) - stacked["written"]  # (saved ranks, saved), in pushes
    # Sort newest first. The newest sample of a ring is just before its position, and within a step
    # the samples of the last rank count as the newest.
    back = (position.unsqueeze(1) - 1 - torch.arange(saved, device=device)) % saved
    rows = torch.arange(len(back), device=device).unsqueeze(1)
    newest = (back.argsort(dim=1) + saved * rows).flip(0).flatten()
    newest = newest[valid.flatten()[newest]]
    newest = newest[age.flatten()[newest].argsort(stable=True)]
    own = newest[: size * length][rank::size].flip(0)  # oldest first, in push order

    count = len(own)
    pushes = stacked["pushes"].max()
    state = {
        "features": features.new_zeros(features.shape[1], length, features.shape[3]),
        "valid": torch.arange(length, device=device) < count,
        "position": torch.tensor(count % length, device=device),
        "rejected": stacked["rejected"].sum() * (rank == 0),
        "written": pushes.new_zeros(length),
        "pushes": pushes,
    }
    state["features"][:, :count] = features[own // saved, :, own % saved].transpose(0, 1)
    state["written"][:count] = pushes - age.flatten()[own]
    return state
