"""Statistics of codes and predictions, which show a training that collapses or does not start."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from swavkit import _checks
from swavkit._tensors import at_least_float32, autocast_disabled, on_cpu, traceable
from swavkit.swapped_prediction import Views, check_pairing, errors_of_samples

__all__ = ["SwAVStatistics", "cluster_statistics"]

_SCORES_OF_A_BLOCK = 2**23

# A CPU finds the largest entry of a row 9 times as fast by the largest one of each chunk.
_ENTRIES_OF_A_CHUNK = 64


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
    samples, prototypes = score_views[0].shape
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (score_views[0].shape[:1],), score_views[0])
    size = max(_SCORES_OF_A_BLOCK // (len(score_views) * prototypes), 1)
    sums = []
    with torch.no_grad(), autocast_disabled(score_views[0].device):
        inverse_temperature = 1 / traceable(temperature, score_views[0].device)
        for start in range(0, max(samples, 1), size):
            rows = slice(start, start + size)
            block: Views = [view[rows] for view in score_views]
            if isinstance(scores, Tensor):
                block = scores[:, rows]  # whose views are computed together
            block_codes = [code[rows] for code in code_views]
            weight = None if sample_weight is None else sample_weight[rows]
            nearest, entropies = observed_rows(block)
            errors_of_samples(block, block_codes, inverse_temperature, weight, None, entropies)
            sums.append(block_statistics(nearest, entropies, block_codes, weight))
    return summed(sums)


def observed_rows(scores: Views) -> tuple[Tensor, Tensor]:
    """Return the nearest prototypes of the rows of scores, and memory for their entropies.

    Args:
        scores: (V, b, K), or V tensors (b, K).

    Returns:
        (V, b) int64, and an uninitialized (V, b) tensor for ``errors_of_samples``.
    """
    if isinstance(scores, Tensor):
        nearest = _nearest(scores)
    else:
        nearest = torch.stack([_nearest(view) for view in scores])
    return nearest, torch.empty_like(nearest, dtype=at_least_float32(scores[0].dtype))


def block_statistics(
    nearest: Tensor,
    entropies: Tensor,
    codes: Sequence[Tensor],
    sample_weight: Tensor | None,
) -> SwAVStatistics:
    """Return the statistics of some samples.

    Args:
        nearest: (V, b) int64, the index of the largest entry of each row of scores.
        entropies: (V, b) of the predictions; not finite if the row of scores is not valid.
        codes: A tensors (b, K).
        sample_weight: (b,), or ``None``.
    """
    dtype = entropies.dtype
    code_entropies = torch.stack([row_entropies(code.to(dtype)) for code in codes])
    weight = _weights(sample_weight, entropies)
    usage = [
        # 0 · NaN is 0 here.
        (code * rows.unsqueeze(-1)).nansum(dim=0, dtype=dtype)
        for code, rows in zip(codes, valid_weights(code_entropies, weight), strict=True)
    ]
    return statistics_of_rows(nearest, entropies, code_entropies, reduce(torch.add, usage), weight)


def statistics_of_rows(
    nearest: Tensor,
    entropies: Tensor,
    code_entropies: Tensor,
    code_usage: Tensor,
    weight: Tensor,
) -> SwAVStatistics:
    """Return the statistics given those of each row, with (b,) ``weight``."""
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


def summed(statistics: Sequence[SwAVStatistics]) -> SwAVStatistics:
    """Return the statistics of all samples, given those of several blocks of them."""
    return SwAVStatistics(*(reduce(torch.add, values) for values in zip(*statistics, strict=True)))


def _weights(sample_weight: Tensor | None, like: Tensor) -> Tensor:
    if sample_weight is None:
        return like.new_ones(like.shape[-1])
    return sample_weight.to(like.dtype)


def valid_weights(entropies: Tensor, weight: Tensor) -> Tensor:
    """Return the weights of rows, (..., b), with zeros where an entropy is not finite."""
    return torch.where(entropies.isfinite(), weight, 0)


def row_entropies(codes: Tensor) -> Tensor:
    """Return the entropy of each row of codes, (b,), in nats; not finite if the row is not."""
    tiny = torch.finfo(codes.dtype).tiny  # its logarithm is finite, so 0 · ln 0 is 0
    return -codes.clamp_min(tiny).log_().mul_(codes).sum(dim=-1)


def _nearest(scores: Tensor) -> Tensor:
    """Return the index of the largest entry of each row, (...,) int64, the first if several are."""
    prototypes = scores.shape[-1]
    if not on_cpu(scores) or prototypes < 4 * _ENTRIES_OF_A_CHUNK:
        return scores.argmax(dim=-1)
    whole = prototypes // _ENTRIES_OF_A_CHUNK
    divided = scores[..., : whole * _ENTRIES_OF_A_CHUNK]
    chunks = divided.view(*scores.shape[:-1], whole, _ENTRIES_OF_A_CHUNK).amax(dim=-1)
    rest = scores[..., whole * _ENTRIES_OF_A_CHUNK :]
    if rest.shape[-1]:
        chunks = torch.cat([chunks, rest.amax(dim=-1, keepdim=True)], dim=-1)
    first = chunks.argmax(dim=-1, keepdim=True) * _ENTRIES_OF_A_CHUNK
    indices = first + torch.arange(_ENTRIES_OF_A_CHUNK, device=scores.device)
    in_chunk = scores.gather(-1, indices.clamp_(max=prototypes - 1)).argmax(dim=-1)
    return first.squeeze(-1) + in_chunk
