"""Codes and loss where no process holds all prototypes, nor anything that is as long.

Each process has k of the K prototypes, and for the time of a step the features of all samples. It
computes the columns of scores, codes and predictions that belong to its prototypes. A sum over
prototypes goes over the processes, as a number for each sample. In the notation of ``sinkhorn``::

    u = c / (Pᵀ (r * v))            # k numbers, which no other process needs
    v = 1 / sum_over_ranks(P u)     # B numbers

and in that of ``swapped_prediction``, for each view::

    M = max_over_ranks(max_k S/τ)
    E = sum_over_ranks(Σ_k exp(S/τ - M))
    L = n · log E - sum_over_ranks(⟨T, S/τ - M⟩)
    ∂L/∂S = (n · exp(S/τ - M) / E - T) / τ

The gradient of the scores gives that of the own prototypes as it is. That of a process's features
is the sum of what the prototypes of all processes give.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swavkit._autograd import attach_gradients
from swavkit._tensors import at_least_float32, autocast_disabled
from swavkit.distributed.collectives import (
    gather_over_ranks,
    max_over_ranks,
    rank_and_size,
    sum_over_ranks,
)
from swavkit.sinkhorn.arithmetic import nan_mask_of, over_prototypes, over_samples
from swavkit.sinkhorn.kernel import SCALINGS_OF_ONE_KERNEL

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


class Spread(NamedTuple):
    """How the samples of all processes lie one after the other.

    Attributes:
        sizes: How many there are on each process.
        group: The processes; ``None`` is this one alone.
        fractional: Whether a process gives weights other than 0 and 1.
    """

    sizes: list[int]
    group: ProcessGroup | None
    fractional: bool

    def own(self) -> slice:
        """Return which of the samples are those of this process."""
        rank, _ = rank_and_size(self.group)
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])


def whole_batch(
    samples: int, sample_weight: Tensor | None, device: torch.device, group: ProcessGroup | None
) -> Spread:
    """Return how the ``samples`` of this process lie in the batch of the group.

    The host waits for the number of samples on the other processes: without it they could not
    differ.
    """
    fractional = sample_weight is not None and sample_weight.is_floating_point()
    if group is None:
        return Spread([samples], None, fractional)
    own = torch.tensor([samples, fractional], device=device)
    sizes, of_weights = gather_over_ranks(own, group).T.tolist()
    return Spread(sizes, group, any(of_weights))


def gathered(values: Tensor, batch: Spread) -> Tensor:
    """Return the rows of all processes, (..., B, M), given those of this one, (..., b, M).

    Backward, a process gets the sum of what all processes have as gradients of its rows.
    """
    if batch.group is None:
        return values
    rows: Tensor = _Gathered.apply(values, batch)  # type: ignore[no-untyped-call]
    return rows


def own_part(values: Tensor, batch: Spread) -> Tensor:
    """Return the rows of this process, (b, M), of (B, M) that all processes have.

    Backward, a process gets the gradients of the rows of all processes.
    """
    if batch.group is None:
        return values
    part: Tensor = _OwnPart.apply(values, batch)  # type: ignore[no-untyped-call]
    return part


@torch.no_grad()
def sharded_codes(
    scores: Tensor,
    sample_weight: Tensor,
    num_prototypes: int,
    *,
    epsilon: float,
    iterations: int,
    fractional: bool,
    group: ProcessGroup | None,
) -> Tensor:
    """Return the columns of the codes that belong to the prototypes of this process.

    They are those of :func:`~swavkit.sinkhorn_knopp` for the scores of all processes side by side.
    An iteration takes a sum over processes of one number for each sample, and in the log domain a
    maximum before it. The first one is in the log domain; all are where scaling vectors would leave
    the range of floating point (see ``_plan.py``).

    Args:
        scores: (A, N, k), of all samples with the prototypes of this process; k may be 0.
        sample_weight: (N,) multiplicities.
        num_prototypes: K.
        epsilon: ε.
        iterations: How many.
        fractional: Whether a weight may be other than 0 and 1; the same on all processes.
        group: The processes that have the other prototypes.

    Returns:
        (A, N, k) in float32, or in float64 for float64 scores.
    """
    dtype = at_least_float32(scores.dtype)
    in_log_domain = fractional or iterations > SCALINGS_OF_ONE_KERNEL
    with autocast_disabled(scores.device):
        nan_mask = nan_mask_of(scores).to(
            dtype
        )  # (A, N), NaN for a sample with a score that is not finite, else 0
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
                log_u.masked_fill_(log_u == torch.inf, 0)  # nobody is present
                torch.add(exponents, log_u, out=plan)
                largest = max_over_ranks(largest_of_rows(plan), group)
                plan.sub_(largest.unsqueeze(-1)).exp_()
                u = torch.ones_like(log_u).squeeze(-2)
                sums = plan.sum(dim=-1)
            else:
                sums = over_samples(plan, mass * v)
                # c, without which u and v would drift away from 1
                share = mass.sum(dim=-1, keepdim=True) / num_prototypes
                u = (share / sums).masked_fill_(sums == 0, 1)
                sums = over_prototypes(plan, u)
            sums = sum_over_ranks(sums + nan_mask, group)
            nan_mask = sums - sums  # that which only another process has seen came with the sum
            mass = mass.masked_fill(nan_mask.isnan(), 0)
            code_mass = torch.where(code_mass == 0, 0, code_mass + nan_mask)
            v = sums.masked_fill_(nan_mask.isnan(), 1).reciprocal_()
            log_v = v.log() - largest
        return plan.mul_(u.unsqueeze(-2)).mul_((v * code_mass).unsqueeze(-1))


def sharded_losses(
    scores: Tensor,
    codes: Tensor,
    share: Tensor,
    *,
    temperature: float,
    group: ProcessGroup | None,
) -> Tensor:
    """Return the contribution of each sample to the loss.

    Args:
        scores: (V, N, k) scores of all samples with the prototypes of this rank; k may be 0.
        codes: (A, N, k), in the dtype of the arithmetic, float32 or float64.
        share: (N,), the normalized weight of each sample in the loss.
        temperature: τ.
        group: The ranks that have the other prototypes.

    Returns:
        (N, 1), in the dtype of the arithmetic.
    """
    with torch.no_grad(), autocast_disabled(scores.device):
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
        absent = share == 0
        residual.masked_fill_(absent.unsqueeze(-1), 0)
        share = share.to(codes.dtype).unsqueeze(-1) / (len(codes) * (len(scores) - 1))
        losses = share * errors.masked_fill_(absent, 0).unsqueeze(-1)
    if not scores.requires_grad:
        return losses
    return attach_gradients(losses, share / temperature, [residual], [scores])


class _Gathered(torch.autograd.Function):
    """The rows of all processes, of which each may have another number."""

    @staticmethod
    def forward(values: Tensor, batch: Spread) -> Tensor:
        most = max(batch.sizes)
        *others, samples, columns = values.shape
        padded = values.new_zeros(*others, most, columns)
        padded[..., :samples, :] = values
        with autocast_disabled(values.device):  # which would not join half precisions
            parts = gather_over_ranks(padded, batch.group)
            return torch.cat(
                [part[..., :size, :] for part, size in zip(parts, batch.sizes, strict=True)],
                dim=-2,
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.batch = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        precise = gradient.to(at_least_float32(gradient.dtype))
        total = sum_over_ranks(precise.clone() if precise is gradient else precise, ctx.batch.group)
        return total[..., ctx.batch.own(), :].to(gradient.dtype), None


class _OwnPart(torch.autograd.Function):
    """The rows of this process, of those that all processes have."""

    @staticmethod
    def forward(values: Tensor, batch: Spread) -> Tensor:
        return values[batch.own()].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.batch = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Gathered.forward(gradient, ctx.batch), None


def _targets(codes: Tensor, views: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each view that has something to predict, with the sum of the codes that it must."""
    of_all = reduce(torch.add, codes)
    for view in range(views):
        others = [code for index, code in enumerate(codes) if index != view]
        if view >= len(codes):
            yield view, of_all
        elif others:
            yield view, reduce(torch.add, others)


def largest_of_rows(entries: Tensor) -> Tensor:
    """Return the largest entry of each row (..., k), and hardly a number where k is 0."""
    if entries.shape[-1]:
        return entries.amax(dim=-1)
    return entries.new_full(entries.shape[:-1], torch.finfo(entries.dtype).min)
