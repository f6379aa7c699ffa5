"""The iterations of Sinkhorn-Knopp: a plan and the masses it is to have give u, over all processes.

They know how often masses are summed, and not how: that is the business of ``_plan.py``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swavkit._distributed import gather_over_ranks, max_over_ranks, sum_over_ranks
from swavkit._plan import Plan

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup


def find_u(
    plan: Plan,
    prototype_mass: Tensor | None,
    iterations: int,
    relaxation: float,
    tolerance: float | None,
    group: ProcessGroup | None,
    rider: Tensor | None = None,
) -> None:
    """Bring u of a new plan to where the settings ask for; ``None`` stands for equal masses.

    ``rider`` is summed over the group in a collective that is made anyway, in place.
    """
    if relaxation == math.inf:
        _iterate(plan, prototype_mass, iterations, tolerance, group, rider)
    else:
        _iterate_relaxed(plan, prototype_mass, iterations, relaxation, group, rider)


def _iterate(
    plan: Plan,
    prototype_mass: Tensor | None,
    iterations: int,
    tolerance: float | None,
    group: ProcessGroup | None,
    rider: Tensor | None,
) -> None:
    """Bring a new plan as near to the masses ``prototype_mass`` (K,), of sum 1, as is asked for."""
    log_u = -_largest_exponents(plan, group)
    if prototype_mass is None:
        prototype_mass = _equal_masses(log_u)
    else:
        log_u += prototype_mass.log()
    sums = sum_over_ranks(plan.start(log_u), group, rider)
    wanted = prototype_mass
    for iteration in range(iterations):
        if iteration > 0:
            sums = sum_over_ranks(plan.sums(), group)
            mass = sums * plan.u
            if iteration == 1:  # v follows any factor of u, so the first u need not know the total
                wanted = prototype_mass * mass.sum(dim=-1, keepdim=True)
            if tolerance is not None and _near(mass, wanted, tolerance):
                break
        # No mass is wanted where there is none, or nobody is present.
        plan.scale((wanted / sums).masked_fill_(sums == 0, 1))


def _near(mass: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Tell whether the relative error is within ``tolerance`` everywhere. Waits for the device."""
    return bool(((mass - wanted).abs() <= tolerance * wanted).all())


def _iterate_relaxed(
    plan: Plan,
    prototype_mass: Tensor | None,
    iterations: int,
    relaxation: float,
    group: ProcessGroup | None,
    rider: Tensor | None,
) -> None:
    """Set log u of a new plan to f after so many iterations in the log domain.

    One iteration is ::

        f = φ (log c - logsumexp_i(S/ε + g + log r))    with φ = ρ / (ρ + ε)
        g = -logsumexp_j(S/ε + f)

    A prototype may end up with less mass than floating point can hold, so masses are logarithms.
    """
    strength = relaxation / (relaxation + plan.epsilon)
    shift = _largest_exponents(plan, group)
    if prototype_mass is None:
        prototype_mass = _equal_masses(shift)
    # The equations take the sum of r to be 1; what it is comes with the first masses.
    totals = torch.cat([plan.start(-shift), plan.sample_mass.sum(dim=-1, keepdim=True)], dim=-1)
    totals = sum_over_ranks(totals, group, rider).log()
    log_mass, log_total = totals[..., :-1], totals[..., -1:]
    nobody = log_total == -math.inf
    log_sum = log_mass + shift
    for iteration in range(iterations):
        if iteration > 0:
            # The codes are exp(S/ε + f + g), so that the sum is their mass without f.
            log_mass = gather_over_ranks(plan.log_masses(), group).logsumexp(dim=0)
            log_sum = log_mass - plan.log_u
        log_sum = (log_sum - log_total).masked_fill_(nobody, 0)
        log_u = strength * (prototype_mass.log() - log_sum)
        plan.relax(log_u.masked_fill_(prototype_mass == 0, -math.inf))


def _equal_masses(like: Tensor) -> Tensor:
    return torch.full_like(like, 1 / like.shape[-1])


def _largest_exponents(plan: Plan, group: ProcessGroup | None) -> Tensor:
    """Return the largest S/ε (N, K) of each prototype; 0 where nobody is present on any rank."""
    largest = max_over_ranks(plan.largest_exponents(), group)
    return largest.masked_fill_(largest <= plan.lowest, 0)
