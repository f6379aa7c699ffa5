"""The scaled Gibbs kernel P = exp(S/ε) of Sinkhorn-Knopp, in blocks that stay in a CPU's cache.

It sums masses over the samples of this rank. ``iterations.py`` sums over ranks and applies the
target marginals.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit._tensors import empty, on_cpu, scaled_sum, traceable

# With equal masses, the range of u and v grows by up to B·K per scaling. Five scalings stay inside
# float32 at any B·K that fits in memory; then P is computed anew. With fractional weights the range
# grows faster, and P is computed anew each time.
SCALINGS_OF_ONE_KERNEL = 5

# Sample masses may span 40 decades. These factors of masses, u and P keep them in float32's range.
_UNIT_OF_MASSES, _UNIT_OF_U, _LOG_UNIT_OF_KERNEL = 2.0**90, 2.0**60, 30 * math.log(2)

# The values and samples that a CPU's caches keep from one operation to the next.
_VALUES_OF_A_BLOCK = 2**21
_SAMPLES_OF_A_BLOCK = 2**12

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

Part = tuple[int | slice, ...]  # the index of a problem, if there are several, and of samples


class Masses(NamedTuple):
    """Logarithms of masses (..., N), relative to the largest one. Only their ratios count."""

    log: Tensor  # (..., N), log of mass / largest; -inf for a mass of 0, NaN for one below 0
    log_largest: Tensor  # (..., 1); the lowest number if all masses are 0


class Block(NamedTuple):
    """Some samples of one problem, or the same samples of several problems."""

    part: Part
    values: Tensor  # (..., b, K), scaled scores and then P
    log_mass: Tensor  # (..., b), log r
    nan_mask: Tensor  # (..., b), NaN for a sample with a score that is not finite, else 0


class Kernel:
    """The scaled kernel P = exp((S + f)/ε) of one problem or N, for Q = diag(v) P diag(u).

    Each row of P is divided by its largest entry, so that no finite score overflows. Only u and f
    are state: v follows from them, since each row of Q sums to 1. Each method reads the scores or P
    once. The order of calls is :meth:`largest_scores`, :meth:`measure` if there are several ranks,
    :meth:`start`, then :meth:`scale` and :meth:`masses` in turn (or :meth:`relax` and
    :meth:`log_masses`), and at last :meth:`codes`.

    P stays as it is while u changes. When u is about to leave the range of floating point, it is
    absorbed into f and P is computed anew. P lies in the memory of the codes. If that is missing or
    narrower than the arithmetic, P of a block is computed whenever it is needed.

    Scores and f are scaled, see ``_SCALE``. A sample with a NaN or infinite score has mass
    0. Its code is NaN, or zeros if its weight is 0.

    Args:
        scores: Returns the scores (..., b, K) of a part.
        parts: The parts to compute at a time; see :func:`parts_of`.
        sample_mass: r of (B,) or (N, B) samples, in the dtype of all arithmetic; overwritten.
        num_prototypes: K.
        weighted: Whether a sample mass may be 0.
        fractional: Whether masses of samples or prototypes may differ in any other way.
        epsilon: ε.
        codes: (B, K) or (N, B, K) memory for the codes, if they are needed as a whole.
        memory: Flat memory for P of a part without ``codes``. It may be overwritten between calls.
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
        epsilon: float | Tensor,
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
        self.lowest = torch.finfo(dtype).min / 4  # the scaled score of an excluded prototype
        self.shape = (*self.log_mass.shape[:-1], num_prototypes)
        self.scalings = 0  # of the present P by u
        self.log_factor: Tensor | None = None  # of u, if that may be out of range
        self.nan_mask = torch.empty_like(self.log_mass)
        self.level = torch.empty_like(self.log_mass)  # the largest S + f of each row

        self.memory = memory
        self.keeps_values = codes is not None and codes.dtype == dtype
        if not self.keeps_values:
            self.keeps_values = len(parts) == 1 and memory is None
            if memory is None:
                samples = max([0, *[self.log_mass[part].numel() for part in parts]])
                self.memory = empty((samples * num_prototypes,), dtype, self.log_mass)
        self.holds_p = False
        self.blocks = [self.block(part) for part in parts]

    def block(self, part: Part) -> Block:
        """Return the block of a part, for :meth:`codes_of` also of one that is not in ``parts``.

        That needs the memory of the codes, or parts that keep no P.
        """
        return Block(part, self._room(part), self.log_mass[part], self.nan_mask[part])

    def _room(self, part: Part) -> Tensor:
        """Return the memory of a part's values."""
        if self.all_codes is not None and self.all_codes.dtype == self.log_mass.dtype:
            return self.all_codes[part]
        shape = (*self.log_mass[part].shape, self.shape[-1])
        if torch.compiler.is_compiling():  # which does not support aliases
            return self.log_mass.new_empty(shape)
        assert self.memory is not None
        return self.memory[: math.prod(shape)].view(shape)

    def largest_scores(self) -> Tensor:
        """Return the largest S + ε log r of each prototype, (..., K), scaled.

        It is ``lowest`` if no sample counts. The method also finds the samples with scores that are
        not finite.
        """
        largest = self._over_blocks(self._largest_of, torch.maximum, self.lowest)
        self.code_mass = self.nan_mask + 1  # the sum of each code
        masked = self.nan_mask.isnan()
        if self.weighted:
            self.code_mass.masked_fill_(masked & (self.log_mass == -math.inf), 0)
        self.log_mass.masked_fill_(masked, -math.inf)
        return largest

    def measure(self, log_largest_mass: Tensor) -> None:
        """Make sample masses relative to a given one, (..., 1), that of all ranks."""
        self.log_mass += self.log_largest_mass - log_largest_mass

    def start(self, f: Tensor) -> Tensor:
        """Set f and return Σ_i r_i exp((S_ij + f_j)/ε), (..., K), whose terms must be at most 1."""
        self.f, self.u = f, torch.ones_like(f)
        self.mass = self.log_mass.exp()
        if self.fractional:  # in two steps, for masses below the range of floating point
            root = (self.log_mass / 2).exp_()
            self.mass = root * _UNIT_OF_MASSES * root
        sums = self._over_blocks(self._start_of, torch.add, 0)
        self.holds_p, self.knows_level = self.keeps_values, not self.fractional
        return sums

    def scale(self, target: Tensor, masses: Tensor) -> None:
        """Scale u so that prototypes with ``masses`` (..., K) get those of ``target``.

        A prototype of mass 0 keeps its u: its target is 0, or no sample is present.
        """
        if self.fractional:
            self.log_factor = (target.log() - masses.log()).masked_fill_(masses == 0, 0)
        else:
            self.u = self.u * (target / masses).masked_fill_(masses == 0, 1)
            self.scalings += 1

    def masses(self) -> Tensor:
        """Return the masses of the prototypes in Q, (..., K).

        Their unit is the same on all ranks, however u is divided between ``f`` and ``u``.
        """
        if self.fractional or self.scalings == SCALINGS_OF_ONE_KERNEL:
            self._absorb()
        sums = self._over_blocks(self._sums_of, torch.add, 0)
        self.holds_p, self.knows_level = self.keeps_values, not self.fractional
        sums *= self.u
        return sums if self.fractional else sums.mul_(_UNIT_OF_MASSES)

    def codes(self, rounded: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return Q, (..., B, K), in place of P.

        ``rounded`` changes codes in place, before they are converted to the dtype of the memory.
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
        """Return Q of a block, in place of its P; ``scores`` are those of the block, if known."""
        if self.log_factor is not None:  # up to a factor, which v cancels
            root = (self.log_factor - self.log_factor.amax(dim=-1, keepdim=True)).div_(2).exp_()
            u = (root * _UNIT_OF_U * root).clamp_(min=torch.finfo(root.dtype).tiny)
            self.u, self.log_factor = self.u * u, None
        values = self._p_of(block, scores).mul_(_row(self.u, block))
        v = (self.code_mass[block.part] / values.sum(dim=-1)).unsqueeze(-1)
        codes = values if self.all_codes is None else self.all_codes[block.part]
        if rounded is None:
            return torch.mul(values, v, out=codes)
        return codes.copy_(rounded(values.mul_(v)))

    def relax(self, f: Tensor) -> None:
        """Set f (..., K), with u = 1."""
        self.f, self.u = f, torch.ones_like(f)
        self.holds_p = self.knows_level = False

    def log_masses(self) -> Tensor:
        """Return ε times the logarithms of the masses, scaled, for u = 1 and of any size."""
        return self._over_blocks(
            self._log_masses_of,
            lambda *both, out: out.copy_(self.sum_of_logs(torch.stack(both), 0)),
            -math.inf,
        )

    def sum_of_logs(self, values: Tensor, dim: int) -> Tensor:
        """Return ε log Σ exp(values/ε) of scaled values, which are overwritten."""
        lowest = torch.finfo(values.dtype).min
        largest = values.amax(dim=dim, keepdim=True).clamp_(min=lowest)
        sums = values.sub_(largest).mul_(self.rate).exp_().sum(dim=dim)
        return sums.log_().mul_(self.temperature).add_(largest.squeeze(dim))

    def _absorb(self) -> None:
        """Absorb u into f. The rounding error of f stays in u."""
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
        """Combine the results of all blocks, (..., K)."""
        if len(self.blocks) == 1:
            return of_block(self.blocks[0]).view(self.shape)
        result = self.log_mass.new_full(self.shape, neutral)
        for block in self.blocks:
            of_part = _of(result, block)
            combine(of_part, of_block(block), out=of_part)
        return result

    def _scaled(self, block: Block, scores: Tensor, added: Tensor) -> Tensor:
        """Compute S + ``added`` (..., b), scaled, and ``lowest`` where it is not finite."""
        scaled_sum(added.unsqueeze(-1), scores, self.scale_of_scores, out=block.values)
        return block.values.nan_to_num_(self.lowest, self.lowest, self.lowest)

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
        if self.weighted or not self.keeps_values:
            values = self._sums_before_division(block)
        else:
            values = block.values.add_(_row(self.f, block))
        largest = self._exponentials_of(block, values)
        # The factor of a sample of weight 0 may be infinite.
        factor = (largest * self.rate).clamp_(max=-self.lowest).add_(block.log_mass).exp_()
        return over_samples(values, factor)

    def _sums_of(self, block: Block) -> Tensor:
        values = self._p_of(block)
        v = self.mass[block.part] / over_prototypes(values, _of(self.u, block))
        return over_samples(values, v)

    def _log_masses_of(self, block: Block) -> Tensor:
        values = self._sums_before_division(block)
        values.sub_(values.amax(dim=-1, keepdim=True))
        log_v = (values * self.rate).exp_().sum(dim=-1).log_().neg_()
        added = log_v.add_(block.log_mass).mul_(self.temperature)
        return self.sum_of_logs(values.add_(added.unsqueeze(-1)), -2)

    def _p_of(self, block: Block, scores: Tensor | None = None) -> Tensor:
        if self.holds_p:
            return block.values
        if not self.knows_level:
            values = self._sums_before_division(block, scores)
            self._exponentials_of(block, values)
            return values
        if scores is None:
            scores = self.scores(block.part)
        f, level = _row(self.f, block), self.level[block.part].unsqueeze(-1)
        values = scaled_sum(f, scores, self.scale_of_scores, out=block.values)
        return values.sub_(level).mul_(self.rate).exp_().nan_to_num_(1)

    def _exponentials_of(self, block: Block, values: Tensor) -> Tensor:
        largest = exponentials(values, self.rate, _LOG_UNIT_OF_KERNEL if self.fractional else 0)
        self.level[block.part] = largest + block.nan_mask
        return largest


def parts_of(scores: Tensor) -> list[Part]:
    """Return the parts of ``scores``, (B, K) or (N, B, K), to compute at a time.

    On an accelerator and under torch.compile there is one. On a CPU, parts that stay in the cache
    save up to 1.2 times.
    """
    *number, samples, prototypes = scores.shape
    if scores.numel() == 0:
        return []
    if not on_cpu(scores) or (
        scores.numel() <= _VALUES_OF_A_BLOCK and samples <= _SAMPLES_OF_A_BLOCK
    ):
        return [(slice(None),) * (scores.dim() - 1)]
    rows = min(_SAMPLES_OF_A_BLOCK, _VALUES_OF_A_BLOCK // prototypes)
    rows = max(rows - rows % PARTS_OF_A_PRODUCT, 1)
    return [
        (*problem, slice(first, first + rows))
        for problem in itertools.product(*map(range, number))
        for first in range(0, samples, rows)
    ]


def _of(vectors: Tensor, block: Block) -> Tensor:
    """Return the vectors (..., K) of a block's problem."""
    return vectors[block.part[:-1]] if len(block.part) > 1 else vectors


def _row(vectors: Tensor, block: Block) -> Tensor:
    """Return the vectors (..., K) of a block's problem as rows, (..., 1, K)."""
    return _of(vectors, block).unsqueeze(-2)


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


def products(matrices: Tensor, vectors: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the product of each matrix with its vector. A batched product might use TF32."""
    if matrices.dim() == 3:
        results = vectors.new_empty(matrices.shape[:-1])
        for matrix, vector, result in zip(matrices, vectors, results, strict=True):
            products(matrix, vector, out=result)
        return results
    parts = _parts_of_a_row(matrices)
    if not parts:
        return torch.mv(matrices, vectors, out=out)
    sums = torch.stack([torch.mv(matrices[:, part], vectors[part]) for part in parts])
    return torch.sum(sums, dim=0, out=out)


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
