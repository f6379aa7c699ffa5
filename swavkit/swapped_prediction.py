"""The loss: every view predicts the codes of the other code views of its image.

With T_v = Σ_{i < A, i ≠ v} q_i, the sum of the codes that view v must predict, and n_v = Σ_k T_v,
the double sum over pairs of views (Caron et al. 2020, eq. 2 and §3.2)::

    loss = 0
    for i in range(A):                      # code views
        for v in range(V):                  # all views
            if v != i:
                loss -= (codes[i] * log_softmax(scores[v] / τ)).sum(-1).mean()
    loss /= A * (V - 1)

collapses to one logsumexp per view::

    L = 1/(A(V-1)) · Σ_v mean_b [ n_v · logsumexp_k(S_v/τ) - ⟨T_v, S_v⟩/τ ]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._precision import at_least_float32, autocast_disabled

__all__ = ["SwappedPredictionLoss", "swapped_prediction_loss"]


def swapped_prediction_loss(
    scores: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
    *,
    temperature: float = 0.1,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy of every view's prediction with the codes of the other code views.

    Its value is between the mean entropy of the codes and ln K + 2/τ for cosine scores; scores that
    are all equal give ln K, where a training that does not start is stuck.

    Args:
        scores: (V, B, K) scores of V >= 2 views, or a sequence of V tensors (B, K), the code views
            first.
        codes: (A, B, K) codes of the first A views, 1 <= A <= V, or a sequence of them; at least 0,
            rows need not sum to 1. Code i belongs to view i. They are constants: no gradient flows
            into them.
        temperature: The softmax temperature τ > 0, in the unit of the scores.
        sample_weight: (B,) weights in the mean over samples, bool or floating, at least 0. A sample
            of weight 0 takes no part, whatever its scores and codes hold.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 scores. An empty batch, or one
        whose weights are all 0, gives exactly 0, connected to the graph of the scores.

    Raises:
        TypeError: If ``scores`` or ``codes`` are no floating tensors, or ``sample_weight`` is
            neither bool nor floating.
        ValueError: If the temperature is out of range or a shape or device does not fit.

    Example:
        >>> scores = torch.zeros(3, 4, 10)  # 3 views, 4 samples, 10 prototypes
        >>> codes = torch.full((2, 4, 10), 0.1)
        >>> swapped_prediction_loss(scores, codes)  # ln 10
        tensor(2.3026)
    """
    temperature = _checks.positive_float("temperature", temperature)
    score_views = _checks.views("scores", scores, "prototypes", least=2)
    code_views = _checks.views("codes", codes, "prototypes", least=1)
    _check_pairing(score_views, code_views)
    samples = score_views[0].shape[:1]
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (samples,), score_views[0])

    dtype = at_least_float32(score_views[0].dtype)
    with autocast_disabled(score_views[0].device):
        constants = torch.stack([code.detach().to(dtype) for code in code_views])  # (A, B, K)
        if sample_weight is not None:
            sample_weight = sample_weight.to(dtype)
            absent = (sample_weight == 0).unsqueeze(-1)  # (B, 1)
            constants = constants.masked_fill(absent, 0)
        total = constants.sum(dim=0)

        per_sample = torch.zeros(samples, dtype=dtype, device=total.device)
        for view, view_scores in enumerate(score_views):
            if view == 0 and len(code_views) == 1:
                continue  # the only code is its own: nothing to predict
            target = total - constants[view] if view < len(code_views) else total  # (B, K), T_v
            logits = view_scores.to(dtype) / temperature
            if sample_weight is not None:
                logits = logits.masked_fill(absent, 0)
            mass = target.sum(dim=-1)  # (B,), n_v
            agreement = (target * logits).sum(dim=-1)  # (B,), ⟨T_v, S_v⟩/τ
            per_sample = per_sample + mass * torch.logsumexp(logits, dim=-1) - agreement

        if sample_weight is None:
            mean = per_sample.sum() / max(samples.numel(), 1)
        else:
            weight_sum = sample_weight.sum()
            mean = (sample_weight * per_sample).sum() / torch.where(weight_sum == 0, 1, weight_sum)
        return mean / (len(code_views) * (len(score_views) - 1))


class SwappedPredictionLoss(nn.Module):
    """Module form of :func:`swapped_prediction_loss`: it holds the temperature.

    Args:
        temperature: The softmax temperature τ > 0, in the unit of the scores.

    Shape:
        scores (V, B, K), codes (A, B, K) and ``sample_weight`` (B,) give a scalar in float32, or in
        float64 for float64 scores.

    Raises:
        TypeError: If the temperature is no number.
        ValueError: If the temperature is out of range.

    Example:
        >>> criterion = SwappedPredictionLoss(temperature=0.1)
        >>> scores = torch.eye(5).expand(2, 5, 5)  # two views that agree
        >>> criterion(scores, codes=torch.eye(5).expand(2, 5, 5))
        tensor(0.0002)
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _checks.positive_float("temperature", temperature)

    def forward(
        self,
        scores: Tensor | Sequence[Tensor],
        codes: Tensor | Sequence[Tensor],
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss; see :func:`swapped_prediction_loss`."""
        return swapped_prediction_loss(
            scores, codes, temperature=self.temperature, sample_weight=sample_weight
        )

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"temperature={self.temperature}"


def _check_pairing(scores: list[Tensor], codes: list[Tensor]) -> None:
    """Refuse codes that do not belong to the first views of ``scores``."""
    _checks.no_empty_last_dimension("scores", scores[0], "prototypes")
    if len(codes) > len(scores):
        raise ValueError(
            f"codes must hold at most as many views as scores, {len(scores)}, got {len(codes)}"
        )
    if codes[0].shape != scores[0].shape:
        raise ValueError(
            f"codes must have the shape of scores per view, {tuple(scores[0].shape)}, "
            f"got {tuple(codes[0].shape)}"
        )
    _checks.same_device("codes", codes[0], scores[0])
