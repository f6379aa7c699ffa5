"""The state of a model and the queues of all processes, for ``torch.distributed.checkpoint``."""

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
    """Return ``module.state_dict()`` with the queues of all processes, one shard each.

    ``torch.distributed.checkpoint`` keeps one process's copy of a plain tensor, and every process
    has a queue of its own. Here each tensor of a :class:`FeatureQueue` gets a first dimension, one
    row for each process, and is a ``DTensor`` sharded over it; everything else stays as it is. To
    save::

        dcp.save({"model": sharded_state_dict(model)}, checkpoint_id=path)

    and to load, on any number of processes::

        state = {"model": sharded_state_dict(model, checkpoint=path)}
        dcp.load(state, checkpoint_id=path)
        load_sharded_state_dict(model, state["model"])

    Args:
        module: The model, the loss, or a queue; plain, in ``DistributedDataParallel`` or FSDP2.
        checkpoint: The checkpoint that the result is going to be loaded from: its path, or a
            ``torch.distributed.checkpoint.StorageReader``. If it was saved by another number of
            processes, or with another length, the queues' entries are tensors on the CPU that have
            room for all that was saved.
        process_group: The processes; the default group if ``None``, and this process alone where
            ``torch.distributed`` is not initialised.

    Raises:
        ValueError: If the checkpoint holds queues of different sizes under the same name.
    """
    group = participants(process_group, synchronize=True)
    state: dict[str, Any] = module.state_dict()
    saved = {} if checkpoint is None else saved_tensors(checkpoint)
    for queue, keys in _queues(module):
        found = {name: _saved_as(names, saved) for name, names in keys.items()}
        shards = {name: shard_of(getattr(queue, name), group) for name in keys}
        if any(like is not None and like[0] != shards[name].shape for name, like in found.items()):
            shards = {
                name: values if like is None else torch.empty(like[0], dtype=like[1], device="cpu")
                for (name, values), like in zip(shards.items(), found.values(), strict=True)
            }
        state |= _spread(shards, keys)
    return state


def load_sharded_state_dict(
    module: nn.Module,
    state_dict: dict[str, Any],
    *,
    strict: bool = True,
    process_group: ProcessGroup | None = None,
) -> Any:
    """Load what :func:`sharded_state_dict` returned, after ``torch.distributed.checkpoint`` has.

    Saved by as many processes and with the same length, each queue is what it was. Else all valid
    features are sorted by their age in steps (in a step by process, then by their order in the
    batch), and the newest of them that there is room for are dealt out in turn, so that every
    process has as many as any other, give or take one, and as new ones. Nothing is there twice and
    nothing is made up: slots that are left are not valid. Ages stay; the sum over all processes of
    ``rejected`` too.

    Args:
        module: The module that ``state_dict`` was made from.
        state_dict: What was loaded.
        strict: As of ``torch.nn.Module.load_state_dict``, whose result is returned.
        process_group: The processes, as given to :func:`sharded_state_dict`.

    Raises:
        ValueError: If the queues have other views or features than those of the module.
        RuntimeError: As ``torch.nn.Module.load_state_dict`` does.
    """
    group = participants(process_group, synchronize=True)
    plain = copy.copy(state_dict)
    for queue, keys in _queues(module):
        stacked = {name: state_dict[names[0]] for name, names in keys.items() if names[0] in plain}
        if len(stacked) < len(keys):
            continue  # which keys are missing is told below
        rows = {name: own_row(values, group) for name, values in stacked.items()}
        own = {name: row for name, row in rows.items() if row is not None}
        if len(own) < len(rows) or own["features"].shape != queue.features.shape:
            _require_fitting(keys["features"][0], stacked["features"], queue)
            own = _deal(stacked, queue.length, *rank_and_size(group))
        plain |= _spread(own, keys)
    return module.load_state_dict(plain, strict=strict)


def _queues(module: nn.Module) -> list[tuple[FeatureQueue, dict[str, list[str]]]]:
    """Return the queues of a module, each with the keys of its tensors in the state dict.

    They are found by what they hold: wrappers put prefixes before some names and not others, and a
    queue that is in two places is there twice.
    """
    keys: dict[int, list[str]] = {}
    for key, value in module.state_dict().items():
        keys.setdefault(id(value), []).append(key)
    return [
        (queue, {name: keys[id(tensor)] for name, tensor in queue.state_dict().items()})
        for queue in module.modules()
        if isinstance(queue, FeatureQueue)
    ]


def _spread(values: dict[str, Tensor], keys: dict[str, list[str]]) -> dict[str, Tensor]:
    return {key: values[name] for name, names in keys.items() for key in names}


def _saved_as(
    keys: list[str], saved: dict[str, tuple[torch.Size, torch.dtype]]
) -> tuple[torch.Size, torch.dtype] | None:
    """Return shape and dtype of the entry of a checkpoint that ends with one of ``keys``."""
    endings = tuple(f".{key}" for key in keys)
    found = {entry for name, entry in saved.items() if f".{name}".endswith(endings)}
    if len(found) > 1:
        raise ValueError(
            f"checkpoint must hold one size of {keys[0]}, got "
            + " and ".join(sorted(str(tuple(shape)) for shape, _ in found))
        )
    return found.pop() if found else None


def _require_fitting(key: str, features: Tensor, queue: FeatureQueue) -> None:
    """Refuse saved features (processes, views, length, features) that the queue cannot hold."""
    expected = (queue.num_views, queue.feature_dim)
    if features.dim() != 4 or (features.shape[1], features.shape[3]) != expected:
        raise ValueError(
            f"{key} must have shape (processes, {queue.num_views} views, length, "
            f"{queue.feature_dim} features), got {tuple(features.shape)}"
        )


def _deal(stacked: dict[str, Tensor], length: int, rank: int, size: int) -> dict[str, Tensor]:
    """Return the state of one of ``size`` queues, given the states of others in rows."""
    features, valid, position = stacked["features"], stacked["valid"], stacked["position"]
    saved = features.shape[2]
    device = features.device
    age = stacked["pushes"].unsqueeze(1) - stacked["written"]  # (processes, saved), in pushes
    # Newest first: the last sample of a ring is the one before its position, and of one step the
    # samples of the last process came last.
    back = (position.unsqueeze(1) - 1 - torch.arange(saved, device=device)) % saved
    rows = torch.arange(len(back), device=device).unsqueeze(1)
    newest = (back.argsort(dim=1) + saved * rows).flip(0).flatten()
    newest = newest[valid.flatten()[newest]]
    newest = newest[age.flatten()[newest].argsort(stable=True)]
    own = newest[: size * length][rank::size].flip(0)  # oldest first, as they were pushed

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
