"""The figures of ``ClusterMonitor``, from sums over steps and ranks in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swavkit.prototypes import unit_rows

_DUPLICATE = 0.99  # the cosine above which two prototypes are duplicates
_BLOCK = 2**22  # cosines held at once


def cluster_figures(
    assigned: Tensor, code_usage: Tensor, totals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the figures of codes, predictions and losses.

    Args:
        assigned: (K,).
        code_usage: (K,).
        totals: The other sums of :class:`SwAVStatistics`; ``loss``, times samples, and
            ``loss_samples``; ``losses``, the number of losses given; and ``nonfinite``, the figure.
    """
    prototypes = len(assigned)
    code_entropy = totals["code_entropy"] / totals["code_rows"]
    mean_code = code_usage / totals["code_rows"]
    figures = {
        "perplexity": _perplexity(assigned),
        "used": (assigned > 0).double().mean().where(assigned.sum() > 0, math.nan),
        "code_perplexity": _perplexity(code_usage),
        "code_entropy": code_entropy,
        "prediction_entropy": totals["prediction_entropy"] / totals["prediction_rows"],
        "marginal_error": (prototypes * mean_code - 1).abs().max(),
        "agreement": totals["agreeing"] / totals["pairs"],
        "nonfinite": totals["nonfinite"],
    }
    if totals["losses"] > 0:
        loss = totals["loss"] / totals["loss_samples"]
        figures["loss"] = loss
        figures["below_ln_k"] = math.log(prototypes) - loss
        figures["above_code_entropy"] = loss - code_entropy
    return figures


def moments(features: Tensor) -> list[Tensor]:
    """Return the Gram matrix (D, D), the sum (D,) and the number of the unit rows of (N, D).

    Rows that are not finite are left out. Moments of several ranks add up.
    """
    finite = features.isfinite().all(dim=-1)
    unit = unit_rows(features.double().masked_fill(~finite.unsqueeze(-1), 0))
    return [unit.T @ unit, unit.sum(dim=0), finite.sum().double()]


def feature_figures(gram: Tensor, total: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Return the figures of features from their summed :func:`moments`."""
    eigenvalues = torch.linalg.eigvalsh(gram)
    # Eigenvalues are exact to a multiple of the largest one, of which nothing below it counts.
    rounding = torch.finfo(gram.dtype).eps * len(total) * eigenvalues[-1]
    singular = torch.where(eigenvalues > rounding, eigenvalues, 0).sqrt()
    empty = torch.where(count > 0, 0.0, math.nan)
    return {
        "feature_std": _spread(gram, total, count),
        "effective_rank": _perplexity(singular).where(singular.sum() > 0, empty),
    }


def queue_figures(
    features: Sequence[Tensor], queued: Sequence[Tensor], feature_std: Tensor
) -> dict[str, Tensor]:
    """Return the figures of a queue for the diagnosis, from summed :func:`moments`.

    ``"queue_std"`` is the standard deviation of the queued features, and ``"queue_drift"`` the
    distance of their mean from that of the current features, both over ``feature_std``.
    """
    (_, total, count), (_, queue_total, queue_count) = features, queued
    drift = torch.linalg.vector_norm(queue_total / queue_count - total / count)
    return {
        "queued": queue_count,
        "queue_std": _spread(*queued) / feature_std,
        "queue_drift": drift / feature_std,
    }


def num_duplicates(prototypes: Tensor) -> Tensor:
    """Return how many rows of (K, D) have another one at a cosine above 0.99."""
    directions = unit_rows(prototypes)
    rows = max(1, _BLOCK // len(directions))
    found = torch.zeros((), dtype=torch.int64, device=directions.device)
    for first in range(0, len(directions), rows):
        cosines = directions[first : first + rows] @ directions.T
        cosines.diagonal(first).fill_(-1)  # of each with itself
        found += (cosines > _DUPLICATE).any(dim=1).sum()
    return found


def _spread(gram: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """Return the mean standard deviation of the dimensions, times √D, from :func:`moments`."""
    variance = (gram.diagonal() / count - (total / count).square()).clamp_min(0)
    return math.sqrt(len(total)) * variance.sqrt().mean()


def _perplexity(counts: Tensor) -> Tensor:
    """Return exp of the entropy of normalized counts; NaN if there are none."""
    entropy: Tensor = torch.special.entr(counts / counts.sum()).sum()
    return entropy.exp()
