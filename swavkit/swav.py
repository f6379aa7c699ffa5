"""SwAV as one module: the parts, wired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._agreement import Agreement
from swavkit._details import SwAVDetails
from swavkit._distributed import participants, share_of_mean, sum_over_ranks
from swavkit._hooks import is_plainly
from swavkit._precision import at_least_float32, product_dtype
from swavkit._recomputation import Recomputation, keeping_what_it_saves
from swavkit._record import ADVICE, record
from swavkit.feature_queue import FeatureQueue
from swavkit.prototypes import PrototypeLayer, product, unit_rows
from swavkit.sharded_prototypes import ShardedPrototypeLayer, layer_class, losses_of_shards
from swavkit.sinkhorn import SinkhornKnopp
from swavkit.streaming import streamed_loss
from swavkit.swapped_prediction import SwappedPredictionLoss, loss_of_factors

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup

__all__ = ["SwAVDetails", "SwAVLoss"]

# A head whose scores and codes would take more than that is streamed, unless told otherwise.
_BYTES_OF_FULL_MEMORY = 2**30


class SwAVLoss(nn.Module):
    """The SwAV loss of the features of several views, with its prototypes and its queue.

    It is the parts, wired; with a queue and nothing else switched on, a training step is::

        scores = [prototypes(view) for view in features]
        recent = prototypes(queue.features)
        codes = sinkhorn(cat([scores[:A], recent], dim=1), cat([ones(B), queue.valid]))[:, :B]
        value = loss(scores, codes)
        queue.push(unit_rows(features[:A]))

    While nobody looks at the parts, by hooks or by asking for details, the gradient of the scores
    goes to features and prototypes without being held: the same numbers, with one matrix of the
    size of the scores instead of three.

    Parameters and state belong to the module: give its parameters to the optimizer, save its
    ``state_dict()``, and in a distributed job wrap it in DDP or FSDP2, alone or inside the model.
    Left bare, prototypes would drift apart: they and the settings are compared over processes at
    the 1st, 2nd, 4th, 8th ... training call that is not compiled, and by :meth:`check_ranks`.

    Args:
        feature_dim: D, the number of features.
        num_prototypes: K, the number of prototypes; or a sequence of numbers for as many heads,
            each with prototypes and codes of its own: the loss is the mean over heads.
        num_code_views: A, how many of the views, the first ones, give codes.
        temperature: The softmax temperature τ of the predictions.
        epsilon: The entropy temperature ε of the codes.
        iterations: The Sinkhorn-Knopp iterations of the codes.
        queue_length: The slots of the feature queue, per process and code view; 0 for no queue.
        queue_start: For how many training steps the queue only fills. From then on, and not before
            the second step, codes are computed on the current features and the queue's.
        freeze_steps: For how many training steps the prototypes get a gradient of zeros. Weight
            decay may rescale them meanwhile, which changes no score; Adam's coupled decay can turn
            them, and so can SGD with momentum and a decay of several per cent a step.
        memory: ``"full"`` holds the scores of all views; ``"streamed"`` computes them again block
            by block, with the same result, and holds none; ``"auto"`` streams where scores and
            codes would take more than 1 GiB. Details, validated codes, and a part that is
            replaced or has hooks need ``"full"`` or ``"auto"``.
        reduction: ``"mean"``: over the samples of this process. ``"global_mean"``, for batches of
            different sizes: scaled so that the mean over processes, which DDP makes of gradients,
            is the mean over all samples of those that share codes. Where a call does not
            synchronise, both are the same.
        shard_prototypes: Whether each process keeps a part of the prototypes only, for K that one
            device should not hold: see "Sharded prototypes" in the documentation. One process alone
            keeps all.
        process_group: The processes that share the batch for codes; the default group if ``None``.
        synchronize: Whether to share the batch for codes with other processes in training mode;
            ``"always"`` for ``eval()`` too, where then all processes must make the call.
        prototype_gradient: How the norm of the stored prototypes is differentiated, see
            :class:`PrototypeLayer`.
        queue_dtype: In which floating dtype the queue stores features, see :class:`FeatureQueue`.

    Attributes:
        prototypes: The :class:`PrototypeLayer`; for a sequence of numbers, of length 1 too, a
            ``ModuleList`` of them.
        sinkhorn: The :class:`SinkhornKnopp`.
        loss: The :class:`SwappedPredictionLoss`.
        queue: The :class:`FeatureQueue`, or ``None`` without one.
        steps: int64 scalar, the training steps so far. A forward in ``eval()`` changes no state.

    Raises:
        TypeError: If a setting or an input is of the wrong type.
        ValueError: If a setting is out of range, a shape or device does not fit, or settings or
            prototypes differ between processes.
        RuntimeError: In a backward pass with ``create_graph=True``: there is no second derivative.

    Example:
        >>> criterion = SwAVLoss(feature_dim=16, num_prototypes=10)
        >>> features = torch.randn(4, 8, 16, requires_grad=True)  # 4 views of 8 images, 2 full-size
        >>> loss = criterion(features)
        >>> loss.backward()
        >>> loss.shape, features.grad.shape
        (torch.Size([]), torch.Size([4, 8, 16]))
    """

    steps: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_prototypes: int | Sequence[int],
        *,
        num_code_views: int = 2,
        temperature: float = 0.1,
        epsilon: float = 0.05,
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
    ) -> None:
        super().__init__()
        self.num_code_views = _checks.positive_int("num_code_views", num_code_views)
        queue_length = _checks.non_negative_int("queue_length", queue_length)
        self.queue_start = _checks.non_negative_int("queue_start", queue_start)
        self.freeze_steps = _checks.non_negative_int("freeze_steps", freeze_steps)
        _checks.choice("memory", memory, ("full", "streamed", "auto"))
        self.memory = memory
        _checks.choice("reduction", reduction, ("mean", "global_mean"))
        self.reduction = reduction
        self.prototypes: PrototypeLayer | nn.ModuleList
        layer = layer_class(shard_prototypes, process_group, synchronize)
        if isinstance(num_prototypes, (list, tuple)):
            sizes = _checks.positive_ints("num_prototypes", num_prototypes)
            self.prototypes = nn.ModuleList(
                layer(feature_dim, size, gradient=prototype_gradient) for size in sizes
            )
        else:
            self.prototypes = layer(feature_dim, num_prototypes, gradient=prototype_gradient)
        self.sinkhorn = SinkhornKnopp(
            epsilon, iterations, process_group=process_group, synchronize=synchronize
        )
        self.loss = SwappedPredictionLoss(temperature)
        self.queue = None
        if queue_length:
            self.queue = FeatureQueue(queue_length, feature_dim, num_code_views, dtype=queue_dtype)
        self._agreement = Agreement(repeatedly=True)  # prototypes may drift apart late
        self._recomputation = Recomputation()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: Literal[True],
    ) -> tuple[Tensor, SwAVDetails | tuple[SwAVDetails, ...]]: ...

    @keeping_what_it_saves
    def forward(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        sample_weight: Tensor | None = None,
        return_details: bool = False,
    ) -> Tensor | tuple[Tensor, SwAVDetails | tuple[SwAVDetails, ...]]:
        """Return the loss of one batch; in training mode count the step and fill the queue.

        Args:
            features: (V, B, D) features of V views of B images, of any norm, or a sequence of V
                tensors (B, D); the code views first.
            sample_weight: (B,) weights of the samples in the codes and in the loss, bool or
                floating. A sample of weight 0 takes no part and does not enter the queue.
            return_details: Whether to return ``(loss, details)``.

        Returns:
            The loss, a scalar in float32 (float64 for float64 features), reduced as ``reduction``
            says; with ``return_details`` also the :class:`SwAVDetails`, or for a sequence of heads
            a tuple of them, one for each.
        """
        heads = self._heads()
        views = _checks.views(
            "features",
            features,
            "features",
            least=max(2, self.num_code_views),
            last=heads[0].feature_dim,
        )
        if sample_weight is not None:
            _checks.weight("sample_weight", sample_weight, (views[0].shape[:1],), views[0])
        _checks.same_device("features", views[0], heads[0].weight)
        group = None
        if isinstance(self.sinkhorn, SinkhornKnopp) or self.reduction == "global_mean":
            group = _checks.instance("sinkhorn", self.sinkhorn, SinkhornKnopp)._participants()
        repeated = self._recomputation.detected(self.queue, self.freeze_steps, return_details)
        if not repeated:
            self._agreement.require(self._record, group, views[0].device, advice=ADVICE)

        together = features if isinstance(features, Tensor) else torch.stack(views)  # (V, B, D)
        around = None
        if sample_weight is not None:
            # An absent sample may hold NaN. In the product that would reach every gradient, as
            # 0 · NaN, so it goes around the product.
            finite = together.detach().isfinite().all(dim=-1, keepdim=True)
            around = (sample_weight == 0).unsqueeze(-1) & ~finite  # (V, B, 1)
            together = together.masked_fill(around, 0)
        shards = isinstance(heads[0], ShardedPrototypeLayer)
        own = rider = None
        if self.reduction == "global_mean" and group is not None:
            weights = together.new_ones(len(views[0])) if sample_weight is None else sample_weight
            own = weights.detach().sum(dtype=at_least_float32(together.dtype))
            rider = own.clone()  # to be summed over the processes along with the first codes
            if shards:
                rider = sum_over_ranks(rider, group)
        if shards:
            parts = losses_of_shards(self, heads, together, sample_weight, group, return_details)
        else:
            parts = [
                self._loss_of_head(
                    head, together, around, sample_weight, return_details, None if place else rider
                )
                for place, head in enumerate(heads)
            ]
        losses, details = zip(*parts, strict=True)
        loss: Tensor = losses[0] if len(heads) == 1 else torch.stack(losses).mean()
        if own is not None and rider is not None:
            loss = loss * share_of_mean(own, rider, group)

        if self.training and not repeated:
            if self.queue is not None:
                present = None if sample_weight is None else sample_weight != 0
                newest = [unit_rows(view.detach()) for view in views[: self.num_code_views]]
                self.queue.push(newest, valid=present)
            self.steps.add_(1)
        if not return_details:
            return loss
        return loss, details if isinstance(self.prototypes, nn.ModuleList) else details[0]

    def check_ranks(self) -> None:
        """Compare settings and prototypes with those of the other processes, which must all call.

        In training that happens by itself, see above; this is for before a long run, and for a
        compiled step, in which it does not. Reads values on the host.

        Raises:
            ValueError: If something differs, on all processes; the text names it and all values.
        """
        sinkhorn = _checks.instance("sinkhorn", self.sinkhorn, SinkhornKnopp)
        group = participants(sinkhorn.process_group, True)
        self._agreement.require(self._record, group, self.steps.device, advice=ADVICE, again=True)

    def _record(self) -> dict[str, Any]:
        return record(self, self._heads(), self.sinkhorn._settings()._asdict())

    def _heads(self) -> list[PrototypeLayer]:
        several = isinstance(self.prototypes, nn.ModuleList)
        return list(self.prototypes) if several else [self.prototypes]  # type: ignore[arg-type, list-item]

    def _loss_of_head(
        self,
        head: PrototypeLayer,
        features: Tensor,
        around: Tensor | None,
        sample_weight: Tensor | None,
        return_details: bool,
        rider: Tensor | None,
    ) -> tuple[Tensor, SwAVDetails | None]:
        """Return the loss with one layer of prototypes.

        Where ``around`` (V, B, 1) is true, the scores of ``features`` (V, B, D) count as NaN. The
        scores in the details are only there if they are asked for. ``rider`` is summed over the
        processes, in place.
        """
        frozen = self.steps < self.freeze_steps if self.freeze_steps else None
        unobserved = all(
            is_plainly(part, kind)
            for part, kind in (
                (head, PrototypeLayer),
                (self.sinkhorn, SinkhornKnopp),
                (self.loss, SwappedPredictionLoss),
            )
        )
        if self._streams(head, features, unobserved, return_details):
            recent = None if self.queue is None else unit_rows(self.queue.features)
            factors = head._factors(features, frozen)
            shape, dtype = (self.num_code_views, head.num_prototypes), product_dtype(factors[0])
            self.sinkhorn._compare(shape, at_least_float32(dtype), features.device)
            settings = self.sinkhorn._settings()._asdict()
            del settings["validate"]
            loss = streamed_loss(
                *factors,
                recent,
                num_code_views=self.num_code_views,
                code_weight=self._code_weight(features.shape[1], sample_weight),
                sample_weight=sample_weight,
                temperature=self.loss.temperature,
                group=self.sinkhorn._participants(),
                rider=rider,
                **settings,
            )
            return loss, None
        # Features times their factor would leave the range of float16 in a batch of thousands.
        fused = unobserved and product_dtype(features) != torch.float16
        if fused:
            factors = head._factors(features, frozen)
            scores = product(*factors)
        else:
            scores = head(features, frozen=frozen)  # (V, B, K)
        if around is not None:
            scores = scores.masked_fill(around, torch.nan)
        constant = scores.detach()
        codes = self._codes(head, constant[: self.num_code_views], sample_weight, rider)
        if fused:
            loss = loss_of_factors(
                *factors,
                constant,
                codes,
                temperature=self.loss.temperature,
                sample_weight=sample_weight,
                residual=None if return_details else constant,
            )
        else:
            loss = self.loss(scores, codes, sample_weight)
        return loss, SwAVDetails(codes, constant)

    def _streams(
        self, head: PrototypeLayer, features: Tensor, unobserved: bool, return_details: bool
    ) -> bool:
        """Tell whether to compute the loss of a head block by block."""
        possible = unobserved and not return_details and not self.sinkhorn.validate
        if self.memory == "streamed" and not possible:
            raise ValueError(
                "memory must be 'full' or 'auto' for details, for validated codes, and with a part "
                "that is replaced or has hooks, got 'streamed'"
            )
        views, samples, _ = features.shape
        queued = 0 if self.queue is None else self.queue.length
        rows = views * samples + self.num_code_views * (samples + queued)  # scores, and codes
        if queued:  # scores of the queue, and behind those of the code views
            rows += self.num_code_views * (queued + samples + queued)
        if product_dtype(features).itemsize < 4:  # those of the code views in float32
            rows += self.num_code_views * samples
        size = rows * head.num_prototypes * at_least_float32(features.dtype).itemsize
        large = size > _BYTES_OF_FULL_MEMORY
        return possible and (self.memory == "streamed" or (self.memory == "auto" and large))

    @torch.no_grad()
    def _codes(
        self,
        head: PrototypeLayer,
        scores: Tensor,
        sample_weight: Tensor | None,
        rider: Tensor | None,
    ) -> Tensor:
        """Return the codes of the current samples, (A, B, K), computed along with the queue."""
        scores = scores.to(at_least_float32(scores.dtype))  # so that the codes stay float32
        solve = self.sinkhorn if rider is None else partial(self.sinkhorn._with, rider)
        samples = scores.shape[1]
        if self.queue is not None:
            recent = head(self.queue.features).to(scores.dtype)
            scores = torch.cat([scores, recent], dim=1)
        codes: Tensor = solve(scores, self._code_weight(samples, sample_weight))
        return codes[:, :samples]

    def _code_weight(self, samples: int, sample_weight: Tensor | None) -> Tensor | None:
        """Return the weights in the codes: of the current samples and then of the queue's."""
        if self.queue is None:
            return sample_weight
        takes_part = self.queue.valid & (self.steps >= self.queue_start)
        present = takes_part.new_ones(samples) if sample_weight is None else sample_weight
        return torch.cat([present, takes_part.to(present.dtype)])

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"num_code_views={self.num_code_views}, queue_start={self.queue_start}, "
            f"freeze_steps={self.freeze_steps}, reduction={self.reduction!r}"
        )
