"""Codes of a problem that fits in memory at once: equal prototypes, one process, few operations."""

from __future__ import annotations

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, on_cpu, scaled_sum, traceable
from swavkit.sinkhorn.kernel import (
    SCALINGS_OF_ONE_KERNEL,
    exponentials,
    nan_mask_of,
    over_prototypes,
    over_samples,
    scale_and_rate,
)

# Up to so many values, a CPU gains more from fewer operations than from blocks that stay in its
# cache: 2.2 times at 64×300, 1.15 times (on one thread 1.5 times) at 2×256×3,000.
_VALUES_AT_ONCE = 2**21

# What computes codes on a CUDA device: "torch", or "triton" where its kernels support the problem.
# On an H100 these take 0.24 to 0.6 of the time in a CUDA graph, 0.37 to 0.77 in eager mode.
BACKEND = "triton"


def fits_at_once(scores: Tensor, iterations: int) -> bool:
    """Tell whether :func:`codes_at_once` can make the iterations and is the fastest way."""
    small = scores.numel() <= _VALUES_AT_ONCE or not on_cpu(scores)
    return small and iterations <= SCALINGS_OF_ONE_KERNEL and scores.numel() > 0


def fastest_codes(
    scores: Tensor, epsilon: float | Tensor, iterations: int, present: Tensor | None = None
) -> Tensor:
    """Return :func:`codes_at_once`, by the backend for the device."""
    if BACKEND == "triton" and scores.is_cuda and not torch.compiler.is_compiling():
        from swavkit._triton import attempt  # which imports triton
        from swavkit.sinkhorn import triton_codes

        if triton_codes.supports(scores, iterations, present):
            codes = attempt(
                "codes",
                triton_codes,
                lambda: triton_codes.codes_by_triton(scores, epsilon, iterations, present),
            )
            if codes is not None:
                return codes
    return codes_at_once(scores, epsilon, iterations, present)


def codes_at_once(
    scores: Tensor, epsilon: float | Tensor, iterations: int, present: Tensor | None = None
) -> Tensor:
    """Return the codes of scores (B, K) or (N, B, K) with equal marginals, in few operations.

    They are in the dtype of the arithmetic. The steps are those of a
    :class:`~swavkit.sinkhorn.kernel.Kernel` in one block. Samples that are not ``present``, (B,) or
    (N, B) bool, take no part.
    """
    dtype = at_least_float32(scores.dtype)
    lowest = torch.finfo(dtype).min / 4  # the scaled score of an excluded prototype
    scale, rate = scale_and_rate(traceable(epsilon, scores.device), dtype)
    nan_mask = nan_mask_of(scores).to(dtype)
    finite = nan_mask == 0  # (..., B)
    values = torch.empty(scores.shape, dtype=dtype, device=scores.device)
    if present is None:
        counts = finite  # r
        scaled_sum(nan_mask.unsqueeze(-1), scores, scale, out=values)
        values.nan_to_num_(lowest, lowest, lowest)
        values.sub_(values.amax(dim=-2, keepdim=True))
    else:
        counts = finite & present
        not_counted = (nan_mask / present).unsqueeze(-1)  # NaN, or 0
        nan_mask = torch.where(present, nan_mask, present)  # 0 for an absent sample
        # -S, or inf where a sample does not count: the least entry is minus the largest score.
        scaled_sum(not_counted, scores, -scale, out=values).nan_to_num_(
            torch.inf, torch.inf, torch.inf
        )
        shift = values.amin(dim=-2, keepdim=True).nan_to_num_(posinf=0)  # if no sample counts
        scaled_sum(shift, scores, scale, out=values).nan_to_num_(lowest, lowest, lowest)
    largest = exponentials(values, rate)  # that of an absent sample may be anything
    v = torch.where(counts, (largest * rate).exp_(), counts)
    u = over_samples(values, v).reciprocal_()
    for _ in range(iterations - 1):
        v = counts / over_prototypes(values, u)
        u = over_samples(values, v).reciprocal_()
    if present is not None:
        u.nan_to_num_(1, 1)  # if no sample counts
    sums = values.mul_(u.unsqueeze(-2)).sum(dim=-1)
    return values.mul_(torch.addcdiv(nan_mask, finite, sums).unsqueeze(-1))
