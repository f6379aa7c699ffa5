"""The plan of Sinkhorn-Knopp: P = exp(S/ε), scaled, in blocks that stay in the cache.

It knows how to sum masses and how to scale by them; which masses are wanted, and how often, is the
business of ``sinkhorn.py``. It knows of no other processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The ranges of u and v can grow with each scaling, by up to B·K if all masses are equal. For so
# many scalings they stay inside that of float32 at any B·K that fits in memory; then P is computed
# anew. Masses that differ let them grow by as much more: then P is new each time.
_SCALINGS_OF_ONE_P = 5

# What the caches of a CPU keep from one operation to the next. An accelerator takes everything at
# once, and so does a compiler, which fuses the operations.
_ENTRIES_OF_A_BLOCK = 2**21
_SAMPLES_OF_A_BLOCK = 2**12

# torch spreads a batch of products with a vector over the threads of a CPU, and a single one not.
_PARTS_OF_A_PRODUCT = 8
_SAMPLES_OF_A_PART = 16


class _Block(NamedTuple):
    """Some samples of some problems."""

    problems: slice
    scores: Tensor  # (n, b, K)
    entries: Tensor  # (n, b, K), P
    codes: Tensor  # (n, b, K)
    sample_mass: Tensor  # (n, b), r
    absence: Tensor | None  # (n, b), NaN for a sample that is absent, else 0; None: nobody is
    code_mass: Tensor  # (n, b), what a code must sum to


class Plan:
    """Q = diag(v) P diag(u) of N problems, with P = softmax(S/ε + log_u) over the prototypes.

    Only u has to be told: v always brings the rows of Q to a sum of 1, but for :meth:`start`, which
    finds the masses before any v. Each method reads P, or the scores, once.

    P lies in the memory of the codes and is only read, while u changes, until the range of floating
    point calls for a new P, with u in ``log_u``. Codes of half precision offer no such memory: if
    they fill several blocks, P is computed each time it is needed, in the memory of one block.

    A sample with a NaN or an infinite score is left out: its mass is 0, and its code NaN, or zeros
    if it was absent anyway.

    Args:
        scores: (N, B, K).
        sample_mass: (N, B), in the dtype of all arithmetic; overwritten.
        weighted: Whether any of these may be 0.
        graded: Whether masses of samples or of prototypes may differ in another way than that.
        epsilon: ε.
    """

    def __init__(
        self,
        scores: Tensor,
        sample_mass: Tensor,
        *,
        weighted: bool,
        graded: bool,
        epsilon: float,
    ) -> None:
        self.epsilon = epsilon
        self.weighted = weighted
        self.sample_mass = sample_mass
        self.code_mass = torch.empty_like(sample_mass)
        self.log_u = sample_mass.new_empty(len(scores), scores.shape[-1])
        self.u: Tensor | None = None  # None: all of it is in log_u
        self.scalings = 0  # by u, of one P
        # In place of what must not count: the lowest exponent, and a score that leads there.
        self.lowest = torch.finfo(sample_mass.dtype).min / 4
        self.lowest_score = self.lowest * min(epsilon, 1)

        absence = None
        if weighted:
            absence = torch.zeros_like(sample_mass).masked_fill_(sample_mass == 0, torch.nan)
        self.all_codes = codes = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
        apart = codes.dtype != sample_mass.dtype  # P needs memory of its own
        parts = _parts(scores)
        self.keeps_entries = len(parts) == 1 or not apart
        self.scalings_of_one_p = 1 if graded or not self.keeps_entries else _SCALINGS_OF_ONE_P
        if len(parts) == 1:
            entries = torch.empty_like(codes, dtype=sample_mass.dtype) if apart else codes
            of_samples = (sample_mass, absence, self.code_mass)
            self.blocks = [_Block(slice(None), scores, entries, codes, *of_samples)]
        else:
            shared = sample_mass.new_empty(codes[parts[0]].shape) if parts and apart else codes
            self.blocks = [
                _Block(
                    part[0],
                    scores[part],
                    shared[:, : codes[part].shape[1]] if apart else codes[part],
                    codes[part],
                    sample_mass[part],
                    None if absence is None else absence[part],
                    self.code_mass[part],
                )
                for part in parts
            ]

    def largest_scores(self) -> Tensor:
        """Return the largest score (N, K) of each prototype among the samples that count.

        Where no sample counts it is ``lowest_score``. To be called first: it also finds out which
        samples have scores that are not finite.
        """
        largest = self._over_blocks(_largest_scores, torch.maximum, self.lowest_score)
        flawed = self.code_mass.isnan()
        self.code_mass += 1
        if self.weighted:
            self.code_mass.masked_fill_(flawed & (self.sample_mass == 0), 0)
        self.sample_mass.masked_fill_(flawed, 0)
        return largest

    def start(self, log_u: Tensor) -> Tensor:
        """Return the masses (N, K) of exp(S/ε + log_u), as it is, without v; see :meth:`restart`.

        No exponent of a sample that is present may be above 0.
        """
        self.restart(log_u)
        return self._over_blocks(_mass_without_v, torch.add, 0)

    def scale(self, factor: Tensor) -> None:
        """Multiply u by ``factor`` (N, K)."""
        self.u = factor if self.u is None else self.u * factor
        self.scalings += 1
        if self.scalings == self.scalings_of_one_p:
            self.restart(self.log_u + self.u.log())

    def restart(self, log_u: Tensor) -> None:
        """Set all of u, as ``log_u`` (N, K). A NaN in it makes every code of the problem NaN."""
        self.log_u, self.u, self.scalings = log_u, None, 0
        self.code_mass.masked_fill_(log_u.isnan().any(dim=-1, keepdim=True), torch.nan)

    def mass(self) -> Tensor:
        """Return the masses (N, K) of the prototypes in Q."""
        if self.u is not None:
            return self._over_blocks(_mass, torch.add, 0) * self.u
        mass = self._over_blocks(_mass_of_new_entries, torch.add, 0)
        if self.keeps_entries:
            self.u = torch.ones_like(mass)
        return mass

    def log_mass(self) -> Tensor:
        """Return the logarithm of :meth:`mass`, which may be below the range of floating point.

        All of u must be in ``log_u``.
        """
        return self._over_blocks(_log_mass, torch.logaddexp, -torch.inf)

    def codes(self) -> Tensor:
        """Return Q, (N, B, K), in the dtype of the scores. The plan is used up."""
        for block in self.blocks:
            if self.u is None:
                entries, v = _new_entries(self, block), block.code_mass
            else:
                entries = block.entries.mul_(self.u[block.problems].unsqueeze(-2))
                v = block.code_mass / entries.sum(dim=-1)
            torch.mul(entries, v.unsqueeze(-1), out=block.codes)
        return self.all_codes

    def _over_blocks(
        self,
        of_block: Callable[[Plan, _Block], Tensor],
        combine: Callable[..., Tensor],
        neutral: float,
    ) -> Tensor:
        """Combine what the blocks give, (n, K) each, into (N, K)."""
        if len(self.blocks) == 1:
            return of_block(self, self.blocks[0])
        total = torch.full_like(self.log_u, neutral)
        for block in self.blocks:
            part = total[block.problems]
            combine(part, of_block(self, block), out=part)
        return total


def _parts(scores: Tensor) -> list[tuple[slice, slice]]:
    """Return which problems and which samples go into each block."""
    number, samples, prototypes = scores.shape
    if not (number and samples):
        return []
    if not _on_cpu(scores) or (
        scores.numel() <= _ENTRIES_OF_A_BLOCK and samples <= _SAMPLES_OF_A_BLOCK
    ):
        return [(slice(None), slice(None))]
    rows = min(_SAMPLES_OF_A_BLOCK, _ENTRIES_OF_A_BLOCK // prototypes)
    rows = max(rows - rows % _PARTS_OF_A_PRODUCT, 1)
    return [
        (slice(problem, problem + 1), slice(first, first + rows))
        for problem in range(number)
        for first in range(0, samples, rows)
    ]


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _largest_scores(plan: Plan, block: _Block) -> Tensor:
    """Return (n, K) largest scores, and leave in ``code_mass`` 0, or NaN for a flawed sample."""
    # NaN and infinity show in a sum: times 0 it is NaN, and that makes all of the sample NaN.
    total = block.scores.sum(dim=-1, dtype=block.code_mass.dtype)
    offset = torch.mul(total, 0, out=block.code_mass)
    if block.absence is not None:
        offset = offset + block.absence
    counted = plan.blocks[0].entries[:, : block.scores.shape[1]]  # memory that is in the cache
    torch.add(block.scores, offset.unsqueeze(-1), out=counted)
    return _without_infinities(counted, plan.lowest_score).amax(dim=-2)


def _mass_without_v(plan: Plan, block: _Block) -> Tensor:
    exponents = _exponents(plan, block)
    largest = exponents.amax(dim=-1)
    entries = torch.softmax(exponents, dim=-1, out=exponents)
    # What the softmax has divided a row by; only a sample that is absent can be above 0.
    divisor = largest.clamp_(max=0).exp_() / entries.amax(dim=-1)
    return _over_samples(entries, divisor.mul_(block.sample_mass))


def _mass(plan: Plan, block: _Block) -> Tensor:
    assert plan.u is not None
    v = block.sample_mass / _over_prototypes(block.entries, plan.u[block.problems])
    return _over_samples(block.entries, v)


def _mass_of_new_entries(plan: Plan, block: _Block) -> Tensor:
    return _over_samples(_new_entries(plan, block), block.sample_mass)


def _log_mass(plan: Plan, block: _Block) -> Tensor:
    log_codes = torch.log_softmax(_exponents(plan, block), dim=-1, out=block.entries)
    return log_codes.add_(block.sample_mass.log().unsqueeze(-1)).logsumexp(dim=-2)


def _new_entries(plan: Plan, block: _Block) -> Tensor:
    exponents = _exponents(plan, block)
    return torch.softmax(exponents, dim=-1, out=exponents)


def _exponents(plan: Plan, block: _Block) -> Tensor:
    """Compute S/ε + log_u where P will be."""
    log_u = plan.log_u[block.problems].unsqueeze(-2)
    exponents = torch.add(log_u, block.scores, alpha=1 / plan.epsilon, out=block.entries)
    return _without_infinities(exponents, plan.lowest)


def _without_infinities(values: Tensor, lowest: float) -> Tensor:
    """Overwrite NaN and infinities with a number that is too low to count."""
    return values.nan_to_num_(nan=lowest, posinf=lowest, neginf=lowest)


def _over_prototypes(entries: Tensor, u: Tensor) -> Tensor:
    """Return Σ_j P_ij u_j, (n, b), for entries (n, b, K) and u (n, K)."""
    if not _on_cpu(entries):
        return _products(entries, u)
    rows = _rows_in_parts(entries)
    if rows.shape == entries.shape:
        return torch.bmm(u.unsqueeze(1), rows.mT).squeeze(1)
    vectors = u.repeat_interleave(len(rows) // len(u), dim=0).unsqueeze(1)
    return torch.bmm(vectors, rows.mT).view(entries.shape[:-1])


def _over_samples(entries: Tensor, v: Tensor) -> Tensor:
    """Return Σ_i P_ij v_i, (n, K), for entries (n, b, K) and v (n, b)."""
    if not _on_cpu(entries):
        return _products(entries.mT, v)
    rows = _rows_in_parts(entries)
    if rows.shape == entries.shape:
        return torch.bmm(v.unsqueeze(1), rows).squeeze(1)
    sums = torch.bmm(v.view(len(rows), 1, -1), rows)
    return sums.view(len(v), -1, sums.shape[-1]).sum(dim=1)


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix with its vector; batched, it could be in TF32."""
    return torch.stack([torch.mv(*pair) for pair in zip(matrices, vectors, strict=True)])


def _rows_in_parts(entries: Tensor) -> Tensor:
    """View (n, b, K) as (n · parts, b / parts, K)."""
    samples = entries.shape[1]
    if samples < _PARTS_OF_A_PRODUCT * _SAMPLES_OF_A_PART:
        return entries
    parts = math.gcd(samples, _PARTS_OF_A_PRODUCT)
    return entries.view(len(entries) * parts, samples // parts, -1)
