"""Prediction of a code at the same place: patch tokens, cluster heads, DeepCluster-v2.

:mod:`~swavkit.swapped_prediction` pairs the views of an image. Here, row n of the scores predicts
code n.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from swavkit import _checks
from swavkit._autograd import attach_gradients
from swavkit._prediction_errors import (
    Target,
    normalized_weights,
    prediction_errors,
    residual_scale,
)
from swavkit._tensors import at_least_float32, autocast_disabled, empty, on_cpu, traceable

__all__ = ["CodePredictionLoss", "code_prediction_loss"]


def code_prediction_loss(
    scores: Tensor,
    codes: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    sample_weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""Return the cross-entropy between predictions and codes.

    .. math:: e = -\sum_k q_k \log \operatorname{softmax}(s / \tau)_k

    is the error of one sample with weight w. The loss is :math:`\sum w e / \sum w` for ``"mean"``,
    :math:`\sum w e` for ``"sum"`` and :math:`w e` for ``"none"``.

    Args:
        scores: (..., K) scores of predictions, any real floating dtype.
        codes: (..., K) codes, floating and at least 0, whose rows need not sum to 1; or (...) int64
            indices of hard codes. Codes get no gradient.
        temperature: The softmax temperature τ > 0, in the unit of the scores: a number, or a
            floating 0-dim tensor, which is never read on the host.
        sample_weight: (...) weights, bool or floating, at least 0. A sample of weight 0 is ignored,
            even if its scores or codes are not finite or its index is out of range.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``. The mean is over the samples of this rank.

    Returns:
        A scalar, or (...) for ``"none"``, in float32, or in float64 for float64 scores. A mean over
        no samples, or over weights that are all 0, is exactly 0 and connected to the graph of the
        scores. A score of -inf excludes a prototype: the error is infinite if its code is above 0.

    Raises:
        TypeError: If ``scores`` is not a floating tensor, ``codes`` is neither floating nor int64,
            or ``sample_weight`` is neither bool nor floating.
        ValueError: If a setting is out of range, a shape or device does not fit, or an index on the
            CPU is out of range. On other devices, and under ``torch.compile``, indices are not
            checked.
        RuntimeError: In a backward pass with ``create_graph=True``, as by ``torch.func.grad``: the
            gradient is computed in the forward pass and has no derivative.

    Example:
        >>> scores = torch.eye(3)  # of 3 patches with 3 prototypes
        >>> code_prediction_loss(scores, torch.tensor([0, 1, 1]))
        tensor(3.3334)
        >>> present = torch.tensor([True, True, False])
        >>> code_prediction_loss(scores, torch.eye(3), temperature=1, sample_weight=present)
        tensor(0.5514)
    """
    temperature = _checks.positive_setting("temperature", temperature)
    _checks.choice("reduction", reduction, ("mean", "sum", "none"))
    _check(scores, codes, sample_weight)
    _checks.known_setting("temperature", temperature, scores.device)
    differentiable = torch.is_grad_enabled() and scores.requires_grad
    residual = empty(scores.shape, scores.dtype, scores) if differentiable else None
    with torch.no_grad(), autocast_disabled(scores.device):
        rows = scores.unsqueeze(0).flatten(0, -2)  # (N, K)
        weight = None if sample_weight is None else sample_weight.reshape(len(rows))
        weighted_errors, factor = _errors_and_factor(
            rows,
            codes.reshape(rows.shape if codes.is_floating_point() else rows.shape[:1]),
            traceable(temperature, scores.device),
            weight,
            normalized_weights(weight, rows) if reduction == "mean" else weight,
            None if residual is None else residual.view(rows.shape),
        )
        loss = weighted_errors.view(*scores.shape[:-1], 1)
        factor = factor.view(loss.shape)
        if reduction != "none":
            loss = loss.sum()
    if residual is not None:
        loss = attach_gradients(loss, factor, [residual], [scores])
    return loss.squeeze(-1) if reduction == "none" else loss


class CodePredictionLoss(nn.Module):
    """Module form of :func:`code_prediction_loss`.

    Args:
        temperature: The softmax temperature τ > 0, in the unit of the scores: a number, or a
            floating 0-dim tensor, which is never read on the host.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Shape:
        scores (..., K), codes (..., K) or (...) and ``sample_weight`` (...) give a scalar, or (...)
        for ``"none"``, in float32, or in float64 for float64 scores.

    Raises:
        TypeError: If the temperature is not a number or a floating tensor.
        ValueError: If a setting is out of range.

    Example:
        >>> criterion = CodePredictionLoss(temperature=1.0, reduction="none")
        >>> criterion(torch.eye(3), codes=torch.tensor([0, 1, 0]))
        tensor([0.5514, 0.5514, 1.5514])
    """

    __prepare_scriptable__ = _checks.refuse_scripting

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        self.temperature = _checks.positive_setting("temperature", temperature)
        _checks.choice("reduction", reduction, ("mean", "sum", "none"))
        self.reduction: Literal["mean", "sum", "none"] = reduction

    def forward(self, scores: Tensor, codes: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Return the loss; see :func:`code_prediction_loss`."""
        return code_prediction_loss(
            scores,
            codes,
            temperature=self.temperature,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )

    if TYPE_CHECKING:
        __call__ = forward  # nn.Module's returns anything

    def extra_repr(self) -> str:
        """Return the settings for ``repr``."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


def _errors_and_factor(
    scores: Tensor,
    codes: Tensor,
    temperature: float | Tensor,
    sample_weight: Tensor | None,
    error_weight: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return w e and the factor from the residual to the gradient, (N,) each.

    ``residual``, (N, K), is overwritten.
    """
    dtype = at_least_float32(scores.dtype)
    inverse_temperature = 1 / temperature
    absent = None if sample_weight is None else sample_weight == 0
    if codes.is_floating_point():
        target = codes.to(dtype)
        mass = target.sum(dim=-1)
    else:
        target = codes if absent is None else codes.masked_fill(absent, 0)
        mass = scores.new_ones(codes.shape, dtype=dtype)
    scale = residual_scale(mass, scores.dtype)
    errors = prediction_errors(
        scores.unsqueeze(0),
        [Target(0, target, mass)],
        inverse_temperature,
        None if residual is None else residual.unsqueeze(0),
        scale,
    )
    if absent is not None:
        errors.masked_fill_(absent, 0)
        if residual is not None:
            residual.masked_fill_(absent.unsqueeze(-1), 0)
    weight = torch.ones_like(mass) if error_weight is None else error_weight.to(dtype)
    factor = weight * -inverse_temperature
    return weight * errors, factor if scale is None else factor / scale


def _check(scores: Tensor, codes: Tensor, sample_weight: Tensor | None) -> None:
    _checks.floating_tensor("scores", scores)
    _checks.untransformed("scores", scores)
    _checks.min_dimensions("scores", scores, 1, "(..., prototypes)")
    _checks.no_empty_last_dimension("scores", scores, "prototypes")
    _checks.tensor("codes", codes)
    if codes.dtype not in (*_checks.FLOATING_DTYPES, torch.int64):
        raise TypeError(
            f"codes must have a floating-point dtype of 16 to 64 bits, or be int64 indices, "
            f"got {codes.dtype}"
        )
    expected = scores.shape if codes.is_floating_point() else scores.shape[:-1]
    if not _checks.same_shape(codes.shape, expected):
        raise ValueError(
            f"codes must have shape {tuple(expected)} with {codes.dtype}, for scores of shape "
            f"{tuple(scores.shape)}, got {tuple(codes.shape)}"
        )
    _checks.same_device("codes", codes, scores)
    if sample_weight is not None:
        _checks.weight("sample_weight", sample_weight, (scores.shape[:-1],), scores)
    if not codes.is_floating_point() and on_cpu(codes) and type(codes) is Tensor:
        used = codes if sample_weight is None else codes[sample_weight != 0]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < scores.shape[-1]:
            raise ValueError(
                f"codes must be indices of {scores.shape[-1]} prototypes, got indices from "
                f"{int(used.min())} to {int(used.max())}"
            )
