"""The iterations of Sinkhorn-Knopp over all ranks: they find u of a kernel.

``kernel.py`` sums masses over samples, this file over ranks. Several kernels go in step, so that
their sums travel in one collective.
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
from swavkit.sinkhorn.kernel import Kernel

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


def find_u(
    kernels: Sequence[Kernel],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    relaxation: float,
    tolerance: float | None,
    group: ProcessGroup | None,
) -> None:
    """Run the Sinkhorn iterations and set u of each kernel.

    Args:
        kernels: One or more new kernels, of any shapes.
        prototype_masses: The target marginal (K,) of each kernel, of sum 1; ``None`` for equal
            masses.
        iterations: The number of iterations, or the maximum number with ``tolerance``.
        relaxation: ρ; infinity is the strict constraint.
        tolerance: A kernel stops when its marginal error is at most this.
        group: The ranks.
    """
    if group is None and len(kernels) > 1:  # one by one, while P is in the cache
        for kernel, mass in zip(kernels, prototype_masses, strict=True):
            find_u([kernel], [mass], iterations, relaxation, tolerance, None)
    elif relaxation == math.inf:
        _iterate(kernels, prototype_masses, iterations, tolerance, group)
    else:
        _iterate_relaxed(kernels, prototype_masses, iterations, relaxation, group)


def _iterate(
    kernels: Sequence[Kernel],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    tolerance: float | None,
    group: ProcessGroup | None,
) -> None:
    """Run strict iterations until their number or the tolerance is reached."""
    first_masses, targets = [], []
    for kernel, mass, largest in zip(
        kernels, prototype_masses, _largest_scores(kernels, group), strict=True
    ):
        f = -largest if mass is None else mass.log() * kernel.temperature - largest
        targets.append(_equal_mass(f) if mass is None else mass)
        first_masses.append(kernel.start(f))
    masses = in_one_collective(sum_over_ranks, first_masses, group)
    for iteration in range(iterations):
        if iteration > 0:
            masses = in_one_collective(
                sum_over_ranks, [kernel.masses() for kernel in kernels], group
            )
            if iteration == 1:  # the total mass; v cancels any factor of the first u
                targets = [
                    share * mass.sum(dim=-1, keepdim=True)
                    for share, mass in zip(targets, masses, strict=True)
                ]
            if tolerance is not None:  # all ranks see the same masses
                far = [not _near(*pair, tolerance) for pair in zip(masses, targets, strict=True)]
                kernels = list(itertools.compress(kernels, far))
                targets = list(itertools.compress(targets, far))
                masses = list(itertools.compress(masses, far))
                if not kernels:
                    break
        for kernel, share, mass in zip(kernels, targets, masses, strict=True):
            kernel.scale(share, mass)


def _near(mass: Tensor, target: Tensor, tolerance: float) -> bool:
    """Return whether the relative error is at most ``tolerance`` everywhere. Reads the device."""
    return bool(((mass - target).abs() <= tolerance * target).all())


def _iterate_relaxed(
    kernels: Sequence[Kernel],
    prototype_masses: Sequence[Tensor | None],
    iterations: int,
    relaxation: float,
    group: ProcessGroup | None,
) -> None:
    """Run relaxed iterations in the log domain, and set f.

    One iteration is ::

        f = φ (log c - logsumexp_i(S/ε + g + log r))    with φ = ρ / (ρ + ε)
        g = -logsumexp_j(S/ε + f)

    Masses are logarithms, since a prototype may get less mass than floating point can hold. They
    and f are multiplied by ε and scaled like the scores; see ``kernel.py``.
    """
    shifts = _largest_scores(kernels, group)
    targets = [
        _equal_mass(shift) if mass is None else mass
        for mass, shift in zip(prototype_masses, shifts, strict=True)
    ]
    # r has sum 1 in the equations. Its sum over ranks comes with the first masses.
    first_masses = [
        torch.cat([kernel.start(-shift), kernel.log_mass.exp().sum(dim=-1, keepdim=True)], dim=-1)
        for kernel, shift in zip(kernels, shifts, strict=True)
    ]
    totals = [
        total.log_().mul_(kernel.temperature)
        for kernel, total in zip(
            kernels, in_one_collective(sum_over_ranks, first_masses, group), strict=True
        )
    ]
    log_sums = [total[..., :-1] + shift for total, shift in zip(totals, shifts, strict=True)]
    for iteration in range(iterations):
        if iteration > 0:
            # Their sums over ranks include f.
            log_masses = in_one_collective(
                gather_over_ranks, [kernel.log_masses() for kernel in kernels], group
            )
            log_sums = [
                kernel.sum_of_logs(of_ranks, 0) - kernel.f
                for of_ranks, kernel in zip(log_masses, kernels, strict=True)
            ]
        for kernel, share, log_sum, total in zip(kernels, targets, log_sums, totals, strict=True):
            log_total = total[..., -1:]
            log_sum = (log_sum - log_total).masked_fill_(
                log_total == -math.inf, 0
            )  # no sample is present
            rho = traceable(relaxation, share.device)
            strength = rho / (rho + kernel.epsilon)
            f = strength * (share.log() * kernel.temperature - log_sum)
            kernel.relax(f.masked_fill_(share == 0, -math.inf))


def _equal_mass(like: Tensor) -> Tensor:
    """Return the target mass of all prototypes, (1,)."""
    return like.new_full((1,), 1 / like.shape[-1])


def _largest_scores(kernels: Sequence[Kernel], group: ProcessGroup | None) -> list[Tensor]:
    """Return the largest S + ε log r of each prototype over all ranks, (..., K).

    It is 0 if no sample counts. Sample masses become relative to the largest of all ranks.
    """
    of_all = [kernel.largest_scores() for kernel in kernels]
    if group is not None:
        own = [
            torch.cat([largest, kernel.log_largest_mass], dim=-1)
            for kernel, largest in zip(kernels, of_all, strict=True)
        ]
        both = in_one_collective(max_over_ranks, own, group)
        of_all = [largest[..., :-1] for largest in both]
        for kernel, largest in zip(kernels, both, strict=True):
            kernel.measure(largest[..., -1:])
    return [
        largest.masked_fill_(largest <= kernel.lowest, 0)
        for kernel, largest in zip(kernels, of_all, strict=True)
    ]
