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
first scaled so that no finite score over- or underflows, and is then read and never rewritten; the
arithmetic is in float32 or better whatever the dtype of the scores; samples may be spread unevenly
over processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._distributed import GroupHandle, max_over_ranks, participants, sum_over_ranks
from swavkit._precision import at_least_float32, autocast_disabled

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup

__all__ = ["SinkhornKnopp", "sinkhorn_knopp"]

# The ranges of u and v can grow by up to B·K in each iteration. For so many iterations they stay
# inside that of float32 at any B·K that fits in memory; then the plan is computed anew.
_ITERATIONS_OF_ONE_PLAN = 5

# What a CPU's core keeps in its cache from one operation to the next. An accelerator takes all
# samples at once, and so does a compiler, which fuses the operations.
_ENTRIES_OF_A_BLOCK = 2**18
_SAMPLES_OF_A_BLOCK = 2**9  # a matrix-vector product may add them up one by one, in float32


def sinkhorn_knopp(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    sample_weight: Tensor | None = None,
    prototype_weight: Tensor | None = None,
    process_group: ProcessGroup | None = None,
    synchronize: bool = True,
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
        iterations: How many iterations, at least 1.
        sample_weight: (..., B) or (B,) multiplicities, bool or floating, at least 0. A sample of
            weight 0 is absent: it takes no part, whatever its scores hold. Its own code is the one
            that the present samples' prototype masses give it, or zeros if its scores are not
            finite.
        prototype_weight: (K,) relative masses of the prototypes, at least 0, at any scale; equal
            masses by default.
        process_group: The processes that share the batch; the default group if ``None``.
        synchronize: Whether to share the batch with other processes at all.

    Returns:
        (..., B, K) codes in the dtype of ``scores``, without gradient. Values are not checked, so
        that no accelerator has to wait. A sample with a NaN or an infinite score gets NaN codes,
        and the others those that they have without it. A negative or NaN weight makes every code
        NaN. S/ε is rounded in float32 (float64 for float64 scores), which limits the accuracy of an
        entry to about 6e-8 · max|S| / ε.

    Raises:
        TypeError: If ``scores`` is no floating tensor or a weight is neither bool nor floating.
        ValueError: If a setting is out of range, a shape does not fit, or the calling process is
            not in ``process_group``.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6]])
        >>> codes = sinkhorn_knopp(scores, epsilon=0.2)
        >>> scores.argmax(dim=1)  # prototype 0 is the nearest of every sample ...
        tensor([0, 0, 0])
        >>> codes.argmax(dim=1)  # ... and equal use gives the undecided one to prototype 1
        tensor([0, 0, 1])

    References:
        Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments",
        NeurIPS 2020. Cuturi, "Sinkhorn Distances", NeurIPS 2013.
    """
    epsilon = _checks.positive_float("epsilon", epsilon)
    iterations = _checks.positive_int("iterations", iterations)
    _checks.choice("synchronize", synchronize, (True, False))
    _checks.floating_tensor("scores", scores)
    _checks.min_dimensions("scores", scores, 2, "(..., samples, prototypes)")
    _checks.no_empty_last_dimension("scores", scores, "prototypes")
    if sample_weight is not None:
        _checks.weight(
            "sample_weight", sample_weight, (scores.shape[:-1], scores.shape[-2:-1]), scores
        )
    if prototype_weight is not None:
        _checks.weight("prototype_weight", prototype_weight, (scores.shape[-1:],), scores)
    group = participants(process_group, synchronize)

    with torch.no_grad(), autocast_disabled(scores.device):
        dtype = at_least_float32(scores.dtype)
        sample_mass = _mass(sample_weight, scores.shape[:-1], scores.device, dtype)  # (..., B), r
        prototype_mass = _mass(prototype_weight, scores.shape[-1:], scores.device, dtype)  # (K,), c
        plan = _Plan(
            scores.flatten(0, -3) if scores.dim() > 2 else scores.unsqueeze(0),
            sample_mass.flatten(0, -2) if scores.dim() > 2 else sample_mass.unsqueeze(0),
            sample_weight is not None,
            epsilon,
        )
        codes = _iterate(plan, prototype_mass / prototype_mass.sum(), iterations, group)
        return codes.view(scores.shape).to(scores.dtype)


class SinkhornKnopp(nn.Module):
    """Module form of :func:`sinkhorn_knopp`: it holds the settings.

    In ``eval()`` it never talks to other processes, so that one process can validate alone.

    Args:
        epsilon: The entropy temperature ε > 0, in the unit of the scores.
        iterations: How many iterations, at least 1.
        process_group: The processes that share the batch; the default group if ``None``. A deep
            copy of the module shares the group; pickling drops it, and the loaded module must be
            given a new one (``module.process_group = ...``) before its next use.
        synchronize: Whether to share the batch with other processes in training mode.

    Shape:
        scores (..., B, K), ``sample_weight`` (..., B) or (B,), ``prototype_weight`` (K,) give codes
        (..., B, K) in the dtype of the scores.

    Raises:
        TypeError: If a setting is of the wrong type.
        ValueError: If a setting is out of range.

    Example:
        >>> sinkhorn = SinkhornKnopp(epsilon=0.05, iterations=3)
        >>> sinkhorn(torch.eye(3))
        tensor([[1.0000e+00, 2.0612e-09, 2.0612e-09],
                [2.0612e-09, 1.0000e+00, 2.0612e-09],
                [2.0612e-09, 2.0612e-09, 1.0000e+00]])
    """

    def __init__(
        self,
        epsilon: float = 0.05,
        iterations: int = 3,
        *,
        process_group: ProcessGroup | None = None,
        synchronize: bool = True,
    ) -> None:
        super().__init__()
        self.epsilon = _checks.positive_float("epsilon", epsilon)
        self.iterations = _checks.positive_int("iterations", iterations)
        _checks.choice("synchronize", synchronize, (True, False))
        self.synchronize = synchronize
        self._group = GroupHandle(process_group)

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that share the batch; the default group if ``None``."""
        return self._group.get()

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        self._group = GroupHandle(group)

    def forward(
        self,
        scores: Tensor,
        sample_weight: Tensor | None = None,
        prototype_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the codes of ``scores``; see :func:`sinkhorn_knopp`."""
        return sinkhorn_knopp(
            scores,
            epsilon=self.epsilon,
            iterations=self.iterations,
            sample_weight=sample_weight,
            prototype_weight=prototype_weight,
            process_group=self.process_group,
            synchronize=self.synchronize and self.training,
        )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return (
            f"epsilon={self.epsilon}, iterations={self.iterations}, synchronize={self.synchronize}"
        )


def _mass(
    weight: Tensor | None, shape: torch.Size, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return a weight as masses of ``shape``; NaN where it is negative, so that it shows."""
    if weight is None:
        return torch.ones(shape, device=device, dtype=dtype)
    return torch.where(weight < 0, torch.nan, weight.to(dtype)).expand(shape).clone()


def _iterate(
    plan: _Plan, prototype_mass: Tensor, iterations: int, group: ProcessGroup | None
) -> Tensor:
    """Return the codes (N, B, K) of a new plan; ``prototype_mass`` (K,) has the sum 1."""
    largest = max_over_ranks(plan.largest_scores(), group)  # (N, K)
    largest = torch.where(largest == plan.low, 0, largest)  # nobody is present on any rank
    log_u = prototype_mass.log() - largest / plan.epsilon
    mass = plan.start(log_u)
    for iteration in range(1, iterations):
        u = _equalise(sum_over_ranks(mass, group), prototype_mass)
        if iteration % _ITERATIONS_OF_ONE_PLAN == 0:
            log_u += u.log()
            mass = plan.restart(log_u)
        else:
            mass = plan.iterate(u)
    return plan.codes(_equalise(sum_over_ranks(mass, group), prototype_mass))


def _equalise(mass: Tensor, prototype_mass: Tensor) -> Tensor:
    """Return the u (N, K) that brings the prototypes from ``mass`` to their own, up to a factor.

    The factor cancels in v; with the total in it, u stays near 1 however large the weights are.
    """
    u = prototype_mass * mass.sum(dim=-1, keepdim=True) / mass
    return torch.where(mass == 0, 1, u)  # no mass is wanted there, or nobody is present


class _Block(NamedTuple):
    """Some samples of problem number ``problem``."""

    problem: int
    scores: Tensor  # (b, K)
    entries: Tensor  # (b, K), P
    sample_mass: Tensor  # (b,), r
    usable: Tensor  # (b,) bool, whether all scores are finite
    code_mass: Tensor  # (b,), what the codes must sum to


class _Plan:
    """P = exp(S/ε) of N problems, scaled so that no score takes it out of range.

    With b_j the largest S_ij/ε of prototype j, and a_i the largest exponent that this leaves to
    sample i, P_ij = exp(S_ij/ε - b_j + log c_j - a_i). The largest entry of each row is 1, and the
    first v = e^a, which undoes a, leaves an entry of c_j to each column. So the first u and v are
    finite for any finite scores, at the price of one exponential an entry.

    Each method reads P once, block by block, and all but the last return (N, K) masses of the
    prototypes, Pᵀ (r * v), of the samples of this process. A sample with a NaN or an infinite score
    is left out: its mass is 0, and its code NaN, or zeros if it was absent anyway.

    Args:
        scores: (N, B, K).
        sample_mass: (N, B), in the dtype of all arithmetic; overwritten.
        weighted: Whether any of these can be 0.
        epsilon: ε.
    """

    def __init__(self, scores: Tensor, sample_mass: Tensor, weighted: bool, epsilon: float) -> None:
        self.weighted = weighted
        self.epsilon = epsilon
        self.entries = torch.empty(scores.shape, dtype=sample_mass.dtype, device=scores.device)
        # In place of scores that must not count: so low that it is the largest of no prototype.
        low = torch.finfo(sample_mass.dtype).min / 4 * min(epsilon, 1)
        self.low = sample_mass.new_full((), low)
        self.sample_mass = sample_mass
        self.usable = torch.empty_like(sample_mass, dtype=torch.bool)
        self.code_mass = torch.ones_like(sample_mass)
        parts = (scores, self.entries, self.sample_mass, self.usable, self.code_mass)
        number, samples, prototypes = scores.shape
        rows = samples
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = min(_SAMPLES_OF_A_BLOCK, _ENTRIES_OF_A_BLOCK // prototypes)
        self.blocks = [
            _Block(problem, *(tensor[problem] for tensor in block))
            for block in zip(*(torch.split(part, max(rows, 1), 1) for part in parts), strict=True)
            for problem in range(number if samples else 0)
        ]

    def largest_scores(self) -> Tensor:
        """Return the largest score of each prototype among the samples that are present."""
        largest = self._of_prototypes(self.low)
        for problem, scores, entries, sample_mass, usable, _ in self.blocks:
            usable.copy_(scores.sum(dim=-1, dtype=entries.dtype).isfinite())
            torch.where(usable.unsqueeze(-1), scores.to(entries.dtype), self.low, out=entries)
            present = entries
            if self.weighted:
                present = torch.where((sample_mass != 0).unsqueeze(-1), entries, self.low)
            torch.maximum(largest[problem], present.amax(dim=0), out=largest[problem])
        absent = self.sample_mass == 0
        self.code_mass.masked_fill_(~self.usable, torch.nan).masked_fill_(~self.usable & absent, 0)
        self.sample_mass.masked_fill_(~self.usable, 0)
        return largest

    def start(self, log_u: Tensor) -> Tensor:
        """Compute P and v for u = 1."""
        mass = self._of_prototypes(0)
        for problem, _, entries, sample_mass, _, _ in self.blocks:
            torch.add(log_u[problem], entries, alpha=1 / self.epsilon, out=entries)
            exponent = entries.amax(dim=-1)  # (b,), a; above 0 for absent samples alone
            entries.sub_(exponent.unsqueeze(-1)).exp_()
            v = exponent.clamp(max=0).exp()
            mass[problem] += torch.mv(entries.mT, sample_mass * v)
        return mass

    def iterate(self, u: Tensor) -> Tensor:
        """Compute v for the next u."""
        mass = self._of_prototypes(0)
        for problem, _, entries, sample_mass, _, _ in self.blocks:
            v = 1 / torch.mv(entries, u[problem])
            mass[problem] += torch.mv(entries.mT, sample_mass * v)
        return mass

    def restart(self, log_u: Tensor) -> Tensor:
        """Compute P anew with u inside, log_u (N, K), and with v, so that rows sum to 1."""
        mass = self._of_prototypes(0)
        for problem, scores, entries, sample_mass, usable, _ in self.blocks:
            torch.where(usable.unsqueeze(-1), scores.to(entries.dtype), self.low, out=entries)
            torch.add(log_u[problem], entries, alpha=1 / self.epsilon, out=entries)
            entries.copy_(entries.softmax(dim=-1))
            mass[problem] += torch.mv(entries.mT, sample_mass)
        return mass

    def codes(self, u: Tensor) -> Tensor:
        """Return diag(v) P diag(u) for the v of the last u. The plan is used up."""
        for problem, _, entries, _, _, code_mass in self.blocks:
            v = code_mass / torch.mv(entries, u[problem])
            entries.mul_(u[problem]).mul_(v.unsqueeze(-1))
        return self.entries

    def _of_prototypes(self, value: float | Tensor) -> Tensor:
        number, _, prototypes = self.entries.shape
        return self.low.new_zeros(number, prototypes) + value
