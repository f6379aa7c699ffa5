"""Codes from scores: ``swavkit.sinkhorn_knopp``, the published form, and other solvers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import OURS, Calls, Suite
from benchmarks.inputs import CPU, clustered
from benchmarks.published import published_codes
from swavkit import sinkhorn_knopp
from tests import oracles

EPSILON = 0.05
ITERATIONS = 3
TO_CONVERGENCE = "geomloss, to convergence"
_SCORES_TO_CONVERGENCE = 2**21  # at most, so that a call takes seconds
_ITERATIONS_OF_THE_CONVERGED = 100


@dataclass(frozen=True)
class Problem:
    """Scores (N, B, K) of N independent problems, with the settings of the paper."""

    samples: int
    prototypes: int
    dtype: str = "float32"
    problems: int = 1

    def __str__(self) -> str:
        several = f"{self.problems} × " if self.problems > 1 else ""
        return f"{several}{self.samples:,} × {self.prototypes:,} {self.dtype}"

    @property
    def tolerance(self) -> float:
        """The tolerance of an entry in [0, 1]: float32 arithmetic, then rounding to the dtype."""
        return 2e-5 + torch.finfo(getattr(torch, self.dtype)).eps / 4

    def scores(self, device: torch.device = CPU) -> Tensor:
        features, directions = clustered(
            self.problems, self.samples, 128, prototypes=self.prototypes, device=device
        )
        return (F.normalize(features, dim=-1) @ directions.T).to(getattr(torch, self.dtype))


def prepare(problem: Problem, device: torch.device = CPU) -> Calls:
    scores = problem.scores(device)
    single = scores[0]
    calls: dict[str, Callable[[], object]] = {
        OURS: (
            (lambda: sinkhorn_knopp(scores))
            if problem.problems > 1
            else (lambda: [sinkhorn_knopp(single)])
        ),
        "published": lambda: [published_codes(view) for view in scores],
    }
    if scores.dtype != torch.float32:
        # A careful use of the published form.
        calls["published, float32 inside"] = lambda: [
            published_codes(view.float()).to(scores.dtype) for view in scores
        ]
        return calls | {"floor": lambda: floor(scores)}

    if device.type != "cpu":
        return calls | {"floor": lambda: floor(scores)}
    cost = -scores
    if peers.installed("POT"):
        calls["POT"] = lambda: peers.pot_codes(cost)
        calls["POT, log domain"] = lambda: peers.pot_codes(cost, method="sinkhorn_log")
    if peers.installed("geomloss"):
        calls["geomloss, annealed"] = lambda: peers.geomloss_codes(cost)
        if cost.numel() <= _SCORES_TO_CONVERGENCE:
            calls[TO_CONVERGENCE] = lambda: peers.geomloss_converged(cost)
    return calls | {"floor": lambda: floor(scores)}


def floor(scores: Tensor) -> Tensor:
    """Compute the exponential, and read it once per iteration, in the cheapest way."""
    plan = (scores / EPSILON).exp_()
    for _ in range(ITERATIONS):
        plan.sum(dim=-1)
    return plan


def check_reference() -> None:
    scores = Problem(6, 5).scores().double()
    expected = oracles.sinkhorn(scores[0].numpy(), EPSILON, ITERATIONS)
    np.testing.assert_allclose(published_codes(scores[0]).numpy(), expected, atol=1e-12)


def errors(problem: Problem, calls: Calls, device: torch.device = CPU) -> dict[str, float]:
    """Return the largest error of an entry of the codes."""
    scores = problem.scores(device).double()
    expected = reference(scores, ITERATIONS)
    found = {
        name: _largest_difference(call(), expected)
        for name, call in calls.items()
        if name not in ("floor", TO_CONVERGENCE)
    }
    if TO_CONVERGENCE in calls:
        expected = reference(scores, _ITERATIONS_OF_THE_CONVERGED)
        found[TO_CONVERGENCE] = _largest_difference(calls[TO_CONVERGENCE](), expected)
    return found


def reference(scores: Tensor, iterations: int) -> list[Tensor]:
    return [published_codes(view, EPSILON, iterations) for view in scores]


def _largest_difference(codes: Iterable[Tensor], expected: list[Tensor]) -> float:
    return max(
        (ours - theirs).abs().max().item() for ours, theirs in zip(codes, expected, strict=True)
    )


SUITE = Suite(
    name="sinkhorn",
    cases=(
        Problem(64, 300),
        Problem(256, 3000, problems=2),
        Problem(4096, 3000),
        Problem(512, 65_536),
        Problem(4096, 3000, "bfloat16"),
    ),
    quick=Problem(64, 300),
    prepare=prepare,
    check_reference=check_reference,
    errors=errors,
    missing=peers.missing,
)
