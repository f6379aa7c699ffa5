"""A queue of recent features, which enlarges small batches for the computation of codes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._own_state import OwnState
from swavkit._tensors import autocast_disabled

__all__ = ["FeatureQueue"]

_ADDED_IN_VERSION_2 = ("written", "pushes")


class FeatureQueue(OwnState):
    """Ring buffer of the most recent features of each code view.

    New features overwrite the oldest; slots never move, and shapes never change. The queue stores
    features rather than scores because the prototypes change. In a distributed job each rank has
    its own queue.

    Args:
        length: The number of slots per rank and view, at least 1.
        feature_dim: D, the number of features, at least 1.
        num_views: The number of code views, at least 1.
        dtype: The dtype of the stored features: ``torch.float16``, ``torch.bfloat16``,
            ``torch.float32`` or ``torch.float64``; the default dtype if ``None``. The first two
            halve the memory and round each entry of a unit feature by up to 5e-4 or 4e-3 of it.

    Attributes:
        features: (num_views, length, D), in slot order; zeros in slots that are not valid.
        valid: (length,) bool, true for slots that hold features.
        position: int64 scalar, the next slot to be written.
        rejected: int64 scalar, the number of samples rejected for NaN or infinite entries.
        written: (length,) int64, the number of the push that wrote each slot; 0 if none did.
        pushes: int64 scalar, the number of pushes, including empty ones.

    These are saved in ``state_dict()``, and move and change dtype with the module like buffers.
    They are not buffers, because ``DistributedDataParallel`` would overwrite them with those of
    rank 0, and weight averaging would average them. FSDP moves only parameters and buffers.
    :class:`SwAVLoss` moves its queue to the device of the prototypes; move a separate queue with
    ``to()``. A ``state_dict`` of version 1 lacks ``written`` and ``pushes`` and loads with both at
    0: all its features count as written by the latest push. :func:`~swavkit.sharded_state_dict`
    saves the queues of all ranks.

    Raises:
        TypeError: If a size is not an int, or the features are not floating-point tensors.
        ValueError: If a size is below 1, ``dtype`` is not one of the four, or a shape or device
            does not fit.

    Example:
        >>> queue = FeatureQueue(length=4, feature_dim=2, num_views=1)
        >>> queue.push(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]]))
        >>> len(queue), queue.valid
        (3, tensor([ True,  True,  True, False]))
        >>> queue.push(torch.tensor([[[0.0, 1.0]]]))
        >>> queue.age
        tensor([1, 1, 1, 0])
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    _version = 2
    _own = ("features", "valid", "position", "rejected", "written", "pushes")

    features: Tensor
    valid: Tensor
    position: Tensor
    rejected: Tensor
    written: Tensor
    pushes: Tensor

    def __init__(
        self,
        length: int,
        feature_dim: int,
        num_views: int = 2,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length = _checks.positive_int("length", length)
        self.feature_dim = _checks.positive_int("feature_dim", feature_dim)
        self.num_views = _checks.positive_int("num_views", num_views)
        _checks.choice("dtype", dtype, (None, *_checks.FLOATING_DTYPES))
        self.features = torch.zeros(self.num_views, self.length, self.feature_dim, dtype=dtype)
        self.valid = torch.zeros(self.length, dtype=torch.bool)
        self.position = torch.zeros((), dtype=torch.int64)
        self.rejected = torch.zeros((), dtype=torch.int64)
        self.written = torch.zeros(self.length, dtype=torch.int64)
        self.pushes = torch.zeros((), dtype=torch.int64)

    def reset_parameters(self) -> None:
        """Empty the queue in place: no slot is valid, and all counts are 0."""
        self._empty_own()

    @torch.no_grad()
    def push(self, features: Tensor | Sequence[Tensor], *, valid: Tensor | None = None) -> None:
        """Overwrite the oldest features with new ones. Does not synchronize with the device.

        Args:
            features: (num_views, B, D), or a sequence of num_views tensors (B, D), for any B. Only
                the last ``length`` samples are kept. Features are stored as given, detached, in the
                dtype of the queue. A sample with a NaN or infinite entry in any view is stored as
                zeros, is not valid, and is counted in ``rejected``.
            valid: (B,) bool; samples where it is false are stored as zeros and are not valid.
        """
        views = _checks.views(
            "features", features, "features", least=self.num_views, last=self.feature_dim
        )
        if len(views) != self.num_views:
            raise ValueError(f"features must hold {self.num_views} views, got {len(views)}")
        _checks.same_device("features", views[0], self.features)
        if valid is not None:
            _checks.mask("valid", valid, views[0].shape[:1], views[0])

        with autocast_disabled(views[0].device):  # autocast cannot stack every half precision
            new = torch.stack([view.detach() for view in views])
        new = new.to(self.features.dtype)
        finite = new.abs().amax(dim=(0, 2)) < torch.inf  # (B,), false for NaN
        keep = finite if valid is None else finite & valid
        self.rejected.add_((~finite if valid is None else valid & ~finite).sum())
        new.masked_fill_(~keep.unsqueeze(-1), 0)

        samples = new.shape[1]
        written = min(samples, self.length)
        first = samples - written
        slots = torch.arange(first, samples, device=new.device).add_(self.position) % self.length
        self.features.index_copy_(1, slots, new[:, first:])
        self.valid.index_copy_(0, slots, keep[first:])
        self.position.copy_((self.position + samples) % self.length)
        self.pushes.add_(1)
        self.written.index_copy_(0, slots, self.pushes.expand(written))

    @property
    def age(self) -> Tensor:
        """The number of pushes since each slot was written, (length,) int64; -1 if not valid.

        Each training step makes one push, so the age is in steps. The newest features have age 0.
        Does not synchronize with the device.
        """
        return torch.where(self.valid, self.pushes - self.written, -1)

    def __len__(self) -> int:
        """Return the number of valid slots. Synchronizes with the device; avoid it in training."""
        return int(self.valid.sum())

    def __bool__(self) -> bool:
        """Return ``True``, also for an empty queue."""
        return True

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        shown = f"length={self.length}, feature_dim={self.feature_dim}, num_views={self.num_views}"
        dtype = self.features.dtype
        return f"{shown}, dtype={dtype}" if dtype.itemsize < 4 else shown

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        """Load a state of version 1, which lacks the push counts, with both at 0."""
        old = (local_metadata.get("version") or 1) < 2
        added = {prefix + name: getattr(self, name) for name in _ADDED_IN_VERSION_2}
        if old and prefix + "features" in state_dict and not state_dict.keys() & added.keys():
            device = state_dict[prefix + "features"].device
            zeros = {key: torch.zeros_like(value, device=device) for key, value in added.items()}
            state_dict = {**state_dict, **zeros}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)
