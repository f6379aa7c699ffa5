"""The same loss block by block: the V·B·K scores never exist at once.

Scores are cheap to compute again, so of the codes only u (K) and v (B) are kept. In pseudo-code,
with Z the features, C the prototypes and a block some samples of all views::

    for block in blocks:                       # of the code views and of the queue
        largest = max(largest, max_i S_ij/ε)                     with S = Z_block Cᵀ
    for iteration in range(iterations):
        for block in blocks:
            sums += Σ_i r_i v_i P_ij           # v follows from u, see _plan.py
        u = c / sums                           # summed over processes
    for block in blocks:                       # of all views
        codes = diag(v) P diag(u)
        loss += Σ_v n_v · logsumexp(S_v/τ) - ⟨T_v, S_v⟩/τ
        residual = T_v - n_v · softmax(S_v/τ)
        gradient of Z_block = -residual C
        gradient of C -= residualᵀ Z_block     # in float32 or better

The backward pass only scales both gradients. Each formula stands where it stands for whole
matrices: P and u in ``_plan.py`` and ``sinkhorn.py``, errors and residuals in
``swapped_prediction.py``.

Where the code views are few, or the caller has memory for them alone, P is kept, and not computed
again in each iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from swavkit._autograd import attach_gradients
from swavkit._tensors import autocast_disabled, product_dtype, traceable
from swavkit.fused.score_blocks import BlockScores, find_memory
from swavkit.sinkhorn.functional import Settings, one_hot
from swavkit.sinkhorn.iterations import find_u
from swavkit.sinkhorn.kernel import Kernel
from swavkit.swapped_prediction import errors_of_samples, normalized_weights

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup


def fused_losses(
    factors: Sequence[tuple[Tensor, Tensor]],
    queued: Tensor | None,
    *,
    num_code_views: int,
    code_weight: Tensor | None,
    sample_weight: Tensor | None,
    temperature: float,
    settings: Settings,
    group: ProcessGroup | None,
    most_bytes_of_kernels: int,
) -> list[Tensor]:
    """Return the loss with each of several heads, without their scores.

    Args:
        factors: For each head the features, (V, B, D) unit rows, the code views first, of which
            those of weight 0 must be finite; and its prototypes, (K, D) unit rows in their dtype.
        queued: (A, L, D) unit rows from the queue, if there is one.
        num_code_views: A.
        code_weight: (B + L,) weights in the codes, bool or floating, or ``None``.
        sample_weight: (B,) weights in the loss, bool or floating, or ``None``.
        temperature: τ.
        settings: As for :func:`~swavkit.sinkhorn_knopp`.
        group: The ranks that share the batch for codes.
        most_bytes_of_kernels: Kernels of all heads are kept if they take no more than that.

    Returns:
        The losses, scalars in float32, or float64 for float64 features.
    """
    tracked = torch.is_grad_enabled()
    wanted = [tuple(tracked and part.requires_grad for part in pair) for pair in factors]
    dtypes = [product_dtype(features) for features, _ in factors]  # while autocast can be asked
    with torch.no_grad(), autocast_disabled(factors[0][0].device):
        of_heads = []
        for (features, directions), dtype in zip(factors, dtypes, strict=True):
            of_heads.append(
                BlockScores(
                    features.detach().to(dtype),
                    directions.detach().to(dtype),
                    None if queued is None else queued.to(dtype),
                    num_code_views,
                )
            )
        find_memory(of_heads, most_bytes_of_kernels)
        kernels = [scores.kernel(code_weight, settings.epsilon) for scores in of_heads]
        equal = [None] * len(kernels)
        find_u(
            kernels,
            equal,
            settings.iterations,
            settings.relaxation,
            settings.tolerance,
            group,
        )
        parts = [
            _loss(scores, kernel, sample_weight, temperature, settings.hard, *of_head)
            for scores, kernel, of_head in zip(of_heads, kernels, wanted, strict=True)
        ]
    return [
        attach_gradients(loss, loss.new_ones(()), gradients, pair) if any(of_head) else loss
        for pair, (loss, gradients), of_head in zip(factors, parts, wanted, strict=True)
    ]


def _loss(
    scores: BlockScores,
    kernel: Kernel,
    sample_weight: Tensor | None,
    temperature: float,
    hard: bool,
    to_features: bool,
    to_directions: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Return the loss, and its gradients for features and directions where they are asked for."""
    features, directions = scores.features, scores.directions
    views = len(features)
    inverse_temperature = 1 / traceable(temperature, features.device)
    share = normalized_weights(sample_weight, features[0]) / (len(scores.of_codes) * (views - 1))
    factor = share * -inverse_temperature
    # In float16 the product of a feature and its share could underflow.
    dtype = torch.float32 if features.dtype == torch.float16 else features.dtype
    of_features = share.new_zeros(features.shape if to_features else (0,))
    of_directions = share.new_zeros(directions.shape if to_directions else (0,))
    loss = share.new_zeros(())
    for rows, parts in scores.blocks:
        of_block = scores.of(features[:, rows])  # (V, b, K)
        for part in parts:
            of_part = of_block[:, part.start - rows.start : part.stop - rows.start]
            codes = scores.codes(kernel, part, of_part[: len(scores.of_codes)])
            errors, scale = errors_of_samples(
                list(of_part),
                [one_hot(code) for code in codes] if hard else codes,
                inverse_temperature,
                None if sample_weight is None else sample_weight[part],
                list(of_part) if to_features or to_directions else None,
            )
            loss += (share[part] * errors).sum()
            factor[part] /= scale
        if to_features:
            residual = of_block.flatten(0, 1).to(dtype)  # (V·b, K)
            products = (residual @ directions.to(dtype)).view(
                of_block.shape[:2] + features.shape[-1:]
            )
            of_features[:, rows] = products * factor[rows].unsqueeze(-1)
        if to_directions:
            residual = of_block.flatten(0, 1).to(dtype)
            weighted = (features[:, rows] * factor[rows].unsqueeze(-1)).flatten(0, 1).to(dtype)
            if dtype == of_directions.dtype:
                of_directions.addmm_(residual.T, weighted)
            else:
                of_directions += residual.T @ weighted
    return loss, (of_features, of_directions)
