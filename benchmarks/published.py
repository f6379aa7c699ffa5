"""The published algorithm, from the pseudo-code of the paper's appendix (arXiv 2006.09882).

It is the baseline of the benchmarks. Sinkhorn-Knopp divides the matrix P = exp(S/ε), and the loss
is a double loop of cross-entropies over views. All computation is in the dtype of the scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def published_codes(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the codes of one view's scores, (B, K) to (B, K)."""
    samples, prototypes = scores.shape
    plan = torch.exp(scores / epsilon)  # (B, K), a plan of mass 1 after the next line
    plan /= plan.sum()
    for _ in range(iterations):
        plan /= plan.sum(dim=0, keepdim=True) * prototypes  # mass 1/K for every prototype
        plan /= plan.sum(dim=1, keepdim=True) * samples  # mass 1/B for every sample
    plan *= samples  # each sample's code sums to 1
    return plan


def published_loss(scores: Tensor, codes: list[Tensor], temperature: float = 0.1) -> Tensor:
    """Return the loss of the scores of all views, (V, B, K), given those of the code views."""
    loss = scores.new_zeros(())
    for own, code in enumerate(codes):
        of_code = scores.new_zeros(())
        for view in range(len(scores)):
            if view != own:
                log_prediction = F.log_softmax(scores[view] / temperature, dim=-1)
                of_code = of_code - (code * log_prediction).sum(dim=-1).mean()
        loss = loss + of_code / (len(scores) - 1)
    return loss / len(codes)


def published_step(
    features: Tensor,
    weight: Tensor,
    code_views: int,
    queued: Tensor | None = None,
    of_teacher: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the loss of features (V, B, D) with prototypes (K, D), normalized in place first.

    Codes are computed on the features of the code views and, if given, on ``queued`` (A, L, D); or
    on unit features and prototypes of a teacher.
    """
    with torch.no_grad():
        weight /= weight.norm(dim=-1, keepdim=True)
    scores = F.normalize(features, dim=-1) @ weight.T  # (V, B, K)
    to_code = scores.detach()[:code_views]
    if of_teacher is not None:
        to_code = of_teacher[0] @ of_teacher[1].T
    if queued is not None:
        to_code = torch.cat([to_code, queued @ weight.detach().T], dim=1)
    codes = [published_codes(view)[: features.shape[1]] for view in to_code]
    return published_loss(scores, codes)
