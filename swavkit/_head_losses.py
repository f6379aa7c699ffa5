"""The loss of one batch with each head: by calling the parts, or fused block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._checks import is_plainly
from swavkit._tensors import at_least_float32, autocast_disabled, product_dtype
from swavkit.distributed.collectives import rank_and_size, sum_over_ranks
from swavkit.fused.loss import fused_losses
from swavkit.prototypes import PrototypeLayer, unit_rows
from swavkit.sinkhorn import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["SwAVDetails"]

# memory="auto" calls the parts for up to so many scores of all views and heads, if there is no
# queue: fewer operations then save more than fewer bytes. torch.compile fuses the operations of the
# parts itself, and keeps the batch size symbolic in them, so there the limit is one of memory.
SCORES_OF_CALLED_PARTS, SCORES_OF_COMPILED_PARTS = 2**21, 2**28

# memory="auto" lets the fused route keep the kernels of the code views, if they take no more.
_BYTES_OF_KEPT_KERNELS = 2**30


class Batch(NamedTuple):
    """What every head needs to know of a training step.

    Attributes:
        features: (V, B, D), the code views first; finite where a sample is absent.
        nan_rows: (V, B, 1) bool, where scores count as NaN; or ``None``.
        num_code_views: A.
        sample_weight: (B,), or ``None``.
        queued: (A, L, D) features of the queue, or ``None``.
        queue_mask: (L,) bool, which of them take part; or ``None``.
        frozen: Bool scalar, whether prototypes get a gradient of zeros; or ``None`` for never.
    """

    features: Tensor
    nan_rows: Tensor | None
    num_code_views: int
    sample_weight: Tensor | None
    queued: Tensor | None
    queue_mask: Tensor | None
    frozen: Tensor | None

    def code_weight(self) -> Tensor | None:
        """Return the weights of the current and queued samples in the codes, (B + L,)."""
        if self.queue_mask is None:
            return self.sample_weight
        current = self.sample_weight
        if current is None:
            current = self.queue_mask.new_ones(self.features.shape[1])
        with autocast_disabled(current.device):  # which does not join two half precisions
            return torch.cat([current, self.queue_mask.to(current.dtype)])


class SwAVDetails(NamedTuple):
    """Intermediate results of :class:`SwAVLoss`, without gradient.

    Attributes:
        codes: (A, B, K) targets of the views, float32 (float64 for float64 scores).
        scores: (V, B, K) cosines of features and prototypes.
    """

    codes: Tensor
    scores: Tensor


class HeadLoss(NamedTuple):
    """The loss with one head, and what is known on the way if the parts were called."""

    loss: Tensor
    details: SwAVDetails | None = None


def head_losses(
    batch: Batch,
    heads: Sequence[PrototypeLayer],
    sinkhorn: nn.Module,
    loss: nn.Module,
    *,
    memory: str,
    details: bool,
) -> list[HeadLoss]:
    """Return the loss with each head; ``details`` asks for codes and scores."""
    observed = not (
        is_plainly(sinkhorn, SinkhornKnopp)
        and is_plainly(loss, SwappedPredictionLoss)
        and all(is_plainly(head, PrototypeLayer) for head in heads)
    )
    needs_parts = details or observed or getattr(sinkhorn, "validate", False)
    if memory == "streamed" and needs_parts:
        raise ValueError(
            "memory must be 'full' or 'auto' for details, for validated codes, and with a part "
            "that is replaced or has hooks, got 'streamed'"
        )
    prototypes = sum(head.num_prototypes for head in heads)
    if needs_parts or memory == "full" or (memory == "auto" and _is_small(batch, prototypes)):
        return _parts_called(batch, heads, sinkhorn, loss)
    assert isinstance(sinkhorn, SinkhornKnopp)
    return _fused(batch, heads, sinkhorn, loss, _BYTES_OF_KEPT_KERNELS if memory == "auto" else 0)


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
    own = weight.sum(dtype=at_least_float32(batch.features.dtype))
    total = sum_over_ranks(own.clone(), group)
    _, size = rank_and_size(group)
    return own * size / torch.where(total == 0, 1, total)


def _is_small(batch: Batch, prototypes: int) -> bool:
    """Tell whether ``memory="auto"`` calls the parts."""
    scores = batch.features.shape[0] * batch.features.shape[1] * prototypes
    if torch.compiler.is_compiling():
        queued = 0 if batch.queued is None else batch.queued.shape[:-1].numel() * prototypes
        return scores + queued <= SCORES_OF_COMPILED_PARTS
    return batch.queued is None and scores <= SCORES_OF_CALLED_PARTS


def _parts_called(
    batch: Batch, heads: Sequence[PrototypeLayer], sinkhorn: nn.Module, loss: nn.Module
) -> list[HeadLoss]:
    """Call the parts, as the docstring of ``SwAVLoss`` does."""
    scores = [head(batch.features, frozen=batch.frozen) for head in heads]  # (V, B, K) each
    if batch.nan_rows is not None:
        scores = [of_head.masked_fill(batch.nan_rows, torch.nan) for of_head in scores]
    with torch.no_grad():
        to_code = [
            _with_queued(batch, head, of_head) for head, of_head in zip(heads, scores, strict=True)
        ]
        weight = batch.code_weight()
        if is_plainly(sinkhorn, SinkhornKnopp):
            codes = sinkhorn(to_code, [weight] * len(heads))
        else:  # a hook or a module of the user's takes one problem at a time
            codes = [sinkhorn(of_head, weight) for of_head in to_code]
        samples = batch.features.shape[1]
        if batch.queued is not None:  # not a view, which would keep those of the queue
            codes = [code[:, :samples].clone() for code in codes]
    return [
        HeadLoss(loss(of_head, code, batch.sample_weight), SwAVDetails(code, of_head.detach()))
        for of_head, code in zip(scores, codes, strict=True)
    ]


def _with_queued(batch: Batch, head: PrototypeLayer, scores: Tensor) -> Tensor:
    """Return the scores that codes are computed on, (A, B + L, K), in float32 or better."""
    current = scores.detach()[: batch.num_code_views]
    current = current.to(at_least_float32(current.dtype))
    if batch.queued is None:
        return current
    return torch.cat([current, head(batch.queued).to(current.dtype)], dim=1)


def _fused(
    batch: Batch,
    heads: Sequence[PrototypeLayer],
    sinkhorn: SinkhornKnopp,
    loss: nn.Module,
    most_bytes_of_kernels: int,
) -> list[HeadLoss]:
    """Compute the losses block by block, without the scores of all views."""
    factors = [head._factors(batch.features, batch.frozen) for head in heads]
    features, _ = factors[0]
    group = sinkhorn._participants()
    sinkhorn._compare(
        group,
        batch.num_code_views * len(heads),
        sum(head.num_prototypes for head in heads),
        at_least_float32(product_dtype(features)),
        features.device,
    )
    losses = fused_losses(
        factors,
        None if batch.queued is None else unit_rows(batch.queued),
        num_code_views=batch.num_code_views,
        code_weight=batch.code_weight(),
        sample_weight=batch.sample_weight,
        temperature=_checks.positive_float("temperature", loss.temperature),
        settings=sinkhorn._settings(),
        group=group,
        most_bytes_of_kernels=most_bytes_of_kernels,
    )
    return [HeadLoss(value) for value in losses]
