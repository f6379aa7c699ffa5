"""Every equation in float64 NumPy, as plain loops, from the paper and not from the package.

Those for users' own tests stand in ``swavkit.testing.oracle``, which imports nothing else of the
package, nor does this file. Where the equations would overflow, sums of exponentials are taken by
their logarithm; there is no other cleverness.
"""

from __future__ import annotations

import math

import numpy as np

from swavkit.testing.oracle import (  # noqa: F401
    log_sum_exp,
    marginal_error,
    unit_rows,
)
from swavkit.testing.oracle import sinkhorn_codes as sinkhorn
from swavkit.testing.oracle import swapped_loss as loss
from swavkit.testing.oracle import swapped_loss_gradient as loss_gradient  # noqa: F401


def relaxed_sinkhorn(
    scores: np.ndarray,
    epsilon: float,
    iterations: int,
    relaxation: float,
    sample_weight: np.ndarray | None = None,
    prototype_weight: np.ndarray | None = None,
) -> np.ndarray:
    """Return the codes of (B, K) scores with relaxed masses of the prototypes.

    In each iteration every prototype gets a potential f, which is only the part φ = ρ/(ρ+ε) of what
    would bring its column to its mass; then every sample gets one, g, for its row to sum to 1. A
    sample of weight 0 is in no column sum. Some sample must be present.
    """
    samples, prototypes = scores.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    mass = np.ones(prototypes) if prototype_weight is None else np.asarray(prototype_weight, float)
    weight, mass = weight / weight.sum(), mass / mass.sum()
    part = 1 / (1 + epsilon / relaxation)
    exponents = np.asarray(scores, np.float64) / epsilon
    f, g = np.zeros(prototypes), np.zeros(samples)
    present = weight > 0
    for _ in range(iterations):
        for j in range(prototypes):
            if mass[j] == 0:
                f[j] = -np.inf
                continue
            column = exponents[present, j] + g[present] + np.log(weight[present])
            f[j] = part * (np.log(mass[j]) - log_sum_exp(column))
        for i in range(samples):
            g[i] = -log_sum_exp(exponents[i] + f)
    return np.exp(exponents + f + g[:, None])


def code_prediction_errors(
    scores: np.ndarray,
    codes: np.ndarray,
    temperature: float,
    sample_weight: np.ndarray | None = None,
) -> np.ndarray:
    """Return the weighted cross-entropies (...) of (..., K) scores with the codes at their places.

    Codes are (..., K), or (...) integers, the index of the one entry of 1.
    """
    errors = np.zeros(scores.shape[:-1])
    for place in np.ndindex(errors.shape):
        weight = 1.0 if sample_weight is None else float(sample_weight[place])
        if weight == 0:
            continue
        logits = scores[place] / temperature
        log_prediction = logits - log_sum_exp(logits)
        if np.issubdtype(codes.dtype, np.integer):
            errors[place] = -weight * log_prediction[codes[place]]
        else:
            used = codes[place] > 0  # 0 · log 0 is 0
            errors[place] = -weight * np.sum(codes[place][used] * log_prediction[used])
    return errors


def code_prediction_loss(
    scores: np.ndarray,
    codes: np.ndarray,
    temperature: float,
    sample_weight: np.ndarray | None = None,
    reduction: str = "mean",
) -> np.ndarray:
    """Return the cross-entropies, their sum, or their mean over the weights."""
    errors = code_prediction_errors(scores, codes, temperature, sample_weight)
    if reduction == "none":
        return errors
    total = np.sum(errors)
    if reduction == "sum":
        return total
    weight = float(errors.size) if sample_weight is None else float(np.sum(sample_weight))
    return total / weight if weight else np.zeros(())


def code_prediction_gradient(
    scores: np.ndarray,
    codes: np.ndarray,
    temperature: float,
    sample_weight: np.ndarray | None = None,
    reduction: str = "mean",
) -> np.ndarray:
    """Return the gradient (..., K) of the loss, or of the sum of the losses without reduction."""
    gradient = np.zeros(scores.shape)
    places = scores.shape[:-1]
    weights = np.ones(places) if sample_weight is None else np.asarray(sample_weight, float)
    for place in np.ndindex(places):
        if weights[place] == 0:
            continue
        if np.issubdtype(codes.dtype, np.integer):
            code = np.zeros(scores.shape[-1])
            code[codes[place]] = 1
        else:
            code = codes[place]
        logits = scores[place] / temperature
        prediction = np.exp(logits - log_sum_exp(logits))
        gradient[place] = weights[place] * (code.sum() * prediction - code) / temperature
    if reduction == "mean" and weights.sum() > 0:
        gradient /= weights.sum()
    return gradient


def perplexity(counts: np.ndarray) -> float:
    """Return exp of the entropy of counts divided by their sum."""
    total = sum(float(count) for count in counts)
    entropy = 0.0
    for count in counts:
        if count > 0:
            entropy -= count / total * math.log(count / total)
    return math.exp(entropy)


def cluster_figures(
    steps: list[dict[str, np.ndarray]], losses: list[float] | None = None
) -> dict[str, float]:
    """Return the figures of the statistics of some steps and ranks, one entry for each of both.

    A loss is the mean over the samples of its entry. One that is not finite counts nowhere.
    """
    prototypes = len(steps[0]["assigned"])
    sums = {name: np.zeros(np.shape(value)) for name, value in steps[0].items()}
    for step in steps:
        for name, value in step.items():
            sums[name] = sums[name] + np.asarray(value, np.float64)
    used, largest = 0, 0.0
    for index in range(prototypes):
        used += sums["assigned"][index] > 0
        mean_code = sums["code_usage"][index] / sums["code_rows"]
        largest = max(largest, abs(mean_code - 1 / prototypes) / (1 / prototypes))
    figures = {
        "perplexity": perplexity(sums["assigned"]),
        "used": used / prototypes,
        "code_perplexity": perplexity(sums["code_usage"]),
        "code_entropy": float(sums["code_entropy"] / sums["code_rows"]),
        "prediction_entropy": float(sums["prediction_entropy"] / sums["prediction_rows"]),
        "marginal_error": float(largest),
        "agreement": float(sums["agreeing"] / sums["pairs"]),
    }
    if losses is not None:
        total, samples = 0.0, 0.0
        for step, loss in zip(steps, losses, strict=True):
            if math.isfinite(loss):
                total += float(step["samples"]) * loss
                samples += float(step["samples"])
        figures["loss"] = total / samples
        figures["below_ln_k"] = math.log(prototypes) - figures["loss"]
        figures["above_code_entropy"] = figures["loss"] - figures["code_entropy"]
    return figures


def feature_figures(features: np.ndarray) -> dict[str, float]:
    """Return the figures of (N, D) features of which all are finite."""
    unit = unit_rows(features)
    dimensions = unit.shape[1]
    deviation = sum(float(np.std(unit[:, index])) for index in range(dimensions)) / dimensions
    return {
        "feature_std": deviation * math.sqrt(dimensions),
        "effective_rank": perplexity(np.linalg.svd(unit, compute_uv=False)),
    }


def num_duplicates(prototypes: np.ndarray) -> int:
    """Return how many of (K, D) prototypes have another one at a cosine above 0.99."""
    unit = unit_rows(prototypes)
    count = 0
    for index in range(len(unit)):
        others = [other for other in range(len(unit)) if other != index]
        count += any(float(unit[index] @ unit[other]) > 0.99 for other in others)
    return count


def cosines(features: np.ndarray, prototypes: np.ndarray) -> np.ndarray:
    """Return the cosines (N, K) of (N, D) features with (K, D) prototypes."""
    return unit_rows(features) @ unit_rows(prototypes).T


def cosine_gradients(
    features: np.ndarray, prototypes: np.ndarray, gradient: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of (N, D) features and (K, D) prototypes, given that of cosines (N, K).

    No row is zero.
    """
    unit, directions = unit_rows(features), unit_rows(prototypes)
    cosine = cosines(features, prototypes)
    of_features, of_prototypes = np.zeros(features.shape), np.zeros(prototypes.shape)
    for n, k in np.ndindex(gradient.shape):
        across = directions[k] - cosine[n, k] * unit[n]
        of_features[n] += gradient[n, k] * across / np.linalg.norm(features[n])
        across = unit[n] - cosine[n, k] * directions[k]
        of_prototypes[k] += gradient[n, k] * across / np.linalg.norm(prototypes[k])
    return of_features, of_prototypes


class Ring:
    """A queue that takes one sample at a time, each with a feature for every code view."""

    def __init__(self, length: int) -> None:
        self.slots: list[np.ndarray | None] = [None] * length
        self.position = 0
        self.rejected = 0

    def push(self, features: np.ndarray) -> None:
        """Store (A, B, D) features, the oldest giving way."""
        for sample in np.moveaxis(features, 1, 0):
            usable = bool(np.isfinite(sample).all())
            self.slots[self.position] = sample if usable else None
            self.rejected += not usable
            self.position = (self.position + 1) % len(self.slots)


def swav_loss(
    features: np.ndarray,
    prototypes: np.ndarray,
    code_views: int,
    temperature: float,
    epsilon: float,
    iterations: int,
    queue: Ring | None = None,
    queue_takes_part: bool = True,
    code_features: np.ndarray | None = None,
    code_prototypes: np.ndarray | None = None,
    prototype_weight: np.ndarray | None = None,
) -> float:
    """Return the loss of (V, B, D) features; the codes also see the queue, which is then filled.

    With a teacher, its features (A, B, D) and prototypes (K, D) give the codes and fill the queue.
    """
    code_features = features[:code_views] if code_features is None else code_features
    code_prototypes = prototypes if code_prototypes is None else code_prototypes
    seen = queue if queue_takes_part else None
    codes = swav_codes(code_features, code_prototypes, epsilon, iterations, seen, prototype_weight)
    if queue is not None:
        queue.push(np.stack([unit_rows(view) for view in code_features]))
    return loss(np.stack([cosines(view, prototypes) for view in features]), codes, temperature)


def swav_codes(
    features: np.ndarray,
    prototypes: np.ndarray,
    epsilon: float,
    iterations: int,
    queue: Ring | None = None,
    prototype_weight: np.ndarray | None = None,
) -> np.ndarray:
    """Return the codes (A, B, K) of (A, B, D) features, which also see the queue."""
    codes = []
    for view, own in enumerate(features):
        rows = [cosines(own, prototypes)]
        if queue is not None:
            recent = [slot[view] for slot in queue.slots if slot is not None]
            if recent:
                rows.append(cosines(np.stack(recent), prototypes))
        found = sinkhorn(
            np.concatenate(rows), epsilon, iterations, prototype_weight=prototype_weight
        )
        codes.append(found[: len(own)])
    return np.stack(codes)


def cluster_statistics(
    scores: np.ndarray,
    codes: np.ndarray,
    temperature: float,
    sample_weight: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return the sums that tell of a step, of scores (V, B, K) and codes (A, B, K).

    A sample counts as often as its weight says, and one of weight 0 not at all. A row of scores
    with NaN, with +inf or with -inf only counts nowhere, nor does a row of codes that is not
    finite. Of several largest entries the first is taken.
    """
    views, samples, prototypes = scores.shape
    weight = np.ones(samples) if sample_weight is None else np.asarray(sample_weight, float)
    found = {name: np.zeros(prototypes) for name in ("code_usage", "assigned")}
    found |= {
        name: np.zeros(())
        for name in (
            "samples",
            "code_entropy",
            "prediction_entropy",
            "code_rows",
            "prediction_rows",
            "agreeing",
            "pairs",
        )
    }
    for sample in range(samples):
        times = weight[sample]
        if times == 0:
            continue
        found["samples"] += times
        nearest: list[int | None] = []
        for view in range(views):
            row = scores[view, sample]
            if np.isnan(row).any() or row.max() in (np.inf, -np.inf):
                nearest.append(None)
                continue
            nearest.append(int(np.flatnonzero(row == row.max())[0]))
            logits = row / temperature
            log_prediction = logits - log_sum_exp(logits)
            for each in log_prediction[log_prediction > -np.inf]:
                found["prediction_entropy"] -= times * math.exp(each) * each
            found["prediction_rows"] += times
        for view, code in enumerate(codes[:, sample]):
            if nearest[view] is not None:
                found["assigned"][nearest[view]] += times
            for other in range(views):
                if other == view or nearest[view] is None or nearest[other] is None:
                    continue
                found["pairs"] += times
                found["agreeing"] += times * (nearest[view] == nearest[other])
            if not np.isfinite(code).all():
                continue
            found["code_usage"] += times * code
            for each in code[code > 0]:  # 0 · log 0 is 0
                found["code_entropy"] -= times * each * math.log(each)
            found["code_rows"] += times
    return found
