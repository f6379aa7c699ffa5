"""Losses that are known together with their gradients, so that backward passes only scale.

What they are known from stands where it is computed: ``swapped_prediction.py``, ``streaming.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swavkit._tensors import autocast_disabled


class LossOfScores(torch.autograd.Function):
    """The loss of scores: they get residual · factor."""

    @staticmethod
    def forward(loss: Tensor, factor: Tensor, *residuals_and_scores: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, factor, *others = inputs
        ctx.save_for_backward(factor, *others[: len(others) // 2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        factor, *residuals = ctx.saved_tensors
        factor = factor * gradient
        wanted = ctx.needs_input_grad[-len(residuals) :]
        # In the dtype of factor, but for what is written.
        gradients = [
            torch.mul(residual, factor, out=torch.empty_like(residual)) if wants else None
            for residual, wants in zip(residuals, wanted, strict=True)
        ]
        return (None, None, *[None] * len(residuals), *gradients)


class LossOfFactors(torch.autograd.Function):
    """The loss of scores that are a product: each factor gets residual · factor times the other."""

    @staticmethod
    def forward(
        loss: Tensor, factor: Tensor, residual: Tensor, features: Tensor, directions: Tensor
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        factor, residual, features, directions = ctx.saved_tensors
        factor = factor * gradient
        to_features = to_directions = None
        with autocast_disabled(residual.device):
            if ctx.needs_input_grad[3]:
                products = residual @ directions.to(residual.dtype)  # (V, B, D)
                to_features = (products * factor).to(features.dtype)
            if ctx.needs_input_grad[4]:
                scaled = (features * factor).to(residual.dtype)
                products = residual.flatten(0, 1).T @ scaled.flatten(0, 1)  # (K, D)
                to_directions = products.to(directions.dtype)
        return None, None, None, to_features, to_directions


class LossWithGradients(torch.autograd.Function):
    """The loss of unit features and prototypes, whose gradients are known but for a scalar."""

    @staticmethod
    def forward(
        loss: Tensor,
        of_features: Tensor,
        of_directions: Tensor,
        features: Tensor,
        directions: Tensor,
    ) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, *gradients, features, directions = inputs
        ctx.save_for_backward(*gradients)
        ctx.dtypes = features.dtype, directions.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        gradients = [
            (saved * gradient).to(dtype) if wants else None
            for saved, dtype, wants in zip(
                ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[-2:], strict=True
            )
        ]
        return None, None, None, *gradients


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the swapped prediction loss has no second derivative: its gradient is computed along "
            "with its value, and is a constant from then on; expected a backward pass without "
            "create_graph=True"
        )
