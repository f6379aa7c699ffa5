"""Module state that is saved and moved like buffers without being registered as buffers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from swavkit import _checks

Module = TypeVar("Module", bound="OwnState")


class OwnState(nn.Module):
    """Base class of modules with state tensors of their own, initially zero.

    State tensors are in ``state_dict()``, and move and change dtype with the module. They are not
    buffers because other code overwrites buffers: ``DistributedDataParallel`` broadcasts those of
    rank 0, and weight averaging replaces a step count with a mean of counts.

    Attributes:
        _own: The names of the state tensors.
        _keeps_dtypes: Whether floating-point state keeps its dtype too, like counts and masks.
    """

    _own: ClassVar[tuple[str, ...]] = ()
    _keeps_dtypes: ClassVar[bool] = False

    @torch.no_grad()
    def _empty_own(self) -> None:
        """Reset the state to zeros, in place."""
        for name in self._own:
            getattr(self, name).zero_()

    def _follow(self, device: torch.device) -> None:
        """Move the state to the device of the parameters.

        FSDP moves parameters and buffers without calling ``to``. State on the meta device has no
        values and is reset to zeros.
        """
        misplaced = [name for name in self._own if getattr(self, name).device != device]
        if not misplaced:
            return
        with torch.inference_mode(False), torch.no_grad():  # inference tensors refuse updates
            for name in misplaced:
                value = getattr(self, name)
                new = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
                setattr(self, name, new)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._own:
            value = getattr(self, name)
            changed = fn(value)
            kept = self._keeps_dtypes or not value.is_floating_point()
            if kept and changed.dtype != value.dtype:  # Module.type() converts counts and masks too
                changed = value.to(changed.device)
            setattr(self, name, changed)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._own:
            destination[prefix + name] = getattr(self, name)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {name: prefix + name for name in self._own}
        others = {key: value for key, value in state_dict.items() if key not in own.values()}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        loaded = {name: state_dict[key] for name, key in own.items() if key in state_dict}
        if strict:
            missing_keys += [key for name, key in own.items() if name not in loaded]
        mismatches = [
            f"size mismatch for {own[name]}: expected shape {tuple(getattr(self, name).shape)}, "
            f"got {tuple(value.shape)}"
            for name, value in loaded.items()
            if value.shape != getattr(self, name).shape
        ]
        error_msgs += mismatches
        if mismatches:
            return  # do not load a part of the state
        for name, value in loaded.items():
            held = getattr(self, name)
            if local_metadata.get("assign_to_params_buffers", False):
                # Counts and masks stay what they are if the whole dict was converted.
                setattr(self, name, value if held.is_floating_point() else value.to(held.dtype))
                continue
            if held.is_meta and not value.is_meta:
                warnings.warn(
                    f"{own[name]} is on the meta device, where nothing can be loaded; expected "
                    f"assign=True, or to_empty() before",
                    stacklevel=_checks.callers_stacklevel(),
                )
            held.copy_(value)
