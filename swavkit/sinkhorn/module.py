"""Module form of the codes: it holds the settings and compares them over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit.distributed.agreement import Agreement
from swavkit.distributed.collectives import GroupHandle, participants
from swavkit.sinkhorn.functional import Settings, checked_settings, solve

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["SinkhornKnopp"]


class SinkhornKnopp(nn.Module):
    """Module form of :func:`sinkhorn_knopp`: it holds the settings.

    In ``eval()`` it does not talk to other processes, so that one process can validate alone. In a
    job with several, the first training call compares the settings and the shape of the problem
    over the group, and raises the same error everywhere if they differ.

    Args:
        epsilon: The entropy temperature ε > 0, in the unit of the scores.
        iterations: How many iterations, at least 1; with ``tolerance``, at most so many.
        process_group: The processes that share the batch; the default group if ``None``. A deep
            copy of the module shares the group; pickling drops it, and the loaded module must be
            given a new one (``module.process_group = ...``) before its next use.
        synchronize: Whether to share the batch with other processes in training mode; ``"always"``
            for ``eval()`` too, where then all processes must make the call.
        relaxation: How strictly equal use is asked for, ρ > 0; infinite is strict.
        tolerance: Stop as soon as the marginal error is at most this; reads a value on the host.
        hard: Whether to round each code to the prototype of its largest entry.
        validate: Whether to refuse bad values of scores and weights; reads values on the host.

    Shape:
        scores (..., B, K), ``sample_weight`` (..., B) or (B,), ``prototype_weight`` (K,) give codes
        (..., B, K) in the dtype of the scores.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range, or differs from that of another process.

    Example:
        >>> sinkhorn = SinkhornKnopp(epsilon=0.05, iterations=3)
        >>> sinkhorn(torch.eye(3))
        tensor([[1.0000e+00, 2.0612e-09, 2.0612e-09],
                [2.0612e-09, 1.0000e+00, 2.0612e-09],
                [2.0612e-09, 2.0612e-09, 1.0000e+00]])
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    def __init__(
        self,
        epsilon: float = 0.05,
        iterations: int = 3,
        *,
        process_group: ProcessGroup | None = None,
        synchronize: bool | Literal["always"] = True,
        relaxation: float = math.inf,
        tolerance: float | None = None,
        hard: bool = False,
        validate: bool = False,
    ) -> None:
        super().__init__()
        settings = checked_settings(epsilon, iterations, relaxation, tolerance, hard, validate)
        self.epsilon, self.iterations, self.relaxation, self.tolerance, *_ = settings
        self.hard = hard
        self.validate = validate
        _checks.choice("synchronize", synchronize, (True, False, "always"))
        self.synchronize = synchronize
        self._group = GroupHandle(process_group)
        self._agreement = Agreement()

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that share the batch; the default group if ``None``."""
        return self._group.get()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = GroupHandle(group)

    def forward(
        self,
        scores: Tensor,
        sample_weight: Tensor | None = None,
        prototype_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the codes of ``scores``; see :func:`sinkhorn_knopp`."""
        return self._in_step([scores], sample_weight, prototype_weight)[0]

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def _in_step(
        self,
        several: Sequence[Tensor],
        sample_weight: Tensor | None,
        prototype_weight: Tensor | None = None,
        rider: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the codes of each of several scores, with no more collectives than of one.

        ``rider`` is summed over the processes along with them, in place.
        """
        settings, group = self._settings(), self._participants()
        for scores in several:
            _checks.of_samples_and_prototypes("scores", scores)
        prototypes = sum(scores.shape[-1] for scores in several)
        shape = math.prod(several[0].shape[:-2]), prototypes
        dtype, device = several[0].dtype, several[0].device
        self._compare(shape, dtype, device, prototype_weight is not None)
        return solve(several, sample_weight, prototype_weight, settings, group, rider)

    def _compare(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, prior: bool = False
    ) -> None:
        """Compare ``shape``, the numbers of problems and prototypes, and the settings, if due."""
        record = {
            "num_prototypes": shape[1],
            "the number of problems": shape[0],
            "the dtype of scores": dtype,
            "whether prototype_weight is given": prior,
            **self._settings()._asdict(),
        }
        self._agreement.require(lambda: record, self._participants(), device)

    def _participants(self) -> ProcessGroup | None:
        """Return the processes that share the batch of a call now, or ``None``."""
        now = self.synchronize == "always" or (self.synchronize and self.training)
        return participants(self.process_group, now)

    def _settings(self) -> Settings:
        return checked_settings(*(getattr(self, name) for name in Settings._fields))

    def extra_repr(self) -> str:
        """Return the settings for ``repr``; the rarer ones where they differ from the default."""
        shown = ["epsilon", "iterations", "synchronize"]
        shown += ["relaxation"] * (self.relaxation != math.inf)
        shown += ["tolerance"] * (self.tolerance is not None)
        shown += ["hard"] * self.hard + ["validate"] * self.validate
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)
