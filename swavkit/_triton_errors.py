"""Errors of predictions and their residuals in one CUDA kernel, without temporary memory.

The equations are those of ``_prediction_errors.py``. A program takes one sample of one view and
goes over its prototypes three times, tile by tile: for the largest score, for the sums, and for the
residual, which may overwrite the scores.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from swavkit._prediction_errors import LARGEST_RESIDUAL_IN_FLOAT16, LEAST_MASS_IN_FLOAT16
from swavkit._triton import jit, takes, tl, triton

_jit = jit(["samples", "view"])  # for another batch, the same kernel
if triton is not None:
    _SCALE = tl.constexpr(LARGEST_RESIDUAL_IN_FLOAT16)
    _LEAST_MASS = tl.constexpr(LEAST_MASS_IN_FLOAT16)

usable = True  # until the kernel could not be run

_MOST_COLUMNS, _COLUMNS_OF_A_WARP = 4096, 512  # of a tile


def supports(
    scores: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
    residuals: Tensor | Sequence[Tensor] | None,
) -> bool:
    """Tell whether :func:`errors_by_triton` can compute the errors."""
    tensors = [*scores, *codes, *([] if residuals is None else residuals)]
    return len(codes) <= 2 and all(takes(each) and 0 < each.numel() < 2**31 for each in tensors)


def errors_by_triton(
    scores: Tensor | Sequence[Tensor],
    codes: Tensor | Sequence[Tensor],
    inverse_temperature: float | Tensor,
    sample_weight: Tensor | None,
    residuals: Tensor | Sequence[Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the errors (b,) and the scale of the residuals of one or two codes.

    Arguments and results are those of :func:`~swavkit.swapped_prediction.errors_of_samples`.
    """
    views, (samples, prototypes) = len(scores), scores[0].shape
    errors = torch.empty(views, samples, device=scores[0].device)
    scaled = scores[0].dtype == torch.float16
    scales = torch.empty_like(errors[0]) if scaled else errors  # or a pointer that is not used
    if isinstance(inverse_temperature, Tensor):
        inverse_temperature = inverse_temperature.to(errors.device, non_blocking=True)
    weight = errors if sample_weight is None else sample_weight
    if weight.dtype == torch.bool:
        weight = weight.view(torch.uint8)
    columns = min(triton.next_power_of_2(prototypes), _MOST_COLUMNS)
    settings = {
        "ON_DEVICE": isinstance(inverse_temperature, Tensor),
        "WEIGHTED": sample_weight is not None,
        "CODES": len(codes),
        "RESIDUAL": residuals is not None,
        "SCALED": scaled,
        "COLUMNS": columns,
        "num_warps": max(columns // _COLUMNS_OF_A_WARP, 1),
    }
    # Views in one tensor take one launch.
    launches = [(0, views)] if isinstance(scores, Tensor) else [(view, 1) for view in range(views)]
    with torch.accelerator.device_index(errors.device.index):
        for view, count in launches:
            own = scores[view]
            residual = own if residuals is None else residuals[view]
            _errors[samples, count](
                own,
                *(codes[0], codes[-1]),
                *(inverse_temperature, weight, errors, residual, scales),
                *(samples, prototypes, view),
                *(scores.stride(0) if isinstance(scores, Tensor) else 0, own.stride(0)),
                *(residuals.stride(0) if isinstance(residuals, Tensor) else 0, residual.stride(0)),
                *(codes[0].stride(0), codes[-1].stride(0), weight.stride(0)),
                **settings,
            )
    return errors.sum(dim=0), scales if scaled else None


@_jit
def _tile(
    scores, first, second, start, prototypes, predicts_first, predicts_second,
    CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return numbers of prototypes, whether they exist, scores, the target and all codes."""
    columns = start + tl.arange(0, COLUMNS)
    inside = columns < prototypes
    values = tl.load(scores + columns, mask=inside, other=float("-inf")).to(tl.float32)
    of_all = tl.load(first + columns, mask=inside, other=0.0).to(tl.float32)
    target = tl.where(predicts_first, of_all, 0.0)
    if CODES == 2:
        code = tl.load(second + columns, mask=inside, other=0.0).to(tl.float32)
        target += tl.where(predicts_second, code, 0.0)
        of_all += code
    return columns, inside, values, target, of_all


@_jit
def _errors(
    scores, first, second, inverse_temperature, weight, errors, residuals, scales,
    samples, prototypes, view,
    view_stride, stride, view_stride_of_residuals, stride_of_residuals,
    stride_of_first, stride_of_second, stride_of_weight,
    ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr, CODES: tl.constexpr,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    sample, place = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    scores += place * view_stride + sample * stride
    residuals += place * view_stride_of_residuals + sample * stride_of_residuals
    first += sample * stride_of_first
    second += sample * stride_of_second
    view += tl.program_id(1)
    if ON_DEVICE:
        inverse_temperature = tl.load(inverse_temperature)
    inverse_temperature = tl.full((), inverse_temperature, tl.float32)
    predicts_first = view != 0
    predicts_second = (CODES == 2) & (view != 1)
    counts = predicts_first | predicts_second
    if WEIGHTED:
        counts = counts & (tl.load(weight + sample * stride_of_weight) != 0)

    largest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        inside = columns < prototypes
        values = tl.load(scores + columns, mask=inside, other=float("-inf"))
        largest = tl.maximum(largest, values.to(tl.float32))
    level = tl.max(largest, axis=0)

    # A NaN in the scores makes the sum of the exponentials NaN, one in a code its mass.
    sums = tl.zeros((COLUMNS,), tl.float32)
    agreement = tl.zeros((COLUMNS,), tl.float32)
    mass = tl.zeros((COLUMNS,), tl.float32)
    mass_of_all = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        _columns, _inside, values, target, of_all = _tile(
            scores, first, second, start, prototypes, predicts_first, predicts_second,
            CODES, COLUMNS,
        )  # fmt: skip
        logits = (values - level) * inverse_temperature
        sums += tl.exp(logits)
        mass += target
        mass_of_all += of_all
        agreement += tl.where(target == 0, 0.0, target * logits)  # 0 · -inf is 0 here
    total, of_target = tl.sum(sums, axis=0), tl.sum(mass, axis=0)
    error = of_target * tl.log(total) - tl.sum(agreement, axis=0)
    tl.store(errors + view * samples + sample, tl.where(counts, error, 0.0))

    scale = 1.0
    if SCALED:
        of_all = tl.sum(mass_of_all, axis=0)
        of_all = tl.where((of_all > 0) & (of_all < float("inf")), of_all, 1.0)
        scale = _SCALE / tl.maximum(of_all, _LEAST_MASS)
        tl.store(scales + sample, scale, mask=view == 0)
    if RESIDUAL:
        factor = of_target / total
        for start in range(0, prototypes, COLUMNS):
            columns, inside, values, target, _of_all = _tile(
                scores, first, second, start, prototypes, predicts_first, predicts_second,
                CODES, COLUMNS,
            )  # fmt: skip
            softmax = tl.exp((values - level) * inverse_temperature)
            residual = tl.where(counts, (target - factor * softmax) * scale, 0.0)
            tl.store(residuals + columns, residual, mask=inside)
