"""The published equations in float64 NumPy, in plain loops to check against the paper.

Nothing else of the package is used. Sums of exponentials are taken by their logarithm, so that
nothing overflows; there is no other cleverness.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

__all__ = [
    "log_sum_exp",
    "marginal_error",
    "sinkhorn_codes",
    "swapped_loss",
    "swapped_loss_gradient",
    "unit_rows",
]

Array = np.ndarray[Any, np.dtype[Any]]


def log_sum_exp(values: Array) -> float:
    """Return log Σ exp(values) of a vector; -inf for an empty one."""
    largest = values.max(initial=-np.inf)
    if largest == -np.inf:
        return -np.inf
    return float(largest + np.log(np.sum(np.exp(values - largest))))


def unit_rows(rows: Array) -> Array:
    """Return (N, D) rows of length 1; a zero row stays zero."""
    result = np.zeros_like(rows, dtype=np.float64)
    for index, row in enumerate(np.asarray(rows, np.float64)):
        length = math.sqrt(math.fsum(row * row))
        result[index] = row / length if length else row
    return result


def sinkhorn_codes(
    scores: Array,
    epsilon: float,
    iterations: int,
    sample_weight: Array | None = None,
    prototype_weight: Array | None = None,
) -> Array:
    """Return the codes of (B, K) scores, as published.

    In each iteration every prototype's column is scaled to its mass, then every sample's row to a
    sum of 1. A sample of weight 0 is in no column sum.

    Args:
        scores: (B, K).
        epsilon: ε > 0.
        iterations: At least 1.
        sample_weight: (B,) multiplicities of the samples; 1 by default.
        prototype_weight: (K,) relative masses of the prototypes; equal by default.

    Returns:
        (B, K) codes in float64.

    Example:
        >>> sinkhorn_codes(np.array([[0.9, 0.1], [0.8, 0.1]]), epsilon=0.1, iterations=3).round(2)
        array([[0.62, 0.38],
               [0.38, 0.62]])
    """
    samples, prototypes = scores.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    mass = np.ones(prototypes) if prototype_weight is None else np.asarray(prototype_weight, float)
    mass = mass / mass.sum()
    present = weight > 0
    log_plan = np.asarray(scores, np.float64) / epsilon
    with np.errstate(divide="ignore"):
        log_weight, log_mass = np.log(weight), np.log(mass)
    for _ in range(iterations):
        for j in range(prototypes):
            if mass[j] == 0:
                log_plan[:, j] = -np.inf
                continue
            column = log_weight[present] + log_plan[present, j]
            log_plan[:, j] += log_mass[j] - log_sum_exp(column)
        for i in range(samples):
            log_plan[i] -= log_sum_exp(log_plan[i])
    return np.exp(log_plan)


def marginal_error(
    codes: Array, sample_weight: Array | None = None, prototype_weight: Array | None = None
) -> float:
    """Return how far the most or least used prototype is from its mass, relatively."""
    samples, prototypes = codes.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    mass = np.ones(prototypes) if prototype_weight is None else np.asarray(prototype_weight, float)
    present = weight > 0
    errors = []
    for j in range(prototypes):
        used = np.sum(weight[present] * codes[present, j])
        wanted = mass[j] / mass.sum() * weight.sum()
        if wanted == 0:
            errors.append(0.0 if used == 0 else np.inf)
        else:
            errors.append(abs(used / wanted - 1))
    return float(np.max(errors))


def swapped_loss(
    scores: Array, codes: Array, temperature: float, sample_weight: Array | None = None
) -> float:
    """Return the mean cross-entropy over code views, other views and (weighted) samples.

    Args:
        scores: (V, B, K).
        codes: (A, B, K). Code i belongs to view i.
        temperature: τ > 0.
        sample_weight: (B,) weights; 1 by default.

    Returns:
        The loss; 0 if all weights are 0.

    Example:
        >>> codes = np.array([[[1.0, 0.0]]])
        >>> swapped_loss(np.zeros((2, 1, 2)), codes, temperature=0.1)  # ln 2
        0.6931471805599453
    """
    views, samples, _ = scores.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    if weight.sum() == 0:
        return 0.0
    total = 0.0
    for own in range(len(codes)):
        for view in range(views):
            if view == own:
                continue
            for sample in np.flatnonzero(weight):
                logits = scores[view, sample] / temperature
                log_prediction = logits - log_sum_exp(logits)
                code = codes[own, sample]
                used = code != 0  # 0 · log 0 is 0
                total -= weight[sample] * float(np.sum(code[used] * log_prediction[used]))
    return float(total / (weight.sum() * len(codes) * (views - 1)))


def swapped_loss_gradient(scores: Array, codes: Array, temperature: float) -> Array:
    """Return the gradient (V, B, K) of the unweighted :func:`swapped_loss` for the scores."""
    views, samples, _ = scores.shape
    gradient: Array = np.zeros(scores.shape)
    for own in range(len(codes)):
        for view in range(views):
            if view == own:
                continue
            for sample in range(samples):
                logits = scores[view, sample] / temperature
                prediction = np.exp(logits - log_sum_exp(logits))
                code = codes[own, sample]
                gradient[view, sample] += code.sum() * prediction - code
    gradient /= temperature * samples * len(codes) * (views - 1)
    return gradient
