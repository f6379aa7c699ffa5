"""The scaled Gibbs kernel P = exp(S/ε) of Sinkhorn-Knopp, in blocks that stay in a CPU's cache.

:class:`ScaledScores` starts a :class:`Scaling`, each iteration returns another one, and the last
gives the :class:`Kernel` of the codes. Masses are sums over the samples of this rank;
``iterations.py`` sums them over ranks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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

# On a CPU, torch spreads a batch of matrix-vector products over threads but not a single one: 0.9
# of the time with 2 threads at 2×256×3,000.
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
    values: Tensor  # memory (..., b, K) for scaled scores and then P


class ScaledScores:
    """The scores S of one problem or N, which are read once at construction.

    They are multiplied by a scale, see ``_SCALE``, and so is f. The rows of P = exp((S + f)/ε) are
    divided by their largest entries, so that no finite score overflows. P of the last f is kept in
    the memory of the codes. If that is missing or narrower than the arithmetic, P of a block is
    computed whenever it is needed.

    ``values``, if that memory is there, holds scaled scores while ``holds_scores``, and then P of
    ``f_of_p``. ``level`` belongs to ``f_of_level``.

    A sample with a NaN or infinite score has mass 0. Its code is NaN, or zeros if its weight is 0.

    Args:
        scores: Returns the scores (..., b, K) of each part, in the order of ``parts``.
        parts: The parts to compute at a time; see :func:`parts_of`.
        sample_mass: r of (B,) or (N, B) samples, in the dtype of all arithmetic; overwritten.
        num_prototypes: K.
        prototype_mass: c, (K,), of sum 1; ``None`` for equal masses.
        weighted: Whether a sample mass may be 0.
        fractional: Whether masses of samples or prototypes may differ in any other way.
        epsilon: ε.
        codes: (B, K) or (N, B, K) memory for the codes, if they are needed as a whole.
        memory: Flat memory for P of a part without ``codes``. It may be overwritten between calls.
    """

    def __init__(
        self,
        scores: Callable[[], Iterable[Tensor]],
        parts: Sequence[Part],
        sample_mass: Masses,
        num_prototypes: int,
        prototype_mass: Tensor | None,
        *,
        weighted: bool,
        fractional: bool,
        epsilon: float | Tensor,
        codes: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> None:
        self.scores, self.all_codes, self.memory = scores, codes, memory
        self.log_mass, self.log_largest_mass = sample_mass
        self.weighted, self.fractional = weighted, fractional
        self.equal = prototype_mass is None
        if prototype_mass is None:
            prototype_mass = self.log_mass.new_full((1,), 1 / num_prototypes)
        self.target = prototype_mass  # c
        dtype = self.log_mass.dtype
        self.epsilon = traceable(epsilon, self.log_mass.device)
        self.scale, self.rate = scale_and_rate(self.epsilon, dtype)
        self.temperature = self.epsilon * self.scale
        self.lowest = torch.finfo(dtype).min / 4  # the scaled score of an excluded prototype
        self.shape = (*self.log_mass.shape[:-1], num_prototypes)

        self.values = codes if codes is not None and codes.dtype == dtype else None
        if self.values is None and memory is None and len(parts) == 1:
            self.values = empty((*self.log_mass.shape, num_prototypes), dtype, self.log_mass)
        elif self.values is None and memory is None:
            samples = max([0, *[self.log_mass[part].numel() for part in parts]])
            self.memory = empty((samples * num_prototypes,), dtype, self.log_mass)
        self.blocks = [self.block(part) for part in parts]
        self.f_of_p: Tensor | None = None  # f of the P in memory, which then needs no scores
        self.f_of_level: Tensor | None = None
        self.level = torch.empty_like(self.log_mass)  # the largest S + f of each row

        self.nan_mask = torch.empty_like(self.log_mass)  # NaN for a score that is not finite, or 0
        # With weights, a CPU keeps scores from one pass to the next at the price of one more block.
        self.holds_scores = self.values is not None and (not weighted or on_cpu(self.log_mass))
        # The largest S + ε log r of each prototype, (..., K); ``lowest`` if no sample counts.
        self.largest = self.over_blocks(self._largest_of, torch.maximum, self.lowest)
        self.code_mass = self.nan_mask + 1  # the sum of each code
        masked = self.nan_mask.isnan()
        if weighted:
            self.code_mass.masked_fill_(masked & (self.log_mass == -math.inf), 0)
        self.log_mass.masked_fill_(masked, -math.inf)

    def block(self, part: Part) -> Block:
        """Return the block of a part, which may be smaller than those of ``parts``."""
        if self.values is not None:
            return Block(part, self.values[part])
        shape = (*self.log_mass[part].shape, self.shape[-1])
        if torch.compiler.is_compiling():  # which does not support aliases
            return Block(part, self.log_mass.new_empty(shape))
        assert self.memory is not None
        return Block(part, self.memory[: math.prod(shape)].view(shape))

    def start(self, f: Tensor, log_mass: Tensor) -> tuple[Scaling, Tensor]:
        """Return a scaling with u = 1 and Σ_i r_i exp((S_ij + f_j)/ε), (..., K).

        Each term must be at most 1. ``log_mass`` is log r relative to the largest of all ranks.
        """

        def sums_of(block: Block, scores: Tensor | None) -> Tensor:
            if scores is None:
                values = block.values.add_(_row(f, block))
            else:
                values = self.sums_with(f, block, scores)
            largest = self._exponentials_of(block, values)
            # The factor of a sample of weight 0 may be infinite.
            factor = (largest * self.rate).clamp_(max=-self.lowest).add_(log_mass[block.part])
            return over_samples(values, factor.exp_())

        mass = log_mass.exp()
        if self.fractional:  # in two steps, for masses below the range of floating point
            root = (log_mass / 2).exp_()
            mass = root * _UNIT_OF_MASSES * root
        sums = self.over_blocks(sums_of, in_memory=self.holds_scores)
        self.keep(f)
        return Scaling(self, log_mass, mass, f, torch.ones_like(f)), sums

    def keep(self, f: Tensor) -> None:
        """Note that a pass over all blocks has computed P of ``f``, which stays if it has room."""
        self.f_of_p, self.f_of_level = f if self.values is not None else None, f
        self.holds_scores = False

    def p_of(self, f: Tensor, block: Block, scores: Tensor | None) -> Tensor:
        """Return P of a block, given its scores unless P is in memory."""
        if self.f_of_p is f:
            return block.values
        assert scores is not None
        if self.f_of_level is not f:
            self.f_of_level = None  # is about to change
            values = self.sums_with(f, block, scores)
            self._exponentials_of(block, values)
            return values
        level = self.level[block.part].unsqueeze(-1)
        values = scaled_sum(_row(f, block), scores, self.scale, out=block.values)
        return values.sub_(level).mul_(self.rate).exp_().nan_to_num_(1)

    def sums_with(self, f: Tensor, block: Block, scores: Tensor) -> Tensor:
        """Return S + f of a block."""
        return self._scaled(block, scores, self.nan_mask[block.part]).add_(_row(f, block))

    def over_blocks(
        self,
        of_block: Callable[[Block, Any], Tensor],
        combine: Callable[..., object] = torch.add,
        neutral: float = 0,
        in_memory: bool = False,
    ) -> Tensor:
        """Combine the results (..., K) of all blocks and their scores, ``None`` if in memory."""
        alone = len(self.blocks) == 1
        result = self.log_mass if alone else self.log_mass.new_full(self.shape, neutral)
        for block, scores in self.with_scores(in_memory):
            found = of_block(block, scores)
            if alone:
                return found.view(self.shape)
            of_part = _of(result, block)
            combine(of_part, found, out=of_part)
        return result

    def with_scores(self, in_memory: bool) -> Iterable[tuple[Block, Tensor | None]]:
        """Return each block with its scores, or with ``None`` if what it needs is in memory."""
        if in_memory:
            return [(block, None) for block in self.blocks]
        self.f_of_p = None  # is about to be overwritten
        return zip(self.blocks, self.scores(), strict=True)

    def sum_of_logs(self, values: Tensor, dim: int) -> Tensor:
        """Return ε log Σ exp(values/ε) of scaled values, which are overwritten."""
        lowest = torch.finfo(values.dtype).min
        largest = values.amax(dim=dim, keepdim=True).clamp_(min=lowest)
        sums = values.sub_(largest).mul_(self.rate).exp_().sum(dim=dim)
        return sums.log_().mul_(self.temperature).add_(largest.squeeze(dim))

    def _largest_of(self, block: Block, scores: Tensor) -> Tensor:
        nan_mask = self.nan_mask[block.part].copy_(nan_mask_of(scores))
        if not self.weighted:
            return self._scaled(block, scores, nan_mask).amax(dim=-2)
        log_mass = self.log_mass[block.part]
        if not self.holds_scores:
            nan_mask = scaled_sum(nan_mask, log_mass, self.temperature)
            return self._scaled(block, scores, nan_mask).amax(dim=-2)
        values = self._scaled(block, scores, nan_mask)
        added = (log_mass * self.temperature).unsqueeze(-1)
        return (values + added).amax(dim=-2).clamp_(min=self.lowest)

    def _scaled(self, block: Block, scores: Tensor, added: Tensor) -> Tensor:
        """Compute S + ``added`` (..., b), scaled, and ``lowest`` where it is not finite."""
        scaled_sum(added.unsqueeze(-1), scores, self.scale, out=block.values)
        return block.values.nan_to_num_(self.lowest, self.lowest, self.lowest)

    def _exponentials_of(self, block: Block, values: Tensor) -> Tensor:
        largest = exponentials(values, self.rate, _LOG_UNIT_OF_KERNEL if self.fractional else 0)
        self.level[block.part] = largest + self.nan_mask[block.part]
        return largest


class Scaling(NamedTuple):
    """The scaling vectors of P during the iterations, for Q = diag(v) P diag(u).

    v follows from f and u, since each row of Q sums to 1. P stays as it is while u changes. When u
    is about to leave the range of floating point, it is absorbed into f and P is computed anew.
    """

    scores: ScaledScores
    log_mass: Tensor  # (..., B), log r
    mass: Tensor  # (..., B), r; in ``_UNIT_OF_MASSES`` if fractional
    f: Tensor  # (..., K), scaled like the scores
    u: Tensor  # (..., K)
    scalings: int = 0  # of P by u
    log_factor: Tensor | None = None  # (..., K), of u, if that may be out of range

    def scale(self, target: Tensor, masses: Tensor) -> Scaling:
        """Scale u so that prototypes with ``masses`` (..., K) get those of ``target``.

        A prototype of mass 0 keeps its u: its target is 0, or no sample is present.
        """
        if self.scores.fractional:
            log_factor = (target.log() - masses.log()).masked_fill_(masses == 0, 0)
            return self._replace(log_factor=log_factor)
        u = self.u * (target / masses).masked_fill_(masses == 0, 1)
        return self._replace(u=u, scalings=self.scalings + 1)

    def masses(self) -> tuple[Scaling, Tensor]:
        """Return a scaling with the same Q, and the masses of the prototypes in it, (..., K).

        Their unit is the same on all ranks, however u is divided between ``f`` and ``u``.
        """
        all_scores, mass, scaling = self.scores, self.mass, self
        if all_scores.fractional or self.scalings == SCALINGS_OF_ONE_KERNEL:
            scaling = self._absorbed()
        f, u = scaling.f, scaling.u

        def sums_of(block: Block, scores: Tensor | None) -> Tensor:
            p = all_scores.p_of(f, block, scores)
            return over_samples(p, mass[block.part] / over_prototypes(p, _of(u, block)))

        sums = all_scores.over_blocks(sums_of, in_memory=all_scores.f_of_p is f)
        all_scores.keep(f)
        sums *= u
        return scaling, sums if all_scores.fractional else sums.mul_(_UNIT_OF_MASSES)

    def log_masses(self) -> Tensor:
        """Return ε times the logarithms of the masses, scaled, for u = 1 and of any size."""
        all_scores = self.scores

        def of_block(block: Block, scores: Tensor) -> Tensor:
            values = all_scores.sums_with(self.f, block, scores)
            values.sub_(values.amax(dim=-1, keepdim=True))
            log_v = (values * all_scores.rate).exp_().sum(dim=-1).log_().neg_()
            added = log_v.add_(self.log_mass[block.part]).mul_(all_scores.temperature)
            return all_scores.sum_of_logs(values.add_(added.unsqueeze(-1)), -2)

        return all_scores.over_blocks(
            of_block,
            lambda *both, out: out.copy_(all_scores.sum_of_logs(torch.stack(both), 0)),
            -math.inf,
        )

    def kernel(self) -> Kernel:
        """Return the kernel that gives the codes."""
        u, log_factor = self.u, self.log_factor
        if log_factor is not None:  # up to a factor, which v cancels
            root = (log_factor - log_factor.amax(dim=-1, keepdim=True)).div_(2).exp_()
            u = u * (root * _UNIT_OF_U * root).clamp_(min=torch.finfo(root.dtype).tiny)
        return Kernel(self.scores, self.f, u)

    def _absorbed(self) -> Scaling:
        """Absorb u into f. The rounding error of f stays in u."""
        change = self.u.log()
        if self.log_factor is not None:
            change += self.log_factor
        change *= self.scores.temperature
        f = self.f + change
        part = f - self.f
        lost = (self.f - (f - part)) + (change - part)
        u = lost.mul_(self.scores.rate).masked_fill_(f == -math.inf, 0).exp_()
        return self._replace(f=f, u=u, scalings=0, log_factor=None)


class Kernel(NamedTuple):
    """The kernel P of the last iteration with its u: the codes are Q = diag(v) P diag(u)."""

    scores: ScaledScores
    f: Tensor  # (..., K)
    u: Tensor  # (..., K)

    def codes(self, rounded: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return Q, (..., B, K), in place of P.

        ``rounded`` changes codes in place, before they are converted to the dtype of the memory.
        """
        assert self.scores.all_codes is not None
        for block, scores in self.scores.with_scores(self.scores.f_of_p is self.f):
            self.codes_of(block, scores, rounded)
        self.scores.f_of_p = None
        return self.scores.all_codes

    def codes_of(
        self,
        block: Block,
        scores: Tensor | None,
        rounded: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return Q of a block, once, in place of its P. Needs no scores if P is in memory."""
        values = self.scores.p_of(self.f, block, scores).mul_(_row(self.u, block))
        v = (self.scores.code_mass[block.part] / values.sum(dim=-1)).unsqueeze(-1)
        all_codes = self.scores.all_codes
        codes = values if all_codes is None else all_codes[block.part]
        if rounded is None:
            return torch.mul(values, v, out=codes)
        return codes.copy_(rounded(values.mul_(v)))


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
    small = values.numel() < PARTS_OF_A_PRODUCT * _VALUES_OF_A_PART
    if small or not on_cpu(values) or torch.get_num_threads() == 1:
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
