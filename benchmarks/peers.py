"""Optional solvers and losses of other packages.

The solvers take the precomputed cost C = -S (N, B, K), with mass 1/B for a sample and 1/K for a
prototype. Each returns N codes (B, K).
"""

from __future__ import annotations

import importlib.util
import math
import runpy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

MODULES = {"POT": "ot", "geomloss": "geomloss"}  # the solvers
LIGHTLY = "lightly"


def installed(name: str) -> bool:
    return importlib.util.find_spec(MODULES.get(name, name)) is not None


def missing() -> list[str]:
    return [name for name in MODULES if not installed(name)]


def lightly_loss() -> nn.Module:
    """Return lightly's loss, from its file: the package itself imports torchvision."""
    file = Path(importlib.util.find_spec(LIGHTLY).origin).parent / "loss" / "swav_loss.py"
    return runpy.run_path(str(file))["SwaVLoss"]()


def pot_codes(
    cost: Tensor, epsilon: float = 0.05, iterations: int = 3, *, method: str = "sinkhorn"
) -> Sequence[Tensor]:
    """Return the codes of POT's ``sinkhorn``, one problem at a time.

    An iteration scales the columns and then the rows, as ours does. The tolerance cannot be
    reached, so all iterations are made.
    """
    import ot

    _, samples, prototypes = cost.shape
    masses = cost.new_full([samples], 1 / samples), cost.new_full([prototypes], 1 / prototypes)
    settings = {"numItermax": iterations, "stopThr": 0, "warn": False}
    return [ot.sinkhorn(*masses, of, epsilon, method, **settings).mul_(samples) for of in cost]


def geomloss_codes(cost: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the codes of geomloss's ``solve_batch``.

    Its iterations differ from ours: ε decreases from the range of the costs to ``epsilon``. Both
    marginals are fitted at once and averaged with their previous values.
    """
    from geomloss.ot import solve_batch

    plan: Tensor = solve_batch(cost, reg=epsilon, max_iter=iterations).plan
    return plan.mul_(cost.shape[1])


def geomloss_converged(cost: Tensor, epsilon: float = 0.05, iterations: int = 60) -> Tensor:
    """Return the codes of geomloss's ``SamplesLoss``, with a nearly constant ε.

    ``solve_batch`` reaches ε in its last iteration only, and approaches the converged plan as
    1 / iterations. ``SamplesLoss`` takes the first ε and its steps as arguments.
    """
    from geomloss import SamplesLoss

    problems, samples, prototypes = cost.shape
    step = 1e-6  # of the logarithm of √ε, which must decrease
    costs = iter((cost, cost.mT))  # in the order of its requests
    potentials = SamplesLoss(
        p=2,
        blur=math.sqrt(epsilon),
        # SamplesLoss adds an iteration at either end, and rounds up.
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
            cost.new_zeros(problems, samples, 1),  # points are unused: the costs are given
            cost.new_full([problems, prototypes], 1 / prototypes),
            cost.new_zeros(problems, prototypes, 1),
        )
        exponents = (f.unsqueeze(2) + g.unsqueeze(1)).sub_(cost).div_(epsilon)
        return exponents.exp_().div_(prototypes)
