"""The kernel of Sinkhorn-Knopp: P = exp(S/ε), scaled, in blocks that stay in the cache.

It sums masses; which ones are wanted, and how often, is decided in ``_iterations.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, empty, on_cpu, scaled_sum, traceable
from swavkit.sinkhorn.arithmetic import (
    PARTS_OF_A_PRODUCT,
    exponentials,
    nan_mask_of,
    over_prototypes,
    over_samples,
    products,
    scale_and_rate,
)

# The ranges of u and v can grow with each scaling, by up to B·K if all masses are equal. For so
# many scalings they stay inside that of float32 at any B·K that fits in memory; then P is computed
# anew. Masses that differ let them grow by as much more; then P is new each time.
SCALINGS_OF_ONE_P = 5

# Masses of samples that differ may span 40 decades, which these factors of masses, of u and of P
# keep within the range of float32.
_UNIT_OF_MASSES, _UNIT_OF_U, _LOG_UNIT_OF_P = 2.0**90, 2.0**60, 30 * math.log(2)

# What the caches of a CPU keep from one operation to the next.
_ENTRIES_OF_A_BLOCK = 2**21
_SAMPLES_OF_A_BLOCK = 2**12

# Up to so many, fewer operations save more on a CPU than cheaper ones.
_ENTRIES_AT_ONCE = 2**20

Part = tuple[int | slice, ...]  # the index of a problem, if there are several, and of samples


class Masses(NamedTuple):
    """Masses of which only the ratios count, at any scale: the logarithms of (..., N) numbers."""

    log: Tensor  # (..., N), without log_largest; -inf for a mass of 0, NaN for one below 0
    log_largest: Tensor  # (..., 1); the lowest number if all masses are 0


class Block(NamedTuple):
    """A part of the problem, or several problems with the same part of each: (..., b, K)."""

    part: Part
    entries: Tensor  # (..., b, K), scaled scores and then P
    log_mass: Tensor  # (..., b), log r
    nan_mask: Tensor  # (..., b), NaN for a sample whose scores are not finite, else 0


class Kernel:
    """Q = diag(v) P diag(u) of a problem or of N, with P = exp((S + f)/ε) up to a factor of rows.

    Only f and u have to be told: v always brings the rows of Q to a sum of 1, but for
    :meth:`start`, which finds the masses before any v. Each method reads P, or the scores, once.

    P is only read, while u changes, until the range of floating point calls for a new P, with u in
    f. It lies in the memory of the codes. Where they have none, or one too narrow for the
    arithmetic, P is computed each time it is needed, in the memory of one part.

    S, f and what is added to them are scaled, see ``_arithmetic.py``; S + f of a row is taken
    relative to its largest before it is divided by ε, so that no finite scores overflow.

    A sample with a NaN or an infinite score is left out: its mass is 0, and its code NaN, or zeros
    if it was absent anyway.

    Args:
        scores: Gives the scores (..., b, K) of a part.
        parts: What is computed at a time; see :func:`parts_of`.
        sample_mass: Of (B,) or (N, B) samples, r, in the dtype of all arithmetic; overwritten.
        num_prototypes: K.
        weighted: Whether a mass may be 0.
        fractional: Whether masses of samples or of prototypes may differ in another way than that.
        epsilon: ε.
        codes: (B, K) or (N, B, K), memory for the codes, if they are wanted as a whole.
        memory: For P of a part without that, flat. Between two calls others may write there.
    """

    def __init__(
        self,
        scores: Callable[[Part], Tensor],
        parts: Sequence[Part],
        sample_mass: Masses,
        num_prototypes: int,
        *,
        weighted: bool,
        fractional: bool,
        epsilon: float,
        codes: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self.scores = scores
        self.log_mass, self.log_largest_mass = sample_mass
        self.epsilon = traceable(epsilon, self.log_mass.device)
        self.all_codes = codes
        self.weighted, self.fractional = weighted, fractional
        dtype = self.log_mass.dtype
        self.scale_of_scores, self.rate = scale_and_rate(self.epsilon, dtype)
        self.temperature = self.epsilon * self.scale_of_scores
        self.lowest = torch.finfo(dtype).min / 4  # a scaled score that does not count
        self.shape = (*self.log_mass.shape[:-1], num_prototypes)
        self.scalings = 0  # by u, of one P
        self.log_factor: Tensor | None = None  # of u, if it may be out of range
        self.nan_mask = torch.empty_like(self.log_mass)
        self.level = torch.empty_like(
            self.log_mass
        )  # the largest S + f of a row; NaN by a nan_mask

        self.memory = memory
        self.keeps_entries = codes is not None and codes.dtype == dtype
        if not self.keeps_entries:
            self.keeps_entries = len(parts) == 1 and memory is None
            if memory is None:
                samples = max([0, *[self.log_mass[part].numel() for part in parts]])
                self.memory = empty((samples * num_prototypes,), dtype, self.log_mass)
        self.holds_p = False
        self.blocks = [self.block(part) for part in parts]

    def block(self, part: Part) -> Block:
        """Return a part of the problem; to :meth:`codes_of` also one that no part is the same as.

        That must have its place in the memory of the codes, or none of the parts keeps its P.
        """
        return Block(part, self._room(part), self.log_mass[part], self.nan_mask[part])

    def _room(self, part: Part) -> Tensor:
        """Return memory for the entries of a part."""
        if self.all_codes is not None and self.all_codes.dtype == self.log_mass.dtype:
            return self.all_codes[part]
        shape = (*self.log_mass[part].shape, self.shape[-1])
        if torch.compiler.is_compiling():  # does not see that parts would share memory
            return self.log_mass.new_empty(shape)
        assert self.memory is not None
        return self.memory[: math.prod(shape)].view(shape)

    def largest_scores(self) -> Tensor:
        """Return the largest S + ε log r (..., K) of each prototype, scaled.

        Where no sample counts it is ``lowest``. To be called first: it also finds out which samples
        have scores that are not finite.
        """
        largest = self._over_blocks(self._largest_of, torch.maximum, self.lowest)
        self.code_mass = self.nan_mask + 1  # what a code must sum to
        masked = self.nan_mask.isnan()
        if self.weighted:
            self.code_mass.masked_fill_(masked & (self.log_mass == -math.inf), 0)
        self.log_mass.masked_fill_(masked, -math.inf)
        return largest

    def measure(self, log_largest_mass: Tensor) -> None:
        """Take masses of samples relative to another one, (..., 1), than the largest of them."""
        self.log_mass += self.log_largest_mass - log_largest_mass

    def start(self, f: Tensor) -> Tensor:
        """Set f, and return Σ_i r_i exp((S_ij + f_j)/ε), (..., K).

        None of the r_i exp((S_ij + f_j)/ε) may be above 1.
        """
        self.f, self.u = f, torch.ones_like(f)
        self.mass = self.log_mass.exp()
        if self.fractional:  # as above, and masses below the range of floating point too
            root = (self.log_mass / 2).exp_()
            self.mass = root * _UNIT_OF_MASSES * root
        sums = self._over_blocks(self._start_of, torch.add, 0)
        self.holds_p, self.knows_level = self.keeps_entries, not self.fractional
        return sums

    def scale(self, wanted: Tensor, masses: Tensor) -> None:
        """Bring the prototypes from ``masses`` (..., K) to those ``wanted``.

        A prototype without a mass stays as it is: none is wanted there, or nobody is present.
        """
        if self.fractional:
            self.log_factor = (wanted.log() - masses.log()).masked_fill_(masses == 0, 0)
        else:
            self.u = self.u * (wanted / masses).masked_fill_(masses == 0, 1)
            self.scalings += 1

    def masses(self) -> Tensor:
        """Return the masses of the prototypes in Q, (..., K), in a unit of all kernels.

        They do not tell how u is spread over ``f`` and ``u``, which may differ from process to
        process.
        """
        if self.fractional or self.scalings == SCALINGS_OF_ONE_P:
            self._absorb()
        sums = self._over_blocks(self._sums_of, torch.add, 0)
        self.holds_p, self.knows_level = self.keeps_entries, not self.fractional
        sums *= self.u
        return sums if self.fractional else sums.mul_(_UNIT_OF_MASSES)

    def codes(self, rounded: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return Q, (..., B, K), in the dtype of the memory for it. The kernel is used up.

        ``rounded`` changes codes in place, in the dtype of the arithmetic.
        """
        assert self.all_codes is not None
        for block in self.blocks:
            self.codes_of(block, rounded=rounded)
        return self.all_codes

    def codes_of(
        self,
        block: Block,
        scores: Tensor | None = None,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return Q of a block, in place of its P; ``scores`` are those of the block, if at hand."""
        if self.log_factor is not None:  # u up to a factor, which changes nothing
            root = (self.log_factor - self.log_factor.amax(dim=-1, keepdim=True)).div_(2).exp_()
            u = (root * _UNIT_OF_U * root).clamp_(min=torch.finfo(root.dtype).tiny)
            self.u, self.log_factor = self.u * u, None
        entries = self._p_of(block, scores).mul_(_row(self.u, block))
        v = (self.code_mass[block.part] / entries.sum(dim=-1)).unsqueeze(-1)
        codes = entries if self.all_codes is None else self.all_codes[block.part]
        if rounded is None:
            return torch.mul(entries, v, out=codes)
        return codes.copy_(rounded(entries.mul_(v)))

    def relax(self, f: Tensor) -> None:
        """Set all of u, as ``f`` (..., K)."""
        self.f, self.u = f, torch.ones_like(f)
        self.holds_p = self.knows_level = False

    def log_masses(self) -> Tensor:
        """Return ε times the logarithms of the masses, scaled; these may be of any size.

        All of u must be in ``f``.
        """
        return self._over_blocks(
            self._log_masses_of,
            lambda *both, out: out.copy_(self.sum_of_logs(torch.stack(both), 0)),
            -math.inf,
        )

    def sum_of_logs(self, values: Tensor, dim: int) -> Tensor:
        """Return ε log Σ exp(values/ε), of scaled values, which are overwritten."""
        lowest = torch.finfo(values.dtype).min
        largest = values.amax(dim=dim, keepdim=True).clamp_(min=lowest)
        sums = values.sub_(largest).mul_(self.rate).exp_().sum(dim=dim)
        return sums.log_().mul_(self.temperature).add_(largest.squeeze(dim))

    def _absorb(self) -> None:
        """Move u into f, but for what rounding loses there, which stays in u."""
        change = self.u.log()
        if self.log_factor is not None:
            change += self.log_factor
        change *= self.temperature
        f = self.f + change
        part = f - self.f
        lost = (self.f - (f - part)) + (change - part)
        self.u = lost.mul_(self.rate).masked_fill_(f == -math.inf, 0).exp_()
        self.f, self.scalings, self.log_factor = f, 0, None
        self.holds_p = self.knows_level = False

    def _over_blocks(
        self,
        of_block: Callable[[Block], Tensor],
        combine: Callable[..., object],
        neutral: float,
    ) -> Tensor:
        """Combine what the blocks give, (..., K)."""
        if len(self.blocks) == 1:
            return of_block(self.blocks[0]).view(self.shape)
        result = self.log_mass.new_full(self.shape, neutral)
        for block in self.blocks:
            of_part = _of(result, block)
            combine(of_part, of_block(block), out=of_part)
        return result

    def _scaled(self, block: Block, scores: Tensor, added: Tensor) -> Tensor:
        """Compute S with ``added`` (..., b) on top, scaled, and ``lowest`` where that is NaN."""
        scaled_sum(added.unsqueeze(-1), scores, self.scale_of_scores, out=block.entries)
        return block.entries.nan_to_num_(self.lowest, self.lowest, self.lowest)

    def _largest_of(self, block: Block) -> Tensor:
        scores = self.scores(block.part)
        block.nan_mask.copy_(nan_mask_of(scores))
        added = block.nan_mask
        if self.weighted:
            added = scaled_sum(added, block.log_mass, self.temperature)
        return self._scaled(block, scores, added).amax(dim=-2)

    def _sums_before_division(self, block: Block, scores: Tensor | None = None) -> Tensor:
        """Compute S + f."""
        if scores is None:
            scores = self.scores(block.part)
        return self._scaled(block, scores, block.nan_mask).add_(_row(self.f, block))

    def _start_of(self, block: Block) -> Tensor:
        if self.weighted or not self.keeps_entries:
            entries = self._sums_before_division(block)
        else:
            entries = block.entries.add_(_row(self.f, block))
        largest = self._exponentials_of(block, entries)
        # That of an absent sample may be infinite.
        factor = (largest * self.rate).clamp_(max=-self.lowest).add_(block.log_mass).exp_()
        return over_samples(entries, factor)

    def _sums_of(self, block: Block) -> Tensor:
        entries = self._p_of(block)
        v = self.mass[block.part] / over_prototypes(entries, _of(self.u, block))
        return over_samples(entries, v)

    def _log_masses_of(self, block: Block) -> Tensor:
        entries = self._sums_before_division(block)
        entries.sub_(entries.amax(dim=-1, keepdim=True))
        log_v = (entries * self.rate).exp_().sum(dim=-1).log_().neg_()
        added = log_v.add_(block.log_mass).mul_(self.temperature)
        return self.sum_of_logs(entries.add_(added.unsqueeze(-1)), -2)

    def _p_of(self, block: Block, scores: Tensor | None = None) -> Tensor:
        if self.holds_p:
            return block.entries
        if not self.knows_level:
            entries = self._sums_before_division(block, scores)
            self._exponentials_of(block, entries)
            return entries
        if scores is None:
            scores = self.scores(block.part)
        f, level = _row(self.f, block), self.level[block.part].unsqueeze(-1)
        entries = scaled_sum(f, scores, self.scale_of_scores, out=block.entries)
        return entries.sub_(level).mul_(self.rate).exp_().nan_to_num_(1)

    def _exponentials_of(self, block: Block, entries: Tensor) -> Tensor:
        largest = exponentials(entries, self.rate, _LOG_UNIT_OF_P if self.fractional else 0)
        self.level[block.part] = largest + block.nan_mask
        return largest


def fits_at_once(scores: Tensor, iterations: int) -> bool:
    """Tell whether :func:`codes_at_once` can make the iterations, and is the fastest to do so."""
    small = scores.numel() <= _ENTRIES_AT_ONCE or not on_cpu(scores)
    return small and iterations <= SCALINGS_OF_ONE_P and scores.numel() > 0


def codes_at_once(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the codes of scores (B, K) or (N, B, K), with equal masses, in few operations.

    They are in the dtype of the arithmetic. The steps are those of a :class:`Kernel` of one part.
    """
    dtype = at_least_float32(scores.dtype)
    lowest = torch.finfo(dtype).min / 4
    scale, rate = scale_and_rate(traceable(epsilon, scores.device), dtype)
    nan_mask = nan_mask_of(scores).to(dtype).unsqueeze(-1)
    entries = scaled_sum(nan_mask, scores, scale)
    entries.nan_to_num_(lowest, lowest, lowest)
    entries.sub_(entries.amax(dim=-2, keepdim=True))
    largest = exponentials(entries, rate)
    factor = nan_mask.exp_()  # NaN or 1, what a code must sum to
    sample_mass = factor.squeeze(-1).nan_to_num(0)
    v = largest.mul_(rate).exp_().mul_(sample_mass)
    transposed = entries.mT
    for _ in range(iterations):
        u = products(transposed, v).reciprocal_()
        sums = products(entries, u)
        v = sample_mass / sums
    return entries.mul_(u.unsqueeze(-2)).mul_(factor.div_(sums.unsqueeze(-1)))


def parts_of(scores: Tensor) -> list[Part]:
    """Return which parts of ``scores``, (B, K) or (N, B, K), to compute at a time.

    An accelerator takes everything at once, and so does a compiler, which fuses the operations.
    """
    *number, samples, prototypes = scores.shape
    if scores.numel() == 0:
        return []
    if not on_cpu(scores) or (
        scores.numel() <= _ENTRIES_OF_A_BLOCK and samples <= _SAMPLES_OF_A_BLOCK
    ):
        return [(slice(None),) * (scores.dim() - 1)]
    rows = min(_SAMPLES_OF_A_BLOCK, _ENTRIES_OF_A_BLOCK // prototypes)
    rows = max(rows - rows % PARTS_OF_A_PRODUCT, 1)
    return [
        (*problem, slice(first, first + rows))
        for problem in itertools.product(*map(range, number))
        for first in range(0, samples, rows)
    ]


def _of(vectors: Tensor, block: Block) -> Tensor:
    """Return those of the vectors (..., K) that belong to the block."""
    return vectors[block.part[:-1]] if len(block.part) > 1 else vectors


def _row(vectors: Tensor, block: Block) -> Tensor:
    """Return those of the vectors (..., K) that belong to the block, (..., 1, K)."""
    return _of(vectors, block).unsqueeze(-2)
