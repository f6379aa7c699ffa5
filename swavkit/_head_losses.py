"""The loss of one batch with each head: by calling the parts, or fused block by block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._checks import is_plainly
from swavkit._tensors import at_least_float32, autocast_disabled, on_cpu, product_dtype
from swavkit.distributed.collectives import is_sharded, rank_and_size, sum_over_ranks
from swavkit.fused.loss import fused_losses
from swavkit.prototypes import PrototypeLayer, unit_rows
from swavkit.sinkhorn import SinkhornKnopp
from swavkit.sinkhorn.functional import Problem, solve
from swavkit.sinkhorn.marginals import marginal_error
from swavkit.swapped_prediction import SwappedPredictionLoss
from swavkit.swav_statistics import SwAVStatistics, cluster_statistics

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["SwAVDetails"]

# memory="auto" calls the parts for up to so many scores of all views and heads. On a CPU it does so
# if there is no queue: fewer operations then save more than fewer bytes. An accelerator and
# torch.compile gain from fewer operations at any size, so there the limit is one of memory.
SCORES_OF_PARTS_ON_CPU, SCORES_OF_PARTS = 2**20, 2**28

# memory="auto" lets the fused route keep the kernels of the code views, if they take no more.
_BYTES_OF_KEPT_KERNELS = 2**30


class Batch(NamedTuple):
    """What every head needs to know of a training step.

    Attributes:
        features: (V, B, D), the code views first; finite where a sample is absent.
        nan_rows: (V, B, 1) bool, where scores count as NaN; or ``None``.
        num_code_views: A.
        code_features: (A, B, D) of a teacher, finite where a sample is absent; ``None`` if the
            features of the code views give the codes themselves.
        code_nan_rows: (A, B, 1) bool, where scores of ``code_features`` count as NaN; or ``None``.
        sample_weight: (B,), or ``None``.
        queued: (A, L, D) features of the queue, or ``None``.
        queue_mask: (L,) bool, which of them take part; or ``None``.
        frozen: Bool scalar, whether prototypes get a gradient of zeros; or ``None`` for never.
        details: Whether codes and scores are requested.
        statistics: Whether statistics are requested.
    """

    features: Tensor
    nan_rows: Tensor | None
    num_code_views: int
    code_features: Tensor | None
    code_nan_rows: Tensor | None
    sample_weight: Tensor | None
    queued: Tensor | None
    queue_mask: Tensor | None
    frozen: Tensor | None
    details: bool
    statistics: bool

    def code_weight(self) -> Tensor | None:
        """Return the weights of the current and queued samples in the codes, (B + L,)."""
        if self.queue_mask is None:
            return self.sample_weight
        current = self.sample_weight
        if current is None:
            current = self.queue_mask.new_ones(self.features.shape[1])
        with autocast_disabled(current.device):  # which does not join two half precisions
            return torch.cat([current, self.queue_mask.to(current.dtype)])


class Head(NamedTuple):
    """The parts of one head.

    Attributes:
        prototypes: The layer that is trained.
        code_prototypes: The layer whose scores give the codes: the same one, or a teacher's.
        prototype_weight: (K,) relative masses of the prototypes, or ``None``.
    """

    prototypes: PrototypeLayer
    code_prototypes: PrototypeLayer
    prototype_weight: Tensor | None


class _CodesAndScores(NamedTuple):
    codes: Tensor
    scores: Tensor


class SwAVDetails(_CodesAndScores):
    """Intermediate results of :class:`SwAVLoss`, without gradient.

    Attributes:
        codes: (A, B, K) targets of the views, float32 (float64 for float64 scores).
        scores: (V, B, K) cosines of features and prototypes.
        marginal_error: (A,) :func:`~swavkit.marginal_error` of the codes of current and queued
            samples, over all ranks, if a ``tolerance`` is set; else ``None``. It is computed
            before ``hard`` or ``dtype`` rounds the codes, in float32 or better, and is above the
            tolerance if that was not reached. All ranks must then request details. It is an
            attribute but not a field, so the tuple unpacks to codes and scores. Copies, pickles
            and ``_replace`` keep it. Code that creates a new tuple from the fields loses
            it, such as ``torch.utils._pytree`` and therefore DDP with ``find_unused_parameters`` or
            ``static_graph``; a forward hook on the criterion inside DDP still gets it.
    """

    marginal_error: Tensor | None = None  # no field: the tuple has two

    def _replace(self, /, **fields: Any) -> SwAVDetails:
        """Return a copy with other fields."""
        replaced = super()._replace(**fields)
        replaced.marginal_error = self.marginal_error
        return replaced

    __replace__ = _replace  # of copy.replace, since Python 3.13


class HeadLoss(NamedTuple):
    """The loss with one head, and its details and statistics if they are requested."""

    loss: Tensor
    details: SwAVDetails | None = None
    statistics: SwAVStatistics | None = None


def head_losses(
    batch: Batch,
    heads: Sequence[Head],
    sinkhorn: nn.Module,
    loss: nn.Module,
    *,
    memory: str,
) -> list[HeadLoss]:
    """Return the loss with each head."""
    observed = not (
        is_plainly(sinkhorn, SinkhornKnopp)
        and is_plainly(loss, SwappedPredictionLoss)
        and all(is_plainly(layer, PrototypeLayer) for head in heads for layer in head[:2])
    )
    validated = getattr(sinkhorn, "validate", False)
    own_dtype = getattr(sinkhorn, "dtype", None) is not None
    needs_parts = batch.details or observed or validated or own_dtype
    if memory == "streamed" and needs_parts:
        raise ValueError(
            "memory must be 'full' or 'auto' for details, for validated codes or codes of a given "
            "dtype, and with a part that is replaced or has hooks, got 'streamed'"
        )
    prototypes = sum(head.prototypes.num_prototypes for head in heads)
    if needs_parts or memory == "full" or (memory == "auto" and _is_small(batch, prototypes)):
        return _parts_called(batch, heads, sinkhorn, loss)
    assert isinstance(sinkhorn, SinkhornKnopp)
    return _fused(batch, heads, sinkhorn, loss, _BYTES_OF_KEPT_KERNELS if memory == "auto" else 0)


def checked_code_views(
    code_features: Tensor | Sequence[Tensor], num_code_views: int, like: Tensor
) -> list[Tensor]:
    """Return the features that give the codes view by view, (B, D) ``like`` a view of features."""
    last = like.shape[-1]
    views = _checks.views("code_features", code_features, "features", least=1, last=last)
    if len(views) != num_code_views or len(views[0]) != len(like):
        raise ValueError(
            f"code_features must hold {num_code_views} views of {len(like)} samples, got "
            f"{len(views)} of {len(views[0])}"
        )
    _checks.same_device("code_features", views[0], like)
    return views


def checked_code_heads(
    code_prototypes: PrototypeLayer | Iterable[PrototypeLayer], heads: Sequence[PrototypeLayer]
) -> list[PrototypeLayer]:
    """Return the layers that score what gives the codes, one for each of ``heads``."""
    several = isinstance(code_prototypes, Iterable)
    given = list(code_prototypes) if isinstance(code_prototypes, Iterable) else [code_prototypes]
    if len(given) != len(heads):
        raise ValueError(
            f"code_prototypes must be one PrototypeLayer for each of {len(heads)} heads, got "
            f"{len(given)}"
        )
    for index, (layer, head) in enumerate(zip(given, heads, strict=True)):
        name = f"code_prototypes[{index}]" if several else "code_prototypes"
        _checks.instance(name, layer, PrototypeLayer)
        if (layer.num_prototypes, layer.feature_dim) != (head.num_prototypes, head.feature_dim):
            raise ValueError(
                f"{name} must have {head.num_prototypes} prototypes of {head.feature_dim} "
                f"features, got {layer.num_prototypes} of {layer.feature_dim}"
            )
        if layer._held != head._held:
            raise ValueError(
                f"{name} must be sharded like the prototypes, which hold {head._held} on this "
                f"rank, got {layer._held}"
            )
        _checks.same_device(name, layer.weight, head.weight)
        if is_sharded(layer._rows()) and is_plainly(layer, PrototypeLayer):  # else hooks gather it
            raise RuntimeError(
                f"{name} must have its whole weight on each rank, got a sharded one, as FSDP2 "
                f"keeps it; expected a call on all ranks between unshard() and reshard() of the "
                f"module that was given to fully_shard, or fully_shard of the PrototypeLayer itself"
            )
    return given


def stacked(
    views: Tensor | list[Tensor], sample_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the views (V, B, D) as one tensor, and the rows (V, B, 1) whose scores are NaN.

    An absent sample may hold NaN, which the product would spread to every gradient as 0 · NaN. Its
    features become zeros.
    """
    if not isinstance(views, Tensor):
        with autocast_disabled(views[0].device):  # which does not stack half precisions
            views = torch.stack(views)
    if sample_weight is None:
        return views, None
    finite = views.detach().isfinite().all(dim=-1, keepdim=True)
    nan_rows = (sample_weight == 0).unsqueeze(-1) & ~finite
    return views.masked_fill(nan_rows, 0), nan_rows


@torch.no_grad()
def part_of_mean(batch: Batch, group: ProcessGroup | None) -> Tensor | None:
    """Return the factor that makes the average of means over ranks the mean of all samples.

    It is ``None`` on one rank, and 0 on a rank without samples.
    """
    if group is None:
        return None
    weight = batch.sample_weight
    if weight is None:
        weight = batch.features.new_ones(batch.features.shape[1])
    own = weight.sum(dtype=torch.float64)  # in whose range is any sum of float32 weights
    total = sum_over_ranks(own.clone(), group)
    _, size = rank_and_size(group)
    part = own * size / torch.where(total == 0, 1, total)
    return part.to(at_least_float32(batch.features.dtype))


def _is_small(batch: Batch, prototypes: int) -> bool:
    """Tell whether ``memory="auto"`` calls the parts."""
    scores = batch.features.shape[0] * batch.features.shape[1] * prototypes
    if on_cpu(batch.features):
        return batch.queued is None and scores <= SCORES_OF_PARTS_ON_CPU
    queued = 0 if batch.queued is None else batch.queued.shape[:-1].numel() * prototypes
    return scores + queued <= SCORES_OF_PARTS


def _parts_called(
    batch: Batch, heads: Sequence[Head], sinkhorn: nn.Module, loss: nn.Module
) -> list[HeadLoss]:
    """Call the parts, as the docstring of ``SwAVLoss`` does."""
    scores = [
        _masked(head.prototypes(batch.features, frozen=batch.frozen), batch.nan_rows)
        for head in heads
    ]  # (V, B, K) each
    with torch.no_grad():
        to_code = [
            _scores_to_code(batch, head, of_head.detach())
            for head, of_head in zip(heads, scores, strict=True)
        ]
        weight = batch.code_weight()
        priors = [head.prototype_weight for head in heads]
        if is_plainly(sinkhorn, SinkhornKnopp):
            codes = sinkhorn(to_code, [weight] * len(heads), priors)
        else:  # a hook or a module of the user's takes one problem at a time
            codes = [
                sinkhorn(of_head, weight) if prior is None else sinkhorn(of_head, weight, prior)
                for of_head, prior in zip(to_code, priors, strict=True)
            ]
        errors: list[Tensor | None] = [None] * len(heads)
        if batch.details and isinstance(sinkhorn, SinkhornKnopp) and sinkhorn.tolerance is not None:
            errors = list(_marginal_errors(to_code, codes, weight, priors, sinkhorn))
        samples = batch.features.shape[1]
        if batch.queued is not None:  # not a view, which would keep those of the queue
            codes = [code[:, :samples].clone() for code in codes]
    results = []
    for of_head, code, error in zip(scores, codes, errors, strict=True):
        of_codes = SwAVDetails(code, of_head.detach())
        if error is not None:
            of_codes.marginal_error = error
        seen = None
        if batch.statistics:
            seen = cluster_statistics(
                of_codes.scores,
                code,
                temperature=_temperature(loss),
                sample_weight=batch.sample_weight,
            )
        results.append(HeadLoss(loss(of_head, code, batch.sample_weight), of_codes, seen))
    return results


def _temperature(loss: nn.Module) -> float | Tensor:
    """Return the temperature of a loss, which may be a module of the user's."""
    if not hasattr(loss, "temperature"):
        raise TypeError(
            f"loss must have a temperature for the entropy of the predictions, which "
            f"return_statistics requests, got {type(loss).__name__} without one"
        )
    return _checks.positive_setting("temperature", loss.temperature)


def _masked(scores: Tensor, nan_rows: Tensor | None) -> Tensor:
    return scores if nan_rows is None else scores.masked_fill(nan_rows, torch.nan)


def _scores_to_code(batch: Batch, head: Head, scores: Tensor) -> Tensor:
    """Return the scores that codes are computed on, (A, B + L, K), in float32 or better."""
    if batch.code_features is None:
        current = scores[: batch.num_code_views]
    else:
        current = _masked(head.code_prototypes(batch.code_features), batch.code_nan_rows)
    current = current.to(at_least_float32(current.dtype))
    if batch.queued is None:
        return current
    return torch.cat([current, head.code_prototypes(batch.queued).to(current.dtype)], dim=1)


def _marginal_errors(
    scores: Sequence[Tensor],
    codes: Sequence[Tensor],
    weight: Tensor | None,
    priors: Sequence[Tensor | None],
    sinkhorn: SinkhornKnopp,
) -> Iterator[Tensor]:
    """Yield the error of each head's ``codes``, or of the codes of ``scores`` before rounding."""
    settings, group = sinkhorn._settings(), sinkhorn._participants()
    if settings.hard or settings.dtype is not None:  # the iterations once more, without rounding
        problems = [
            Problem(each, weight, prior) for each, prior in zip(scores, priors, strict=True)
        ]
        codes = solve(problems, settings._replace(hard=False, dtype=None, validate=False), group)
    for code, prior in zip(codes, priors, strict=True):
        yield marginal_error(
            code,
            sample_weight=weight,
            prototype_weight=prior,
            process_group=group,
            synchronize=group is not None,
        )


def _fused(
    batch: Batch,
    heads: Sequence[Head],
    sinkhorn: SinkhornKnopp,
    loss: nn.Module,
    most_bytes_of_kernels: int,
) -> list[HeadLoss]:
    """Compute the losses block by block, without the scores of all views."""
    factors = [head.prototypes._factors(batch.features, batch.frozen) for head in heads]
    code_factors = None
    if batch.code_features is not None:
        with torch.no_grad():
            code_factors = [
                head.code_prototypes._factors(batch.code_features, None) for head in heads
            ]
    features, _ = (code_factors or factors)[0]
    settings = sinkhorn._settings()
    temperature = _checks.positive_setting("temperature", loss.temperature)
    _checks.known_setting("epsilon", settings.epsilon, features.device)
    _checks.known_setting("temperature", temperature, features.device)
    group = sinkhorn._participants()
    priors = [head.prototype_weight for head in heads]
    sinkhorn._compare(
        group,
        batch.num_code_views * len(heads),
        sum(head.prototypes.num_prototypes for head in heads),
        at_least_float32(product_dtype(features)),
        features.device,
        any(prior is not None for prior in priors),
    )
    losses = fused_losses(
        factors,
        code_factors,
        None if batch.queued is None else unit_rows(batch.queued),
        num_code_views=batch.num_code_views,
        code_weight=batch.code_weight(),
        sample_weight=batch.sample_weight,
        prototype_weights=priors,
        temperature=temperature,
        settings=settings,
        group=group,
        most_bytes_of_kernels=most_bytes_of_kernels,
        statistics=batch.statistics,
    )
    return [HeadLoss(value, statistics=seen) for value, seen in losses]
