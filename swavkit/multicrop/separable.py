"""Separable linear filters of images, accurate even if TF32 is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swavkit._tensors import autocast_disabled


def filtered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows · images · columnsᵀ in the dtype of the filters, unaffected by autocast and TF32.

    The heights of the images come before their channels. Both products are then batches of
    matrices as they lie in memory, and an image is read once for all of its V filters.

    Args:
        images: (B, H, C, W), differentiable.
        rows: (B, V, h, H), treated as constant.
        columns: (B, V, w, W), treated as constant.

    Returns:
        (B, V, h, C, w).
    """
    count, height, channels, width = images.shape
    views = rows.shape[1]
    low = _product(rows.flatten(1, 2), images.reshape(count, height, channels * width))
    crops = low.view(count * views, rows.shape[2] * channels, width)
    crops = _product(crops, columns.flatten(0, 1).mT)
    return crops.view(count, views, rows.shape[2], channels, columns.shape[2])


def _product(left: Tensor, right: Tensor) -> Tensor:
    result: Tensor = _Product.apply(left, right)  # type: ignore[no-untyped-call]
    return result


class _Product(torch.autograd.Function):
    """Batched matrix product, within 1e-6 even if TF32 is allowed; so are its gradients.

    TF32 rounds factors to 11 bits. Each factor is split into its first 11 bits, which TF32 keeps,
    and a small remainder. The product of both remainders is dropped.
    """

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        # Here and not around the call, since a compiler traces the backward pass under the autocast
        # of the call.
        with autocast_disabled(left.device):
            if not _may_be_rounded(left):
                return left @ right
            left_high, right_high = _first_11_bits(left), _first_11_bits(right)
            correction = torch.bmm(left_high, right - right_high)
            correction = torch.baddbmm(correction, left - left_high, right_high)
            return torch.baddbmm(correction, left_high, right_high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        left, right = ctx.saved_tensors
        with autocast_disabled(gradient.device):
            return (
                _product(gradient, right.mT) if ctx.needs_input_grad[0] else None,
                _product(left.mT, gradient) if ctx.needs_input_grad[1] else None,
            )


def _may_be_rounded(factor: Tensor) -> bool:
    """Return whether TF32 may round the factors; a compiled graph may outlive the setting."""
    if factor.dtype != torch.float32 or factor.device.type == "cpu":
        return False
    if torch.compiler.is_compiling() or factor.device.type not in ("cuda", "meta"):
        return True
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch refuses to answer if both of its interfaces were used
        return True


def _first_11_bits(values: Tensor) -> Tensor:
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)
