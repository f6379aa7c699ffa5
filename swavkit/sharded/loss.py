"""Codes and loss if each rank holds a part of the prototypes.

A rank has k of the K prototypes and, during a step, the features of all samples. It computes the
columns of scores, codes and predictions of its prototypes, and no tensor of length K. Sums over
prototypes are reduced over ranks, one number per sample. In the notation of
``sinkhorn/functional.py``::

    u = c / (Pᵀ (r * v))            # k numbers, local
    v = 1 / sum_over_ranks(P u)     # B numbers

and in that of ``swapped_prediction.py``, for each view::

    M = max_over_ranks(max_k S/τ)
    E = sum_over_ranks(Σ_k exp(S/τ - M))
    L = n · log E - sum_over_ranks(⟨T, S/τ - M⟩)
    ∂L/∂S = (n · exp(S/τ - M) / E - T) / τ

The gradient of a rank's prototypes follows from that of its scores alone. The gradient of features
is summed over ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swavkit._autograd import attach_gradients
from swavkit._prediction_errors import ObservedRows, row_entropies, valid_weights
from swavkit._tensors import at_least_float32, autocast_disabled
from swavkit.distributed.collectives import (
    gather_over_ranks,
    in_one_collective,
    max_over_ranks,
    rank_and_size,
    sum_over_ranks,
)
from swavkit.sinkhorn.kernel import (
    SCALINGS_OF_ONE_KERNEL,
    nan_mask_of,
    over_prototypes,
    over_samples,
)
from swavkit.sinkhorn.marginals import may_be_fractional
from swavkit.swav_statistics import SwAVStatistics, block_statistics

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


class BatchLayout(NamedTuple):
    """The order of the samples of all ranks: those of rank 0, those of rank 1, and so on.

    Attributes:
        sizes: The number of samples of each rank.
        group: The ranks.
        fractional: Whether a rank may have weights other than 0 and 1.
        differentiable: Whether the features of a rank need a gradient.
    """

    sizes: list[int]
    group: ProcessGroup
    fractional: bool = False
    differentiable: bool = False

    def own(self) -> slice:
        """Return the slice of this rank's samples."""
        rank, _ = rank_and_size(self.group)
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


def batch_layout(
    features: Tensor,
    sample_weight: Tensor | None,
    group: ProcessGroup,
    alike: Mapping[str, int],
) -> BatchLayout:
    """Return the layout of the group's batch, given the features (..., b, D) of this rank.

    Raises ``ValueError`` on all ranks if a number of ``alike`` differs between them.

    The host waits for the number of samples of the other ranks, which may differ.
    """
    differentiable = torch.is_grad_enabled() and features.requires_grad
    own = [features.shape[-2], may_be_fractional(sample_weight), differentiable, *alike.values()]
    of_ranks = gather_over_ranks(torch.tensor(own, device=features.device), group)
    sizes, fractional_ranks, differentiable_ranks, *numbers = of_ranks.T.tolist()
    for name, of_name in zip(alike, numbers, strict=True):
        if len(set(of_name)) > 1:
            raise ValueError(
                f"{name} must be the same on all ranks if prototypes are sharded, got {of_name}"
            )
    return BatchLayout(sizes, group, any(fractional_ranks), any(differentiable_ranks))


def gathered(values: Tensor, layout: BatchLayout) -> Tensor:
    """Return the rows of all ranks, (..., N, M), given those of this rank, (..., b, M).

    The backward pass sums the gradients of a row over ranks.
    """
    rows: Tensor = _Gathered.apply(values, layout)  # type: ignore[no-untyped-call]
    return rows


def own_part(values: Tensor, layout: BatchLayout) -> Tensor:
    """Return the rows of this rank, (b, M), of rows (N, M) that all ranks have.

    The backward pass gathers the gradients of all rows.
    """
    part: Tensor = _OwnPart.apply(values, layout)  # type: ignore[no-untyped-call]
    return part


@torch.no_grad()
def sharded_codes(
    scores: Tensor,
    sample_weight: Tensor,
    num_prototypes: int,
    *,
    prototype_mass: Tensor | None = None,
    epsilon: float | Tensor,
    iterations: int,
    fractional: bool,
    group: ProcessGroup,
) -> Tensor:
    """Return the columns of the codes that belong to the prototypes of this rank.

    They equal those of :func:`~swavkit.sinkhorn_knopp` on the scores of all prototypes. An
    iteration reduces one sum per sample over ranks; in the log domain, also a maximum before it.
    The first iteration is in the log domain. So are all others if the scaling vectors could leave
    the range of floating point (see ``sinkhorn/kernel.py``).

    Args:
        scores: (A, N, k) scores of all samples with the prototypes of this rank; k may be 0.
        sample_weight: (N,) multiplicities.
        num_prototypes: K.
        prototype_mass: (k,) target marginal of the prototypes of this rank, whose sum over ranks is
            1; ``None`` for 1/K.
        epsilon: ε.
        iterations: The number of iterations.
        fractional: Whether weights may be other than 0 and 1, or masses of prototypes unequal; the
            same on all ranks.
        group: The ranks that have the other prototypes.

    Returns:
        (A, N, k) in float32, or in float64 for float64 scores.
    """
    dtype = at_least_float32(scores.dtype)
    in_log_domain = fractional or iterations > SCALINGS_OF_ONE_KERNEL
    with autocast_disabled(scores.device):
        nan_mask = nan_mask_of(scores).to(dtype)  # (A, N)
        exponents = (scores.to(dtype) / epsilon).masked_fill_(nan_mask.isnan().unsqueeze(-1), 0)
        weight = sample_weight.to(dtype).expand_as(nan_mask)
        code_mass = (nan_mask + 1).masked_fill_(nan_mask.isnan() & (weight == 0), 0)
        mass = weight.masked_fill(nan_mask.isnan(), 0)  # r
        v = torch.ones_like(mass)
        log_v = torch.zeros_like(mass)
        for iteration in range(iterations):
            if iteration == 0 or in_log_domain:
                plan = exponents + (mass.log() + log_v).unsqueeze(-1)
                log_u = -plan.logsumexp(dim=-2, keepdim=True)
                log_u.masked_fill_(log_u == torch.inf, 0)  # no sample is present
                if prototype_mass is not None:
                    log_u += prototype_mass.log()
                torch.add(exponents, log_u, out=plan)
                largest = max_over_ranks(largest_of_rows(plan), group)
                plan.sub_(largest.unsqueeze(-1)).exp_()
                u = torch.ones_like(log_u).squeeze(-2)
                sums = plan.sum(dim=-1)
            else:
                sums = over_samples(plan, mass * v)
                # c keeps u and v near 1.
                equal_mass = mass.sum(dim=-1, keepdim=True) / num_prototypes
                u = (equal_mass / sums).masked_fill_(sums == 0, 1)
                sums = over_prototypes(plan, u)
            sums = sum_over_ranks(sums + nan_mask, group)
            nan_mask = sums - sums  # NaN for non-finite scores of any rank
            mass = mass.masked_fill(nan_mask.isnan(), 0)
            code_mass = torch.where(code_mass == 0, 0, code_mass + nan_mask)
            v = sums.masked_fill_(nan_mask.isnan(), 1).reciprocal_()
            log_v = v.log() - largest
        return plan.mul_(u.unsqueeze(-2)).mul_((v * code_mass).unsqueeze(-1))


def sharded_losses(
    scores: Tensor,
    codes: Tensor,
    normalized_weight: Tensor,
    *,
    temperature: float | Tensor,
    group: ProcessGroup,
) -> Tensor:
    """Return the contribution of each sample to the loss.

    Args:
        scores: (V, N, k) scores of all samples with the prototypes of this rank; k may be 0.
        codes: (A, N, k).
        normalized_weight: (N,) weights of the samples in the loss.
        temperature: τ.
        group: The ranks that have the other prototypes.

    Returns:
        (N, 1), in float32, or in float64 for float64 scores, whatever the dtype of the codes.
    """
    with torch.no_grad(), autocast_disabled(scores.device):
        codes = codes.to(at_least_float32(scores.dtype))
        logits = scores.to(codes.dtype) / temperature
        largest = max_over_ranks(largest_of_rows(logits), group)
        sums = logits.new_zeros(3, *largest.shape)  # E, ⟨T, S/τ - M⟩ and n
        for view, target in _targets(codes, len(scores)):
            logits[view] -= largest[view].unsqueeze(-1)
            sums[1, view] = torch.linalg.vecdot(target, logits[view])
            sums[0, view] = logits[view].exp_().sum(dim=-1)
            sums[2, view] = target.sum(dim=-1)
        exponentials, agreement, mass = sum_over_ranks(sums, group)

        errors = torch.zeros_like(mass[0])
        residual = torch.zeros_like(logits) if len(codes) == 1 else logits
        for view, target in _targets(codes, len(scores)):
            errors += mass[view] * exponentials[view].log() - agreement[view]
            scale = (mass[view] / exponentials[view]).unsqueeze(-1)
            torch.addcmul(-target, logits[view], scale, out=residual[view])
        zero_weight_mask = normalized_weight == 0
        residual.masked_fill_(zero_weight_mask.unsqueeze(-1), 0)
        pair_weight = normalized_weight.to(codes.dtype) / (len(codes) * (len(scores) - 1))
        pair_weight = pair_weight.unsqueeze(-1)
        losses = pair_weight * errors.masked_fill_(zero_weight_mask, 0).unsqueeze(-1)
    if not scores.requires_grad:
        return losses
    return attach_gradients(losses, pair_weight / temperature, [residual], [scores])


@torch.no_grad()
def sharded_statistics(
    scores: Tensor,
    codes: Tensor,
    weight: Tensor,
    *,
    held: slice,
    num_prototypes: int,
    temperature: float | Tensor,
    layout: BatchLayout,
) -> SwAVStatistics:
    """Return the statistics of this rank's samples, as if it had the columns of all prototypes.

    Args:
        scores: (V, N, k) scores of all samples with the prototypes of this rank; k may be 0.
        codes: (A, N, k).
        weight: (N,) multiplicities.
        held: The prototypes of this rank.
        num_prototypes: K.
        temperature: τ.
        layout: The samples of each rank.
    """
    with autocast_disabled(scores.device):
        logits = scores.to(at_least_float32(scores.dtype)) / temperature
        nearest, largest = nearest_over_ranks(logits, held.start, layout.group)  # (V, N)
        logits -= largest.unsqueeze(-1)
        exponentials = logits.exp()
        codes = codes.to(logits.dtype)
        sums = [exponentials.sum(dim=-1), logits.mul_(exponentials).nansum(dim=-1)]
        total, weighted, code_entropies = in_one_collective(
            sum_over_ranks, [*sums, row_entropies(codes)], layout.group
        )
        entropies = total.log() - weighted / total
        weight = weight.to(logits.dtype)
        code_weight = valid_weights(code_entropies, weight)  # (A, N)
        counted = (codes * code_weight.unsqueeze(-1)).nansum(dim=0)  # 0 · NaN is 0 here
        usage = logits.new_zeros(len(layout.sizes), num_prototypes)
        for row, part in zip(usage, torch.split(counted, layout.sizes), strict=True):
            row[held] = part.sum(dim=0)
        rank, _ = rank_and_size(layout.group)
        own = layout.own()
        return block_statistics(
            ObservedRows(
                nearest[:, own],
                entropies[:, own],
                code_entropies[:, own],
                sum_over_ranks(usage, layout.group)[rank].clone(),  # without the other rows
                weight[own],
            )
        )


class _Gathered(torch.autograd.Function):
    """See :func:`gathered`. Ranks may have different numbers of rows."""

    @staticmethod
    def forward(values: Tensor, layout: BatchLayout) -> Tensor:
        *others, samples, columns = values.shape
        padded = values.new_zeros(*others, max(layout.sizes), columns)
        padded[..., :samples, :] = values
        with autocast_disabled(values.device):  # autocast cannot concatenate half precisions
            parts = gather_over_ranks(padded, layout.group)
            return torch.cat(
                [part[..., :size, :] for part, size in zip(parts, layout.sizes, strict=True)],
                dim=-2,
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        precise = gradient.to(at_least_float32(gradient.dtype))
        summand = precise.clone() if precise is gradient else precise
        total = sum_over_ranks(summand, ctx.layout.group)
        return total[..., ctx.layout.own(), :].to(gradient.dtype), None


class _OwnPart(torch.autograd.Function):
    """See :func:`own_part`."""

    @staticmethod
    def forward(values: Tensor, layout: BatchLayout) -> Tensor:
        return values[layout.own()].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.layout = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gathered.forward(gradient, ctx.layout), None


def _targets(codes: Tensor, views: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each view that has a target, and the target: the sum of the other views' codes."""
    target_of_all = reduce(torch.add, codes)
    for view in range(views):
        others = [code for index, code in enumerate(codes) if index != view]
        if view >= len(codes):
            yield view, target_of_all
        elif others:
            yield view, reduce(torch.add, others)


def nearest_over_ranks(scores: Tensor, first: int, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Return the index among all prototypes, and the value, of the largest score of each row.

    Args:
        scores: (..., k) scores with the prototypes of this rank.
        first: The index of the first of them.
        group: The ranks that have the other prototypes.

    Returns:
        (...,) int64 and (...,) in the dtype of the scores.
    """
    largest = gather_over_ranks(largest_of_rows(scores), group)
    nearest = torch.zeros(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    if scores.shape[-1]:
        nearest = scores.argmax(dim=-1) + first
    best_rank = largest.argmax(dim=0, keepdim=True)
    return gather_over_ranks(nearest, group).gather(0, best_rank)[0], largest.amax(dim=0)


def largest_of_rows(entries: Tensor) -> Tensor:
    """Return the largest entry of each row (..., k); the most negative finite value if k is 0."""
    if entries.shape[-1]:
        return entries.amax(dim=-1)
    return entries.new_full(entries.shape[:-1], torch.finfo(entries.dtype).min)
