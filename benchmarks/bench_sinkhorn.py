"""Codes from scores: ``swavkit.sinkhorn_knopp`` beside dividing the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import OURS, Calls, Suite
from benchmarks.inputs import clustered
from benchmarks.published import published_codes
from swavkit import sinkhorn_knopp
from tests import oracles


@dataclass(frozen=True)
class Problem:
    """Scores (B, K), with the settings of the paper."""

    samples: int
    prototypes: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.samples:,} × {self.prototypes:,} {self.dtype}"

    @property
    def tolerance(self) -> float:
        """Of a code, which is at most 1: float32 arithmetic, then rounding to the dtype."""
        return 2e-5 + torch.finfo(getattr(torch, self.dtype)).eps / 4

    def scores(self) -> Tensor:
        features, directions = clustered(self.samples, 128, prototypes=self.prototypes)
        return (F.normalize(features, dim=-1) @ directions.T).to(getattr(torch, self.dtype))


def prepare(problem: Problem) -> Calls:
    scores = problem.scores()
    calls = {
        OURS: lambda: sinkhorn_knopp(scores),
        "published": lambda: published_codes(scores),
    }
    if scores.dtype != torch.float32:
        # What a careful user of the published form would write.
        calls["published, float32 inside"] = lambda: published_codes(scores.float()).to(
            scores.dtype
        )
    return calls


def check_reference() -> None:
    scores = Problem(6, 5).scores().double()
    expected = oracles.sinkhorn(scores.numpy(), 0.05, 3)
    np.testing.assert_allclose(published_codes(scores).numpy(), expected, atol=1e-12)


def errors(problem: Problem, calls: Calls) -> dict[str, float]:
    """Return the largest error of an entry of the codes."""
    expected = published_codes(problem.scores().double())
    return {name: (call() - expected).abs().max().item() for name, call in calls.items()}


SUITE = Suite(
    name="sinkhorn",
    cases=(
        Problem(64, 300),
        Problem(4096, 3000),
        Problem(512, 65_536),
        Problem(4096, 3000, "bfloat16"),
    ),
    quick=Problem(64, 300),
    prepare=prepare,
    check_reference=check_reference,
    errors=errors,
)
