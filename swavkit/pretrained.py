"""Pretrained models: published checkpoints and those of other libraries, in and out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._checkpoint_layouts import (
    CLASSIFIERS,
    Checkpoint,
    by_layer,
    model_state,
    only,
    resnet_in,
    some,
    unwrapped,
)
from swavkit._tensors import at_least_float32
from swavkit.distributed.collectives import full_tensor, is_sharded
from swavkit.prototypes import PrototypeLayer
from swavkit.swav import SwAVLoss

__all__ = ["LoadReport", "load_pretrained", "pretrained_state_dict"]

_PUBLISHED_HEAD = ("0", "1", "3")  # Linear, BatchNorm, ReLU without entries, Linear


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_pretrained`; ``str()`` is a table.

    Names of the given modules begin with the name of the argument, as in ``network.conv1.weight``.

    Attributes:
        layout: ``"published"`` (SwAV and DeepCluster-v2), ``"vissl"``, ``"lightly"``,
            ``"solo-learn"``, ``"torchvision"`` or ``"swavkit"``.
        loaded: The entries of the given modules that were loaded.
        renamed: For each entry of the checkpoint that was loaded, the entry it was loaded into.
        missing: The entries of the given modules that are not in the checkpoint and are unchanged,
            such as those of a classifier ``fc``.
        unused: For each other entry of the checkpoint, why it was not loaded.
    """

    layout: str
    loaded: tuple[str, ...]
    renamed: dict[str, str]
    missing: tuple[str, ...]
    unused: dict[str, str]

    def __str__(self) -> str:
        rows = [("checkpoint", "module", "result")]
        rows += [(theirs, ours, "loaded") for theirs, ours in self.renamed.items()]
        rows += [("", ours, "missing") for ours in self.missing]
        rows += [(theirs, "", f"unused: {reason}") for theirs, reason in self.unused.items()]
        first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
        counts = (
            f"layout {self.layout}: {len(self.loaded)} entries loaded, {len(self.missing)} "
            f"missing, {len(self.unused)} unused"
        )
        return "\n".join([counts, *(f"{a:{first}}  {b:{second}}  {c}" for a, b, c in rows)])


def load_pretrained(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    network: nn.Module | None = None,
    projection_head: nn.Module | None = None,
    prototypes: PrototypeLayer | nn.ModuleList | SwAVLoss | None = None,
) -> LoadReport:
    """Load a checkpoint into a network, a projection head and prototypes, in place.

    The layout is recognized by the names of the entries: those that the authors published for SwAV
    and DeepCluster-v2, VISSL, lightly, solo-learn, torchvision's ResNets, and those of this
    package. Everything is checked before anything is copied, so that an error leaves all modules
    unchanged. Values get the dtype and device of the module. A file is read without running any
    code in it, and mapped into memory if its format allows it.

    Args:
        source: The path of the file, or the dictionary in it.
        network: A module with the entries of torchvision's or timm's ResNets, of any width, also
            inside a wrapper, or a ``Sequential`` of the children of one. All entries of its stages
            must be in the checkpoint, and all blocks that the checkpoint has for them in the
            network. A classifier ``fc`` or ``classifier`` is neither changed nor loaded. From a
            checkpoint of this package: any module whose entries it holds.
        projection_head: A module with as many layers as that of the checkpoint. If their names
            differ, layers are matched in order.
        prototypes: A :class:`PrototypeLayer`, for several heads a ``ModuleList`` of them, or the
            :class:`SwAVLoss` that has them, whose queue and step counter do not change. Rows are
            loaded as they are; scores are cosines for any norm. If the layer is sharded by
            ``shard_prototypes``, each rank loads its part.

    Returns:
        The :class:`LoadReport`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If no module is given, the file is damaged, not a checkpoint or contains code,
            the layout is unknown, or the checkpoint lacks a given module or does not fit it.
        RuntimeError: If the prototypes are computed by a parametrization.

    Example:
        >>> published = {"module.projection_head.weight": torch.randn(16, 32),
        ...              "module.prototypes.weight": torch.randn(10, 16)}
        >>> head, prototypes = nn.Linear(32, 16, bias=False), PrototypeLayer(16, 10)
        >>> print(load_pretrained(published, projection_head=head, prototypes=prototypes))
        layout published: 2 entries loaded, 0 missing, 0 unused
        checkpoint                     module                  result
        module.projection_head.weight  projection_head.weight  loaded
        module.prototypes.weight       prototypes.weight       loaded
    """
    given = {"network": network, "projection_head": projection_head}
    modules = {
        name: _state_of(name, module) for name, module in given.items() if module is not None
    }
    layers = {} if prototypes is None else _layers_of(prototypes)
    if not modules and not layers:
        raise ValueError("one of network, projection_head and prototypes must be given, got none")
    checkpoint = Checkpoint(model_state(source))

    plan = [
        _Copy(f"{part}.{ours}", (theirs,), modules[part][ours], checkpoint.values[theirs])
        for part in modules
        for ours, theirs in checkpoint.pairs(part, modules[part]).items()
    ]
    for copy in plan:
        _require_fitting(copy, checkpoint.names[copy.theirs[0]])
    if layers:
        plan += _copies_of_prototypes(checkpoint, layers)

    with torch.no_grad():
        for copy in plan:
            copy.target.copy_(copy.value)
    filled = {id(copy.target) for copy in plan}
    used = {theirs: copy.ours for copy in plan for theirs in copy.theirs}
    asked = {*modules, *(("prototypes",) if layers else ())}
    return LoadReport(
        checkpoint.layout,
        tuple(copy.ours for copy in plan),
        {checkpoint.names[theirs]: ours for theirs, ours in used.items()},
        tuple(
            f"{part}.{name}"
            for part, state in modules.items()
            for name, value in state.items()
            if id(value) not in filled
        ),
        {
            theirs: checkpoint.reason(name, asked)
            for name, theirs in checkpoint.names.items()
            if name not in used
        },
    )


def pretrained_state_dict(
    network: nn.Module,
    projection_head: nn.Module | None = None,
    prototypes: PrototypeLayer | nn.ModuleList | SwAVLoss | None = None,
) -> dict[str, Tensor]:
    """Return a state dict in the layout that the authors of SwAV published, without ``module.``.

    Save it with ``torch.save``; the authors' evaluation programs and torchvision can load it.
    Without a projection head and prototypes, only ``fc`` is missing for torchvision's
    ``strict=True``.

    Prototypes are exported as stored. Other programs do not normalize them: call
    :meth:`PrototypeLayer.normalize_` first, unless the rows have unit norm.

    Args:
        network: As in :func:`load_pretrained`. A classifier ``fc`` or ``classifier`` is left out.
        projection_head: One linear layer, or two with a normalization between them.
        prototypes: As in :func:`load_pretrained`. Several heads become ``prototypes.prototypes0``,
            ``prototypes.prototypes1``, …

    Returns:
        Copies on the CPU, in the dtype of the modules. If they are sharded, all ranks must make the
        call.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the network is not a ResNet, has entries that a ResNet does not have, or the
            projection head has other layers.

    Example:
        >>> network, block = nn.Module(), nn.Module()  # with the names of torchvision's ResNets
        >>> network.conv1, block.conv1 = nn.Conv2d(3, 8, 7, bias=False), nn.Conv2d(8, 8, 3)
        >>> network.layer1, network.fc = nn.Sequential(block), nn.Linear(8, 1000)
        >>> list(pretrained_state_dict(network, prototypes=PrototypeLayer(8, 10)))
        ['conv1.weight', 'layer1.0.conv1.weight', 'layer1.0.conv1.bias', 'prototypes.weight']
    """
    state = _state_of("network", network)
    found = {name: state[own] for name, own in resnet_in("network", state).items()}
    if projection_head is not None:
        head = _state_of("projection_head", projection_head)
        layers = list(by_layer(head).values())
        if len(layers) not in (1, len(_PUBLISHED_HEAD)):
            raise ValueError(
                f"projection_head must have 1 or {len(_PUBLISHED_HEAD)} layers with entries in the "
                f"published layout, got {len(layers)}: {some(head)}"
            )
        places = [f"{place}." for place in _PUBLISHED_HEAD] if len(layers) > 1 else [""]
        for place, entries in zip(places, layers, strict=True):
            for kind, own in entries.items():
                found[f"projection_head.{place}{kind}"] = head[own]
    if prototypes is not None:
        for name, layer in _layers_of(prototypes).items():
            number = name.removeprefix("prototypes").removesuffix(".weight").removeprefix(".")
            found[f"prototypes.{f'prototypes{number}.' if number else ''}weight"] = layer.weight
    exported = {id(value) for value in found.values()}
    others = [
        name
        for name, value in state.items()
        if id(value) not in exported and not {*name.split(".")} & {*CLASSIFIERS}
    ]
    if others:
        raise ValueError(
            f"network must be a ResNet alone, or have its other entries in projection_head and "
            f"prototypes, got {some(others)}"
        )
    return {
        name: full_tensor(value.detach()).to("cpu", copy=True).contiguous()
        for name, value in found.items()
    }


class _Copy(NamedTuple):
    """A value to be copied into a module, with its names there and in the checkpoint."""

    ours: str
    theirs: tuple[str, ...]
    target: Tensor
    value: Tensor


def _state_of(name: str, module: nn.Module) -> dict[str, Tensor]:
    state = _checks.instance(name, module, nn.Module).state_dict(keep_vars=True)
    return {unwrapped(key): value for key, value in state.items() if isinstance(value, Tensor)}


def _layers_of(prototypes: Any) -> dict[str, PrototypeLayer]:
    """Return the layers of the argument, each under the name of its weight."""
    if isinstance(prototypes, SwAVLoss):
        prototypes = prototypes.prototypes
    several = isinstance(prototypes, nn.ModuleList)
    layers = list(prototypes) if several else [prototypes]
    for layer in layers:
        if not isinstance(layer, PrototypeLayer):
            raise TypeError(
                f"prototypes must be a PrototypeLayer, a ModuleList of them or a SwAVLoss, got "
                f"{'a ModuleList with ' if several else ''}{type(layer).__name__}"
            )
        layer._require_stored_weight()
    return {
        f"prototypes.{f'{index}.' if several else ''}weight": layer
        for index, layer in enumerate(layers)
    }


def _copies_of_prototypes(checkpoint: Checkpoint, layers: dict[str, PrototypeLayer]) -> list[_Copy]:
    heads = only("prototypes", checkpoint.prototypes)
    found = [names for _, names in sorted(heads.items()) if names.keys() != {"bias"}]
    if len(found) != len(layers):
        raise ValueError(
            f"prototypes must have as many heads as the checkpoint, {len(found)}, got {len(layers)}"
            + ("" if found else f"; the checkpoint holds {some(checkpoint.names)}")
        )
    copies = []
    for (ours, layer), entries in zip(layers.items(), found, strict=True):
        names = tuple(name for kind, name in entries.items() if kind != "bias")
        for name in names:
            _require_whole(f"{checkpoint.names[name]} of source", checkpoint.values[name])
        value = _weight_of({kind: checkpoint.values[name] for kind, name in entries.items()})
        expected = (layer.num_prototypes, layer.feature_dim)
        if value.shape != expected:
            raise ValueError(
                f"prototypes must have num_prototypes and feature_dim of the checkpoint, "
                f"{tuple(value.shape)} in {checkpoint.names[names[-1]]}, got {expected} in {ours}"
            )
        copies.append(_Copy(ours, names, layer._rows(), value[layer._held]))
        _require_fitting(copies[-1], checkpoint.names[names[-1]])
    return copies


def _weight_of(entries: dict[str, Tensor]) -> Tensor:
    """Return the weight of a layer, which may be under weight normalization."""
    if "weight" in entries:
        return entries["weight"]
    direction, scale = entries.get("weight_v"), entries.get("weight_g")
    if direction is None or scale is None or scale.shape != (*direction.shape[:1], 1):
        raise ValueError(
            f"source must hold weight_v (K, D) and weight_g (K, 1) of the prototypes, got "
            f"{ {kind: tuple(value.shape) for kind, value in entries.items()} }"
        )
    rows = direction.to(at_least_float32(direction.dtype))
    weight: Tensor = rows * (scale / rows.norm(dim=1, keepdim=True))
    return weight


def _require_whole(name: str, tensor: Tensor) -> None:
    if is_sharded(tensor):
        raise ValueError(
            f"{name} must be a whole tensor, got a sharded DTensor; expected load_pretrained "
            f"before fully_shard, with a full state dict"
        )
    if tensor.is_meta or tensor.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor with values, got {tensor.layout} on device "
            f"{tensor.device}"
        )


def _require_fitting(copy: _Copy, theirs: str) -> None:
    """Check that copying cannot fail, nor lose values."""
    ours, target, value = copy.ours, copy.target, copy.value
    _require_whole(ours, target)
    _require_whole(f"{theirs} of source", value)
    if target.shape != value.shape:
        raise ValueError(
            f"{ours} must have the shape of {theirs} in the checkpoint, {tuple(value.shape)}, got "
            f"{tuple(target.shape)}"
        )
    if target.is_floating_point() != value.is_floating_point() or value.is_complex():
        raise ValueError(
            f"{ours} has dtype {target.dtype}, which cannot hold {theirs} of the checkpoint, of "
            f"dtype {value.dtype}"
        )
    converted = value.is_floating_point() and value.dtype != target.dtype
    if converted and (value.isfinite() & value.to(target.dtype).isinf()).any():
        raise ValueError(
            f"{ours} has dtype {target.dtype}, which cannot hold {theirs} of the checkpoint, with "
            f"values up to {value.abs().nan_to_num(posinf=0).max().item():g}"
        )
