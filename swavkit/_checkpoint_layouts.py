"""The layouts of checkpoints of this method, recognized by the names of their entries."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_WRAPPERS = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
CLASSIFIERS = ("fc", "classifier")
_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
_CHILDREN = dict(zip(("0", "1", "4", "5", "6", "7"), _PARTS, strict=True))
_COUNTER = "num_batches_tracked"  # absent in files of before PyTorch 0.4.1
_IN_RESNET = re.compile(r"((?:.*\.)?)(layer1|4)\.0\.conv1\.weight")
_IN_HEAD = re.compile(r"((?:.*\.)?)(?:projection_head|projector)\.(?:layers\.)?(.+)")
_IN_PROTOTYPES = re.compile(
    r"((?:.*\.)?)prototypes(?:\.heads)?\.?(\d+)?\.(weight|bias|weight_g|weight_v)"
)


class Checkpoint:
    """The tensors of a model by their names without wrappers, and which part they belong to."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.names: dict[str, str] = {}
        self.values: dict[str, Tensor] = {}
        for theirs, value in state.items():
            name = unwrapped(theirs)
            if name in self.names:
                raise ValueError(
                    f"source must hold one value of {name}, got {self.names[name]} and {theirs}"
                )
            self.names[name], self.values[name] = theirs, value
        self.resnets = _resnets(self.names)
        heads: dict[str, dict[str, str]] = {}
        prototypes: dict[str, dict[int, dict[str, str]]] = {}
        for name in self.names:
            if match := _IN_HEAD.fullmatch(name):
                heads.setdefault(match[1], {})[match[2]] = name
            elif match := _IN_PROTOTYPES.fullmatch(name):
                of_head = prototypes.setdefault(match[1], {}).setdefault(int(match[2] or 0), {})
                of_head[match[3]] = name
        self.heads, self.prototypes = heads, prototypes
        self.layout = self._layout()

    def _layout(self) -> str:
        if not (self.resnets or self.heads or self.prototypes):
            raise ValueError(
                f"source must have the layout of SwAV's or DeepCluster-v2's published files, of "
                f"VISSL, lightly, solo-learn, torchvision or swavkit, got entries "
                f"{some(self.names)}"
            )
        patterns = {
            "vissl": r"(.*\.)?_feature_blocks\..*|heads\.\d+\.(projection_head\..*|prototypes\d.*)",
            "lightly": r"(.*\.)?(prototypes\.heads|projection_head\.layers)\..*",
            "solo-learn": r"(.*\.)?(projector\..*|prototypes\.weight_[gv])",
            "swavkit": r"(.*\.)?(steps|prototypes\.\d+\.weight)",
            "published": r"(projection_head|prototypes)\..*",
        }
        if list(self.names) == ["prototypes.weight"]:
            return "swavkit"
        for layout, pattern in patterns.items():
            if any(re.fullmatch(pattern, name) for name in self.names):
                return layout
        return "torchvision"

    def pairs(self, part: str, ours: dict[str, Tensor]) -> dict[str, str]:
        """Return the name in the checkpoint of each entry of a module that it has.

        Args:
            part: ``"network"`` or ``"projection_head"``.
            ours: The state of the module.
        """
        if self.layout == "swavkit" and (same := self._under_one_prefix(part, ours)):
            return same
        if part == "network":
            own, theirs = resnet_in(part, ours), only(part, self.resnets)
        else:
            own, theirs = {name: name for name in ours}, only(part, self.heads)
        if not theirs:
            raise ValueError(
                f"{part} has no counterpart in the checkpoint, of layout {self.layout}, which "
                f"holds {some(self.names)}; expected entries such as {some(ours)}"
            )
        if part == "projection_head" and _essential(own) != _essential(theirs):
            own, theirs = _numbered(own), _numbered(theirs)
        stages = {name.partition(".")[0] for name in own}
        missing = [own[name] for name in own if name not in theirs and _COUNTER not in name]
        surplus = [
            self.names[theirs[name]]
            for name in theirs
            if name not in own
            and _COUNTER not in name
            and (part != "network" or name.partition(".")[0] in stages)
        ]
        if missing or surplus:
            raise ValueError(
                f"{part} must have the layers of the checkpoint; only {part} has "
                f"{some(missing)}, only the checkpoint has {some(surplus)}"
            )
        return {own[name]: theirs[name] for name in own if name in theirs}

    def _under_one_prefix(self, part: str, ours: dict[str, Tensor]) -> dict[str, str]:
        """Return the names of all entries of a module, if they are equal but for a prefix."""
        needed = sorted(_essential(ours))
        if not needed:
            return {}
        ends = [name for name in self.names if f".{name}".endswith(f".{needed[0]}")]
        found = {
            prefix: {name: prefix + name for name in ours if prefix + name in self.names}
            for prefix in (name.removesuffix(needed[0]) for name in ends)
            if all(prefix + name in self.names for name in needed)
        }
        if len(found) > 1:  # such as an encoder and a head that both are Sequential
            found = {
                prefix: pairs
                for prefix, pairs in found.items()
                if all(self.values[pairs[name]].shape == ours[name].shape for name in needed)
            }
        return only(part, found)

    def reason(self, name: str, asked: set[str]) -> str:
        """Return why an entry was not loaded, given the arguments that were not ``None``."""
        prototypes, head = _IN_PROTOTYPES.fullmatch(name), _IN_HEAD.fullmatch(name)
        if prototypes and prototypes[3] == "bias":
            return "a cosine has no bias"
        in_network = any(name in resnet.values() for resnet in self.resnets.values())
        for part, belongs in {
            "prototypes": prototypes, "projection_head": head, "network": in_network
        }.items():  # fmt: skip
            if belongs and part not in asked:
                return f"{part} is not given"
        if {*name.split(".")} & {*CLASSIFIERS}:
            return "a classifier"
        if re.fullmatch(r"(.*\.)?(steps|queue(\..*)?)", name):
            return "the state of a training"
        return "not in the given modules"


def model_state(source: Any) -> dict[str, Tensor]:
    """Return the tensors of the model in a checkpoint, by their dotted names."""
    if isinstance(source, (str, os.PathLike)):
        source = _read(os.fspath(source))
    elif not isinstance(source, Mapping):
        raise TypeError(f"source must be a path or a mapping, got {type(source).__name__}")
    inner = source
    for path in (("classy_state_dict", "base_model", "model"), ("state_dict",)):
        found: Any = source
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping):
            inner = found
            break
    else:
        ranks = source.get("processes")  # of the example program
        if isinstance(ranks, list) and ranks and isinstance(ranks[0], Mapping):
            inner = {"network": source.get("network"), "criterion": ranks[0].get("criterion")}
    state = dict(_tensors_in(inner, ""))
    if not state:
        raise ValueError(
            f"source must hold tensors by name, got none in a mapping of {some(map(str, source))}"
        )
    return state


def _tensors_in(mapping: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in mapping.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping) and "param_groups" not in value:  # not an optimizer
            yield from _tensors_in(value, f"{prefix}{key}.")


def _read(path: str) -> Mapping[Any, Any]:
    with open(path, "rb") as file:
        archive = file.read(4) == b"PK\x03\x04"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except Exception as error:  # torch.load raises many types
        refused = re.findall(r"GLOBAL ([\w.]*\w)", str(error))
        if isinstance(error, pickle.UnpicklingError) and refused:
            raise ValueError(
                f"source must hold tensors and plain values only, got {path!r} with Python objects "
                f"({', '.join(dict.fromkeys(refused))}), whose loading runs code. Only "
                f"if the file comes from a source that you trust, load it with "
                f"torch.load(path, weights_only=False) and pass the result as source"
            ) from error
        raise ValueError(
            f"source must be a complete file written by torch.save, got {path!r} "
            f"({os.path.getsize(path)} bytes), which is damaged or not a checkpoint"
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(
            f"source must be a file that holds a mapping, got {path!r} with a "
            f"{type(found).__name__}"
        )
    return found


def unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _resnets(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return {torchvision's name: name} of each ResNet among some names, by its prefix."""
    names = list(names)
    found: dict[str, dict[str, str]] = {}
    for match in filter(None, map(_IN_RESNET.fullmatch, names)):
        prefix, sequential = match[1], match[2] == "4"
        entries = found.setdefault(prefix, {})
        for name in names:
            part, _, rest = name.removeprefix(prefix).partition(".")
            part = _CHILDREN.get(part, "") if sequential else part
            if name.startswith(prefix) and rest and part in _PARTS:
                entries[f"{part}.{rest}"] = name
    return found


def resnet_in(argument: str, state: dict[str, Tensor]) -> dict[str, str]:
    found = only(argument, _resnets(state))
    if not found:
        raise ValueError(
            f"{argument} must have the entries of a ResNet, such as layer1.0.conv1.weight, got "
            f"{some(state)}"
        )
    return found


def only(argument: str, found: dict[str, dict[Any, Any]]) -> dict[Any, Any]:
    """Return the only one of some candidates; an empty one if there is none."""
    if len(found) > 1:
        raise ValueError(
            f"{argument} must have one counterpart, got several, whose names begin with "
            f"{some(map(repr, found))}"
        )
    return next(iter(found.values()), {})


def _essential(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.endswith(_COUNTER)}


def by_layer(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return {kind of entry: name} for each layer, in order."""
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, kind = name.rpartition(".")
        layers.setdefault(layer, {})[kind] = name
    return layers


def _numbered(names: Mapping[str, str]) -> dict[str, str]:
    """Return entries by the number of their layer, for layers that are matched in order.

    It is the order of their names if these are numbers, and that of the entries if not.
    """
    layers = by_layer(names)
    if all(layer.isdecimal() for layer in layers):
        layers = dict(sorted(layers.items(), key=lambda layer: int(layer[0])))
    return {
        f"{number}.{kind}": names[name]
        for number, entries in enumerate(layers.values())
        for kind, name in entries.items()
    }


def some(names: Iterable[str]) -> str:
    """Return a few names for a message."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "") or "none"
