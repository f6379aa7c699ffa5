"""Statistics of codes and predictions, which show a training that collapses or does not start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, traceable

__all__ = ["SwAVStatistics", "cluster_statistics"]


class SwAVStatistics(NamedTuple):
    """Sums over the samples of one step and one rank, without gradient.

    All are floating-point tensors, float32 or float64 for float64 scores, so that the statistics of
    several steps or ranks add up. A sample of weight w counts w times. A row of scores with a NaN,
    with +inf, or with -inf only counts nowhere, and neither does a row of codes that is not finite.

    Attributes:
        samples: Scalar, the sum of the weights of the samples.
        code_usage: (K,) sum of the codes.
        assigned: (K,) number of rows of scores of the code views whose largest entry is there; the
            first of several equal ones.
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
    views = _checks.views("scores", scores, "prototypes", least=2)
    code_views = _checks.views("codes", codes, "prototypes", least=1)
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (views[0].shape[:1],), views[0])
    with torch.no_grad(), autocast_disabled(views[0].device):
        dtype = at_least_float32(views[0].dtype)
        weight = torch.ones(len(views[0]), dtype=dtype, device=views[0].device)
        if sample_weight is not None:
            weight = sample_weight.to(dtype)
        present = weight != 0
        zero = weight.new_zeros(())
        prediction_entropy, prediction_rows, agreeing, pairs = zero, zero, zero, zero
        code_entropy, code_rows = zero, zero
        prototypes = views[0].shape[-1]
        assigned, code_usage = weight.new_zeros(prototypes), weight.new_zeros(prototypes)
        nearest, counted = [], []
        for view in views:
            logits = view.to(dtype) / traceable(temperature, weight.device)
            log_sum = logits.logsumexp(dim=-1)
            valid = present & log_sum.isfinite()
            rows = torch.where(valid, weight, 0)
            predictions = torch.softmax(logits, dim=-1)
            entropy = log_sum - (predictions * logits).nansum(dim=-1)
            prediction_entropy = prediction_entropy + (rows * entropy.where(valid, 0)).sum()
            prediction_rows = prediction_rows + rows.sum()
            nearest.append(logits.argmax(dim=-1))
            counted.append(valid)
        for index, code in enumerate(code_views):
            code = code.to(dtype)
            valid = present & code.isfinite().all(dim=-1)
            rows = torch.where(valid, weight, 0)
            code = code.masked_fill(~valid.unsqueeze(-1), 0)
            code_usage = code_usage + rows @ code
            code_entropy = code_entropy + (rows * torch.special.entr(code).sum(dim=-1)).sum()
            code_rows = code_rows + rows.sum()
            assigned = assigned.index_add(0, nearest[index], torch.where(counted[index], weight, 0))
            for other in range(len(views)):
                if other != index:
                    both = torch.where(counted[index] & counted[other], weight, 0)
                    pairs = pairs + both.sum()
                    agreeing = agreeing + (both * (nearest[index] == nearest[other])).sum()
    return SwAVStatistics(
        weight.sum(),
        code_usage,
        assigned,
        code_entropy,
        prediction_entropy,
        code_rows,
        prediction_rows,
        agreeing,
        pairs,
    )
