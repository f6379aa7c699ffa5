"""What a loss tells of the way to it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["SwAVDetails"]


class SwAVDetails(NamedTuple):
    """What :class:`SwAVLoss` computed on the way to the loss, without gradient.

    Attributes:
        codes: (A, B, K), what the views had to predict, float32 (float64 for float64 scores).
        scores: (V, B, K), the cosines of features and prototypes.
    """

    codes: Tensor
    scores: Tensor
