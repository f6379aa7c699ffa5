"""Separable linear filters of images, accurate even if TF32 is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from swavkit._tensors import autocast_disabled


def filtered(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows · images · columnsᵀ in the dtype of the images, unaffected by autocast and TF32.

    Args:
        images: (B, C, H, W), differentiable.
        rows: (B, h, H), treated as constant.
        columns: (B, w, W), treated as constant.
    """
    result: Tensor = _Filtered.apply(images, rows, columns)  # type: ignore[no-untyped-call]
    return result


class _Filtered(torch.autograd.Function):
    """Autograd function of ``filtered``; its gradient is filtered by the transposed matrices."""

    @staticmethod
    def forward(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        with autocast_disabled(images.device):
            narrow = _product(images.flatten(1, 2), columns.mT)  # (B, C · H, w)
            return _product(rows[:, None], narrow.view(*images.shape[:3], columns.shape[1]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = ctx.saved_tensors
        return filtered(gradient, rows.mT, columns.mT), None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix product, within 1e-6 even if TF32 is allowed.

    TF32 rounds factors to 11 bits. Each factor is split into its first 11 bits, which TF32 keeps,
    and a small remainder. The product of both remainders is dropped. The TF32 setting is not
    queried, because that would break a graph.
    """
    if not _may_be_rounded(left):
        return left @ right
    left_high, right_high = _first_11_bits(left), _first_11_bits(right)
    correction = left_high @ (right - right_high) + (left - left_high) @ right_high
    return left_high @ right_high + correction


def _may_be_rounded(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and factor.device.type != "cpu"


def _first_11_bits(values: Tensor) -> Tensor:
    return (values.view(torch.int32) & -(1 << 13)).view(torch.float32)
