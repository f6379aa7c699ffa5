"""The loss of ``SwAVLoss`` with each of its heads, which ask the other processes together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._checks import is_plainly
from swavkit._details import SwAVDetails
from swavkit._tensors import at_least_float32, autocast_disabled, product_dtype
from swavkit.distributed.collectives import sum_over_ranks
from swavkit.fused.loss import streamed_losses
from swavkit.prototypes import PrototypeLayer, product, unit_rows
from swavkit.sinkhorn.module import SinkhornKnopp
from swavkit.swapped_prediction import SwappedPredictionLoss, loss_of_factors

# Unless told otherwise, this much memory may be spent so as not to compute scores again: those of
# all views, and codes; or where that is too little, P of the code views.
_BYTES_OF_FULL_MEMORY = 2**30


def losses_of_heads(
    criterion: Any,
    heads: Sequence[PrototypeLayer],
    features: Tensor,
    around: Tensor | None,
    sample_weight: Tensor | None,
    rider: Tensor | None,
    return_details: bool,
) -> list[tuple[Tensor, SwAVDetails | None]]:
    """Return the loss with each head, and if asked for its codes and scores.

    Args:
        criterion: The ``SwAVLoss``, whose settings, queue and counter are read.
        heads: Its prototypes.
        features: (V, B, D); finite where a sample is absent.
        around: (V, B, 1), where the scores of the features count as NaN; or ``None``.
        sample_weight: (B,), or ``None``.
        rider: A small tensor to be summed over the processes along with the codes, in place.
        return_details: Whether to return codes (A, B, K) and scores (V, B, K) for sure.
    """
    frozen = criterion.steps < criterion.freeze_steps if criterion.freeze_steps else None
    code_weight = _code_weight(criterion, features.shape[1], sample_weight)
    unobserved = is_plainly(criterion.sinkhorn, SinkhornKnopp) and is_plainly(
        criterion.loss, SwappedPredictionLoss
    )
    shown = [not (unobserved and is_plainly(head, PrototypeLayer)) for head in heads]
    if _streams(criterion, heads, features, return_details or any(shown)):
        pairs = [head._factors(features, frozen) for head in heads]
        losses = _streamed(criterion, pairs, code_weight, sample_weight, rider)
        return [(loss, None) for loss in losses]

    # Features times their factor would leave the range of float16 in a batch of thousands.
    in_float16 = product_dtype(features) == torch.float16
    factors: list[tuple[Tensor, Tensor] | None] = []
    scores = []
    for head, is_shown in zip(heads, shown, strict=True):
        pair = None
        if not (is_shown or in_float16):
            pair = head._factors(features, frozen)
        of_head = head(features, frozen=frozen) if pair is None else product(*pair)  # (V, B, K)
        factors.append(pair)
        scores.append(of_head if around is None else of_head.masked_fill(around, torch.nan))
    codes = _codes(criterion, heads, scores, code_weight, rider)
    losses = []
    for pair, of_head, code in zip(factors, scores, codes, strict=True):
        if pair is None:
            losses.append(criterion.loss(of_head, code, sample_weight))
            continue
        losses.append(
            loss_of_factors(
                *pair,
                of_head,
                code,
                temperature=_checks.positive_float("temperature", criterion.loss.temperature),
                sample_weight=sample_weight,
                residual=None if return_details else of_head,
            )
        )
    if return_details and criterion.queue is not None:
        codes = [code.clone() for code in codes]  # not a view of those of the queue
    details = [
        SwAVDetails(code, of_head.detach()) for code, of_head in zip(codes, scores, strict=True)
    ]
    return list(zip(losses, details, strict=True))


def _streams(
    criterion: Any, heads: Sequence[PrototypeLayer], features: Tensor, shown: bool
) -> bool:
    """Tell whether to compute the losses block by block; not if somebody sees scores or codes."""
    possible = not shown and not criterion.sinkhorn.validate
    if criterion.memory == "streamed" and not possible:
        raise ValueError(
            "memory must be 'full' or 'auto' for details, for validated codes, and with a part "
            "that is replaced or has hooks, got 'streamed'"
        )
    views, samples, _ = features.shape
    code_views, queued = criterion.num_code_views, 0
    if criterion.queue is not None:
        queued = criterion.queue.length
    rows = views * samples + code_views * (samples + queued)  # scores, and codes
    if queued:  # scores of the queue, and behind those of the code views
        rows += code_views * (queued + samples + queued)
    if product_dtype(features).itemsize < 4:  # those of the code views in float32
        rows += code_views * samples
    prototypes = sum(head.num_prototypes for head in heads)
    size = rows * prototypes * at_least_float32(features.dtype).itemsize
    large = size > _BYTES_OF_FULL_MEMORY
    return possible and (criterion.memory == "streamed" or (criterion.memory == "auto" and large))


def _streamed(
    criterion: Any,
    factors: Sequence[tuple[Tensor, Tensor]],
    code_weight: Tensor | None,
    sample_weight: Tensor | None,
    rider: Tensor | None,
) -> list[Tensor]:
    """Return the losses, of which nothing else is known."""
    sinkhorn, queue = criterion.sinkhorn, criterion.queue
    features, prototypes = factors[0][0], sum(len(directions) for _, directions in factors)
    shape, dtype = (criterion.num_code_views, prototypes), product_dtype(features)
    sinkhorn._compare(shape, at_least_float32(dtype), features.device)
    settings = sinkhorn._settings()._asdict()
    del settings["validate"]
    return streamed_losses(
        factors,
        None if queue is None else unit_rows(queue.features),
        num_code_views=criterion.num_code_views,
        code_weight=code_weight,
        sample_weight=sample_weight,
        temperature=_checks.positive_float("temperature", criterion.loss.temperature),
        group=sinkhorn._participants(),
        rider=rider,
        most_bytes_of_p=_BYTES_OF_FULL_MEMORY if criterion.memory == "auto" else 0,
        **settings,
    )


@torch.no_grad()
def _codes(
    criterion: Any,
    heads: Sequence[PrototypeLayer],
    scores: Sequence[Tensor],
    code_weight: Tensor | None,
    rider: Tensor | None,
) -> list[Tensor]:
    """Return each head's codes of the current samples, (A, B, K), computed along with the queue."""
    to_code = []
    for head, of_head in zip(heads, scores, strict=True):
        current = of_head.detach()[: criterion.num_code_views]
        current = current.to(at_least_float32(current.dtype))  # so that the codes stay float32
        if criterion.queue is not None:
            recent = head(criterion.queue.features).to(current.dtype)
            current = torch.cat([current, recent], dim=1)
        to_code.append(current)
    codes = _solved(criterion.sinkhorn, to_code, code_weight, rider)
    samples = scores[0].shape[1]
    return [of_head[:, :samples] for of_head in codes]


def _solved(
    sinkhorn: nn.Module, scores: Sequence[Tensor], weight: Tensor | None, rider: Tensor | None
) -> list[Tensor]:
    """Return the codes of the scores of each head, found in step wherever that is possible."""
    if is_plainly(sinkhorn, SinkhornKnopp):
        return sinkhorn._in_step(scores, weight, rider=rider)  # type: ignore[operator, no-any-return]
    if rider is not None:
        rider.copy_(sum_over_ranks(rider.clone(), sinkhorn._participants()))  # type: ignore[operator]
    return [sinkhorn(of_head, weight) for of_head in scores]


@torch.no_grad()
def _code_weight(criterion: Any, samples: int, sample_weight: Tensor | None) -> Tensor | None:
    """Return the weights in the codes: of the current samples and then of the queue's."""
    queue = criterion.queue
    if queue is None:
        return sample_weight
    takes_part = queue.valid & (criterion.steps >= criterion.queue_start)
    present = takes_part.new_ones(samples) if sample_weight is None else sample_weight
    with autocast_disabled(present.device):  # which would not join half precisions
        return torch.cat([present, takes_part.to(present.dtype)])
