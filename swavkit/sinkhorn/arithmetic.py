"""Exponentials and products of a kernel that stay in range and accurate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swavkit._tensors import on_cpu

# Scores are first multiplied by this, so that no difference of finite scores overflows, and last
# divided by ε. What overflows then is too far below the row's largest exponent to count. An ε above
# 1 is divided out first.
_SCALE = 2.0**-3

# The sum of up to 2^23 scores times this overflows only if one of them is not finite.
_SCALE_OF_A_SUM = 2.0**-24

# On a CPU, torch spreads a batch of matrix-vector products over threads but not a single one.
PARTS_OF_A_PRODUCT = 8
_VALUES_OF_A_PART = 2**15

# Rows longer than this are multiplied with a vector in parts: a sum of a million float32 terms is
# less accurate than its terms.
_PROTOTYPES_OF_A_PRODUCT = 2**14


def over_prototypes(values: Tensor, u: Tensor) -> Tensor:
    """Return Σ_j P_ij u_j, (..., b), for values (..., b, K) and u (..., K)."""
    parts = _parts_of_a_product(values)
    if parts == 1:
        return products(values, u)
    rows = values.view(-1, values.shape[-2] // parts, values.shape[-1])
    vectors = u.repeat_interleave(parts, dim=0) if u.dim() > 1 else u.expand(parts, -1)
    vectors, columns = vectors.unsqueeze(1), rows.mT
    parts_of_a_row = _parts_of_a_row(values) or [slice(None)]
    sums = [torch.bmm(vectors[..., part], columns[:, part]) for part in parts_of_a_row]
    return torch.stack(sums).sum(dim=0).view(values.shape[:-1])


def over_samples(values: Tensor, v: Tensor) -> Tensor:
    """Return Σ_i P_ij v_i, (..., K), for values (..., b, K) and v (..., b)."""
    parts = _parts_of_a_product(values)
    if parts == 1:
        return products(values.mT, v)
    rows = values.view(-1, values.shape[-2] // parts, values.shape[-1])
    sums = torch.bmm(v.view(len(rows), 1, -1), rows)
    return sums.view(*v.shape[:-1], parts, -1).sum(dim=-2)


def products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix with its vector. A batched product might use TF32."""
    if matrices.dim() == 3:
        return torch.stack([products(*pair) for pair in zip(matrices, vectors, strict=True)])
    parts = _parts_of_a_row(matrices)
    if not parts:
        return torch.mv(matrices, vectors)
    return torch.stack([torch.mv(matrices[:, part], vectors[part]) for part in parts]).sum(dim=0)


def _parts_of_a_row(values: Tensor) -> list[slice]:
    """Return the columns to sum over at a time, or none for all of them."""
    columns = values.shape[-1]
    if columns <= _PROTOTYPES_OF_A_PRODUCT or not on_cpu(values):
        return []
    starts = range(0, columns, _PROTOTYPES_OF_A_PRODUCT)
    return [slice(start, start + _PROTOTYPES_OF_A_PRODUCT) for start in starts]


def _parts_of_a_product(values: Tensor) -> int:
    if values.numel() < PARTS_OF_A_PRODUCT * _VALUES_OF_A_PART or not on_cpu(values):
        return 1
    return math.gcd(values.shape[-2], PARTS_OF_A_PRODUCT)


def nan_mask_of(scores: Tensor) -> Tensor:
    """Return (..., b), NaN for a sample with a score (..., b, K) that is not finite, else 0."""
    factor = scores.new_full((scores.shape[-1],), _SCALE_OF_A_SUM)
    if scores.dim() == 2:
        total = torch.mv(scores, factor)
    elif scores.is_contiguous():
        total = torch.mv(scores.flatten(0, -2), factor).view(scores.shape[:-1])
    else:  # without a copy
        total = torch.stack([torch.mv(each, factor) for each in scores])
    return total - total


def exponentials(values: Tensor, rate: float | Tensor, log_unit: float = 0) -> Tensor:
    """Replace values by e^log_unit · exp(rate · (values - largest)) in place.

    Return ``largest``, (..., b), the largest value of each row, without log_unit / rate.
    """
    largest = values.amax(dim=-1, keepdim=True)
    if log_unit:
        largest -= log_unit / rate
    values.sub_(largest).mul_(rate).exp_()
    return largest.squeeze(-1)


def scale_and_rate(
    epsilon: float | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """Return two factors of scores, the scale of all sums and the rest of 1/ε."""
    most = torch.finfo(dtype).max
    if isinstance(epsilon, Tensor):
        scale = _SCALE / epsilon.clamp(min=1)
        return scale, (scale * epsilon).reciprocal().clamp(max=most)
    factor = _SCALE / max(1, epsilon)
    return factor, min(1 / (factor * epsilon), most)
