"""The iterations of Sinkhorn-Knopp: a plan and the masses it is to have give u, over all processes.

They know how often masses are summed, and not how: that is the business of ``_plan.py``. Several
plans go in step, so that what they sum over processes is sent together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swavkit._tensors import traceable
from swavkit.distributed.collectives import (
    gather_over_ranks,
    in_one_collective,
    max_over_ranks,
    sum_over_ranks,
)
from swavkit.sinkhorn.kernel import Plan

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


def find_u(
    plans: Sequence[Plan],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    relaxation: float,
    tolerance: float | None,
    group: ProcessGroup | None,
    rider: Tensor | None = None,
) -> None:
    """Bring u of new plans to where the settings ask for.

    Args:
        plans: One or more, of any shapes.
        prototype_masses: For each plan the masses (K,), of sum 1, that its prototypes are to have;
            ``None`` stands for equal ones.
        iterations: At most so many.
        relaxation: ρ; infinite is strict.
        tolerance: A plan that is as near to its masses as that makes no more iterations.
        group: The processes.
        rider: A small tensor that is summed over them in a collective that is made anyway, in
            place.
    """
    if group is None and len(plans) > 1:  # nothing to send: each while its P is in the caches
        for plan, mass in zip(plans, prototype_masses, strict=True):
            find_u([plan], [mass], iterations, relaxation, tolerance, None)
    elif relaxation == math.inf:
        _iterate(plans, prototype_masses, iterations, tolerance, group, rider)
    else:
        _iterate_relaxed(plans, prototype_masses, iterations, relaxation, group, rider)


def _iterate(
    plans: Sequence[Plan],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    tolerance: float | None,
    group: ProcessGroup | None,
    rider: Tensor | None,
) -> None:
    """Bring new plans as near to the masses of their prototypes as is asked for."""
    firsts, wanted = [], []
    for plan, mass, largest in zip(
        plans, prototype_masses, _largest_scores(plans, group), strict=True
    ):
        f = -largest if mass is None else mass.log() * plan.temperature - largest
        wanted.append(_equal_mass(f) if mass is None else mass)
        firsts.append(plan.start(f))
    masses = _sums(firsts, group, rider)
    for iteration in range(iterations):
        if iteration > 0:
            masses = _sums([plan.masses() for plan in plans], group)
            if iteration == 1:  # v follows any factor of u, so the first u need not know the total
                wanted = [
                    share * mass.sum(dim=-1, keepdim=True)
                    for share, mass in zip(wanted, masses, strict=True)
                ]
            if tolerance is not None:  # all processes see the same masses
                far = [not _near(*pair, tolerance) for pair in zip(masses, wanted, strict=True)]
                plans = list(itertools.compress(plans, far))
                wanted = list(itertools.compress(wanted, far))
                masses = list(itertools.compress(masses, far))
                if not plans:
                    break
        for plan, share, mass in zip(plans, wanted, masses, strict=True):
            plan.scale(share, mass)


def _near(mass: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Tell whether the relative error is within ``tolerance`` everywhere. Waits for the device."""
    return bool(((mass - wanted).abs() <= tolerance * wanted).all())


def _iterate_relaxed(
    plans: Sequence[Plan],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    relaxation: float,
    group: ProcessGroup | None,
    rider: Tensor | None,
) -> None:
    """Set f of new plans to what it is after so many iterations in the log domain.

    One iteration is ::

        f = φ (log c - logsumexp_i(S/ε + g + log r))    with φ = ρ / (ρ + ε)
        g = -logsumexp_j(S/ε + f)

    A prototype may end up with less mass than floating point can hold, so masses are logarithms.
    These and f are multiplied by ε and scaled as the scores are; see ``_plan.py``.
    """
    shifts = _largest_scores(plans, group)
    wanted = [
        _equal_mass(shift) if mass is None else mass
        for mass, shift in zip(prototype_masses, shifts, strict=True)
    ]
    # The equations take the sum of r to be 1; what it is comes with the first masses.
    firsts = [
        torch.cat([plan.start(-shift), plan.log_mass.exp().sum(dim=-1, keepdim=True)], dim=-1)
        for plan, shift in zip(plans, shifts, strict=True)
    ]
    totals = [
        total.log_().mul_(plan.temperature)
        for plan, total in zip(plans, _sums(firsts, group, rider), strict=True)
    ]
    log_sums = [total[..., :-1] + shift for total, shift in zip(totals, shifts, strict=True)]
    for iteration in range(iterations):
        if iteration > 0:
            # The codes are exp(S/ε + f + g), so that the sum is their mass without f.
            log_masses = in_one_collective(
                gather_over_ranks, [plan.log_masses() for plan in plans], group
            )
            log_sums = [
                plan.sum_of_logs(of_ranks, 0) - plan.f
                for of_ranks, plan in zip(log_masses, plans, strict=True)
            ]
        for plan, share, log_sum, total in zip(plans, wanted, log_sums, totals, strict=True):
            log_total = total[..., -1:]
            log_sum = (log_sum - log_total).masked_fill_(log_total == -math.inf, 0)  # nobody
            rho = traceable(relaxation, share.device)
            strength = rho / (rho + plan.epsilon)
            f = strength * (share.log() * plan.temperature - log_sum)
            plan.relax(f.masked_fill_(share == 0, -math.inf))


def _equal_mass(like: Tensor) -> Tensor:
    """Return the one mass that all prototypes are to have, (1,)."""
    return like.new_full((1,), 1 / like.shape[-1])


def _largest_scores(plans: Sequence[Plan], group: ProcessGroup | None) -> list[Tensor]:
    """Return the largest S + ε log r (..., K) of each prototype; 0 where nobody is on any rank.

    From now on the masses of samples are relative to the largest of all ranks.
    """
    of_all = [plan.largest_scores() for plan in plans]
    if group is not None:
        own = [
            torch.cat([largest, plan.log_largest_mass], dim=-1)
            for plan, largest in zip(plans, of_all, strict=True)
        ]
        both = in_one_collective(max_over_ranks, own, group)
        of_all = [largest[..., :-1] for largest in both]
        for plan, largest in zip(plans, both, strict=True):
            plan.measure(largest[..., -1:])
    return [
        largest.masked_fill_(largest <= plan.lowest, 0)
        for plan, largest in zip(plans, of_all, strict=True)
    ]


def _sums(
    values: list[Tensor], group: ProcessGroup | None, rider: Tensor | None = None
) -> list[Tensor]:
    """Return the sum of each of the values over the group, that of the ``rider`` in place."""
    if rider is None:
        return in_one_collective(sum_over_ranks, values, group)
    *sums, total = in_one_collective(sum_over_ranks, [*values, rider], group)
    rider.copy_(total)
    return sums
