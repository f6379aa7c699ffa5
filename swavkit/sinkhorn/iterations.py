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

# Scores; the largest S + ε log r of each prototype over all ranks, 0 if no sample counts; log r
# relative to the largest of all ranks.
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
    shifts = [each.largest for each in scores]
    log_masses = [each.log_mass for each in scores]
    if group is not None:
        own = [torch.cat([each.largest, each.log_largest_mass], dim=-1) for each in scores]
        of_all = in_one_collective(max_over_ranks, own, group)
        shifts = [largest[..., :-1] for largest in of_all]
        log_masses = [
            each.log_mass + (each.log_largest_mass - largest[..., -1:])
            for each, largest in zip(scores, of_all, strict=True)
        ]
    problems = [
        (each, shift.masked_fill(shift <= each.lowest, 0), log_mass)
        for each, shift, log_mass in zip(scores, shifts, log_masses, strict=True)
    ]
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
    started = []
    for scores, shift, log_mass in problems:
        f = -shift if scores.equal else scores.target.log() * scores.temperature - shift
        started.append(scores.start(f, log_mass))
    targets = [scores.target for scores, _, _ in problems]
    scalings = [scaling for scaling, _ in started]
    masses = in_one_collective(sum_over_ranks, [mass for _, mass in started], group)
    unfinished = list(range(len(problems)))
    for iteration in range(iterations):
        if iteration > 0:
            steps = [scalings[each].masses() for each in unfinished]
            sums = in_one_collective(sum_over_ranks, [own for _, own in steps], group)
            for each, (scaling, _), mass in zip(unfinished, steps, sums, strict=True):
                scalings[each], masses[each] = scaling, mass
            # v cancels the unit of the first u, whose targets had the sum 1. Masses now have the
            # sum Σ r, in their own unit, and so must all later targets.
            if iteration == 1:
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
    log_totals, log_sums = [], []
    of_all = in_one_collective(sum_over_ranks, own, group)
    for total, (scores, shift, _) in zip(of_all, problems, strict=True):
        total.log_().mul_(scores.temperature)
        log_totals.append(total[..., -1:])
        log_sums.append(total[..., :-1] + shift)
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
        for each, (log_sum, log_total) in enumerate(zip(log_sums, log_totals, strict=True)):
            scores = scalings[each].scores
            no_samples = log_total == -math.inf
            log_sum = (log_sum - log_total).masked_fill_(no_samples, 0)
            mass = scores.target
            rho = traceable(relaxation, mass.device)
            strength = rho / (rho + scores.epsilon)
            f = strength * (mass.log() * scores.temperature - log_sum)
            scalings[each] = scalings[each]._replace(f=f.masked_fill_(mass == 0, -math.inf))
    return scalings
