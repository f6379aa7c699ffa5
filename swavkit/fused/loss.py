"""The SwAV loss and its gradients block by block, without all V·B·K scores in memory.

Scores are cheap to recompute, so only u (K) and v (B) of the codes are stored. In pseudo-code, with
features Z, prototypes C and a block of some samples of all views::

    for block in blocks:                       # of the code views and of the queue
        largest = max(largest, max_i S_ij/ε)                     with S = Z_block Cᵀ
    for iteration in range(iterations):
        for block in blocks:
            sums += Σ_i r_i v_i P_ij           # v follows from u
        u = c / sums                           # summed over ranks
    for block in blocks:                       # of all views
        codes = diag(v) P diag(u)
        loss += Σ_v n_v · logsumexp(S_v/τ) - ⟨T_v, S_v⟩/τ
        residual = T_v - n_v · softmax(S_v/τ)
        gradient of Z_block = -residual C
        gradient of C -= residualᵀ Z_block     # summed in float32 or better

The backward pass only scales both gradients. The formulas are shared with the loss on whole
matrices: P in ``sinkhorn/kernel.py``, u in ``sinkhorn/iterations.py``, errors and residuals in
``swapped_prediction.py``.

P is kept across iterations if it is small or fits in the memory that the caller allows.
Otherwise each iteration recomputes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swavkit._autograd import attach_gradients
from swavkit._prediction_errors import normalized_weights
from swavkit._tensors import autocast_disabled, product_dtype, traceable
from swavkit.fused.score_blocks import BlockScores, find_memory
from swavkit.sinkhorn.functional import Settings, one_hot
from swavkit.sinkhorn.iterations import find_kernels
from swavkit.sinkhorn.kernel import Kernel
from swavkit.swapped_prediction import errors_of_samples
from swavkit.swav_statistics import (
    SwAVStatistics,
    added,
    block_statistics,
    no_statistics,
    rows_to_observe,
)

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


def fused_losses(
    factors: Sequence[tuple[Tensor, Tensor]],
    code_factors: Sequence[tuple[Tensor, Tensor]] | None,
    queued: Tensor | None,
    *,
    num_code_views: int,
    code_weight: Tensor | None,
    sample_weight: Tensor | None,
    prototype_weights: Sequence[Tensor | None],
    temperature: float | Tensor,
    settings: Settings,
    group: ProcessGroup | None,
    most_bytes_of_kernels: int,
    statistics: bool,
) -> list[tuple[Tensor, SwAVStatistics | None]]:
    """Return the loss of each head, with ``statistics`` also those of its codes and predictions.

    Args:
        factors: The features and the prototypes of each head, in one dtype: (V, B, D) unit rows,
            the code views first, finite even for samples of weight 0; and (K, D) unit rows.
        code_factors: Those of a teacher, (A, B, D) and (K, D), whose products give the codes; or
            ``None`` for those of the code views.
        queued: (A, L, D) unit rows from the queue, or ``None``.
        num_code_views: A.
        code_weight: (B + L,) weights in the codes, bool or floating, or ``None``.
        sample_weight: (B,) weights in the loss, bool or floating, or ``None``.
        prototype_weights: (K,) relative masses of the prototypes of each head, or ``None``.
        temperature: τ.
        settings: The settings of :func:`~swavkit.sinkhorn_knopp`.
        group: The ranks that share the batch for codes.
        most_bytes_of_kernels: The kernels of all heads are kept if together they take at most this.
        statistics: Whether statistics are requested.

    Returns:
        Scalars in float32, or float64 for float64 features.
    """
    tracked = torch.is_grad_enabled()
    needs_gradients = [
        tuple(tracked and factor.requires_grad for factor in pair) for pair in factors
    ]
    predicting = [_in_product_dtype(*pair) for pair in factors]  # before autocast is disabled
    coding = code_factors and [_in_product_dtype(*pair) for pair in code_factors]
    with torch.no_grad(), autocast_disabled(factors[0][0].device):
        head_scores = [
            BlockScores(*pair, coding[head] if coding else None, queued, num_code_views)
            for head, pair in enumerate(predicting)
        ]
        find_memory(head_scores, most_bytes_of_kernels)
        heads = list(zip(head_scores, prototype_weights, strict=True))
        # On one rank one by one, while P is in the cache.
        batches = [[each] for each in heads] if group is None else [heads]
        kernels = [
            kernel
            for batch in batches
            for kernel in find_kernels(
                [scores.scaled(code_weight, mass, settings.epsilon) for scores, mass in batch],
                settings.iterations,
                settings.relaxation,
                settings.tolerance,
                group,
            )
        ]
        results = [
            _loss(scores, kernel, sample_weight, temperature, settings.hard, statistics, *needed)
            for scores, kernel, needed in zip(head_scores, kernels, needs_gradients, strict=True)
        ]
    return [
        (attach_gradients(loss, loss.new_ones(()), gradients, pair) if any(needed) else loss, seen)
        for pair, (loss, gradients, seen), needed in zip(
            factors, results, needs_gradients, strict=True
        )
    ]


def _in_product_dtype(features: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    dtype = product_dtype(features)
    return features.detach().to(dtype), directions.detach().to(dtype)


def _loss(
    scores: BlockScores,
    kernel: Kernel,
    sample_weight: Tensor | None,
    temperature: float | Tensor,
    hard: bool,
    statistics: bool,
    needs_features: bool,
    needs_directions: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor], SwAVStatistics | None]:
    """Return the loss, its gradients for features and directions, and the statistics.

    Gradients that are not needed are empty.
    """
    features, directions = scores.features, scores.directions
    views = len(features)
    inverse_temperature = 1 / traceable(temperature, features.device)
    code_views = len(scores.code_features)
    pair_weight = normalized_weights(sample_weight, features[0], code_views * (views - 1))
    factor = pair_weight * -inverse_temperature
    # In float16 the product of a feature and its weight could underflow.
    dtype = torch.float32 if features.dtype == torch.float16 else features.dtype
    features_gradient = pair_weight.new_zeros(features.shape if needs_features else (0,))
    directions_gradient = pair_weight.new_zeros(directions.shape if needs_directions else (0,))
    loss = pair_weight.new_zeros(())
    seen = no_statistics(directions.T) if statistics else None
    for rows, parts in scores.blocks:
        block_scores = scores.of(features[:, rows])  # (V, b, K)
        code_scores = scores.code_scores(kernel, rows, block_scores)  # (A, b, K)
        for part in parts:
            inside = slice(part.start - rows.start, part.stop - rows.start)
            part_scores = block_scores[:, inside]
            codes = scores.codes(kernel, part, code_scores[:, inside])
            if hard:
                codes = [one_hot(code) for code in codes]
            weight = None if sample_weight is None else sample_weight[part]
            observed = rows_to_observe(part_scores, codes, weight) if statistics else None
            errors, scale = errors_of_samples(
                part_scores,
                codes,
                inverse_temperature,
                weight,
                part_scores if needs_features or needs_directions else None,
                observed,
            )
            if observed is not None and seen is not None:
                seen = added(seen, block_statistics(observed))
            loss += (pair_weight[part] * errors).sum()
            if scale is not None:
                factor[part] /= scale
        # The residuals have overwritten the scores.
        if needs_features or needs_directions:
            residual = block_scores.flatten(0, 1).to(dtype)  # (V·b, K)
        if needs_features:
            products = (residual @ directions.to(dtype)).view(
                block_scores.shape[:2] + features.shape[-1:]
            )
            features_gradient[:, rows] = products * factor[rows].unsqueeze(-1)
        if needs_directions:
            weighted = (features[:, rows] * factor[rows].unsqueeze(-1)).flatten(0, 1).to(dtype)
            if dtype == directions_gradient.dtype:
                directions_gradient.addmm_(residual.T, weighted)
            else:
                directions_gradient += residual.T @ weighted
    return loss, (features_gradient, directions_gradient), seen
