"""Gradients computed in the forward pass, and exact ones of a product and of unit rows."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swavkit._tensors import autocast_disabled, empty, product_dtype


def attach_gradients(
    loss: Tensor, factor: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Tensor:
    """Return ``loss`` as a function of ``inputs``, each with its gradient times ``factor``.

    Args:
        loss: A constant, a scalar or one that broadcasts with ``factor``.
        factor: A constant in float32 or better. It is applied in the backward pass, so that
            gradients in half precision are stored without it, at the order of 1.
        gradients: The gradient of each input, up to ``factor``; it broadcasts with ``factor``. That
            of an input that needs none may be empty.
        inputs: The differentiable inputs. Their gradients come back in their own dtype.
    """
    attached: Tensor = _KnownGradients.apply(  # type: ignore[no-untyped-call]
        loss, factor, *gradients, *inputs
    )
    return attached


def linear(features: Tensor, weight: Tensor) -> Tensor:
    """Return ``torch.nn.functional.linear(features, weight)`` in the same precision.

    Its backward pass keeps that precision. Inside autocast, torch's own computes a float32 gradient
    in half precision. On a CPU, scores, residuals and gradient lie on huge pages: a step of
    8×64×30,000 then takes 0.75 to 0.88 of the time.
    """
    if torch.compiler.is_compiling():
        return F.linear(features, weight)
    dtype = product_dtype(features)
    scores: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
        features.to(dtype), weight.to(dtype)
    )
    return scores


class UnitRows(torch.autograd.Function):
    """Unit rows and their lengths, with a gradient of few operations.

    For x = n u of length n, the gradient of u is (g - ⟨g, u⟩ u) / n, and that of n is u.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, differentiate_norm: bool) -> tuple[Tensor, Tensor]:
        # Divided by the largest entry first, so that no square over- or underflows. It cancels.
        largest = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
        unit = rows / largest
        norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
        if type(norm) is Tensor:  # a zero row's gradient is 0
            norm = F.threshold(norm, 0, torch.inf)
        else:  # torch 2.9 has no threshold of a DTensor
            norm = norm.masked_fill(norm == 0, torch.inf)
        return unit / norm, norm * largest

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.differentiate_norm = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, of_length: Tensor | None
    ) -> tuple[Tensor | None, None]:
        unit, length = ctx.saved_tensors
        total = None
        if gradient is not None:
            if ctx.differentiate_norm:
                along = (gradient * unit).sum(dim=-1, keepdim=True)
                gradient = torch.addcmul(gradient, along, unit, value=-1)
            total = gradient / length
        if of_length is not None:  # in a second derivative
            total = of_length * unit if total is None else total + of_length * unit
        return total, None


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(features: Tensor, weight: Tensor) -> Tensor:
        if torch._C._functorch.maybe_current_level() is not None:
            return F.linear(features, weight)
        rows = features.reshape(prod(features.shape[:-1]), features.shape[-1])
        scores = empty((len(rows), len(weight)), rows.dtype, rows)
        torch.mm(rows, weight.mT, out=scores)
        return scores.view(*features.shape[:-1], len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        features, weight = ctx.saved_tensors
        to_features = to_weight = None
        with autocast_disabled(gradient.device):
            if ctx.needs_input_grad[0]:
                to_features = gradient @ weight
            if ctx.needs_input_grad[1]:
                rows = prod(gradient.shape[:-1])  # not -1, for a weight without rows
                of_scores = gradient.reshape(rows, gradient.shape[-1])
                to_weight = of_scores.mT @ features.reshape(rows, features.shape[-1])
        return to_features, to_weight


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(loss: Tensor, factor: Tensor, *gradients_and_inputs: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, factor, *others = inputs
        gradients, differentiable = others[: len(others) // 2], others[len(others) // 2 :]
        ctx.save_for_backward(factor, *gradients)
        ctx.dtypes = [values.dtype for values in differentiable]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the loss has no second derivative: its gradient is computed along with its value, "
                "and is a constant from then on; expected a backward pass without create_graph=True"
            )
        factor, *saved = ctx.saved_tensors
        factor = factor * gradient
        wanted = ctx.needs_input_grad[-len(saved) :]
        # Multiplied in the dtype of factor, and rounded once.
        gradients = [
            torch.mul(values, factor, out=empty(values.shape, dtype, values)) if wants else None
            for values, dtype, wants in zip(saved, ctx.dtypes, wanted, strict=True)
        ]
        return (None, None, *[None] * len(saved), *gradients)


# torch asks for the signature of a forward at each call. Answered once, a small step takes 0.92 to
# 0.96 of the time.
for _function in (UnitRows, _Linear, _KnownGradients):
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
