"""Swapped prediction loss: each view predicts the codes of the other code views of its image.

The loss is a double sum over pairs of views (Caron et al. 2020, eq. 2 and §3.2)::

    loss = 0
    for i in range(A):                      # code views
        for v in range(V):                  # all views
            if v != i:
                loss -= (codes[i] * log_softmax(scores[v] / τ)).sum(-1).mean()
    loss /= A * (V - 1)

Let T_v = Σ_{i < A, i ≠ v} q_i be the target of view v, and n_v = Σ_k T_v its mass. The sum then
needs one logsumexp per view, and the softmax gives its gradient::

    L = 1/(A(V-1)) · Σ_v mean_b [ n_v · logsumexp_k(S_v/τ) - ⟨T_v, S_v⟩/τ ]
    ∂L/∂S_v = (T_v - n_v · softmax(S_v/τ)) · -w_b / (τ · A · (V-1) · Σ w)

``_prediction_errors.py`` computes both for some views.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._autograd import attach_gradients
from swavkit._prediction_errors import (
    ObservedRows,
    Target,
    normalized_weights,
    observe_codes,
    prediction_errors,
    residual_scale,
)
from swavkit._tensors import at_least_float32, autocast_disabled, empty, on_cpu, traceable

__all__ = ["SwappedPredictionLoss", "swapped_prediction_loss"]

Views = Tensor | Sequence[Tensor]  # (V, b, K), or V tensors (b, K)

# Views of up to so many scores are computed at once: fewer operations, for 0.7 of the time at
# 8×64×300. Of more, some samples at a time, for less temporary memory. A CPU then takes the views
# one by one, in blocks that stay in its cache: 0.6 of the time at 8×2,048×3,000. On an accelerator
# a block costs 26 operations: 8 blocks for 8×32×131,072 take twice the time of all at once.
_SCORES_AT_ONCE_ON_CPU, _SCORES_AT_ONCE = 2**21, 2**26
_SCORES_OF_A_BLOCK_ON_CPU = 2**20  # of one view
_LEAST_BLOCKS = 6

# What computes errors and residuals on a CUDA device: "torch", or "triton" where its kernel can do
# it. That takes 2 launches in place of 27 for 8 views, and no temporary memory in place of half a
# copy of the scores for 2 views. It has not run on a device yet.
BACKEND = "torch"


def swapped_prediction_loss(
    scores: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor = 0.1,
    sample_weight: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy between each view's prediction and the codes of other code views.

    For cosine scores, it lies between the mean entropy of the codes and ln K + 2/τ. Equal scores
    give ln K, the value if training does not start.

    Args:
        scores: (V, B, K) scores of V >= 2 views, or a sequence of V tensors (B, K), the code views
            first.
        codes: (A, B, K) codes of the first A views, 1 <= A <= V, or a sequence of them; at least 0,
            rows need not sum to 1. Code i belongs to view i. Codes get no gradient.
        temperature: The softmax temperature τ > 0, in the unit of the scores: a number, or a
            floating 0-dim tensor, which is never read on the host.
        sample_weight: (B,) weights in the mean over samples, bool or floating, at least 0. A sample
            of weight 0 is ignored, even if its scores or codes are not finite. They get no
            gradient.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 scores. It is exactly 0, and
        connected to the graph of the scores, if the batch is empty or all weights are 0. A score of
        -inf excludes a prototype: the loss is infinite if a code is above 0 there.

    Raises:
        TypeError: If ``scores`` or ``codes`` are not floating tensors, or ``sample_weight`` is
            neither bool nor floating.
        ValueError: If the temperature is out of range or a shape or device does not fit.
        RuntimeError: In a backward pass with ``create_graph=True``, as by ``torch.func.grad``: the
            gradient is computed in the forward pass and has no derivative.

    Example:
        >>> scores = torch.zeros(3, 4, 10)  # 3 views, 4 samples, 10 prototypes
        >>> codes = torch.full((2, 4, 10), 0.1)
        >>> swapped_prediction_loss(scores, codes)  # ln 10
        tensor(2.3026)
    """
    temperature = _checks.positive_setting("temperature", temperature)
    score_views = _checks.views("scores", scores, "prototypes", least=2)
    _checks.untransformed("scores", score_views[0])
    code_views = _checks.views("codes", codes, "prototypes", least=1)
    check_pairing(score_views, code_views)
    _checks.known_setting("temperature", temperature, score_views[0].device)
    samples = score_views[0].shape[:1]
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (samples,), score_views[0])

    given = [scores] if isinstance(scores, Tensor) else score_views
    views = scores if isinstance(scores, Tensor) else score_views
    terms = views, codes if isinstance(codes, Tensor) else code_views, temperature, sample_weight
    if not (torch.is_grad_enabled() and any(part.requires_grad for part in given)):
        return _loss_and_factor(None, *terms)[0]
    residuals = [empty(part.shape, part.dtype, part) for part in given]
    loss, factor = _loss_and_factor(
        residuals[0] if isinstance(scores, Tensor) else residuals, *terms
    )
    return attach_gradients(loss, factor, residuals, given)


class SwappedPredictionLoss(nn.Module):
    """Module form of :func:`swapped_prediction_loss`.

    Args:
        temperature: The softmax temperature τ > 0, in the unit of the scores: a number, or a
            floating 0-dim tensor, which is never read on the host.

    Shape:
        scores (V, B, K), codes (A, B, K) and ``sample_weight`` (B,) give a scalar in float32, or in
        float64 for float64 scores.

    Raises:
        TypeError: If the temperature is not a number.
        ValueError: If the temperature is out of range.

    Example:
        >>> criterion = SwappedPredictionLoss(temperature=0.1)
        >>> scores = torch.eye(5).expand(2, 5, 5)  # two views that agree
        >>> criterion(scores, codes=torch.eye(5).expand(2, 5, 5))
        tensor(0.0002)
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    def __init__(self, temperature: float | Tensor = 0.1) -> None:
        super().__init__()
        self.temperature = _checks.positive_setting("temperature", temperature)

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

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"temperature={self.temperature}"


def _loss_and_factor(
    residuals: Views | None,
    scores: Views,
    codes: Views,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the factor (B, 1) from residuals to gradients, both constants.

    ``residuals``, (B, K) for each view, are overwritten.
    """
    with torch.no_grad(), autocast_disabled(scores[0].device):
        pair_weight = normalized_weights(sample_weight, scores[0], len(codes) * (len(scores) - 1))
        inverse_temperature = 1 / traceable(temperature, pair_weight.device)
        errors, scale = errors_of_samples(
            scores, codes, inverse_temperature, sample_weight, residuals
        )
        factor = pair_weight * -inverse_temperature
        if scale is not None:
            factor /= scale
        return (pair_weight * errors).sum(), factor.unsqueeze(-1)


def errors_of_samples(
    scores: Views,
    codes: Views,
    inverse_temperature: float | Tensor,
    sample_weight: Tensor | None,
    residuals: Views | None,
    observed: ObservedRows | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return Σ_v [ n_v · logsumexp_k(S_v/τ) - ⟨T_v, S_v⟩/τ ], (b,), and the scale of residuals.

    Args:
        scores: (V, b, K), or V tensors (b, K).
        codes: (A, b, K), or A tensors (b, K).
        inverse_temperature: 1/τ.
        sample_weight: (b,), or ``None``. Errors and residuals are 0 where it is 0.
        residuals: Like ``scores``, overwritten with T_v - n_v · softmax(S_v/τ), times the scale,
            (b,), if there is one; may be the ``scores`` themselves.
        observed: Overwritten, if rows are observed.
    """
    if BACKEND == "triton" and scores[0].is_cuda and not torch.compiler.is_compiling():
        from swavkit import _triton_errors
        from swavkit._triton import attempt  # which imports triton

        if observed is None and _triton_errors.supports(scores, codes, residuals):
            arguments = scores, codes, inverse_temperature, sample_weight, residuals
            found = attempt(
                "the loss", _triton_errors, lambda: _triton_errors.errors_by_triton(*arguments)
            )
            if found is not None:
                return found
    blocks = _blocks(scores)
    if len(blocks) == 1:
        return _errors_of_block(
            scores, codes, inverse_temperature, sample_weight, residuals, observed
        )
    results = [
        _errors_of_block(
            _samples_of(scores, rows),
            _samples_of(codes, rows),
            inverse_temperature,
            None if sample_weight is None else sample_weight[rows],
            None if residuals is None else _samples_of(residuals, rows),
            None if observed is None else _observed_samples(observed, rows),
        )
        for rows in blocks
    ]
    errors, scales = zip(*results, strict=True)
    return torch.cat(errors), None if scales[0] is None else torch.cat(scales)


def _errors_of_block(
    scores: Views,
    codes: Views,
    inverse_temperature: float | Tensor,
    sample_weight: Tensor | None,
    residuals: Views | None,
    observed: ObservedRows | None,
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`errors_of_samples` of some samples."""
    dtype = at_least_float32(scores[0].dtype)
    zero_weight_mask = None if sample_weight is None else sample_weight == 0
    masses: Views
    if isinstance(codes, Tensor):
        codes = codes.to(dtype)
        masses = codes.sum(dim=-1)
    else:
        codes = [code.to(dtype) for code in codes]
        masses = [code.sum(dim=-1) for code in codes]
    total_mass = _sum(masses)
    of_all = None
    if len(scores) > len(codes):
        of_all = Target(slice(None), _sum(codes), total_mass)
    scale = residual_scale(total_mass, scores[0].dtype)
    errors: list[Tensor] = []
    alone = len(codes) == 1  # the first view has nothing to predict
    groups = _groups(scores, int(alone))
    memory = None
    if observed is not None:
        memory = empty((len(groups[0]), *codes[0].shape), dtype, scores[0])
        observe_codes(codes, observed, memory[0])
        if alone:
            nothing = Target(0, torch.zeros_like(codes[0]), torch.zeros_like(total_mass))
            prediction_errors(
                _together(scores, range(1)),
                [nothing],
                inverse_temperature,
                observed=_observed_views(observed, range(1)),
                memory=memory[:1],
            )
    if alone and residuals is not None:  # which may be the scores
        residuals[0].zero_()
    for views in groups:
        residual = None if residuals is None else _together(residuals, views)
        targets = _targets(codes, masses, of_all, views)
        errors.append(
            prediction_errors(
                _together(scores, views),
                targets,
                inverse_temperature,
                residual,
                scale,
                None if observed is None else _observed_views(observed, views),
                memory,
            )
        )
        if zero_weight_mask is not None and residual is not None:
            residual.masked_fill_(zero_weight_mask.unsqueeze(-1), 0)
    total = _sum(errors)
    if zero_weight_mask is not None:
        total.masked_fill_(zero_weight_mask, 0)
    return total, scale


def _blocks(scores: Views) -> list[slice]:
    """Return the samples that are computed at a time."""
    views, (samples, prototypes) = len(scores), scores[0].shape
    if torch.compiler.is_compiling():  # which needs no temporaries
        return [slice(None)]
    if on_cpu(scores[0]):
        limit, rows = _SCORES_AT_ONCE_ON_CPU, _SCORES_OF_A_BLOCK_ON_CPU // prototypes
    else:
        limit = _SCORES_AT_ONCE
        rows = min(limit // (views * prototypes), -(-samples // _LEAST_BLOCKS))
    if views * samples * prototypes <= limit:
        return [slice(None)]
    rows = max(rows, 1)
    return [slice(start, start + rows) for start in range(0, samples, rows)]


def _samples_of(views: Views, rows: slice) -> Views:
    """Return some samples of all views."""
    if isinstance(views, Tensor):
        return views[:, rows]
    return [view[rows] for view in views]


def _groups(scores: Views, first: int) -> list[range]:
    """Return the views, from the first one, that are computed at a time: all or each."""
    views = range(first, len(scores))
    if isinstance(scores, Tensor):
        limit = _SCORES_AT_ONCE_ON_CPU if on_cpu(scores) else _SCORES_AT_ONCE
        if scores.numel() <= limit:
            return [views]
    return [views[index : index + 1] for index in range(len(views))]


def _together(views: Views, group: range) -> Tensor:
    """Return the views of a group, (v, b, K)."""
    if isinstance(views, Tensor):
        return views[group.start : group.stop]
    return views[group.start].unsqueeze(0)


def _observed_views(observed: ObservedRows, group: range) -> ObservedRows:
    """Return the rows of the views of a group."""
    views = slice(group.start, group.stop)
    return observed._replace(nearest=observed.nearest[views], entropies=observed.entropies[views])


def _observed_samples(observed: ObservedRows, rows: slice) -> ObservedRows:
    """Return the rows of some samples, with the usage by all."""
    nearest, entropies, code_entropies, code_usage, weight = observed
    return ObservedRows(
        nearest[:, rows], entropies[:, rows], code_entropies[:, rows], code_usage, weight[rows]
    )


def _targets(codes: Views, masses: Views, of_all: Target | None, group: range) -> list[Target]:
    """Return the targets of the views of a group: all other codes."""
    targets = []
    for view in range(group.start, min(group.stop, len(codes))):
        values, mass = (_sum([*each[:view], *each[view + 1 :]]) for each in (codes, masses))
        targets.append(Target(view - group.start, values, mass))
    if of_all is not None and group.stop > len(codes):
        targets.append(of_all._replace(views=slice(len(targets), None)))
    return targets


def _sum(tensors: Views) -> Tensor:
    return reduce(torch.add, tensors)


def check_pairing(scores: list[Tensor], codes: list[Tensor]) -> None:
    """Check that codes match the first views of ``scores``."""
    _checks.no_empty_last_dimension("scores", scores[0], "prototypes")
    if len(codes) > len(scores):
        raise ValueError(
            f"codes must hold at most as many views as scores, {len(scores)}, got {len(codes)}"
        )
    if not _checks.same_shape(codes[0].shape, scores[0].shape):
        raise ValueError(
            f"codes must have the shape of scores per view, {tuple(scores[0].shape)}, "
            f"got {tuple(codes[0].shape)}"
        )
    _checks.same_device("codes", codes[0], scores[0])
