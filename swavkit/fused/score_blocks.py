"""Scores of features and prototypes, block by block.

Each product reads all prototypes, so a block has many samples. On a CPU the following operations
take a part of the block at a time, small enough for the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, empty, on_cpu
from swavkit.sinkhorn.kernel import Kernel, ScaledScores
from swavkit.sinkhorn.marginals import masses, may_be_fractional, target_marginal

# The scores of a block on a CPU: 2^21 take 1.15 times as long at 8×256×3,000. For few features,
# reading the prototypes takes most of the time of a product, so with many prototypes a block grows
# to this number of features, up to the maximum. Other devices always use the maximum, since their
# cost is the number of operations.
_ENTRIES_OF_A_BLOCK = 2**23
_FEATURES_OF_A_BLOCK = 256
_MOST_ENTRIES_OF_A_BLOCK = 2**26

# The scores of the code views that a CPU's caches keep from one operation to the next.
_ENTRIES_OF_A_PART = 2**21

Block = tuple[slice, list[slice]]  # the samples of a block, and of each of its parts


class BlockScores:
    """Products of features and prototypes, some samples at a time.

    Args:
        features: (V, B, D), in the dtype of the products.
        directions: (K, D).
        code_factors: The factors (A, B, D) and (K, D) of the scores that give the codes; ``None``
            for the features of the code views and ``directions``.
        queued: (A, L, D), appended to the features that give the codes; or ``None``.
        num_code_views: A.
    """

    def __init__(
        self,
        features: Tensor,
        directions: Tensor,
        code_factors: tuple[Tensor, Tensor] | None,
        queued: Tensor | None,
        num_code_views: int,
    ) -> None:
        self.features, self.directions = features, directions
        self.shares_scores = code_factors is None  # of the code views
        code_features, self.code_directions = code_factors or (
            features[:num_code_views],
            directions,
        )
        self.dtype = at_least_float32(code_features.dtype)  # of the codes
        self.code_features = code_features  # (A, B + L, D)
        if queued is not None:
            self.code_features = torch.cat([code_features, queued.to(code_features.dtype)], dim=1)
        views, samples, _ = features.shape
        self.blocks = self._blocks(views, 0, samples)
        self.code_blocks = self._blocks(num_code_views, 0, samples)
        self.code_blocks += self._blocks(num_code_views, samples, self.code_features.shape[1])
        self.block_memory: Tensor | None = None  # for the scores of a block, as bytes
        self.code_memory: Tensor | None = None  # for those that give codes, which may be the same
        self.part_memory: Tensor | None = None  # for P of a part, flat
        self.all_p: Tensor | None = None  # (A, B + L, K), P of all samples, if it is kept

    def _blocks(self, views: int, first: int, last: int) -> list[Block]:
        """Divide the samples from ``first`` to ``last`` (exclusive) of ``views`` into blocks."""
        prototypes = len(self.directions)
        entries = _entries_of_a_block(self.features.device, prototypes)
        rows = max(entries // (views * prototypes), 1)
        part = rows
        if on_cpu(self.features):
            part = _ENTRIES_OF_A_PART // (len(self.code_features) * prototypes)
            # Softmax distributes rows over threads.
            part = max(part, torch.get_num_threads())
        return [(rows, _slices(rows.start, rows.stop, part)) for rows in _slices(first, last, rows)]

    @property
    def parts(self) -> list[slice]:
        """The parts of the samples of the code views."""
        return [part for _, parts in self.code_blocks for part in parts]

    def bytes_of_blocks(self) -> tuple[int, int, int]:
        """Return the bytes of a block's scores, of scores that give codes, and of P of a part.

        Those of the second kind are 0 if they can take the memory of the first.
        """
        blocks = _most([rows for rows, _ in self.blocks])
        code_blocks = _most([rows for rows, _ in self.code_blocks])
        scores = len(self.features) * blocks * self.features.dtype.itemsize
        code_scores = len(self.code_features) * self.code_features.dtype.itemsize
        if self.shares_scores:
            scores, code_scores = max(scores, code_scores * code_blocks), 0
        else:
            code_scores *= max(blocks, code_blocks)
        part = _most([part for _, parts in self.blocks + self.code_blocks for part in parts])
        part *= len(self.code_features) * self.dtype.itemsize * (self.all_p is None)
        prototypes = len(self.directions)
        return scores * prototypes, code_scores * prototypes, part * prototypes

    def scaled(
        self, weight: Tensor | None, prototype_weight: Tensor | None, epsilon: float | Tensor
    ) -> ScaledScores:
        """Return the scaled scores of the code views."""
        shape = self.code_features.shape[:-1]
        sample_mass = masses(weight, shape, self.features.device, self.dtype)
        # If all of P is kept, a part of several views is not contiguous in it.
        views = [slice(None)] if self.all_p is None else range(len(self.code_features))
        return ScaledScores(
            lambda: self._scores_of_parts(views),
            [(view, rows) for rows in self.parts for view in views],
            sample_mass,
            len(self.directions),
            target_marginal(prototype_weight, sample_mass.log),
            weighted=weight is not None,
            fractional=may_be_fractional(weight, prototype_weight),
            epsilon=epsilon,
            codes=self.all_p,
            memory=self.part_memory,
        )

    def _scores_of_parts(self, views: Sequence[int | slice]) -> Iterator[Tensor]:
        """Yield the scores of each part of the code views. The next block overwrites them."""
        for block, parts in self.code_blocks:
            scores = self._code_scores(block)
            for rows in parts:
                for view in views:
                    yield scores[view, rows.start - block.start : rows.stop - block.start]

    def codes(self, kernel: Kernel, rows: slice, scores: Tensor) -> list[Tensor]:
        """Return the codes (b, K) of each code view for some samples, given :meth:`code_scores`."""
        if self.all_p is None:
            return list(kernel.codes_of(kernel.scores.block((slice(None), rows)), scores))
        return [
            kernel.codes_of(kernel.scores.block((view, rows)), view_scores)
            for view, view_scores in enumerate(scores)
        ]

    def code_scores(self, kernel: Kernel, rows: slice, scores: Tensor) -> Tensor:
        """Return the scores (A, b, K) that give the codes of a block, given those of all views."""
        if self.shares_scores or kernel.scores.f_of_p is kernel.f:  # the codes then need none
            return scores[: len(self.code_features)]
        return self._code_scores(rows)

    def _code_scores(self, rows: slice) -> Tensor:
        memory = self.block_memory if self.shares_scores else self.code_memory
        return _product(self.code_features[:, rows], self.code_directions, memory)

    def of(self, features: Tensor) -> Tensor:
        """Return the scores (..., b, K) of features (..., b, D). The next call overwrites them."""
        return _product(features, self.directions, self.block_memory)


def _entries_of_a_block(device: torch.device, prototypes: int) -> int:
    """Return the most scores of a block."""
    if device.type != "cpu":
        return _MOST_ENTRIES_OF_A_BLOCK
    return min(
        _MOST_ENTRIES_OF_A_BLOCK, max(_ENTRIES_OF_A_BLOCK, _FEATURES_OF_A_BLOCK * prototypes)
    )


def _product(features: Tensor, directions: Tensor, memory: Tensor | None) -> Tensor:
    """Return the scores (..., b, K) of features (..., b, D), in some bytes of memory if given."""
    rows = features.flatten(0, -2)
    if memory is not None:
        size = len(rows) * len(directions) * features.dtype.itemsize
        memory = memory[:size].view(features.dtype).view(-1, len(directions))
    scores = torch.mm(rows, directions.T, out=memory)
    return scores.view(*features.shape[:-1], len(directions))


def find_memory(heads: Sequence[BlockScores], most_bytes_of_kernels: int) -> None:
    """Allocate P of each head if it may be kept, and one block that all heads share.

    Heads can share a block because only one of them uses it at a time.
    """
    like = heads[0].features
    shapes = [(*head.code_features.shape[:-1], len(head.directions)) for head in heads]
    sizes = [prod(shape) * head.dtype.itemsize for head, shape in zip(heads, shapes, strict=True)]
    fits = sum(sizes) <= most_bytes_of_kernels or sum(map(prod, shapes)) <= _ENTRIES_OF_A_BLOCK
    for head, shape in zip(heads, shapes, strict=True):
        if fits or len(head.parts) == 1:
            head.all_p = empty(shape, head.dtype, like)
    if torch.compiler.is_compiling():  # which allocates blocks itself
        return
    sizes_of_heads = [head.bytes_of_blocks() for head in heads]
    block_memory, code_memory, part_memory = (
        empty((max(numbers),), torch.uint8, like) for numbers in zip(*sizes_of_heads, strict=True)
    )
    for head, (_, _, part) in zip(heads, sizes_of_heads, strict=True):
        head.block_memory, head.code_memory = block_memory, code_memory
        head.part_memory = part_memory[:part].view(head.dtype)


def _most(slices: Sequence[slice]) -> int:
    """Return the length of the longest slice."""
    return max((rows.stop - rows.start for rows in slices), default=0)


def _slices(first: int, last: int, size: int) -> list[slice]:
    """Return the slices of up to ``size`` from ``first`` to ``last`` (exclusive)."""
    if 0 < last - first <= size:  # torch.compile keeps this length symbolic
        return [slice(first, last)]
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]
