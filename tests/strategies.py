"""Problems for the property tests, some together with what is known of their answer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swavkit.testing import (  # noqa: F401
    CodesProblem,
    LossProblem,
    codes_problems,
    loss_problems,
    reals,
)

epsilons = st.sampled_from([0.02, 0.05, 0.2, 1.0])
iterations = st.integers(1, 12)
seeds = st.integers(0, 2**16)


@dataclass(frozen=True)
class KnownCodes(CodesProblem):
    """A problem with the codes that it must have."""

    codes: np.ndarray


@dataclass(frozen=True)
class PredictionProblem:
    """Scores (..., K), and codes (..., K) whose rows need not sum to 1, or (...) indices."""

    scores: np.ndarray
    codes: np.ndarray
    temperature: float

    @property
    def places(self) -> tuple[int, ...]:
        """The leading dimensions."""
        return self.scores.shape[:-1]


@st.composite
def separable(draw: st.DrawFn) -> KnownCodes:
    """Scores a_i + b_j: no sample prefers any prototype, so every entry is 1/K."""
    samples, prototypes = draw(st.tuples(st.integers(1, 9), st.integers(1, 7)))
    scores = draw(reals(samples, 1)) + draw(reals(1, prototypes))
    codes = np.full(scores.shape, 1 / prototypes)
    return KnownCodes(scores, draw(epsilons), draw(iterations), codes)


@st.composite
def circulant(draw: st.DrawFn) -> KnownCodes:
    """Each row is the one before, turned by a place: columns and rows have the same sums."""
    row = draw(reals(draw(st.integers(1, 7))))
    scores = np.stack([np.roll(row, turn) for turn in range(len(row))])
    epsilon = draw(epsilons)
    plan = np.exp((scores - scores.max()) / epsilon)
    codes = plan / plan.sum(axis=1, keepdims=True)
    return KnownCodes(scores, epsilon, draw(iterations), codes)


@st.composite
def converged_two_by_two(draw: st.DrawFn) -> KnownCodes:
    """Two samples and two prototypes, which have a closed form at convergence."""
    scores, epsilon = draw(reals(2, 2)), draw(st.sampled_from([0.5, 1.0, 2.0]))
    difference = scores[0, 0] + scores[1, 1] - scores[0, 1] - scores[1, 0]
    agree = 1 / (1 + np.exp(-difference / (2 * epsilon)))
    codes = np.array([[agree, 1 - agree], [1 - agree, agree]])
    return KnownCodes(scores, epsilon, 300, codes)


@st.composite
def prediction_problems(draw: st.DrawFn, hard: bool | None = None) -> PredictionProblem:
    """Draw a problem with leading dimensions of any number and size, no place at all included."""
    places = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    prototypes = draw(st.integers(1, 6))
    if draw(st.booleans()) if hard is None else hard:
        codes = draw(arrays(np.int64, places, elements=st.integers(0, prototypes - 1)))
    else:
        codes = draw(reals(*places, prototypes, low=0.0))
    scores = draw(reals(*places, prototypes))
    return PredictionProblem(scores, codes, draw(st.sampled_from([0.05, 0.1, 1.0])))


@st.composite
def permutations(draw: st.DrawFn, count: int) -> np.ndarray:
    return np.array(draw(st.permutations(range(count))), dtype=np.int64)


@st.composite
def splits(draw: st.DrawFn, count: int, parts: int) -> list[int]:
    """Return the sizes of ``parts`` shards of ``count`` samples, empty ones included."""
    cuts = sorted(draw(st.lists(st.integers(0, count), min_size=parts - 1, max_size=parts - 1)))
    return list(np.diff([0, *cuts, count]))
