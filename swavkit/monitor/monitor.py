"""Metrics of training over a window of steps and over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._own_state import OwnState
from swavkit._tensors import autocast_disabled
from swavkit.distributed.collectives import (
    GroupHandle,
    device_for,
    full_tensor,
    participants,
    rank_and_size,
    sum_over_ranks,
)
from swavkit.monitor.diagnosis import Diagnosis, diagnose
from swavkit.monitor.figures import (
    cluster_figures,
    feature_figures,
    moments,
    num_duplicates,
    queue_figures,
)
from swavkit.monitor.plot import monitor_figure
from swavkit.prototypes import PrototypeLayer
from swavkit.swav_statistics import SwAVStatistics

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup
    from swavkit.monitor.plot import Figure

__all__ = ["ClusterMonitor"]

# The columns of `scalars`. A loss counts for the samples of its step, and is multiplied by them.
_OF_PROTOTYPES = ("assigned", "code_usage")
_OF_STATISTICS = tuple(name for name in SwAVStatistics._fields if name not in _OF_PROTOTYPES)
_COLUMNS = (*_OF_STATISTICS, "loss", "loss_samples", "losses", "nonfinite", "updates")

# Rows that were left out show as a number of rows that is not a multiple of the samples. Sums of
# weights in float32 are multiples up to rounding only.
_ROUNDING = 1e-5


class ClusterMonitor(OwnState):
    r"""Metrics that show whether training works, over the last steps and over all ranks.

    Call :meth:`update` in each step, and :meth:`compute` when metrics are logged::

        loss, statistics = criterion(features, return_statistics=True)
        monitor.update(statistics, loss=loss, features=features, prototypes=criterion.prototypes)
        ...
        if step % 50 == 0:
            metrics = monitor.compute()  # on all ranks

    ``metrics`` is a dict of scalar tensors, for ``self.log_dict(metrics)`` in a
    ``LightningModule``, for ``writer.add_scalar`` of TensorBoard, or
    ``{name: float(value) for name, value in metrics.items()}``. As with a metric of torchmetrics,
    :meth:`reset` starts again, for example after an epoch. It is optional, because old steps leave
    the window.

    Args:
        num_prototypes: K, the number of prototypes, at least 1. Each head needs its own monitor.
        window: The number of steps that metrics are computed over, at least 1; for all diagnoses,
            at least 50.
        process_group: The ranks; the default group if ``None``.

    Attributes:
        assigned: (window, K) ``assigned`` of the last steps.
        code_usage: (window, K) ``code_usage`` of the last steps.
        scalars: (window, 12) the scalars of the statistics, the loss, and counts.
        updates: int64 scalar, the number of updates. The oldest step is overwritten.

    These tensors are saved in ``state_dict()``. They are not buffers, so
    ``DistributedDataParallel`` leaves them alone. They keep their dtype, float32 except for
    ``updates``, when the module changes its own, and :meth:`update` moves them to the device of the
    statistics. The last features and prototypes are neither saved nor copied with the monitor.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range.

    Example:
        >>> from swavkit import cluster_statistics
        >>> monitor = ClusterMonitor(num_prototypes=3)
        >>> scores = torch.eye(3).expand(2, 3, 3)  # two views that agree
        >>> monitor.update(cluster_statistics(scores, codes=scores), loss=1.0)
        >>> metrics = monitor.compute()
        >>> metrics["perplexity"], metrics["agreement"], metrics["loss"]
        (tensor(3.), tensor(1.), tensor(1.))
    """

    _own: ClassVar[tuple[str, ...]] = ("assigned", "code_usage", "scalars", "updates")
    _keeps_dtypes: ClassVar[bool] = True  # half precision has no room for the sums

    assigned: Tensor
    code_usage: Tensor
    scalars: Tensor
    updates: Tensor

    def __init__(
        self,
        num_prototypes: int,
        *,
        window: int = 100,
        process_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.num_prototypes = _checks.positive_int("num_prototypes", num_prototypes)
        self.window = _checks.positive_int("window", window)
        self._group = GroupHandle(process_group)
        usage = (self.window, self.num_prototypes)
        self.assigned = torch.zeros(usage, dtype=torch.float32)
        self.code_usage = torch.zeros(usage, dtype=torch.float32)
        self.scalars = torch.zeros(self.window, len(_COLUMNS), dtype=torch.float32)
        self.updates = torch.zeros((), dtype=torch.int64)
        self._features: Tensor | None = None
        self._prototypes: tuple[PrototypeLayer | Tensor] | None = None  # no submodule

    @property
    def process_group(self) -> ProcessGroup | None:
        """The ranks that metrics are computed over; the default group if ``None``."""
        return self._group.get()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = GroupHandle(group)

    @torch.no_grad()
    def update(
        self,
        statistics: SwAVStatistics,
        *,
        loss: Tensor | float | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
        prototypes: PrototypeLayer | Tensor | None = None,
    ) -> None:
        """Add a step. Reads no value on the host and does not communicate with other ranks.

        A loss that is not finite is left out of the mean. If a statistic is not finite, the
        statistics and the loss of the step are left out.

        Args:
            statistics: The :class:`SwAVStatistics` of this rank.
            loss: The loss of this rank, a scalar, the mean over its samples. With several heads,
                that of :class:`SwAVLoss` is the mean over heads.
            features: Features of the step, (V, B, D), (N, D) or a sequence of tensors (B, D). A
                copy is kept until others with B > 0 are given. Rows with a NaN or infinite entry
                are skipped.
            prototypes: The :class:`PrototypeLayer`, or a tensor (K, D). A reference is kept.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a shape or a device does not fit.
        """
        like = _checked_statistics(statistics, self.num_prototypes)
        if loss is not None:
            loss = _checked_loss(loss, like)
        views = None if features is None else _checked_features(features, like)
        if prototypes is not None:
            _check_prototypes(prototypes, self.num_prototypes, like)

        self._follow(like.device)
        usage = [statistics.assigned.float(), statistics.code_usage.float()]
        scalars = torch.stack([getattr(statistics, name).float() for name in _OF_STATISTICS])
        kept = torch.cat([scalars, *usage]).isfinite().all()
        wrong = ~kept | _some_rows_missing(**dict(zip(_OF_STATISTICS, scalars, strict=True)))
        scalars = scalars.where(kept, 0)
        one = torch.ones_like(scalars[0])
        value, given = (one * 0, one * 0) if loss is None else (loss, one)
        wrong |= ~value.isfinite()
        samples = given * scalars[_OF_STATISTICS.index("samples")].where(value.isfinite(), 0)
        loss_sum = samples * value.where(samples != 0, 0)
        row = torch.stack([*scalars, loss_sum, samples, given, wrong.float(), one])

        slot = self.updates.remainder(self.window).view(1)
        self.scalars.index_copy_(0, slot, row[None])
        for held, counts in zip((self.assigned, self.code_usage), usage, strict=True):
            held.index_copy_(0, slot, counts.where(kept, 0)[None])
        self.updates.add_(1)
        if views is not None and (self._features is None or views[0].shape[0]):
            with autocast_disabled(like.device):
                self._features = torch.cat([view.detach() for view in views])
        if prototypes is not None:
            if isinstance(prototypes, Tensor):
                prototypes = prototypes.detach()  # or its graph would be kept, too
            self._prototypes = (prototypes,)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over the window and over all ranks.

        All ranks must make the call, and must have given the same arguments to :meth:`update`. One
        collective is made, and another one to gather prototypes that are sharded over ranks, by
        ``ShardedPrototypeLayer`` or FSDP2. Reads values on the host.

        Returns:
            A dict of float32 scalars on the device of the monitor. Those without any row are NaN.

            - ``"perplexity"``: exp of the entropy of ``assigned``: K if all prototypes are nearest
              equally often, 1 if all rows have the same one.
            - ``"used"``: share of the prototypes that are the nearest one of at least one row.
            - ``"code_perplexity"``: exp of the entropy of ``code_usage``.
            - ``"code_entropy"``, ``"prediction_entropy"``: means over rows, in nats.
            - ``"marginal_error"``: largest relative distance of the mean code from 1/K.
            - ``"agreement"``: share of pairs of views with the same nearest prototype.
            - ``"nonfinite"``: number of steps in which any rank had a loss, a statistic or rows
              that are not finite. Such rows are in no statistic, and are noticed if the number of
              rows is not a whole multiple of the number of samples.

            If losses were given:

            - ``"loss"``: mean over steps and ranks, weighted by the samples of each.
            - ``"below_ln_k"``: ln K − loss, which is 0 if predictions are uniform.
            - ``"above_code_entropy"``: loss − code entropy, a mean Kullback-Leibler divergence.

            A loss that is the mean over heads does not describe any single head. Of these three,
            only ``"loss"`` is then meaningful.

            If prototypes were given:

            - ``"duplicates"``: number of prototypes with another one at a cosine above 0.99.

            If features were given, of the last features of each rank, with unit norm:

            - ``"feature_std"``: mean over dimensions of the standard deviation, times √D: 1 for
              features uniform on the sphere, 0 if all are equal.
            - ``"effective_rank"``: exp of the entropy of the normalized singular values; 0 if all
              features are zero.

        Raises:
            RuntimeError: If no rank had an update.
        """
        return self._window().figures

    def diagnose(self, criterion: nn.Module | None = None) -> list[Diagnosis]:
        """Return what is wrong and what to do about it, worst first; an empty list if nothing is.

        All ranks must make the call; see :meth:`compute`.

        Args:
            criterion: The :class:`SwAVLoss`, for its settings, and for its queue, whose features
                are compared with those given to :meth:`update` if they have the same dimension. It
                is needed with several heads, whose mean loss is compared with their mean ln K.

        Returns:
            A list of :class:`Diagnosis`, the same on all ranks.

        Raises:
            RuntimeError: If no rank had an update.
            TypeError: If ``criterion`` is not a :class:`SwAVLoss`, for example a wrapper of one.
        """
        if criterion is not None and not hasattr(criterion, "sinkhorn"):
            raise TypeError(f"criterion must be a SwAVLoss, got {type(criterion).__name__}")
        window = self._window(getattr(criterion, "queue", None))
        _, processes = rank_and_size(participants(self.process_group, True))
        return diagnose(
            {name: value.item() for name, value in window.figures.items()},
            num_prototypes=self.num_prototypes,
            samples=window.samples_per_step.item(),
            steps=window.updates,
            window=self.window,
            processes=processes,
            criterion=criterion,
        )

    def plot(self) -> Figure:
        """Return a matplotlib figure of the window, for ``savefig`` or a notebook.

        All ranks must make the call; see :meth:`compute`. Requires ``swavkit[plot]``.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        window = self._window()
        return monitor_figure(
            assigned=window.assigned.cpu().numpy(),
            code_usage=window.code_usage.cpu().numpy(),
            steps={name: values.cpu().numpy() for name, values in window.steps.items()},
            last_step=window.updates,
            figures={name: value.item() for name, value in window.figures.items()},
        )

    def reset(self) -> None:
        """Empty the window in place, and drop the features and prototypes."""
        self._empty_own()
        self._features = self._prototypes = None

    @torch.no_grad()
    def _window(self, queue: Any = None) -> _Window:
        """Sum the window over the ranks, in one collective; with figures of a queue, if given."""
        group = participants(self.process_group, True)
        device = self.updates.device
        if device.type == "meta":
            raise RuntimeError("the monitor must be on a device with values, got the meta device")
        with autocast_disabled(device):
            # Oldest step first, so that the last row holds the last step of every rank.
            order = (torch.arange(self.window, device=device) + self.updates) % self.window
            parts = [
                torch.stack(
                    [torch.ones_like(self.updates), self.updates, self.updates > 0]
                ).double(),
                self.assigned.sum(dim=0, dtype=torch.float64),
                self.code_usage.sum(dim=0, dtype=torch.float64),
                self.scalars.index_select(0, order).double(),
            ]
            if self._features is not None:
                parts += moments(self._features.to(device))
                if queue is not None and queue.feature_dim == self._features.shape[1]:
                    queued = queue.features[:, queue.valid].flatten(0, 1)
                    parts += moments(queued.to(device))
            together = torch.cat([part.flatten() for part in parts])
            together = sum_over_ranks(together.to(device_for(group, device)), group).to(device)
            sums = torch.split(together, [part.numel() for part in parts])
            counts, assigned, code_usage, scalars, *of_features = (
                values.view(part.shape) for values, part in zip(sums, parts, strict=True)
            )
            steps = dict(zip(_COLUMNS, scalars.unbind(dim=1), strict=True))
            if not steps["updates"].any():
                raise RuntimeError(
                    "compute must follow an update, got none on any rank since the last reset(); "
                    "expected update(statistics) in each step"
                )
            ranks, updates, updated = counts.unbind()
            totals = {name: values.sum() for name, values in steps.items()}
            totals["nonfinite"] = (steps["nonfinite"] > 0).sum().double()  # on any rank
            figures = cluster_figures(assigned, code_usage, totals)
            if of_features:
                figures |= feature_figures(*of_features[:3])
            if len(of_features) > 3:
                spread = figures["feature_std"]
                figures |= queue_figures(of_features[:3], of_features[3:], spread)
            if self._prototypes is not None:
                figures["duplicates"] = num_duplicates(_weight(*self._prototypes)).to(device)
        return _Window(
            assigned,
            code_usage,
            steps,
            totals["samples"] * ranks / totals["updates"],
            int(updates / updated),
            {name: value.float() for name, value in figures.items()},
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes to copy or pickle, without features and prototypes."""
        return {**self.__dict__, "_features": None, "_prototypes": None}

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"num_prototypes={self.num_prototypes}, window={self.window}"


class _Window(NamedTuple):
    """Sums over ranks, and the figures."""

    assigned: Tensor  # (K,), of all steps
    code_usage: Tensor  # (K,)
    steps: dict[str, Tensor]  # (window,) each
    samples_per_step: Tensor
    updates: int  # of each rank, the mean of those with any
    figures: dict[str, Tensor]


def _checked_statistics(statistics: Any, num_prototypes: int) -> Tensor:
    """Check statistics, and return a tensor on their device."""
    if not isinstance(statistics, SwAVStatistics):
        if isinstance(statistics, (tuple, list)):
            raise TypeError(
                f"statistics must be a SwAVStatistics, got a {type(statistics).__name__} of "
                f"{len(statistics)}; expected one monitor per head, each with its own statistics"
            )
        _checks.instance("statistics", statistics, SwAVStatistics)
    for field, value in zip(SwAVStatistics._fields, statistics, strict=True):
        name = f"statistics.{field}"
        _checks.floating_tensor(name, value)
        shape = (num_prototypes,) if field in _OF_PROTOTYPES else ()
        if value.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} with num_prototypes={num_prototypes}, got "
                f"{tuple(value.shape)}"
            )
        _checks.same_device(name, value, statistics.samples)
    samples: Tensor = statistics.samples
    return samples


def _checked_loss(loss: Any, like: Tensor) -> Tensor:
    if not isinstance(loss, Tensor):
        return torch.full_like(like, _checks.any_float("loss", loss), dtype=torch.float32)
    _checks.floating_tensor("loss", loss)
    if loss.numel() != 1:
        raise ValueError(f"loss must have 1 element, got shape {tuple(loss.shape)}")
    _checks.same_device("loss", loss, like)
    return loss.detach().float().reshape(())


def _checked_features(features: Any, like: Tensor) -> list[Tensor]:
    if isinstance(features, Tensor) and features.dim() not in (2, 3):
        raise ValueError(
            f"features must have 2 dimensions (samples, features) or 3 (views, samples, features), "
            f"got shape {tuple(features.shape)}"
        )
    if isinstance(features, Tensor) and features.dim() == 2:
        features = features.unsqueeze(0)
    views = _checks.views("features", features, "features", least=1)
    _checks.no_empty_last_dimension("features", views[0], "features")
    _checks.same_device("features", views[0], like)
    return views


def _check_prototypes(prototypes: Any, num_prototypes: int, like: Tensor) -> None:
    weight = prototypes
    if isinstance(prototypes, PrototypeLayer):
        weight = prototypes.weight
        shape: tuple[int, ...] = (prototypes.num_prototypes, prototypes.feature_dim)
    elif isinstance(prototypes, Tensor):
        shape = tuple(_checks.floating_tensor("prototypes", prototypes).shape)
    else:
        raise TypeError(
            f"prototypes must be a PrototypeLayer or a torch.Tensor, got "
            f"{type(prototypes).__name__}; expected one monitor per head"
        )
    if len(shape) != 2 or shape[0] != num_prototypes:
        raise ValueError(
            f"prototypes must have shape ({num_prototypes}, features) with "
            f"num_prototypes={num_prototypes}, got {shape}"
        )
    if weight.is_meta and not like.is_meta:
        raise ValueError("prototypes must have values, got a weight on the meta device")


def _some_rows_missing(
    *, samples: Tensor, code_rows: Tensor, prediction_rows: Tensor, **_: Tensor
) -> Tensor:
    """Return whether rows are not those of the same number of views for each sample."""
    views = torch.stack([code_rows, prediction_rows]) / samples
    apart = (views - views.round()).abs()
    missing: Tensor = (samples > 0) & ((views < 0.5) | (apart > _ROUNDING * views)).any()
    return missing


def _weight(prototypes: PrototypeLayer | Tensor) -> Tensor:
    """Return the (K, D) prototypes, gathered if they are sharded over ranks."""
    if isinstance(prototypes, PrototypeLayer):
        prototypes = prototypes.weight
    return full_tensor(prototypes.detach())
