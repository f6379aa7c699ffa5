"""The equations of the methods in docs/examples, in float64 NumPy, as plain loops.

Nothing here imports swavkit or the examples.
"""

from __future__ import annotations

import numpy as np

from tests.oracles import log_sum_exp, sinkhorn


def cross_entropy(scores: np.ndarray, code: np.ndarray, temperature: float) -> float:
    """Return -Σ_k q_k log softmax(s/τ)_k of one sample."""
    logits = scores / temperature
    return -float(np.sum(code * (logits - log_sum_exp(logits))))


# DINOv2


def class_codes(scores: np.ndarray, epsilon: float, iterations: int = 3) -> np.ndarray:
    """Return the codes of (A, B, K) scores, whose A·B samples are one problem."""
    samples = [sample for view in scores for sample in view]
    return sinkhorn(np.stack(samples), epsilon, iterations).reshape(scores.shape)


def patch_codes(
    scores: np.ndarray, mask: np.ndarray, epsilon: float, iterations: int = 3
) -> dict[tuple[int, int], np.ndarray]:
    """Return the code of each masked token of (N, P, K) scores, under its image and place."""
    places = [(int(image), int(place)) for image, place in np.argwhere(mask)]
    codes = sinkhorn(np.stack([scores[place] for place in places]), epsilon, iterations)
    return dict(zip(places, codes, strict=True))


def dino_loss(student: np.ndarray, codes: np.ndarray, temperature: float) -> float:
    """Return the mean over pairs of crops s != t of (V, B, K) scores and (A, B, K) codes."""
    pairs = []
    for t, target in enumerate(codes):
        for s, prediction in enumerate(student):
            if s != t:
                errors = [
                    cross_entropy(scores, code, temperature)
                    for scores, code in zip(prediction, target, strict=True)
                ]
                pairs.append(np.mean(errors))
    return float(np.mean(pairs))


def patch_loss(
    student: np.ndarray, codes: dict[tuple[int, int], np.ndarray], temperature: float
) -> float:
    """Return the sum over images of their masked tokens' mean error, by the number of images."""
    images, places, _ = student.shape
    total = 0.0
    for image in range(images):
        errors = [
            cross_entropy(student[image, place], codes[image, place], temperature)
            for place in range(places)
            if (image, place) in codes
        ]
        if errors:
            total += np.mean(errors)
    return total / images


# CAPI


def codes_by_position(scores: np.ndarray, epsilon: float, iterations: int = 3) -> np.ndarray:
    """Return the codes of (B, P, K) scores, where each of P positions is a problem of B samples."""
    codes = np.zeros_like(scores)
    for place in range(scores.shape[1]):
        codes[:, place] = sinkhorn(scores[:, place], epsilon, iterations)
    return codes


def same_place_loss(
    scores: np.ndarray, codes: np.ndarray, mask: np.ndarray, temperature: float
) -> float:
    """Return the mean error over the places of (B, P) where the mask is true."""
    errors = [
        cross_entropy(scores[image, place], codes[image, place], temperature)
        for image, place in np.argwhere(mask)
    ]
    return float(np.mean(errors))


# DeepCluster-v2


def nearest(features: np.ndarray, centroids: np.ndarray) -> list[int]:
    """Return the index of the centroid of largest cosine for each unit row."""
    return [max(range(len(centroids)), key=lambda k: float(f @ centroids[k])) for f in features]


def spherical_kmeans(
    features: np.ndarray, centroids: np.ndarray, iterations: int
) -> tuple[np.ndarray, list[int]]:
    """Return the centroids and the assignment to them; an empty cluster keeps its centroid."""
    centroids = np.array(centroids, np.float64)
    for _ in range(iterations):
        assignment = nearest(features, centroids)
        for k in range(len(centroids)):
            members = [f for f, own in zip(features, assignment, strict=True) if own == k]
            if members:
                mean = np.mean(members, axis=0)
                centroids[k] = mean / np.linalg.norm(mean)
    return centroids, nearest(features, centroids)


def hard_target_loss(scores: np.ndarray, index: np.ndarray, temperature: float) -> float:
    """Return the mean over crops of (V, B, K) scores of the error for the index of their image."""
    errors = []
    for crop in scores:
        for sample, target in zip(crop, index, strict=True):
            logits = sample / temperature
            errors.append(log_sum_exp(logits) - logits[target])
    return float(np.mean(errors))


# MSN


def sharpened(scores: np.ndarray, temperature: float, sharpening: float) -> np.ndarray:
    """Return softmax(s/τ) to the power 1/T, normalized, for (B, K) scores."""
    rows = []
    for sample in scores:
        prediction = np.exp(sample / temperature - log_sum_exp(sample / temperature))
        power = prediction ** (1 / sharpening)
        rows.append(power / power.sum())
    return np.stack(rows)


def msn_targets(predictions: np.ndarray, iterations: int = 3) -> np.ndarray:
    """Return sharpened predictions (B, K) after Sinkhorn-Knopp on themselves, as a plan."""
    plan = np.array(predictions)
    for _ in range(iterations):
        for k in range(plan.shape[1]):
            plan[:, k] /= plan[:, k].sum()
        for i in range(len(plan)):
            plan[i] /= plan[i].sum()
    return plan
