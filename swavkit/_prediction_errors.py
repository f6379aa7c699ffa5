"""Errors of predictions of codes, and their residuals, for one view of some samples.

A prediction is softmax(S/τ), its target T has nonnegative entries and mass n = Σ_k T_k. The error
and its gradient are ::

    e = n · logsumexp(S/τ) - ⟨T, S⟩/τ
    ∂e/∂S = -(T - n · softmax(S/τ)) / τ

The residual T - n · softmax(S/τ) lies in the memory of the softmax. Its entries are of the order of
1. The backward pass applies the remaining factors in float32; in half precision they would flush
many entries to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, scaled_sum

# The entries of a residual range from the mass of its target down to 1/K of it. With this largest
# entry, 1/K of it is in the range of float16 for every K that fits in memory.
_LARGEST_RESIDUAL_IN_FLOAT16 = 256.0


def prediction_error(
    scores: Tensor,
    target: Tensor,
    mass: Tensor,
    inverse_temperature: float | Tensor,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Return n · logsumexp(S/τ) - ⟨T, S⟩/τ for some samples of one view, (b,).

    Args:
        scores: (b, K), S, of any floating dtype.
        target: (b, K), T, in the dtype of the arithmetic; or (b,) int64, the index of the only
            entry of each row of T, which is n.
        mass: (b,), n, the row sums of T, in the dtype of the arithmetic, float32 or float64.
        inverse_temperature: 1/τ.
        residual: (b, K), overwritten with T - n · softmax(S/τ); may be ``scores`` itself.
        scale: (b,), a factor of the residual, applied before it is rounded to its dtype.
    """
    largest = scores.amax(dim=-1, keepdim=True).to(mass.dtype)
    shift = largest * -inverse_temperature
    if residual is not None and residual.dtype == mass.dtype:
        logits = residual
    else:
        logits = mass.new_empty(scores.shape)
    scaled_sum(shift, scores, inverse_temperature, out=logits)  # at most 0, up to rounding
    indices = None if target.is_floating_point() else target.unsqueeze(-1)
    if indices is None:
        # 0 · -inf is 0 here. What else is NaN makes the mass or the largest score NaN.
        agreement = (target * logits).nansum(dim=-1)
    else:
        agreement = mass * logits.gather(-1, indices).squeeze(-1)
    predictions = torch.softmax(logits, dim=-1, out=logits)
    # logsumexp is the largest logit minus the logarithm of its softmax.
    log_sum = scaled_sum(shift, largest, inverse_temperature).squeeze(-1)
    log_sum -= predictions.amax(dim=-1).log()
    if residual is not None:
        if indices is None:
            torch.addcmul(target, predictions, mass.unsqueeze(-1), value=-1, out=logits)
        else:
            predictions.mul_(-mass.unsqueeze(-1)).scatter_add_(-1, indices, mass.unsqueeze(-1))
        if scale is not None:
            logits.mul_(scale.unsqueeze(-1))
        if logits is not residual:
            residual.copy_(logits)
    return mass * log_sum - agreement


def residual_scale(mass: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the scale (b,) of residuals of ``dtype`` for targets of ``mass`` (b,), if any."""
    if dtype != torch.float16:
        return None
    mass = mass.where((mass > 0) & mass.isfinite(), 1)
    return _LARGEST_RESIDUAL_IN_FLOAT16 / mass.clamp(min=2.0**-100)  # no infinite scale


def normalized_weights(sample_weight: Tensor | None, like: Tensor) -> Tensor:
    """Return the weights (B,) of the samples of ``like`` (B, ...), divided by their sum."""
    samples, dtype = len(like), at_least_float32(like.dtype)
    if sample_weight is None:
        return torch.full((samples,), 1 / max(samples, 1), dtype=dtype, device=like.device)
    if samples == 0:
        return like.new_zeros((0,), dtype=dtype)
    weight = sample_weight.to(at_least_float32(sample_weight.dtype))
    largest = weight.amax()  # after division by it, no sum over- or underflows
    weight = (weight / torch.where(largest == 0, 1, largest)).to(dtype)
    total = weight.sum()
    return weight / torch.where(total == 0, 1, total)
