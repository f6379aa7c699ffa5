"""Sinkhorn-Knopp: codes that use all prototypes equally, from scores.

The codes solve an entropic optimal-transport problem (Cuturi 2013; Caron et al. 2020, §3.1). Among
all transport plans Q with given marginals, the mass r of each sample and c of each prototype, they
maximize Tr(QᵀS) + ε H(Q). The solution has the form Q = diag(v) P diag(u) with the Gibbs kernel
P = exp(S/ε). Sinkhorn-Knopp alternates between u, which gives each prototype its mass, and v, which
gives each sample its mass. :func:`reference` is this algorithm.

:func:`sinkhorn_knopp` computes the same codes. It differs in three ways, none of which changes the
codes in exact arithmetic: the kernel is scaled so that no finite score over- or underflows
(``kernel.py``); the arithmetic is in float32 or better; samples may be spread unevenly over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, empty
from swavkit.distributed.collectives import participants
from swavkit.sinkhorn.at_once import fastest_codes, fits_at_once
from swavkit.sinkhorn.iterations import find_kernels
from swavkit.sinkhorn.kernel import Masses, ScaledScores, parts_of
from swavkit.sinkhorn.marginals import (
    masses,
    may_be_fractional,
    refuse_bad_values,
    target_marginal,
)

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

__all__ = ["sinkhorn_knopp"]

Weights = Tensor | Sequence[Tensor | None] | None  # a sequence if scores are one


def reference(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the codes (B, K) of scores (B, K) by the algorithm as it is written in textbooks.

    It is here to be read and to be compared with: exact in float64, without weights or ranks.
    """
    samples, prototypes = scores.shape
    kernel = torch.exp((scores - scores.max()) / epsilon)  # P, (B, K)
    v = torch.ones_like(scores[:, 0])
    for _ in range(iterations):
        u = samples / prototypes / (v @ kernel)  # each prototype gets the mass B/K
        v = 1 / (kernel @ u)  # each code sums to 1
    return v.unsqueeze(1) * kernel * u


@overload
def sinkhorn_knopp(
    scores: Tensor,
    *,
    epsilon: float | Tensor = ...,
    iterations: int = ...,
    sample_weight: Tensor | None = ...,
    prototype_weight: Tensor | None = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
    relaxation: float = ...,
    tolerance: float | None = ...,
    hard: bool = ...,
    validate: bool = ...,
    dtype: torch.dtype | None = ...,
) -> Tensor: ...


@overload
def sinkhorn_knopp(
    scores: Sequence[Tensor],
    *,
    epsilon: float | Tensor = ...,
    iterations: int = ...,
    sample_weight: Sequence[Tensor | None] | None = ...,
    prototype_weight: Sequence[Tensor | None] | None = ...,
    process_group: ProcessGroup | None = ...,
    synchronize: bool = ...,
    relaxation: float = ...,
    tolerance: float | None = ...,
    hard: bool = ...,
    validate: bool = ...,
    dtype: torch.dtype | None = ...,
) -> list[Tensor]: ...


def sinkhorn_knopp(
    scores: Tensor | Sequence[Tensor],
    *,
    epsilon: float | Tensor = 0.05,
    iterations: int = 3,
    sample_weight: Weights = None,
    prototype_weight: Weights = None,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
    relaxation: float = math.inf,
    tolerance: float | None = None,
    hard: bool = False,
    validate: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    r"""Return codes that use all prototypes equally.

    One iteration normalizes the prototypes and then the samples. Every code therefore sums to 1.
    Equal use of the prototypes is approximate and improves with the number of iterations.

    In a job with ``torch.distributed`` initialized, each rank passes its own samples, any number of
    them, and gets their codes within the batch of the whole group. All ranks of the group must make
    the call, with the same K and the same settings.

    Args:
        scores: (..., B, K) similarities of B samples with K prototypes, any real floating dtype.
            Leading dimensions are independent problems. A sequence of such tensors, of any shapes,
            holds further independent problems. They are solved together, with as many collectives
            as one.
        epsilon: The entropy temperature ε > 0, in the unit of the scores: a number, or a floating
            0-dim tensor, which is never read on the host. A schedule can change either without
            recompilation.
        iterations: The number of iterations, at least 1. The maximum number with ``tolerance``.
        sample_weight: (..., B) or (B,) multiplicities, bool or floating, at least 0. A sample of
            weight 0 takes no part, whatever its scores are. It still gets a code, from the
            prototype masses of the other samples, or zeros if its scores are not finite. For a
            sequence of scores, a sequence with an entry or ``None`` for each.
        prototype_weight: (K,) relative masses of the prototypes, at least 0 and not all 0, at any
            scale; equal masses by default. For a sequence of scores, a sequence with an entry or
            ``None`` for each.
        process_group: The ranks that share the batch; the default group if ``None``.
        synchronize: Whether to share the batch with other ranks.
        relaxation: The strength ρ > 0 of the constraint on the prototypes' masses. A deviation
            costs ρ times the Kullback-Leibler divergence. Infinity is the strict constraint;
            towards 0 the codes become softmax(S/ε).
        tolerance: Stop when :func:`~swavkit.marginal_error` of all problems is at most this, before
            ``hard`` or ``dtype`` rounds the codes. Reads a value on the host after each iteration,
            which makes an accelerator wait and cannot be compiled. Cannot be combined with a finite
            ``relaxation``, which does not converge to an error of 0.
        hard: Whether to round each code to its largest entry. Ties are decided before codes are
            rounded to ``dtype``.
        validate: Whether to check the values of scores and weights, and raise on all ranks if any
            rank has bad ones. Makes an accelerator wait and cannot be compiled.
        dtype: The floating dtype of the codes, of at least 16 bits; that of ``scores`` if ``None``.

    Returns:
        (..., B, K) codes in ``dtype``, without gradient; a list of them for a sequence of scores.
        Any finite scores give finite codes. The lowest number of a dtype excludes a prototype for a
        sample. A sample with a NaN or infinite score gets NaN codes and does not affect the others.
        A negative, NaN or infinite weight makes every code NaN, and so do prototype weights that
        are all 0. If no sample is present, the code of an absent one is softmax(S/ε + log c), or
        softmax(S/ε + φ log c) with the φ = ρ / (ρ + ε) of a finite relaxation ρ.
        Differences of scores are rounded in float32 (float64 for float64 scores), which limits the
        accuracy of an entry to about 6e-8 · max|S - max_i S| / ε. Sample weights may span 40
        decades.

    Raises:
        TypeError: If ``scores`` is not a floating tensor or a weight is neither bool nor floating.
        ValueError: If a setting is out of range, a shape does not fit, the calling rank is not in
            ``process_group``, or ``validate`` finds a bad value.

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
    settings = checked_settings(epsilon, iterations, relaxation, tolerance, hard, validate, dtype)
    group = participants(process_group, synchronize)
    problems = checked_problems(scores, sample_weight, prototype_weight)
    codes = solve(problems, settings, group)
    return codes[0] if isinstance(scores, Tensor) else codes


class Settings(NamedTuple):
    """The settings of :func:`sinkhorn_knopp` by their names there."""

    epsilon: float | Tensor
    iterations: int
    relaxation: float
    tolerance: float | None
    hard: bool
    validate: bool
    dtype: torch.dtype | None


class Problem(NamedTuple):
    """One entry of the list of problems: scores (..., B, K) with their weights."""

    scores: Tensor
    sample_weight: Tensor | None
    prototype_weight: Tensor | None


def checked_settings(*settings: Any) -> Settings:
    """Refuse bad settings, which come in the order of the fields."""
    epsilon, iterations, relaxation, tolerance, hard, validate, dtype = settings
    epsilon = _checks.positive_setting("epsilon", epsilon)
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
    if dtype is not None:
        _checks.floating_dtype("dtype", dtype)
    return Settings(epsilon, iterations, relaxation, tolerance, hard, validate, dtype)


def checked_problems(
    scores: Tensor | Sequence[Tensor], sample_weight: Weights, prototype_weight: Weights
) -> list[Problem]:
    """Check the tensors that :func:`sinkhorn_knopp` gets, and return its problems."""
    if isinstance(scores, Tensor):
        problem = Problem(scores, sample_weight, prototype_weight)  # type: ignore[arg-type]
        _check(problem, "")
        return [problem]
    tensors = isinstance(scores, (list, tuple)) and all(isinstance(each, Tensor) for each in scores)
    if not tensors or not scores:
        raise TypeError(
            f"scores must be a torch.Tensor, got {type(scores).__name__}; or a list or tuple of "
            f"tensors, at least 1"
        )
    weights = [
        _checks.one_for_each(name, value, len(scores), f"the {len(scores)} scores")
        for name, value in (
            ("sample_weight", sample_weight),
            ("prototype_weight", prototype_weight),
        )
    ]
    problems = [Problem(*each) for each in zip(scores, *weights, strict=True)]
    for index, problem in enumerate(problems):
        _check(problem, f"[{index}]")
        _checks.same_device(f"scores[{index}]", problem.scores, problems[0].scores)
    return problems


def _check(problem: Problem, index: str) -> None:
    _checks.of_samples_and_prototypes("scores" + index, problem.scores)
    _checks.weights(problem.sample_weight, problem.prototype_weight, problem.scores, index)


def solve(
    problems: Sequence[Problem], settings: Settings, group: ProcessGroup | None
) -> list[Tensor]:
    """Return the codes of each problem within the batch of the group."""
    _checks.known_setting("epsilon", settings.epsilon, problems[0].scores.device)
    with autocast_disabled(problems[0].scores.device):
        problems = [problem._replace(scores=problem.scores.detach()) for problem in problems]
        if settings.validate:
            for problem in problems:
                refuse_bad_values(*problem, group)
        # On one rank one by one, while P is in the cache.
        batches = [[each] for each in problems] if group is None else [problems]
        return [codes for batch in batches for codes in _solve_in_step(batch, settings, group)]


def _solve_in_step(
    problems: Sequence[Problem], settings: Settings, group: ProcessGroup | None
) -> list[Tensor]:
    """Return the codes of each problem, with as many collectives as for one."""
    first, scores = problems[0], _without_leading_ones(problems[0].scores)
    if group is None and _is_plain(first, settings) and fits_at_once(scores, settings.iterations):
        present = first.sample_weight
        if present is not None:
            present = present.expand(first.scores.shape[:-1]).reshape(scores.shape[:-1])
        codes = fastest_codes(scores, settings.epsilon, settings.iterations, present)
        codes = one_hot(codes) if settings.hard else codes
        found = [codes.to(settings.dtype or scores.dtype)]
    else:
        kernels = find_kernels(
            [_scaled_scores(problem, settings) for problem in problems],
            settings.iterations,
            settings.relaxation,
            settings.tolerance,
            group,
        )
        found = [kernel.codes(one_hot if settings.hard else None) for kernel in kernels]
    return [
        each.view(problem.scores.shape) if problem.scores.dim() > 2 else each
        for each, problem in zip(found, problems, strict=True)
    ]


def _is_plain(problem: Problem, settings: Settings) -> bool:
    """Tell whether masses are equal, or 0, and the number of strict iterations is fixed."""
    strict = settings.relaxation == math.inf and settings.tolerance is None
    equal = problem.prototype_weight is None and not may_be_fractional(problem.sample_weight)
    return strict and equal


def _without_leading_ones(scores: Tensor) -> Tensor:
    """Return (B, K) scores of one problem, or (N, B, K) of several."""
    if scores.dim() > 2:
        scores = scores.flatten(0, -3)
        scores = scores[0] if len(scores) == 1 else scores
    return scores


def _scaled_scores(problem: Problem, settings: Settings) -> ScaledScores:
    scores = _without_leading_ones(problem.scores)
    dtype = at_least_float32(scores.dtype)
    shape = problem.scores.shape[:-1]
    sample_mass = masses(problem.sample_weight, shape, scores.device, dtype)
    parts = parts_of(scores)
    return ScaledScores(
        lambda: (scores[part] for part in parts),
        parts,
        Masses(*(each.reshape(*scores.shape[:-2], each.shape[-1]) for each in sample_mass)),  # r
        scores.shape[-1],
        target_marginal(problem.prototype_weight, sample_mass.log),
        weighted=problem.sample_weight is not None,
        fractional=may_be_fractional(problem.sample_weight, problem.prototype_weight),
        epsilon=settings.epsilon,
        codes=empty(scores.shape, settings.dtype or scores.dtype, scores),
    )


def one_hot(codes: Tensor) -> Tensor:
    """Round each code to its largest entry, in place. NaN stays NaN, and zeros stay zeros."""
    largest, nearest = codes.max(dim=-1, keepdim=True)
    largest = torch.where(largest > 0, 1, largest)
    return codes.mul_(0).scatter_(-1, nearest, largest)
