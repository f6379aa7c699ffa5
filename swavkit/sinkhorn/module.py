"""Module form of the codes: it holds the settings and compares them over the ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit.distributed.agreement import Agreement
from swavkit.distributed.collectives import GroupHandle, number_of_ranks, participants
from swavkit.sinkhorn.functional import (
    Settings,
    Weights,
    checked_problems,
    checked_settings,
    solve,
)

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["SinkhornKnopp"]


class SinkhornKnopp(nn.Module):
    """Module form of :func:`sinkhorn_knopp`.

    In ``eval()`` it does not communicate, so that one rank can validate alone. A teacher in
    ``eval()`` whose codes are to be those of the batch of all ranks needs
    ``synchronize="always"``; the first local call in a job of several ranks warns. In a distributed
    job, the first training call compares the settings and the shapes over the ranks, and raises the
    same error on all of them if they differ.

    Args:
        epsilon: The entropy temperature ε > 0, in the unit of the scores: a number, or a floating
            0-dim tensor, which is never read on the host. It may be set between steps.
        iterations: The number of iterations, at least 1. The maximum number with ``tolerance``.
        process_group: The ranks that share the batch; the default group if ``None``. A deep copy
            of the module shares the group. Pickling drops it, and the loaded module needs a new one
            (``module.process_group = ...``) before its next use.
        synchronize: Whether to share the batch with other ranks in training mode; ``"always"``
            includes ``eval()``, where all ranks must then make the call.
        relaxation: The strength ρ > 0 of the constraint on the prototypes' masses.
        tolerance: Stop when the marginal error is at most this; reads a value on the host.
        hard: Whether to round each code to its largest entry.
        validate: Whether to check the values of scores and weights; reads values on the host.
        dtype: The floating dtype of the codes, of at least 16 bits; that of the scores if ``None``.

    Shape:
        scores (..., B, K), ``sample_weight`` (..., B) or (B,), ``prototype_weight`` (K,) give codes
        (..., B, K) in ``dtype``. A sequence of scores gives a list of codes.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range, or differs between ranks.

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
        epsilon: float | Tensor = 0.05,
        iterations: int = 3,
        *,
        process_group: ProcessGroup | None = None,
        synchronize: bool | Literal["always"] = True,
        relaxation: float = math.inf,
        tolerance: float | None = None,
        hard: bool = False,
        validate: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        settings = checked_settings(
            epsilon, iterations, relaxation, tolerance, hard, validate, dtype
        )
        self.epsilon, self.iterations, self.relaxation, self.tolerance, *_ = settings
        self.hard = hard
        self.validate = validate
        self.dtype = dtype
        _checks.choice("synchronize", synchronize, (True, False, "always"))
        self.synchronize = synchronize
        self._group = GroupHandle(process_group)
        self._agreement = Agreement()
        self._warned = False  # that codes are local

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that share the batch; the default group if ``None``."""
        return self._group.get()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = GroupHandle(group)

    @overload
    def forward(
        self,
        scores: Tensor,
        sample_weight: Tensor | None = None,
        prototype_weight: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        scores: Sequence[Tensor],
        sample_weight: Sequence[Tensor | None] | None = None,
        prototype_weight: Sequence[Tensor | None] | None = None,
    ) -> list[Tensor]: ...

    def forward(
        self,
        scores: Tensor | Sequence[Tensor],
        sample_weight: Weights = None,
        prototype_weight: Weights = None,
    ) -> Tensor | list[Tensor]:
        """Return the codes of ``scores``; see :func:`sinkhorn_knopp`."""
        settings, group = self._settings(), self._participants()
        problems = checked_problems(scores, sample_weight, prototype_weight)
        shapes = [problem.scores.shape for problem in problems]
        self._compare(
            group,
            sum(math.prod(shape[:-2]) for shape in shapes),
            sum(shape[-1] for shape in shapes),
            problems[0].scores.dtype,
            problems[0].scores.device,
            any(problem.prototype_weight is not None for problem in problems),
        )
        codes = solve(problems, settings, group)
        return codes[0] if isinstance(scores, Tensor) else codes

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def _compare(
        self,
        group: ProcessGroup | None,
        problems: int,
        prototypes: int,
        dtype: torch.dtype,
        device: torch.device,
        prior: bool = False,
    ) -> None:
        """Compare the settings and numbers of problems and prototypes over the ranks, if due."""

        def record() -> dict[str, Any]:
            return {
                "num_prototypes": prototypes,
                "the number of problems": problems,
                "the dtype of scores": dtype,
                "whether prototype_weight is given": prior,
                **self._settings()._asdict(),
            }

        self._agreement.require(record, group, device)

    def _participants(self) -> ProcessGroup | None:
        """Return the ranks that share the batch of a call now, or ``None``."""
        _checks.choice("synchronize", self.synchronize, (True, False, "always"))
        now = self.synchronize == "always" or (self.synchronize and self.training)
        group = participants(self.process_group, now)
        local = self.synchronize and not now and not torch.compiler.is_compiling()
        if local and not self._warned and number_of_ranks(self.process_group) > 1:
            self._warned = True
            warnings.warn(
                "codes in eval() are those of the samples of this rank alone, in a job of several "
                "ranks; expected synchronize='always' for a teacher, with a call on all ranks, or "
                "synchronize=False for local codes",
                stacklevel=_checks.callers_stacklevel(),
            )
        return group

    def _settings(self) -> Settings:
        return checked_settings(*(getattr(self, name) for name in Settings._fields))

    def extra_repr(self) -> str:
        """Return the settings for ``repr``; the rarer ones where they differ from the default."""
        shown = ["epsilon", "iterations", "synchronize"]
        shown += ["relaxation"] * (self.relaxation != math.inf)
        shown += ["tolerance"] * (self.tolerance is not None)
        shown += ["hard"] * self.hard + ["validate"] * self.validate
        shown += ["dtype"] * (self.dtype is not None)
        return ", ".join(f"{name}={getattr(self, name)}" for name in shown)
