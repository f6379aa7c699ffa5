"""The plan of Sinkhorn-Knopp: P = exp(S/ε), scaled, in blocks that stay in the cache.

It knows how to sum masses; which masses are wanted, and how often, is the business of
``_iterations.py``. It knows of no other processes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit._device import on_cpu
from swavkit._memory import empty
from swavkit._precision import at_least_float32

# The ranges of u and v can grow with each scaling, by up to B·K if all masses are equal. For so
# many scalings they stay inside that of float32 at any B·K that fits in memory; then P is computed
# anew. Masses that differ let them grow by as much more; then P is new each time.
_SCALINGS_OF_ONE_P = 5

# What the caches of a CPU keep from one operation to the next.
_ENTRIES_OF_A_BLOCK = 2**21
_SAMPLES_OF_A_BLOCK = 2**12

# Up to so many, fewer operations save more on a CPU than cheaper ones.
_ENTRIES_AT_ONCE = 2**20

# torch spreads a batch of products with a vector over the threads of a CPU, and a single one not.
_PARTS_OF_A_PRODUCT = 8
_ENTRIES_OF_A_PART = 2**15

Part = tuple[int | slice, ...]  # the index of a problem, if there are several, and of samples


class Block(NamedTuple):
    """A part of the problem, or several problems with the same part of each: (..., b, K)."""

    part: Part
    entries: Tensor  # (..., b, K), S/ε and then P
    sample_mass: Tensor  # (..., b), r
    flaw: Tensor  # (..., b), NaN for a sample whose scores are not finite, else 0
    absence: Tensor | None  # (..., b), NaN for a sample that is absent, else 0; None: nobody is


class Plan:
    """Q = diag(v) P diag(u) of a problem or of N, with P = softmax(S/ε + log_u) over prototypes.

    Only ``u`` has to be told: v always brings the rows of Q to a sum of 1, but for :meth:`start`,
    which finds the masses before any v. Each method reads P, or the scores, once.

    P is only read, while u changes, until the range of floating point calls for a new P, with u in
    ``log_u``. It lies in the memory of the codes. Where they have none, or one too narrow for the
    arithmetic, P is computed each time it is needed, in the memory of one part.

    A sample with a NaN or an infinite score is left out: its mass is 0, and its code NaN, or zeros
    if it was absent anyway.

    Args:
        scores: Gives the scores (..., b, K) of a part.
        parts: What is computed at a time; see :func:`parts_of`.
        sample_mass: (B,) or (N, B), r, in the dtype of all arithmetic; overwritten.
        num_prototypes: K.
        weighted: Whether a mass may be 0.
        graded: Whether masses of samples or of prototypes may differ in another way than that.
        epsilon: ε.
        codes: (B, K) or (N, B, K), memory for the codes, if they are wanted as a whole.
        memory: For P of a part without that, flat. Between two calls others may write there.
    """

    log_u: Tensor
    u: Tensor

    def __init__(
        self,
        scores: Callable[[Part], Tensor],
        parts: Sequence[Part],
        sample_mass: Tensor,
        num_prototypes: int,
        *,
        weighted: bool,
        graded: bool,
        epsilon: float,
        codes: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self.scores, self.sample_mass, self.epsilon = scores, sample_mass, epsilon
        self.all_codes = codes
        self.scalings_of_one_p = 1 if graded else _SCALINGS_OF_ONE_P
        self.lowest = torch.finfo(sample_mass.dtype).min / 4  # an exponent that does not count
        self.shape = (*sample_mass.shape[:-1], num_prototypes)
        self.scalings = 0  # by u, of one P
        self.scaled = False  # at all; before that there is no u
        self.flaw = torch.empty_like(sample_mass)
        self.absence = None
        if weighted:
            zeros = torch.zeros_like(sample_mass)
            self.absence = zeros.masked_fill_(sample_mass == 0, torch.nan)

        self.memory = memory
        self.keeps_entries = codes is not None and codes.dtype == sample_mass.dtype
        if not self.keeps_entries:
            self.keeps_entries = len(parts) == 1 and memory is None
            if memory is None:
                samples = max([0, *[sample_mass[part].numel() for part in parts]])
                self.memory = empty((samples * num_prototypes,), sample_mass.dtype, sample_mass)
        self.holds_p = False
        self.blocks = [self.block(part) for part in parts]

    def block(self, part: Part) -> Block:
        """Return a part of the problem; to :meth:`codes_of` also one that no part is the same as.

        That must have its place in the memory of the codes, or none of the parts keeps its P.
        """
        return Block(
            part,
            self._room(part),
            self.sample_mass[part],
            self.flaw[part],
            None if self.absence is None else self.absence[part],
        )

    def _room(self, part: Part) -> Tensor:
        """Return memory for the entries of a part."""
        if self.all_codes is not None and self.all_codes.dtype == self.sample_mass.dtype:
            return self.all_codes[part]
        shape = (*self.sample_mass[part].shape, self.shape[-1])
        if torch.compiler.is_compiling():  # does not see that parts would share memory
            return self.sample_mass.new_empty(shape)
        assert self.memory is not None
        return self.memory[: math.prod(shape)].view(shape)

    def largest_exponents(self) -> Tensor:
        """Return the largest S/ε (..., K) of each prototype among the samples that count.

        Where no sample counts it is ``lowest``. To be called first: it also finds out which samples
        have scores that are not finite.
        """
        largest = self._over_blocks(self._largest_of, torch.maximum, self.lowest)
        self.code_mass = self.flaw + 1  # what a code must sum to
        if self.absence is None:
            torch.nan_to_num(self.code_mass, nan=0, out=self.sample_mass)
        else:
            flawed = self.flaw.isnan()
            self.code_mass.masked_fill_(flawed & (self.sample_mass == 0), 0)
            self.sample_mass.masked_fill_(flawed, 0)
        return largest

    def start(self, log_u: Tensor) -> Tensor:
        """Set ``log_u``, and return Σ_i r_i exp(S_ij/ε + log_u_j), (..., K).

        No exponent of a sample that is present may be above 0.
        """
        self.log_u = log_u
        sums = self._over_blocks(self._start_of, torch.add, 0)
        self.holds_p = self.keeps_entries
        return sums

    def scale(self, factor: Tensor) -> None:
        """Multiply u by ``factor`` (..., K)."""
        self.u = self.u * factor if self.scaled else factor
        self.scaled = True
        self.scalings += 1

    def masses(self) -> Tensor:
        """Return the masses of the prototypes in Q, (..., K).

        They do not tell how u is spread over ``log_u`` and ``u``, which may differ from process to
        process.
        """
        if self.scalings == self.scalings_of_one_p:
            self._renew()
        sums = self._over_blocks(self._sums_of, torch.add, 0)
        self.holds_p = self.keeps_entries
        return sums.mul_(self.u)

    def codes(self) -> Tensor:
        """Return Q, (..., B, K), in the dtype of the memory for it. The plan is used up."""
        assert self.all_codes is not None
        for block in self.blocks:
            self.codes_of(block)
        return self.all_codes

    def codes_of(self, block: Block, scores: Tensor | None = None) -> Tensor:
        """Return Q of a block, in place of its P; ``scores`` are those of the block, if at hand."""
        entries = self._p_of(block, scores).mul_(_row(self.u, block))
        v = self.code_mass[block.part] / entries.sum(dim=-1)
        codes = entries if self.all_codes is None else self.all_codes[block.part]
        return torch.mul(entries, v.unsqueeze(-1), out=codes)

    def relax(self, log_u: Tensor) -> None:
        """Set all of u, as ``log_u`` (..., K)."""
        self.log_u, self.u, self.holds_p = log_u, torch.ones_like(log_u), False

    def log_masses(self) -> Tensor:
        """Return the logarithms of the masses, which may be below the range of floating point.

        All of u must be in ``log_u``.
        """
        return self._over_blocks(self._log_masses_of, torch.logaddexp, -math.inf)

    def _renew(self) -> None:
        """Move u into ``log_u``, but for what rounding loses there, which stays in u."""
        change = self.u.log()
        log_u = self.log_u + change
        part = log_u - self.log_u
        lost = (self.log_u - (log_u - part)) + (change - part)
        self.u = lost.masked_fill_(log_u == -math.inf, 0).exp_()
        self.log_u, self.scalings, self.holds_p = log_u, 0, False

    def _over_blocks(
        self,
        of_block: Callable[[Block], Tensor],
        combine: Callable[..., Tensor],
        neutral: float,
    ) -> Tensor:
        """Combine what the blocks give, (..., K)."""
        if len(self.blocks) == 1:
            return of_block(self.blocks[0]).view(self.shape)
        result = self.sample_mass.new_full(self.shape, neutral)
        for block in self.blocks:
            of_part = _of(result, block)
            combine(of_part, of_block(block), out=of_part)
        return result

    def _exponents_of(self, block: Block, scores: Tensor, left_out: Tensor) -> Tensor:
        """Compute S/ε, with an exponent that does not count where ``left_out`` is NaN."""
        torch.add(left_out.unsqueeze(-1), scores, alpha=1 / self.epsilon, out=block.entries)
        lowest = self.lowest
        return block.entries.nan_to_num_(nan=lowest, posinf=lowest, neginf=lowest)

    def _log_p_of(self, block: Block, scores: Tensor) -> Tensor:
        """Compute S/ε + log_u, of which P is the softmax."""
        return self._exponents_of(block, scores, block.flaw).add_(_row(self.log_u, block))

    def _largest_of(self, block: Block) -> Tensor:
        scores = self.scores(block.part)
        # NaN and infinity show in a sum: less itself it is NaN.
        total = scores.sum(dim=-1, dtype=block.flaw.dtype)
        block.flaw.copy_(total - total)
        left_out = block.flaw if block.absence is None else block.flaw + block.absence
        return self._exponents_of(block, scores, left_out).amax(dim=-2)

    def _start_of(self, block: Block) -> Tensor:
        if self.absence is None and self.keeps_entries:
            exponents = block.entries
        else:
            exponents = self._exponents_of(block, self.scores(block.part), block.flaw)
        exponents.add_(_row(self.log_u, block))
        largest = exponents.amax(dim=-1)
        if self.absence is not None:
            largest.clamp_(max=0)  # only that of an absent sample can be above
        entries = torch.softmax(exponents, dim=-1, out=exponents)
        # What the softmax has divided a row by.
        divisor = largest.exp_().div_(entries.amax(dim=-1))
        return _over_samples(entries, divisor.mul_(block.sample_mass))

    def _sums_of(self, block: Block) -> Tensor:
        entries = self._p_of(block)
        v = block.sample_mass / _over_prototypes(entries, _of(self.u, block))
        return _over_samples(entries, v)

    def _log_masses_of(self, block: Block) -> Tensor:
        exponents = self._log_p_of(block, self.scores(block.part))
        log_codes = torch.log_softmax(exponents, dim=-1, out=exponents)
        return log_codes.add_(block.sample_mass.log().unsqueeze(-1)).logsumexp(dim=-2)

    def _p_of(self, block: Block, scores: Tensor | None = None) -> Tensor:
        if self.holds_p:
            return block.entries
        if scores is None:
            scores = self.scores(block.part)
        exponents = self._log_p_of(block, scores)
        return torch.softmax(exponents, dim=-1, out=exponents)


def fits_at_once(scores: Tensor, iterations: int) -> bool:
    """Tell whether :func:`codes_at_once` can make the iterations, and is the fastest to do so."""
    small = scores.numel() <= _ENTRIES_AT_ONCE or not on_cpu(scores)
    return small and iterations <= _SCALINGS_OF_ONE_P and scores.numel() > 0


def codes_at_once(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Return the codes of scores (B, K) or (N, B, K), with equal masses, in few operations.

    The whole first iteration is a softmax over the samples and one over the prototypes, the first
    of them in the log domain.
    """
    dtype = at_least_float32(scores.dtype)
    lowest = torch.finfo(dtype).min / 4
    total = scores.sum(dim=-1, keepdim=True, dtype=dtype)
    flaw = total - total  # (..., B, 1), NaN where a score is not finite, else 0
    exponents = torch.add(flaw, scores, alpha=1 / epsilon)
    exponents.nan_to_num_(lowest, lowest, lowest)
    torch.log_softmax(exponents, dim=-2, out=exponents)
    entries = torch.softmax(exponents, dim=-1, out=exponents)
    factor = flaw.exp_()  # NaN or 1, what a code must sum to
    if iterations > 1:
        v = sample_mass = factor.squeeze(-1).nan_to_num(0)
        transposed = entries.mT
        for _ in range(iterations - 1):
            u = _products(transposed, v).reciprocal_()
            sums = _products(entries, u)
            v = sample_mass / sums
        entries.mul_(u.unsqueeze(-2))
        factor /= sums.unsqueeze(-1)
    codes = entries.mul_(factor)
    return codes if scores.dtype == dtype else codes.to(scores.dtype)


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
    rows = max(rows - rows % _PARTS_OF_A_PRODUCT, 1)
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


def _over_prototypes(entries: Tensor, u: Tensor) -> Tensor:
    """Return Σ_j P_ij u_j, (..., b), for entries (..., b, K) and u (..., K)."""
    parts = _parts_of_a_product(entries)
    if parts == 1:
        return _products(entries, u)
    rows = entries.view(-1, entries.shape[-2] // parts, entries.shape[-1])
    vectors = u.repeat_interleave(parts, dim=0) if u.dim() > 1 else u.expand(parts, -1)
    return torch.bmm(vectors.unsqueeze(1), rows.mT).view(entries.shape[:-1])


def _over_samples(entries: Tensor, v: Tensor) -> Tensor:
    """Return Σ_i P_ij v_i, (..., K), for entries (..., b, K) and v (..., b)."""
    parts = _parts_of_a_product(entries)
    if parts == 1:
        return _products(entries.mT, v)
    rows = entries.view(-1, entries.shape[-2] // parts, entries.shape[-1])
    sums = torch.bmm(v.view(len(rows), 1, -1), rows)
    return sums.view(*v.shape[:-1], parts, -1).sum(dim=-2)


def _products(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return the product of each matrix with its vector; batched, it could be in TF32."""
    if matrices.dim() == 2:
        return torch.mv(matrices, vectors)
    return torch.stack([torch.mv(*pair) for pair in zip(matrices, vectors, strict=True)])


def _parts_of_a_product(entries: Tensor) -> int:
    if entries.numel() < _PARTS_OF_A_PRODUCT * _ENTRIES_OF_A_PART or not on_cpu(entries):
        return 1
    return math.gcd(entries.shape[-2], _PARTS_OF_A_PRODUCT)
