"""The solvers of other packages on our problem, each of which may be missing.

They are given the cost C = -S (N, B, K) ready made, and mass 1/B on a sample and 1/K on a
prototype. Each returns N codes (B, K).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MODULES = {"POT": "ot", "geomloss": "geomloss"}


def installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES[name]) is not None


def missing() -> list[str]:
    return [name for name in MODULES if not installed(name)]


def pot_codes(
    cost: Tensor, epsilon: float = 0.05, iterations: int = 3, *, method: str = "sinkhorn"
) -> Sequence[Tensor]:
    """Return the codes of POT's ``sinkhorn``, problem by problem.

    One of its iterations brings the columns to their mass and then the rows, as ours does. It would
    stop at a tolerance; this one it never reaches.
    """
    import ot

    _, samples, prototypes = cost.shape
    masses = cost.new_full([samples], 1 / samples), cost.new_full([prototypes], 1 / prototypes)
    settings = {"numItermax": iterations, "stopThr": 0, "warn": False}
    return [ot.sinkhorn(*masses, of, epsilon, method, **settings).mul_(samples) for of in cost]


def geomloss_codes(cost: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the codes of geomloss's ``solve_batch``.

    Its iterations are other ones than ours: ε falls from the range of the costs to what is asked
    for, and both marginals are fitted at once and averaged with what they were.
    """
    from geomloss.ot import solve_batch

    plan: Tensor = solve_batch(cost, reg=epsilon, max_iter=iterations).plan
    return plan.mul_(cost.shape[1])


def geomloss_converged(cost: Tensor, epsilon: float = 0.05, iterations: int = 60) -> Tensor:
    """Return the codes of geomloss's ``SamplesLoss`` after so many iterations at nearly one ε.

    ``solve_batch`` reaches ε in its last iteration only, whatever their number, and nears the
    converged plan as 1 / iterations. Here the first ε and its steps can be told.
    """
    from geomloss import SamplesLoss

    problems, samples, prototypes = cost.shape
    step = 1e-6  # of the logarithm of √ε, for it must fall
    costs = iter((cost, cost.mT))  # as it asks for them
    potentials = SamplesLoss(
        p=2,
        blur=math.sqrt(epsilon),
        # It adds an iteration at either end, and rounds up.
        diameter=math.sqrt(epsilon) * math.exp(step * (iterations - 2.5)),
        scaling=math.exp(-step),
        cost=lambda *points: next(costs),
        debias=False,
        potentials=True,
        backend="tensorized",
    )
    with torch.no_grad():
        f, g = potentials(
            cost.new_full([problems, samples], 1 / samples),
            cost.new_zeros(problems, samples, 1),  # what matters of the points is their cost
            cost.new_full([problems, prototypes], 1 / prototypes),
            cost.new_zeros(problems, prototypes, 1),
        )
        exponents = (f.unsqueeze(2) + g.unsqueeze(1)).sub_(cost).div_(epsilon)
        return exponents.exp_().div_(prototypes)
