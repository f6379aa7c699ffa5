"""The iterations of Sinkhorn-Knopp over all ranks: they find f and u of a kernel.

``kernel.py`` sums masses over samples, this file over ranks. Several problems go in step, so that
their sums travel in one collective.
"""

from __future__ import annotations

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
from swavkit.sinkhorn.kernel import Kernel, ScaledScores, Scaling

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

# Scores, the largest S + ε log r of each prototype over all ranks, and log r.
_Problem = tuple[ScaledScores, Tensor, Tensor]


def find_kernels(
    scores: Sequence[ScaledScores],
    iterations: int,
    relaxation: float,
    tolerance: float | None,
    group: ProcessGroup | None,
) -> list[Kernel]:
    """Run the Sinkhorn iterations and return the kernel of each problem.

    Args:
        scores: Those of one or more problems, of any shapes.
        iterations: The number of iterations, or the maximum number with ``tolerance``.
        relaxation: ρ; infinity is the strict constraint.
        tolerance: A problem stops when its marginal error is at most this.
        group: The ranks.
    """
    largest = [each.largest for each in scores]
    log_masses = [each.log_mass for each in scores]
    if group is not None:
        own = [torch.cat([each.largest, each.log_largest_mass], dim=-1) for each in scores]
        of_all = in_one_collective(max_over_ranks, own, group)
        largest = [both[..., :-1] for both in of_all]
        log_masses = [  # relative to the largest mass of all ranks
            each.log_mass + (each.log_largest_mass - both[..., -1:])
            for each, both in zip(scores, of_all, strict=True)
        ]
    shifts = [  # the largest S + ε log r of each prototype over all ranks, 0 if no sample counts
        shift.masked_fill(shift <= each.lowest, 0)
        for each, shift in zip(scores, largest, strict=True)
    ]
    problems = list(zip(scores, shifts, log_masses, strict=True))
    if relaxation == math.inf:
        scalings = _iterate(problems, iterations, tolerance, group)
    else:
        scalings = _iterate_relaxed(problems, iterations, relaxation, group)
    return [scaling.kernel() for scaling in scalings]


def _iterate(
    problems: Sequence[_Problem],
    iterations: int,
    tolerance: float | None,
    group: ProcessGroup | None,
) -> list[Scaling]:
    """Run strict iterations until their number or the tolerance is reached."""
    started, targets = [], []
    for scores, shift, log_mass in problems:
        mass = scores.prototype_mass
        f = -shift if mass is None else mass.log() * scores.temperature - shift
        targets.append(_equal_mass(f) if mass is None else mass)
        started.append(scores.start(f, log_mass))
    scalings = [scaling for scaling, _ in started]
    masses = in_one_collective(sum_over_ranks, [mass for _, mass in started], group)
    unfinished = list(range(len(problems)))
    for iteration in range(iterations):
        if iteration > 0:
            own = []
            for each in unfinished:
                scalings[each], mass = scalings[each].masses()
                own.append(mass)
            of_all = in_one_collective(sum_over_ranks, own, group)
            for each, mass in zip(unfinished, of_all, strict=True):
                masses[each] = mass
            if iteration == 1:  # the total mass; v cancels any factor of the first u
                targets = [
                    share * mass.sum(dim=-1, keepdim=True)
                    for share, mass in zip(targets, masses, strict=True)
                ]
            if tolerance is not None:  # all ranks see the same masses
                unfinished = [
                    each for each in unfinished if not _near(masses[each], targets[each], tolerance)
                ]
                if not unfinished:
                    break
        for each in unfinished:
            scalings[each] = scalings[each].scale(targets[each], masses[each])
    return scalings


def _near(mass: Tensor, target: Tensor, tolerance: float) -> bool:
    """Return whether the relative error is at most ``tolerance`` everywhere. Reads the device."""
    return bool(((mass - target).abs() <= tolerance * target).all())


def _iterate_relaxed(
    problems: Sequence[_Problem],
    iterations: int,
    relaxation: float,
    group: ProcessGroup | None,
) -> list[Scaling]:
    """Run relaxed iterations in the log domain.

    One iteration is ::

        f = φ (log c - logsumexp_i(S/ε + g + log r))    with φ = ρ / (ρ + ε)
        g = -logsumexp_j(S/ε + f)

    Masses are logarithms, since a prototype may get less mass than floating point can hold. They
    and f are multiplied by ε and scaled like the scores; see ``kernel.py``.
    """
    started = [scores.start(-shift, log_mass) for scores, shift, log_mass in problems]
    scalings = [scaling for scaling, _ in started]
    # r has sum 1 in the equations. Its sum over ranks comes with the first masses.
    own = [
        torch.cat([mass, scaling.log_mass.exp().sum(dim=-1, keepdim=True)], dim=-1)
        for scaling, mass in started
    ]
    totals = [
        total.log_().mul_(scores.temperature)
        for total, (scores, _, _) in zip(
            in_one_collective(sum_over_ranks, own, group), problems, strict=True
        )
    ]
    log_sums = [
        total[..., :-1] + shift for total, (_, shift, _) in zip(totals, problems, strict=True)
    ]
    for iteration in range(iterations):
        if iteration > 0:
            # Their sums over ranks include f.
            log_masses = in_one_collective(
                gather_over_ranks, [scaling.log_masses() for scaling in scalings], group
            )
            log_sums = [
                scaling.scores.sum_of_logs(of_ranks, 0) - scaling.f
                for of_ranks, scaling in zip(log_masses, scalings, strict=True)
            ]
        for each, (log_sum, total) in enumerate(zip(log_sums, totals, strict=True)):
            scores, log_total = scalings[each].scores, total[..., -1:]
            log_sum = (log_sum - log_total).masked_fill_(
                log_total == -math.inf, 0
            )  # no sample is present
            mass = scores.prototype_mass
            mass = _equal_mass(log_sum) if mass is None else mass
            rho = traceable(relaxation, mass.device)
            strength = rho / (rho + scores.epsilon)
            f = strength * (mass.log() * scores.temperature - log_sum)
            scalings[each] = scalings[each]._replace(f=f.masked_fill_(mass == 0, -math.inf))
    return scalings


def _equal_mass(like: Tensor) -> Tensor:
    """Return the target mass of all prototypes, (1,)."""
    return like.new_full((1,), 1 / like.shape[-1])
