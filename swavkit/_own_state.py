"""State of a module that is saved and moved as buffers are, and is no buffer."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound="OwnState")


class OwnState(nn.Module):
    """A module with tensors that describe its own training, and start as zeros.

    They are in ``state_dict()``, and move and change dtype with the module. They are no buffers,
    because others write to those: ``DistributedDataParallel`` sends rank 0's to all ranks, and
    weight averaging replaces a count of steps with a mean of counts.

    Attributes:
        _own: The names of the tensors.
    """

    _own: ClassVar[tuple[str, ...]] = ()

    @torch.no_grad()
    def _empty_own(self) -> None:
        """Set the state to what it was at first, in place."""
        for name in self._own:
            getattr(self, name).zero_()

    def _follow(self, device: torch.device) -> None:
        """Move the state to where the parameters are.

        FSDP moves parameters and buffers itself, without a call of ``to``. State that was left on
        the meta device holds nothing, and starts anew.
        """
        left = [name for name in self._own if getattr(self, name).device != device]
        if not left:
            return
        with torch.inference_mode(False), torch.no_grad():  # it must take writes in training later
            for name in left:
                value = getattr(self, name)
                new = torch.zeros_like(value, device=device) if value.is_meta else value.to(device)
                setattr(self, name, new)

    def _apply(self: Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name in self._own:
            setattr(self, name, fn(getattr(self, name)))
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
            return  # a state half loaded would be neither the old one nor the new
        for name, value in loaded.items():
            if local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, value)
                continue
            held = getattr(self, name)
            if held.is_meta and not value.is_meta:
                warnings.warn(
                    f"{own[name]} is on the meta device, where nothing can be loaded; expected "
                    f"assign=True, or to_empty() before",
                    stacklevel=2,
                )
            held.copy_(value)
