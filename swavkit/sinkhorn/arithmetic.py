"""Arithmetic on scores and P that no finite number takes out of range, and no long row off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swavkit._tensors import on_cpu

# Scores are multiplied by this before anything else, so that no difference of a few overflows, and
# divided by ε last: what overflows then is too far below the largest exponent of its row to count.
# Where ε is above 1 they are first divided by it, so that what is added to them does not either.
_SCALE = 2.0**-3

# Multiples of the sum of up to 2^23 scores: it overflows only if one of them is not finite.
_SCALE_OF_A_SUM = 2.0**-24

# torch spreads a batch of products with a vector over the threads of a CPU, and a single one not.
PARTS_OF_A_PRODUCT = 8
_ENTRIES_OF_A_PART = 2**15

# Longer rows are multiplied with a vector in parts: the sum of a part is as accurate on a CPU as
# the rounding of its terms, and that of a million terms is not.
_PROTOTYPES_OF_A_PRODUCT = 2**14


def over_prototypes(entries: Tensor, u: Tensor) -> Tensor:
    """Return Σ_j P_ij u_j, (..., b), for entries (..., b, K) and u (..., K)."""
    parts = _parts_of_a_product(entries)
    if parts == 1:
        return products(entries, u)
    rows = entries.view(-1, entries.shape[-2] // parts, entries.shape[-1])
    vectors = u.repeat_interleave(parts, dim=0) if u.dim() > 1 else u.expand(parts, -1)
    vectors, columns = vectors.unsqueeze(1), rows.mT
    parts_of_a_row = _parts_of_a_row(entries) or [slice(None)]
    sums = [torch.bmm(vectors[..., part], columns[:, part]) for part in parts_of_a_row]
    return torch.stack(sums).sum(dim=0).view(entries.shape[:-1])


def over_samples(entries: Tensor, v: Tensor) -> Tensor:
    """Return Σ_i P_ij v_i, (..., K), for entries (..., b, K) and v (..., b)."""
    parts = _parts_of_a_product(entries)
    if parts == 1:
        return products(entries.mT, v)
    rows = entries.view(-1, entries.shape[-2] // parts, entries.shape[-1])
    sums = torch.bmm(v.view(len(rows), 1, -1), rows)
    return sums.view(*v.shape[:-1], parts, -1).sum(dim=-2)


def products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix with its vector; batched, it could be in TF32."""
    if matrices.dim() == 3:
        return torch.stack([products(*pair) for pair in zip(matrices, vectors, strict=True)])
    parts = _parts_of_a_row(matrices)
    if not parts:
        return torch.mv(matrices, vectors)
    return torch.stack([torch.mv(matrices[:, part], vectors[part]) for part in parts]).sum(dim=0)


def _parts_of_a_row(entries: Tensor) -> list[slice]:
    """Return which of the columns to sum over at a time; none if all."""
    columns = entries.shape[-1]
    if columns <= _PROTOTYPES_OF_A_PRODUCT or not on_cpu(entries):
        return []
    starts = range(0, columns, _PROTOTYPES_OF_A_PRODUCT)
    return [slice(start, start + _PROTOTYPES_OF_A_PRODUCT) for start in starts]


def _parts_of_a_product(entries: Tensor) -> int:
    if entries.numel() < PARTS_OF_A_PRODUCT * _ENTRIES_OF_A_PART or not on_cpu(entries):
        return 1
    return math.gcd(entries.shape[-2], PARTS_OF_A_PRODUCT)


def nan_mask_of(scores: Tensor) -> Tensor:
    """Return (..., b), NaN for a sample with a score of (..., b, K) that is not finite, else 0."""
    factor = scores.new_full((scores.shape[-1],), _SCALE_OF_A_SUM)
    if scores.dim() == 2:
        total = torch.mv(scores, factor)
    elif scores.is_contiguous():
        total = torch.mv(scores.flatten(0, -2), factor).view(scores.shape[:-1])
    else:  # without a copy
        total = torch.stack([torch.mv(each, factor) for each in scores])
    return total - total


def exponentials(entries: Tensor, rate: float | Tensor, log_unit: float = 0) -> Tensor:
    """Replace entries by exp(rate · (entries - largest)), and return these, (..., b).

    They are the largest of the rows, but for a factor of e to the power ``log_unit``.
    """
    largest = entries.amax(dim=-1, keepdim=True)
    if log_unit:
        largest -= log_unit / rate
    entries.sub_(largest).mul_(rate).exp_()
    return largest.squeeze(-1)


def scale_and_rate(
    epsilon: float | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Return what scores are multiplied by, and what then, so that they are divided by ε."""
    most = torch.finfo(dtype).max
    if isinstance(epsilon, Tensor):
        scale = _SCALE / epsilon.clamp(min=1)
        return scale, (scale * epsilon).reciprocal().clamp(max=most)
    factor = _SCALE / max(1, epsilon)
    return factor, min(1 / (factor * epsilon), most)
