"""Sinkhorn-Knopp: scores become codes that use all prototypes equally.

The codes solve an entropic optimal-transport problem (Cuturi 2013; Caron et al. 2020, §3.1): among
all plans Q with the prescribed mass on every sample and on every prototype, take the one that
maximises Tr(QᵀS) + ε H(Q). Its form is known, Q = diag(v) P diag(u) with P = exp(S/ε), so only the
two vectors u (K) and v (B) are iterated::

    for _ in range(iterations):
        u = c / (Pᵀ (r * v))    # every prototype j gets its mass c_j ...
        v = 1 / (P u)           # ... and every sample's code sums to 1

r are the masses of the samples and c those of the prototypes, each in proportion to its sum.

Differences from the published procedure, none of which changes the codes in exact arithmetic: P is
first scaled so that no finite score over- or underflows, and is then read and not rewritten (see
``_plan.py``); the arithmetic is in float32 or better whatever the dtype of the scores; samples may
be spread unevenly over processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, empty
from swavkit.distributed.collectives import participants
from swavkit.sinkhorn.iterations import find_u
from swavkit.sinkhorn.kernel import Masses, Plan, codes_at_once, fits_at_once, parts_of
from swavkit.sinkhorn.marginals import masses, refuse_bad_values

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["sinkhorn_knopp"]


def sinkhorn_knopp(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    sample_weight: Tensor | None = None,
    prototype_weight: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
    relaxation: float = math.inf,
    tolerance: float | None = None,
    hard: bool = False,
    validate: bool = False,
) -> Tensor:
    r"""Turn scores into codes that use all prototypes equally.

    One iteration is a prototype normalisation followed by a sample normalisation, so that every
    code sums to 1, while the equal use of the prototypes holds the better the more iterations are
    made.

    In a job with ``torch.distributed`` initialised each process passes its own samples, as many or
    few as it has, and gets their codes within the batch of the whole group. All processes of the
    group must make the call, with the same K and the same settings.

    Args:
        scores: (..., B, K) similarities of B samples with K prototypes, any real floating dtype.
            Leading dimensions are independent problems.
        epsilon: The entropy temperature ε > 0, in the unit of the scores.
        iterations: How many iterations, at least 1; with ``tolerance``, at most so many.
        sample_weight: (..., B) or (B,) multiplicities, bool or floating, at least 0. A sample of
            weight 0 is absent: it takes no part, whatever its scores hold. Its own code is the one
            that the present samples' prototype masses give it, or zeros if its scores are not
            finite.
        prototype_weight: (K,) relative masses of the prototypes, at least 0, at any scale; equal
            masses by default.
        process_group: The processes that share the batch; the default group if ``None``.
        synchronize: Whether to share the batch with other processes at all.
        relaxation: How strictly equal use is asked for, ρ > 0: the prototypes' masses may differ
            from what they should be at the price of ρ times the Kullback-Leibler divergence.
            Infinite is strict; towards 0 the codes become softmax(S/ε).
        tolerance: Stop as soon as :func:`~swavkit.marginal_error` is at most this, for all
            problems. Reads a value on the host after each iteration, which makes an accelerator
            wait and cannot be compiled. Not with a finite ``relaxation``, which never gets there.
        hard: Whether to round each code to the prototype of its largest entry, the largest before
            it is rounded to the dtype of ``scores``.
        validate: Whether to look at the values of scores and weights and refuse bad ones, on all
            processes if one has any. Makes an accelerator wait and cannot be compiled.

    Returns:
        (..., B, K) codes in the dtype of ``scores``, without gradient. Without ``validate`` no
        value is checked: a sample with a NaN or an infinite score gets NaN codes, and the others
        those that they have without it; a negative, NaN or infinite weight makes every code NaN;
        and where no sample is present, the code of an absent one is softmax(S/ε + log c). Any
        finite scores have codes, the lowest number of a dtype too, which forbids a prototype to a
        sample. Differences of scores are rounded in float32 (float64 for float64 scores), which
        limits the accuracy of an entry to about 6e-8 · max|S - max_i S| / ε. Weights of samples may
        span 40 decades.

    Raises:
        TypeError: If ``scores`` is no floating tensor or a weight is neither bool nor floating.
        ValueError: If a setting is out of range, a shape does not fit, the calling process is not
            in ``process_group``, or ``validate`` finds a bad value.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6]])
        >>> codes = sinkhorn_knopp(scores, epsilon=0.2)
        >>> scores.argmax(dim=1)  # prototype 0 is the nearest of every sample ...
        tensor([0, 0, 0])
        >>> codes.argmax(dim=1)  # ... and equal use gives the undecided one to prototype 1
        tensor([0, 0, 1])

    References:
        Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        NeurIPS 2020. Cuturi, "Sinkhorn Distances", NeurIPS 2013. Relaxed marginals: Chizat et al.,
        "Scaling Algorithms for Unbalanced Optimal Transport Problems", 2018.
    """
    _checks.boolean("synchronize", synchronize)
    settings = checked_settings(epsilon, iterations, relaxation, tolerance, hard, validate)
    group = participants(process_group, synchronize)
    return solve([scores], sample_weight, prototype_weight, settings, group)[0]


def solve(
    several: Sequence[Tensor],
    sample_weight: Tensor | None,
    prototype_weight: Tensor | None,
    settings: Settings,
    group: ProcessGroup | None,
    rider: Tensor | None = None,
) -> list[Tensor]:
    """Return the codes of each of several scores within the batch of the group, found in step.

    ``rider`` is summed over the group along with them, in place.
    """
    epsilon, iterations, relaxation, tolerance, hard, validate = settings
    for scores in several:
        _checks.of_samples_and_prototypes("scores", scores)
        _checks.weights(sample_weight, prototype_weight, scores)

    several = [scores.detach() for scores in several]
    with autocast_disabled(several[0].device):
        if validate:
            for scores in several:
                refuse_bad_values(scores, sample_weight, prototype_weight, group)
        strict = relaxation == math.inf and tolerance is None
        alone = group is None and sample_weight is None and prototype_weight is None
        codes, plans, prototype_masses = [], [], []
        for scores in several:
            problems = scores  # (B, K) or (N, B, K)
            if scores.dim() > 2:
                problems = scores.flatten(0, -3)
                problems = problems[0] if len(problems) == 1 else problems
            if strict and alone and fits_at_once(problems, iterations):
                found = codes_at_once(problems, epsilon, iterations)
                codes.append((one_hot(found) if hard else found).to(scores.dtype))
                continue
            leading = problems.shape[:-2]
            codes.append(empty(problems.shape, scores.dtype, scores))
            dtype = at_least_float32(scores.dtype)
            sample_mass = masses(sample_weight, scores.shape[:-1], scores.device, dtype)
            weights = [weight for weight in (sample_weight, prototype_weight) if weight is not None]
            plans.append(
                Plan(
                    problems.__getitem__,
                    parts_of(problems),
                    Masses(*(each.view(*leading, each.shape[-1]) for each in sample_mass)),  # r
                    scores.shape[-1],
                    weighted=sample_weight is not None,
                    graded=any(weight.is_floating_point() for weight in weights),
                    epsilon=epsilon,
                    codes=codes[-1],
                )
            )
            prototype_mass = None
            if prototype_weight is not None:
                log_mass, _ = masses(prototype_weight, scores.shape[-1:], scores.device, dtype)
                prototype_mass = log_mass.softmax(dim=-1)  # (K,), c
            prototype_masses.append(prototype_mass)
        if plans:
            find_u(plans, prototype_masses, iterations, relaxation, tolerance, group, rider)
        for plan in plans:
            plan.codes(one_hot if hard else None)
        if several[0].dim() > 2:
            codes = [each.view(scores.shape) for each, scores in zip(codes, several, strict=True)]
        return codes


class Settings(NamedTuple):
    epsilon: float
    iterations: int
    relaxation: float
    tolerance: float | None
    hard: bool
    validate: bool


def checked_settings(*settings: Any) -> Settings:
    """Refuse bad settings, which come in the order of the fields."""
    epsilon, iterations, relaxation, tolerance, hard, validate = settings
    epsilon = _checks.positive_float("epsilon", epsilon)
    iterations = _checks.positive_int("iterations", iterations)
    relaxation = _checks.positive_or_infinite("relaxation", relaxation)
    if tolerance is not None:
        tolerance = _checks.positive_float("tolerance", tolerance)
        if relaxation != math.inf:
            raise ValueError(
                f"tolerance must be None with a finite relaxation, got {tolerance} with a "
                f"relaxation of {relaxation}"
            )
    _checks.boolean("hard", hard)
    _checks.boolean("validate", validate)
    return Settings(epsilon, iterations, relaxation, tolerance, hard, validate)


def one_hot(codes: Tensor) -> Tensor:
    """Round each code to its largest entry, in place. NaN stays NaN, and zeros stay zeros."""
    largest, nearest = codes.max(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, 1, largest)
    return codes.mul_(0).scatter_(-1, nearest, largest)
