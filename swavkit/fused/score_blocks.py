"""Scores of features and prototypes, block by block, for those who never hold all of them.

Products are made for many samples at a time, since each reads all prototypes; what follows them, on
a CPU, for as few as stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from swavkit._tensors import at_least_float32, empty, on_cpu
from swavkit.sinkhorn.kernel import Kernel, Part
from swavkit.sinkhorn.marginals import masses

# On a CPU a block is to have so many scores. With few features its products would take as long as
# reading the prototypes does; so it has more scores, up to a limit, where that gives it so many
# features. Elsewhere every block has the limit: what counts there is how many operations start.
_ENTRIES_OF_A_BLOCK = 2**21
_FEATURES_OF_A_BLOCK = 256
_MOST_ENTRIES_OF_A_BLOCK = 2**26

# Of a block, those of the code views that the caches of a CPU keep from one operation to the next.
_ENTRIES_OF_A_PART = 2**21

Block = tuple[slice, list[slice]]  # some samples, and the same ones in parts


class BlockScores:
    """Products of features and prototypes, for some samples at a time.

    Args:
        features: (V, B, D), in the dtype of the products.
        directions: (K, D).
        queued: (A, L, D), which follow the features of the code views; or ``None``.
        num_code_views: A.
    """

    def __init__(
        self, features: Tensor, directions: Tensor, queued: Tensor | None, num_code_views: int
    ) -> None:
        self.features, self.directions = features, directions
        self.dtype = at_least_float32(features.dtype)  # of all other arithmetic
        self.of_codes = features[:num_code_views]
        if queued is not None:
            self.of_codes = torch.cat([self.of_codes, queued], dim=1)
        views, samples, _ = features.shape
        self.blocks = self._blocks(views, 0, samples)
        self.code_blocks = self._blocks(num_code_views, 0, samples)
        self.code_blocks += self._blocks(num_code_views, samples, self.of_codes.shape[1])
        self.present = features[:0, :0], 0  # scores of some samples of the code views, and of which
        self.memory: Tensor | None = None  # for the scores of a block
        self.memory_of_p: Tensor | None = None  # for that of a part, flat
        self.all_p: Tensor | None = None

    def _blocks(self, views: int, first: int, last: int) -> list[Block]:
        """Return the samples from ``first`` up to ``last``, of so many views, in blocks."""
        prototypes = len(self.directions)
        entries = _MOST_ENTRIES_OF_A_BLOCK
        if self.features.device.type == "cpu":
            entries = min(entries, max(_ENTRIES_OF_A_BLOCK, _FEATURES_OF_A_BLOCK * prototypes))
        rows = max(entries // (views * prototypes), 1)
        part = rows
        if on_cpu(self.features):
            part = _ENTRIES_OF_A_PART // (len(self.of_codes) * prototypes)
            # A softmax is spread over threads by its rows.
            part = max(part, torch.get_num_threads())
        return [(rows, _slices(rows.start, rows.stop, part)) for rows in _slices(first, last, rows)]

    @property
    def parts(self) -> list[slice]:
        """The samples of the code views, a part at a time."""
        return [part for _, parts in self.code_blocks for part in parts]

    def bytes_of_blocks(self) -> tuple[int, int]:
        """Return what the scores of any block take at most, and P of any part."""
        views, code_views = len(self.features), len(self.of_codes)
        blocks, code_blocks = ([rows for rows, _ in of] for of in (self.blocks, self.code_blocks))
        most = max(views * _most(blocks), code_views * _most(code_blocks))
        part = _most([part for _, parts in self.blocks + self.code_blocks for part in parts])
        return (
            most * len(self.directions) * self.features.dtype.itemsize,
            code_views * part * len(self.directions) * self.dtype.itemsize * (self.all_p is None),
        )

    def kernel(self, weight: Tensor | None, epsilon: float) -> Kernel:
        """Return a new kernel of the code views, with equal masses of prototypes."""
        shape = self.of_codes.shape[:-1]
        # Where all of P is kept, that of several views is not in one piece.
        views = [slice(None)] if self.all_p is None else range(len(self.of_codes))
        return Kernel(
            self._of_part,
            [(view, rows) for rows in self.parts for view in views],
            masses(weight, shape, self.features.device, self.dtype),
            len(self.directions),
            weighted=weight is not None,
            fractional=weight is not None and weight.is_floating_point(),
            epsilon=epsilon,
            codes=self.all_p,
            memory=self.memory_of_p,
        )

    def _of_part(self, part: Part) -> Tensor:
        """Return the scores of a part of the code views; the parts must be asked for in order."""
        view, rows = part
        assert isinstance(rows, slice)
        if view in (0, slice(None)):
            for block, _ in self.code_blocks:  # a dict would make its keys constants of a graph
                if block.start == rows.start:
                    self.present = self.of(self.of_codes[:, block]), block.start
        scores, first = self.present
        return scores[view, rows.start - first : rows.stop - first]

    def codes(self, kernel: Kernel, rows: slice, scores: Tensor) -> list[Tensor]:
        """Return the codes of some samples, (b, K) for each code view, given their scores."""
        if self.all_p is None:
            return list(kernel.codes_of(kernel.block((slice(None), rows)), scores))
        return [
            kernel.codes_of(kernel.block((view, rows)), of_view)
            for view, of_view in enumerate(scores)
        ]

    def of(self, features: Tensor) -> Tensor:
        """Return the scores of some (..., b, D), in memory that the next ones overwrite."""
        rows = features.flatten(0, -2)
        memory = None if self.memory is None else self.memory[: len(rows)]
        scores = torch.mm(rows, self.directions.T, out=memory)
        return scores.view(*features.shape[:-1], len(self.directions))


def find_memory(of_heads: Sequence[BlockScores], most_bytes_of_kernels: int) -> None:
    """Find memory for P of each head, if there may be as much; and for blocks, which heads share.

    No block of one head is needed any more when that of another is computed.
    """
    like = of_heads[0].features
    shapes = [(*head.of_codes.shape[:-1], len(head.directions)) for head in of_heads]
    sizes = [
        prod(shape) * head.dtype.itemsize for head, shape in zip(of_heads, shapes, strict=True)
    ]
    fits = sum(sizes) <= most_bytes_of_kernels or sum(map(prod, shapes)) <= _ENTRIES_OF_A_BLOCK
    for head, shape in zip(of_heads, shapes, strict=True):
        if fits or len(head.parts) == 1:
            head.all_p = empty(shape, head.dtype, like)
    if torch.compiler.is_compiling():  # which finds memory for blocks itself
        return
    of_blocks = [head.bytes_of_blocks() for head in of_heads]
    of_scores, of_p = (
        empty((max(of_each),), torch.uint8, like) for of_each in zip(*of_blocks, strict=True)
    )
    for head, (scores, p) in zip(of_heads, of_blocks, strict=True):
        head.memory = of_scores[:scores].view(head.features.dtype).view(-1, len(head.directions))
        head.memory_of_p = of_p[:p].view(head.dtype)


def _most(slices: Sequence[slice]) -> int:
    return max((rows.stop - rows.start for rows in slices), default=0)


def _slices(first: int, last: int, size: int) -> list[slice]:
    if 0 < last - first <= size:  # torch.compile keeps such a length symbolic
        return [slice(first, last)]
    return [slice(start, min(start + size, last)) for start in range(first, last, size)]
