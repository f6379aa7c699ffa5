"""``SwAVLoss``: the parts of SwAV wired into one module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._activation_checkpointing import is_recomputed, keeping_what_it_saves
from swavkit._head_losses import (
    Batch,
    Head,
    SwAVDetails,
    checked_code_heads,
    checked_code_views,
    head_losses,
    part_of_mean,
    stacked,
)
from swavkit._own_state import OwnState
from swavkit.distributed.agreement import Agreement, checksum_of_all
from swavkit.distributed.collectives import device_for, is_sharded, participants
from swavkit.feature_queue import FeatureQueue
from swavkit.prototypes import PrototypeLayer, unit_rows
from swavkit.sharded.prototypes import ShardedPrototypeLayer, layer_class, sharded_head_losses
from swavkit.sinkhorn.marginals import refuse_bad_priors
from swavkit.sinkhorn.module import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss
from swavkit.swav_statistics import SwAVStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swavkit.distributed.collectives import ProcessGroup

    class _Prototypes(PrototypeLayer, nn.ModuleList):
        """The type of ``SwAVLoss.prototypes``: a layer, or a list of layers."""

        def __iter__(self) -> Iterator[PrototypeLayer]: ...
        def __getitem__(self, index: int) -> PrototypeLayer: ...  # type: ignore[override]


__all__ = ["SwAVLoss"]

_COMPARED_HEADS = 8  # whose sizes are compared one by one; those of more by their sum
_ONE_BY_ONE = "whether heads get their codes one by one"

_ADVICE = {
    _ONE_BY_ONE: "they do if sinkhorn is replaced or has hooks, which must hold on all ranks",
    "steps": "load a checkpoint on every rank",
    "the checksum of the prototypes": "wrap SwAVLoss in DistributedDataParallel or fully_shard, "
    "alone or inside the model: without a wrapper, each rank trains its own prototypes",
}


class SwAVLoss(OwnState):
    """The SwAV loss of the features of several views, with its prototypes and its queue.

    It connects the parts. With a queue, a training step is::

        scores = prototypes(features)  # (V, B, K), the first A views give codes
        queued = prototypes(queue.features)
        weight = cat([ones(B), queue.valid])
        codes = sinkhorn(cat([scores[:A], queued], dim=1), weight)[:, :B]
        value = loss(scores, codes)
        queue.push(unit_rows(features[:A]))

    With many scores, unless a part is hooked or details are requested, codes, loss and gradients
    are computed block by block instead; see ``memory``. The results are the same, and only the
    scores of a block are in memory.

    The module owns parameters and state. Give its parameters to the optimizer, save its
    ``state_dict()``, and in a distributed job wrap it in DDP or FSDP2, alone or inside the model.
    Without a wrapper the prototypes of the ranks drift apart. They and the settings are therefore
    compared over ranks at the 1st, 2nd, 4th, 8th ... training call that is not compiled, and by
    :meth:`check_ranks`.

    Args:
        feature_dim: D, the number of features.
        num_prototypes: K, the number of prototypes. A sequence of numbers creates one head for
            each, with its own prototypes and codes. The loss is then the mean over heads. Over
            ranks, several heads take as many collectives as one.
        num_code_views: A, the number of views that give codes. They come first.
        temperature: The softmax temperature τ of the predictions.
        epsilon: The entropy temperature ε of the codes.
        iterations: The number of Sinkhorn-Knopp iterations.
        queue_length: The slots of the feature queue, per rank and code view; 0 for no queue.
        queue_start: The number of training steps in which the queue only fills. After them, from
            the second step on at the earliest, codes are computed on current and queued features.
        freeze_steps: The number of training steps in which the prototypes get a gradient of zeros.
            Weight decay may rescale them in these steps, which changes no score. Adam's coupled
            weight decay turns them, and that of SGD with a momentum of 0.9 reverses them if the
            learning rate times ``weight_decay`` is above 0.0026.
        memory: ``"full"`` calls the parts, which holds the scores of all views. ``"streamed"``
            computes block by block and holds one. ``"auto"`` calls the parts for up to 2^20
            scores without a queue on a CPU, and 2^28 elsewhere. Otherwise it computes block by
            block, and keeps the kernels of the code views if they take at most 1 GiB.
            ``"streamed"`` cannot be combined with details, validated codes, a replaced or hooked
            part, or sharded prototypes.
        reduction: ``"mean"`` is the mean over the samples of this rank. ``"global_mean"``, for
            batches of different sizes, is scaled so that the mean over ranks, which DDP takes of
            the gradients, is the mean over all samples. Without synchronization, both are equal.
        shard_prototypes: Whether each rank keeps only a part of the prototypes, for a large K. See
            "Sharded prototypes" in the documentation. One rank alone keeps all.
        process_group: The ranks that share the batch for codes; the default group if ``None``.
        synchronize: Whether to share the batch for codes with other ranks in training mode;
            ``"always"`` includes ``eval()``, where all ranks must then make the call.
        prototype_gradient: The treatment of the norm of the stored prototypes, see
            :class:`PrototypeLayer`.
        queue_dtype: The floating dtype of the queue's features, see :class:`FeatureQueue`.
        hard: Whether codes are rounded to their largest entry. This and the next two settings are
            those of :class:`SinkhornKnopp`.
        relaxation: The strength ρ > 0 of the constraint on the prototypes' masses.
        tolerance: Stop iterations when the marginal error is at most this; reads a value on the
            host. :attr:`SwAVDetails.marginal_error` is the error that was reached.
        prototype_weight: (K,) relative masses of the prototypes, such as a
            :func:`power_law_prior`, at least 0 and not all 0; equal masses if ``None``. For a
            sequence of heads, a sequence with an entry or ``None`` for each. It is not in the state
            dict. Bad values make the loss NaN if they are set after construction.

    Attributes:
        prototypes: The :class:`PrototypeLayer`; for a sequence of numbers, of length 1 too, a
            ``ModuleList`` of them.
        sinkhorn: The :class:`SinkhornKnopp`.
        loss: The :class:`SwappedPredictionLoss`.
        queue: The :class:`FeatureQueue`, or ``None`` without one.
        steps: int64 scalar, the number of training steps so far. A forward in ``eval()`` changes no
            state. Like the queue's tensors, it is saved and moved with the module but is not a
            buffer. DDP does not broadcast it, so load a checkpoint on every rank. Weight averaging
            (``AveragedModel``, Lightning) does not change it: an averaged copy keeps the counter
            and the queue that it was created with. To continue training from averaged prototypes,
            load them into the criterion that was trained.

    Raises:
        TypeError: If a setting or an input is of the wrong type.
        ValueError: If a setting is out of range, a shape or device does not fit, or settings or
            prototypes differ between ranks.
        RuntimeError: In a backward pass with ``create_graph=True``: there is no second derivative.

    Example:
        >>> criterion = SwAVLoss(feature_dim=16, num_prototypes=10)
        >>> features = torch.randn(4, 8, 16, requires_grad=True)  # 4 views of 8 images, 2 full-size
        >>> loss = criterion(features)
        >>> loss.backward()
        >>> loss.shape, features.grad.shape
        (torch.Size([]), torch.Size([4, 8, 16]))
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    _own = ("steps",)

    steps: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int | Sequence[int],
        *,
        num_code_views: int = 2,
        temperature: float | Tensor = 0.1,
        epsilon: float | Tensor = 0.05,
        iterations: int = 3,
        queue_length: int = 0,
        queue_start: int = 0,
        freeze_steps: int = 0,
        memory: Literal["full", "streamed", "auto"] = "auto",
        reduction: Literal["mean", "global_mean"] = "mean",
        process_group: ProcessGroup | None = None,
        synchronize: bool | Literal["always"] = True,
        prototype_gradient: Literal["tangent", "published"] = "tangent",
        queue_dtype: torch.dtype | None = None,
        shard_prototypes: bool = False,
        hard: bool = False,
        relaxation: float = math.inf,
        tolerance: float | None = None,
        prototype_weight: Tensor | Sequence[Tensor | None] | None = None,
    ) -> None:
        super().__init__()
        self.num_code_views = num_code_views
        self.queue_start, self.freeze_steps = queue_start, freeze_steps
        self.memory: Literal["full", "streamed", "auto"] = memory
        self.reduction: Literal["mean", "global_mean"] = reduction
        self._check_settings()
        queue_length = _checks.non_negative_int("queue_length", queue_length)
        prototypes: Any
        layer = layer_class(shard_prototypes, process_group, synchronize)
        if isinstance(num_prototypes, Sequence) and not isinstance(num_prototypes, str):
            sizes = _checks.positive_ints("num_prototypes", num_prototypes)
            prototypes = nn.ModuleList(
                layer(feature_dim, size, gradient=prototype_gradient) for size in sizes
            )
        else:
            prototypes = layer(feature_dim, num_prototypes, gradient=prototype_gradient)
        self.prototypes: _Prototypes = prototypes
        self.prototype_weight = prototype_weight
        refuse_bad_priors(self._priors(torch.device("cpu")), isinstance(prototypes, nn.ModuleList))
        self.sinkhorn = SinkhornKnopp(
            epsilon,
            iterations,
            process_group=process_group,
            synchronize=synchronize,
            relaxation=relaxation,
            tolerance=tolerance,
            hard=hard,
        )
        self.loss = SwappedPredictionLoss(temperature)
        self.queue = None
        if queue_length:
            self.queue = FeatureQueue(queue_length, feature_dim, num_code_views, dtype=queue_dtype)
        self._agreement = Agreement(repeatedly=True)  # prototypes may drift apart late
        self.steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new prototypes, empty the queue, and set the step counter to 0, in place.

        It initializes a criterion that was made on the meta device, after ``to_empty()``.
        """
        for head in self._heads():
            head._require_stored_weight()
        for head in self._heads():
            head.reset_parameters()
        if self.queue is not None:
            self.queue.reset_parameters()
        self._empty_own()

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        code_features: Tensor | Sequence[Tensor] | None = None,
        code_prototypes: PrototypeLayer | Iterable[PrototypeLayer] | None = None,
        sample_weight: Tensor | None = None,
        return_details: Literal[False] = False,
        return_statistics: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        code_features: Tensor | Sequence[Tensor] | None = None,
        code_prototypes: PrototypeLayer | Iterable[PrototypeLayer] | None = None,
        sample_weight: Tensor | None = None,
        return_details: Literal[True],
        return_statistics: Literal[False] = False,
    ) -> tuple[Tensor, SwAVDetails | tuple[SwAVDetails, ...]]: ...

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        code_features: Tensor | Sequence[Tensor] | None = None,
        code_prototypes: PrototypeLayer | Iterable[PrototypeLayer] | None = None,
        sample_weight: Tensor | None = None,
        return_details: Literal[False] = False,
        return_statistics: Literal[True],
    ) -> tuple[Tensor, SwAVStatistics | tuple[SwAVStatistics, ...]]: ...

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        code_features: Tensor | Sequence[Tensor] | None = None,
        code_prototypes: PrototypeLayer | Iterable[PrototypeLayer] | None = None,
        sample_weight: Tensor | None = None,
        return_details: bool,
        return_statistics: bool,
    ) -> Any: ...

    @keeping_what_it_saves
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        code_features: Tensor | Sequence[Tensor] | None = None,
        code_prototypes: PrototypeLayer | Iterable[PrototypeLayer] | None = None,
        sample_weight: Tensor | None = None,
        return_details: bool = False,
        return_statistics: bool = False,
    ) -> Any:
        """Return the loss of one batch; in training mode count the step and fill the queue.

        Args:
            features: (V, B, D) features of V views of B images, of any norm, or a sequence of V
                tensors (B, D); the code views first.
            code_features: (A, B, D) features that give the codes and enter the queue in place of
                those of the code views, such as a teacher's; or a sequence of A tensors (B, D).
                They get no gradient.
            code_prototypes: The :class:`PrototypeLayer` that scores ``code_features`` and the
                queue, such as a teacher's; for a sequence of heads, one for each. It gets no
                gradient. By default the module's own.
            sample_weight: (B,) weights of the samples in the codes and in the loss, bool or
                floating. A sample of weight 0 takes no part and does not enter the queue.
            return_details: Whether to return ``(loss, details)``.
            return_statistics: Whether to return ``(loss, statistics)``, those of the samples of
                this rank, in every form of the loss. With both, ``(loss, details, statistics)``.

        Returns:
            The loss, a scalar in float32 (float64 for float64 features or prototypes, other than a
            teacher's). With ``return_details`` also the :class:`SwAVDetails`, and with
            ``return_statistics`` the :class:`SwAVStatistics`; for a sequence of heads, tuples.
        """
        heads = self._heads()
        self._check_settings()
        _checks.boolean("return_details", return_details)
        _checks.boolean("return_statistics", return_statistics)
        least, last = max(2, self.num_code_views), heads[0].feature_dim
        views = _checks.views("features", features, "features", least=least, last=last)
        _checks.untransformed("features", views[0])
        code_views, code_heads = None, heads
        if code_features is not None:
            code_views = checked_code_views(code_features, self.num_code_views, views[0])
        if code_prototypes is not None:
            code_heads = checked_code_heads(code_prototypes, heads)
        if sample_weight is not None:
            _checks.weight("sample_weight", sample_weight, (views[0].shape[:1],), views[0])
        _checks.same_device("features", views[0], heads[0].weight, self)
        for part in (self, self.queue):
            if isinstance(part, OwnState):
                part._follow(views[0].device)
        group = None
        if isinstance(self.sinkhorn, SinkhornKnopp) or self.reduction == "global_mean":
            group = _checks.instance("sinkhorn", self.sinkhorn, SinkhornKnopp)._participants()
        requested = return_details or return_statistics
        repeated = is_recomputed(self.queue, self.freeze_steps, requested)
        if not repeated:
            record = partial(self._record, code_heads)
            self._agreement.require(record, group, views[0].device, advice=_ADVICE)

        batch = self._batch(
            features if isinstance(features, Tensor) else views,
            code_views,
            sample_weight,
            code_prototypes is not None,
            return_details,
            return_statistics,
        )
        mean_part = part_of_mean(batch, group) if self.reduction == "global_mean" else None
        priors = self._priors(views[0].device)
        of_heads = [Head(*parts) for parts in zip(heads, code_heads, priors, strict=True)]
        parts = (batch, of_heads, self.sinkhorn, self.loss)
        if isinstance(heads[0], ShardedPrototypeLayer):
            results = sharded_head_losses(*parts, group, memory=self.memory)
        else:
            results = head_losses(*parts, memory=self.memory)
        losses = [result.loss for result in results]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        if mean_part is not None:
            loss = loss * mean_part
        if repeated and self.queue is not None:  # whose features have changed
            loss = loss * math.nan

        if self.training and not repeated:
            if self.queue is not None:
                present = None if sample_weight is None else sample_weight != 0
                newest = batch.features if batch.code_features is None else batch.code_features
                self.queue.push(unit_rows(newest[: self.num_code_views].detach()), valid=present)
            self.steps.add_(1)
        if not requested:
            return loss
        several = isinstance(self.prototypes, nn.ModuleList)
        names = ["details"] * return_details + ["statistics"] * return_statistics
        extras = [tuple(getattr(result, name) for result in results) for name in names]
        return loss, *(extra if several else extra[0] for extra in extras)

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def _batch(
        self,
        features: Tensor | list[Tensor],
        code_views: list[Tensor] | None,
        sample_weight: Tensor | None,
        taught: bool,
        details: bool,
        statistics: bool,
    ) -> Batch:
        together, nan_rows = stacked(features, sample_weight)
        code_features = code_nan_rows = None
        if code_views is not None:
            with torch.no_grad():
                code_features, code_nan_rows = stacked(code_views, sample_weight)
        elif taught:  # by other prototypes alone
            code_features = together[: self.num_code_views].detach()
            code_nan_rows = None if nan_rows is None else nan_rows[: self.num_code_views]
        queued = queue_mask = None
        if self.queue is not None:
            queued = self.queue.features
            queue_mask = self.queue.valid & (self.steps >= self.queue_start)
        return Batch(
            features=together,
            nan_rows=nan_rows,
            num_code_views=self.num_code_views,
            code_features=code_features,
            code_nan_rows=code_nan_rows,
            sample_weight=sample_weight,
            queued=queued,
            queue_mask=queue_mask,
            frozen=self.steps < self.freeze_steps if self.freeze_steps else None,
            details=details,
            statistics=statistics,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SwAVLoss:
        self._priors(self.steps.device)  # A bad one is refused before anything moves.
        super()._apply(fn, recurse)
        self._priors(self.steps.device)  # If a compiled call moved them, it would compile again.
        return self

    def _priors(self, device: torch.device) -> list[Tensor | None]:
        """Return the relative masses of the prototypes of each head, moved to ``device`` once."""
        several = isinstance(self.prototypes, nn.ModuleList)
        priors = _checks.prototype_weights(
            self.prototype_weight, [head.num_prototypes for head in self._heads()], several, device
        )
        if any(prior is not None and prior.device != device for prior in priors):
            priors = [None if prior is None else prior.to(device) for prior in priors]
            if device.type != "meta":  # which would lose the values
                self.prototype_weight = priors if several else priors[0]
        return priors

    def check_ranks(self) -> None:
        """Compare settings and prototypes over all ranks, which must all make the call.

        Eager training does so automatically. Call it before a long run, and before compiled steps.
        It reads values on the host.

        Raises:
            ValueError: On all ranks, if something differs. The message names it and all values.
        """
        sinkhorn = _checks.instance("sinkhorn", self.sinkhorn, SinkhornKnopp)
        group = participants(sinkhorn.process_group, True)
        device = device_for(group, self.steps.device)
        record = partial(self._record, self._heads())
        self._agreement.require(record, group, device, advice=_ADVICE, again=True)

    def _check_settings(self) -> None:
        """Check the settings, at construction and again at each use."""
        _checks.positive_int("num_code_views", self.num_code_views)
        _checks.non_negative_int("queue_start", self.queue_start)
        _checks.non_negative_int("freeze_steps", self.freeze_steps)
        _checks.choice("memory", self.memory, ("full", "streamed", "auto"))
        _checks.choice("reduction", self.reduction, ("mean", "global_mean"))

    def _record(self, code_heads: Sequence[PrototypeLayer]) -> dict[str, Any]:
        """Return what must be the same on all ranks, as ``agreement.py`` compares it."""
        heads = self._heads()
        sizes: list[int | None] = [head.num_prototypes for head in heads[:_COMPARED_HEADS]]
        sizes += [None] * (_COMPARED_HEADS - len(sizes))
        others = [layer for layer, head in zip(code_heads, heads, strict=True) if layer is not head]
        priors = self._priors(heads[0].weight.device)
        return {
            "the number of heads": len(heads),
            "num_prototypes": sum(head.num_prototypes for head in heads),
            **{f"num_prototypes[{head}]": size for head, size in enumerate(sizes)},
            "the dtype of the prototypes": heads[0].weight.dtype,
            "feature_dim": heads[0].feature_dim,
            "num_code_views": self.num_code_views,
            "temperature": getattr(self.loss, "temperature", None),
            "queue_start": self.queue_start,
            "freeze_steps": self.freeze_steps,
            "reduction='global_mean'": self.reduction == "global_mean",
            "steps": self.steps,
            **self.sinkhorn._settings()._asdict(),
            _ONE_BY_ONE: len(heads) > 1 and not _checks.is_plainly(self.sinkhorn, SinkhornKnopp),
            # Shards of prototypes are parts of one matrix: there is nothing to compare.
            "the checksum of the prototypes": checksum_of_all(
                [head.weight for head in heads if not is_sharded(head.weight)]
            ),
            "the checksum of code_prototypes": checksum_of_all(
                [layer.weight for layer in others if not is_sharded(layer.weight)]
            ),
            "the checksum of prototype_weight": checksum_of_all(
                [None if prior is None else prior.double().unsqueeze(1) for prior in priors]
            ),
        }

    def _heads(self) -> list[PrototypeLayer]:
        several = isinstance(self.prototypes, nn.ModuleList)
        return list(self.prototypes) if several else [self.prototypes]

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"num_code_views={self.num_code_views}, queue_start={self.queue_start}, "
            f"freeze_steps={self.freeze_steps}, reduction={self.reduction!r}"
        )
