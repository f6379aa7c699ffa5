"""Errors of predictions of codes, and their residuals.

A prediction is softmax(S/τ), its target T has nonnegative entries and mass n = Σ_k T_k. The error
and its gradient are ::

    e = n · logsumexp(S/τ) - ⟨T, S⟩/τ
    ∂e/∂S = -(T - n · softmax(S/τ)) / τ

The residual T - n · softmax(S/τ) lies in the memory of the exponentials. Its entries are of the
order of 1. The backward pass applies the remaining factors in float32; in half precision they would
flush many entries to zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, on_cpu, scaled_sum

# The entries of a residual range from the mass of its target down to 1/K of it. With this largest
# entry, 1/K of it is in the range of float16 for every K that fits in memory. No scale is infinite.
LARGEST_RESIDUAL_IN_FLOAT16, LEAST_MASS_IN_FLOAT16 = 256.0, 2.0**-100

# A CPU finds the index of the largest entry of a row by the largest one of each chunk, if one of
# these sizes divides the row: 0.5 of the time at K = 3,000.
_SIZES_OF_CHUNKS = 128, 100, 96, 64


class Target(NamedTuple):
    """What some views predict.

    Attributes:
        views: The index of one view or of several.
        values: (b, K), T, in the dtype of the arithmetic; or (b,) int64, the index of the only
            entry of each row of T, which is n.
        mass: (b,), n, the row sums of T, in the dtype of the arithmetic, float32 or float64.
    """

    views: int | slice
    values: Tensor
    mass: Tensor


class ObservedRows(NamedTuple):
    """Memory for what the statistics need to know of each row.

    Attributes:
        nearest: (V, b) int64, the index of the largest entry of each row of scores, the first if
            several are.
        entropies: (V, b) of the predictions, in nats; not finite if the row of scores has a NaN,
            +inf, or -inf only.
        code_entropies: (A, b) of the codes; not finite if the row is not.
        code_usage: (K,), the sum over rows of the codes, zeros at first.
        weight: (b,), given, the weights in that sum.
    """

    nearest: Tensor
    entropies: Tensor
    code_entropies: Tensor
    code_usage: Tensor
    weight: Tensor


def prediction_errors(
    scores: Tensor,
    targets: Sequence[Target],
    inverse_temperature: float | Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    observed: ObservedRows | None = None,
    memory: Tensor | None = None,
) -> Tensor:
    """Return Σ_v [ n_v · logsumexp(S_v/τ) - ⟨T_v, S_v⟩/τ ] for some samples, (b,).

    Args:
        scores: (v, b, K), S of some views, of any floating dtype.
        targets: The targets of all these views.
        inverse_temperature: 1/τ.
        residual: (v, b, K), overwritten with T_v - n_v · softmax(S_v/τ); may be ``scores`` itself.
        scale: (b,), a factor of the residual, applied before it is rounded to its dtype.
        observed: ``nearest`` and ``entropies`` (v, b) are overwritten.
        memory: (v, b, K) in the dtype of the arithmetic, overwritten, if rows are observed.
    """
    dtype = targets[0].mass.dtype
    if observed is None:
        largest = scores.amax(dim=-1, keepdim=True).to(dtype)
    else:
        largest, nearest = _largest(scores)
        largest = largest.to(dtype)
        observed.nearest.copy_(nearest.squeeze(-1))
    shift = largest * -inverse_temperature
    if residual is not None and residual.dtype == dtype:
        logits = residual
    else:
        logits = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    scaled_sum(shift, scores, inverse_temperature, out=logits)  # at most 0, up to rounding
    agreements = [_agreement(target, logits[target.views]) for target in targets]
    exponentials = torch.exp(logits, out=logits if observed is None else memory)
    sums = exponentials.sum(dim=-1)  # (v, b)
    log_sums = sums.log()
    if observed is not None:
        # 0 · -inf is 0 here too.
        weighted = logits.mul_(exponentials).nansum(dim=-1).div_(sums)
        torch.sub(log_sums, weighted, out=observed.entropies)
    mass = _mass_of_views(targets, len(scores))  # (v, b)
    if residual is not None:
        factor = (mass / sums).unsqueeze(-1)
        for target in targets:
            views = target.views
            _residual(exponentials[views], target, factor[views], logits[views])
        if scale is not None:
            logits.mul_(scale.unsqueeze(-1))
        if logits is not residual:
            residual.copy_(logits)
    return _over_views(mass * log_sums, mass[0]) - reduce(torch.add, agreements)


def _mass_of_views(targets: Sequence[Target], views: int) -> Tensor:
    """Return the masses (v, b) of the targets of each view."""
    if len(targets) == 1:
        return targets[0].mass.expand(views, -1)
    counts = [
        1 if isinstance(target.views, int) else len(range(views)[target.views])
        for target in targets
    ]
    return torch.cat(
        [target.mass.expand(count, -1) for target, count in zip(targets, counts, strict=True)]
    )


def _agreement(target: Target, logits: Tensor) -> Tensor:
    """Return Σ_v ⟨T, logits_v⟩ of the views of a target, (b,)."""
    if target.values.is_floating_point():
        total = _over_views(logits, target.values)
        new = logits.dim() > total.dim() and len(logits) > 1  # and not a view
        # 0 · -inf is 0 here. What else is NaN makes the mass or the largest score NaN.
        return torch.mul(total, target.values, out=total if new else None).nansum(dim=-1)
    indices = target.values.unsqueeze(-1)
    return target.mass * logits.gather(-1, indices).squeeze(-1)


def _over_views(values: Tensor, like: Tensor) -> Tensor:
    """Return the sum of several views, or the values of a single one, of the shape of ``like``."""
    if values.dim() == like.dim():
        return values
    return values[0] if len(values) == 1 else values.sum(dim=0)


def _residual(exponentials: Tensor, target: Target, factor: Tensor, out: Tensor) -> None:
    """Write T - factor · exponentials to ``out``, which may be the exponentials."""
    if target.values.is_floating_point():
        torch.addcmul(target.values, exponentials, factor, value=-1, out=out)
    else:
        mass = target.mass.unsqueeze(-1)
        torch.mul(exponentials, -factor, out=out).scatter_add_(
            -1, target.values.unsqueeze(-1), mass
        )


def observe_codes(codes: Tensor | Sequence[Tensor], observed: ObservedRows, memory: Tensor) -> None:
    """Overwrite the entropies of A codes (b, K) and ``memory`` (b, K), and add to the usage."""
    for code, entropies in zip(codes, observed.code_entropies, strict=True):
        entropies.copy_(row_entropies(code, memory))
        weight = valid_weights(entropies, observed.weight).unsqueeze(-1)
        observed.code_usage.add_(torch.mul(code, weight, out=memory).nansum(dim=0))  # 0 · NaN is 0


def row_entropies(codes: Tensor, memory: Tensor | None = None) -> Tensor:
    """Return the entropy of each row of codes (..., K), in nats; not finite if the row is not."""
    masses = codes.sum(dim=-1)
    not_finite = masses - masses  # 0 or NaN
    # 0 · ln 0 is 0 here.
    return not_finite - torch.log(codes, out=memory).mul_(codes).nansum(dim=-1)


def valid_weights(entropies: Tensor, weight: Tensor) -> Tensor:
    """Return the weights of rows, (..., b), with zeros where an entropy is not finite."""
    return torch.where(entropies.isfinite(), weight, 0)


def _largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest entry of each row and its index, (..., 1), the first if several are."""
    size = next((size for size in _SIZES_OF_CHUNKS if scores.shape[-1] % size == 0), None)
    if size is None or not on_cpu(scores):
        return scores.max(dim=-1, keepdim=True)
    chunks = scores.reshape(-1, size)
    maxima = chunks.amax(dim=-1).view(*scores.shape[:-1], scores.shape[-1] // size)
    largest, chunk = maxima.max(dim=-1, keepdim=True)
    first = torch.arange(0, len(chunks), maxima.shape[-1], device=scores.device)
    entries = chunks.index_select(0, first + chunk.flatten())
    index = entries.view(*scores.shape[:-1], size).max(dim=-1, keepdim=True).indices
    return largest, chunk * size + index  # argmax takes twice as long


def residual_scale(mass: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the scale (b,) of residuals of ``dtype`` for targets of ``mass`` (b,), if any."""
    if dtype != torch.float16:
        return None
    mass = mass.where((mass > 0) & mass.isfinite(), 1)
    return LARGEST_RESIDUAL_IN_FLOAT16 / mass.clamp(min=LEAST_MASS_IN_FLOAT16)


def normalized_weights(sample_weight: Tensor | None, like: Tensor, pairs: int = 1) -> Tensor:
    """Return the weights (B,) of the samples of ``like`` (B, ...), of sum 1 / ``pairs``."""
    samples, dtype = len(like), at_least_float32(like.dtype)
    if sample_weight is None:
        return torch.full(
            (samples,), 1 / (max(samples, 1) * pairs), dtype=dtype, device=like.device
        )
    if samples == 0:
        return like.new_zeros((0,), dtype=dtype)
    weight = sample_weight.to(at_least_float32(sample_weight.dtype))
    largest = weight.amax()  # after division by it, no sum over- or underflows
    weight = (weight / torch.where(largest == 0, 1, largest)).to(dtype)
    total = weight.sum()
    return weight / torch.where(total == 0, 1, total * pairs)
