"""Sinkhorn-Knopp: scores become codes that use all prototypes equally.

The codes solve an entropic optimal-transport problem (Cuturi 2013; Caron et al. 2020, §3.1): among
all plans Q with the prescribed mass on every sample and on every prototype, take the one that
maximises Tr(QᵀS) + ε H(Q). Its form is known, Q = diag(v) P diag(u) with P = exp(S/ε), so only the
two vectors u (K) and v (B) are iterated::

    for _ in range(iterations):
        u = c / (Pᵀ (r * v))    # every prototype j gets its mass c_j ...
        v = 1 / (P u)           # ... and every sample's code sums to 1

r are the masses of the samples and c those of the prototypes, each in proportion to its sum.

Differences from the published procedure, none of which changes the codes in exact arithmetic: the
first iteration is made in the log domain, which no finite score over- or underflows; P is read and
never rewritten; the arithmetic is in float32 or better whatever the dtype of the scores; samples
may be spread unevenly over processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._distributed import GroupHandle, logsumexp_over_ranks, participants, sum_over_ranks
from swavkit._precision import at_least_float32, autocast_disabled

if TYPE_CHECKING:
    from swavkit._distributed import ProcessGroup

__all__ = ["SinkhornKnopp", "sinkhorn_knopp"]

# The entries of u and v can grow by up to B·K in each iteration. After the first one in the log
# domain, this many in all stay inside float32's range at any B·K that fits in memory.
_MAX_ITERATIONS_BY_SCALING = 5


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
        that no accelerator has to wait: a NaN or an infinite score of a sample that takes part
        gives NaN codes. S/ε is rounded in float32 (float64 for float64 scores), which limits the
        accuracy of an entry to about 6e-8 · max|S| / ε.

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
        logits = scores.to(dtype) / epsilon  # (..., B, K), log P
        sample_mass = logits.new_ones(())
        if sample_weight is not None:
            sample_mass = sample_weight.to(dtype)
            unusable = (sample_mass == 0) & ~logits.isfinite().all(dim=-1)  # (..., B)
            logits = logits.masked_fill(unusable.unsqueeze(-1), 0)
        sample_mass = sample_mass.expand(logits.shape[:-1])  # (..., B), r
        prototype_mass = logits.new_ones(logits.shape[-1])
        if prototype_weight is not None:
            prototype_mass = prototype_weight.to(dtype)
        prototype_mass = prototype_mass / prototype_mass.sum()  # (K,), c

        by_scaling = iterations <= _MAX_ITERATIONS_BY_SCALING
        iterate = _iterate_by_scaling if by_scaling else _iterate_in_log_domain
        codes = iterate(logits, sample_mass, prototype_mass, iterations, group)
        if sample_weight is not None:
            codes = codes.masked_fill(unusable.unsqueeze(-1), 0)
        return codes.to(scores.dtype)


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


def _iterate_by_scaling(
    logits: Tensor,
    sample_mass: Tensor,
    prototype_mass: Tensor,
    iterations: int,
    group: ProcessGroup | None,
) -> Tensor:
    """Make the first iteration in the log domain and the others by scaling vectors.

    The plan of the first iteration has rows that sum to 1, and columns of mass at least
    c_j · min r, so everything after it is finite. Overwrites ``logits``.
    """
    log_u = prototype_mass.log() - _log_prototype_mass(logits, sample_mass, group)  # (..., K)
    plan = torch.softmax(logits.add_(log_u.unsqueeze(-2)), dim=-1)  # (..., B, K)
    u = torch.ones_like(log_u)
    v = torch.ones_like(sample_mass)  # (..., B)
    for _ in range(iterations - 1):
        mass = sum_over_ranks(_matrix_vector(plan.mT, sample_mass * v), group)  # (..., K)
        # Divided by the total, which v carries from one iteration to the next: else u would drift
        # by (Σr)ⁿ. There is no mass where c_j = 0, and nowhere if nobody is present.
        u = torch.where(mass == 0, 1, prototype_mass * mass.sum(dim=-1, keepdim=True) / mass)
        v = 1 / _matrix_vector(plan, u)
    return plan.mul_(u.unsqueeze(-2)).mul_(v.unsqueeze(-1))


def _iterate_in_log_domain(
    logits: Tensor,
    sample_mass: Tensor,
    prototype_mass: Tensor,
    iterations: int,
    group: ProcessGroup | None,
) -> Tensor:
    """Make every iteration in the log domain, whose range no number of iterations exhausts."""
    log_c = prototype_mass.log()
    log_u = log_c - _log_prototype_mass(logits, sample_mass, group)  # (..., K)
    for _ in range(iterations - 1):
        log_v = -torch.logsumexp(logits + log_u.unsqueeze(-2), dim=-1)  # (..., B)
        log_mass = _log_prototype_mass(logits + log_v.unsqueeze(-1), sample_mass, group)
        log_total = torch.logsumexp(log_u + log_mass, dim=-1, keepdim=True)  # log Σr: no drift
        log_u = log_c - log_mass + log_total
    return torch.softmax(logits + log_u.unsqueeze(-2), dim=-1)


def _log_prototype_mass(logits: Tensor, sample_mass: Tensor, group: ProcessGroup | None) -> Tensor:
    """Return log Σ_i r_i exp(logits_ij) over the samples of all processes, (..., K)."""
    weighted = logits + sample_mass.log().unsqueeze(-1)
    log_mass = logsumexp_over_ranks(torch.logsumexp(weighted, dim=-2), group)
    # Nobody present: there is nothing to equalise, and -inf would turn into NaN.
    return log_mass.masked_fill(log_mass == -torch.inf, 0)


def _matrix_vector(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Multiply (..., N, M) with (..., M), always in the full precision of the dtype.

    A batched product would follow the reduced-precision modes (TF32, bfloat16) that a user may have
    switched on for the network; a plain matrix-vector product does not.
    """
    if matrices.dim() == 2:
        return torch.mv(matrices, vectors)
    products = [
        _matrix_vector(matrix, vector)
        for matrix, vector in zip(matrices.unbind(0), vectors.unbind(0), strict=True)
    ]
    return torch.stack(products) if products else matrices.new_zeros(matrices.shape[:-1])
