"""Statistics of codes and predictions, which show training that collapses or does not start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._prediction_errors import ObservedRows, valid_weights
from swavkit._tensors import at_least_float32, autocast_disabled, traceable
from swavkit.swapped_prediction import Views, check_pairing, errors_of_samples

__all__ = ["SwAVStatistics", "cluster_statistics"]


class SwAVStatistics(NamedTuple):
    """Sums over the samples of one step and one rank, without gradient.

    All are floating-point tensors, float32 or float64 for float64 scores, so that the statistics of
    several steps or ranks add up. A sample of weight w counts w times. A row of scores
    with a NaN, with +inf, or with nothing but -inf is not counted, nor is a row of codes that is
    not finite.

    Attributes:
        samples: Scalar, the sum of the weights of the samples.
        code_usage: (K,) sum of the codes.
        assigned: (K,) number of rows of scores of the code views whose largest entry is at each
            prototype; the first of several equal entries.
        code_entropy: Scalar, sum over rows of the entropy of the codes, in nats.
        prediction_entropy: Scalar, that of the predictions softmax(S/τ) of all views.
        code_rows: Scalar, the number of rows of ``code_entropy``.
        prediction_rows: Scalar, that of ``prediction_entropy``.
        agreeing: Scalar, the number of pairs of a code view i and a view v ≠ i of a sample whose
            scores have their largest entry at the same prototype.
        pairs: Scalar, the number of all such pairs.
    """

    samples: Tensor
    code_usage: Tensor
    assigned: Tensor
    code_entropy: Tensor
    prediction_entropy: Tensor
    code_rows: Tensor
    prediction_rows: Tensor
    agreeing: Tensor
    pairs: Tensor


def cluster_statistics(
    scores: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.1,
    sample_weight: Tensor | None = None,
) -> SwAVStatistics:
    """Return the statistics of a step, for a training loop that calls the parts.

    :class:`SwAVLoss` returns the same with ``return_statistics=True``.

    Args:
        scores: (V, B, K) scores of V >= 2 views, or a sequence of V tensors (B, K), the code views
            first.
        codes: (A, B, K) codes of the first A views, or a sequence of them.
        temperature: The softmax temperature τ > 0 of the predictions.
        sample_weight: (B,) weights of the samples, bool or floating. A sample of weight 0 takes no
            part, whatever its scores and codes are.

    Returns:
        The :class:`SwAVStatistics`. No value is read on the host.

    Raises:
        TypeError: If ``scores`` or ``codes`` are not floating tensors, or ``sample_weight`` is
            neither bool nor floating.
        ValueError: If the temperature is out of range or a shape or device does not fit.

    Example:
        >>> scores = torch.eye(3).expand(2, 3, 3)  # two views that agree
        >>> statistics = cluster_statistics(scores, codes=scores)
        >>> statistics.assigned, statistics.agreeing / statistics.pairs
        (tensor([2., 2., 2.]), tensor(1.))
    """
    temperature = _checks.positive_setting("temperature", temperature)
    score_views = _checks.views("scores", scores, "prototypes", least=2)
    code_views = _checks.views("codes", codes, "prototypes", least=1)
    check_pairing(score_views, code_views)
    _checks.known_setting("temperature", temperature, score_views[0].device)
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (score_views[0].shape[:1],), score_views[0])
    with torch.no_grad(), autocast_disabled(score_views[0].device):
        inverse_temperature = 1 / traceable(temperature, score_views[0].device)
        observed = rows_to_observe(scores, code_views, sample_weight)
        errors_of_samples(scores, code_views, inverse_temperature, sample_weight, None, observed)
        return block_statistics(observed)


def rows_to_observe(
    scores: Views, codes: Sequence[Tensor], sample_weight: Tensor | None
) -> ObservedRows:
    """Return memory for the rows of V scores and A codes of some samples, (b, K) each."""
    samples, prototypes = scores[0].shape
    dtype, device = at_least_float32(scores[0].dtype), scores[0].device
    if sample_weight is None:
        weight = torch.ones(samples, dtype=dtype, device=device)
    else:
        weight = sample_weight.detach().to(dtype)
    return ObservedRows(
        nearest=torch.empty(len(scores), samples, dtype=torch.int64, device=device),
        entropies=weight.new_empty(len(scores), samples),
        code_entropies=weight.new_empty(len(codes), samples),
        code_usage=weight.new_zeros(prototypes),
        weight=weight,
    )


def block_statistics(observed: ObservedRows) -> SwAVStatistics:
    """Return the statistics of some samples, given their rows."""
    nearest, entropies, code_entropies, code_usage, weight = observed
    code_views = len(code_entropies)
    rows = valid_weights(entropies, weight)  # (V, b)
    code_rows = valid_weights(code_entropies, weight)  # (A, b)
    # Each pair i < v of two code views counts twice.
    pairs, agreeing = weight.new_zeros(()), weight.new_zeros(())
    for view in range(code_views):
        first = view + 1
        both = torch.where(rows[view] == 0, 0, rows[first:])  # (V - 1 - i, b)
        times = torch.ones_like(both[:, :1])
        times[: code_views - first] = 2
        both = both * times
        pairs = pairs + both.sum()
        agreeing = agreeing + (both * (nearest[first:] == nearest[view])).sum()
    return SwAVStatistics(
        samples=weight.sum(),
        code_usage=code_usage,
        assigned=torch.zeros_like(code_usage).index_add_(
            0, nearest[:code_views].flatten(), rows[:code_views].flatten()
        ),
        code_entropy=(code_rows * code_entropies).nansum(),
        prediction_entropy=(rows * entropies).nansum(),
        code_rows=code_rows.sum(),
        prediction_rows=rows.sum(),
        agreeing=agreeing,
        pairs=pairs,
    )


def no_statistics(scores: Tensor) -> SwAVStatistics:
    """Return the statistics of no samples for scores (..., K)."""
    sums = scores.new_zeros(scores.shape[-1], dtype=at_least_float32(scores.dtype))
    names, of_prototypes = SwAVStatistics._fields, ("code_usage", "assigned")
    return SwAVStatistics(*(sums if name in of_prototypes else sums.sum() for name in names))


def added(statistics: SwAVStatistics, others: SwAVStatistics) -> SwAVStatistics:
    """Return the statistics of the samples of both."""
    return SwAVStatistics(*map(torch.add, statistics, others))
