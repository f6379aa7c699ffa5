"""Hypothesis strategies for problems of codes and losses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from swavkit.testing.oracle import Array

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = ["CodesProblem", "LossProblem", "codes_problems", "loss_problems", "reals", "weights"]


@dataclass(frozen=True)
class CodesProblem:
    """Scores (B, K) of cosines, and the settings of Sinkhorn-Knopp."""

    scores: Array
    epsilon: float
    iterations: int
    sample_weight: Array | None = field(default=None, kw_only=True)
    prototype_weight: Array | None = field(default=None, kw_only=True)

    def with_scores(self, scores: Array) -> CodesProblem:
        """Return the problem with other scores."""
        return replace(self, scores=scores)


@dataclass(frozen=True)
class LossProblem:
    """Scores (V, B, K) and codes (A, B, K), whose rows need not sum to 1."""

    scores: Array
    codes: Array
    temperature: float


def reals(*shape: int, low: float = -1.0, high: float = 1.0) -> SearchStrategy[Array]:
    """Return arrays of numbers that float32 holds exactly, so that no rounding of input counts.

    Example:
        >>> from swavkit.testing import unit_rows
        >>> features = reals(4, 16).map(unit_rows)  # (4, 16) rows of length 1, or 0
    """
    _require_hypothesis()
    from hypothesis import strategies as st
    from hypothesis.extra.numpy import arrays

    elements = st.floats(low, high, width=32)
    return arrays(np.float32, shape, elements=elements).map(lambda found: found.astype(np.float64))


def weights(count: int) -> SearchStrategy[Array]:
    """Return (count,) weights of at least 0, not all of them 0."""
    return reals(count, low=0.0, high=4.0).map(lambda found: found if found.any() else found + 1)


def codes_problems(
    iterations: SearchStrategy[int] | None = None, *, weighted: bool = False
) -> SearchStrategy[CodesProblem]:
    """Return problems of 1 to 9 samples and 1 to 7 prototypes.

    Args:
        iterations: Numbers of iterations; 1 to 12 by default.
        weighted: Whether samples and prototypes have weights.
    """
    _require_hypothesis()
    from hypothesis import strategies as st

    return st.tuples(st.integers(1, 9), st.integers(1, 7)).flatmap(
        lambda shape: st.builds(
            CodesProblem,
            reals(*shape),
            st.sampled_from([0.02, 0.05, 0.2, 1.0]),
            st.integers(1, 12) if iterations is None else iterations,
            sample_weight=weights(shape[0]) if weighted else st.none(),
            prototype_weight=weights(shape[1]) if weighted else st.none(),
        )
    )


def loss_problems() -> SearchStrategy[LossProblem]:
    """Return problems of 2 to 5 views, any number of them code views."""
    _require_hypothesis()
    from hypothesis import strategies as st

    views = st.integers(2, 5).flatmap(
        lambda count: st.tuples(st.just(count), st.integers(1, count))
    )
    shapes = st.tuples(views, st.integers(1, 5), st.integers(1, 6))
    return shapes.flatmap(
        lambda shape: st.builds(
            LossProblem,
            reals(shape[0][0], *shape[1:]),
            reals(shape[0][1], *shape[1:], low=0.0),
            st.sampled_from([0.05, 0.1, 1.0]),
        )
    )


def _require_hypothesis() -> None:
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "strategies require Hypothesis; expected pip install 'swavkit[testing]'"
        ) from error
