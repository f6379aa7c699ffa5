"""The codes in a few fused CUDA kernels, without a matrix of intermediate results.

The steps are those of :func:`~swavkit.sinkhorn.kernel.codes_at_once`. A program takes a few rows of
one problem and goes over their prototypes twice, tile by tile: first for v, then for its part of
the prototypes' masses, or for the codes. Parts of masses are added up in a fixed order, so results
do not differ from run to run. The first part is relative to its largest score of each prototype.

Triton comes with torch for CUDA, and is imported along with this file.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swavkit.sinkhorn.kernel import SCALINGS_OF_ONE_KERNEL

_jit: Callable[..., Any]
try:
    import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
    import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ImportError:
    triton = None

    def _jit(kernel):
        return kernel
else:
    # No new compilation for another batch.
    _sizes = ["groups", "samples", "prototypes", "stride", "stride_of_problems"]
    _jit = triton.jit(do_not_specialize=_sizes)
    # Scaled scores are within ±float32's largest number / 8, see kernel.py, and S + f within / 4.
    _LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 4)
    _BELOW_ALL_SUMS = tl.constexpr(torch.finfo(torch.float32).min / 2)

# ---- The configuration, to be chosen by measurements on a device.
_VALUES_OF_A_TILE = 2**12
_WARPS = 8
_VALUES_OF_A_PROGRAM = 2**13  # at least, as long as there are _FEW_GROUPS
_PROGRAMS = 528  # at most, up to _MOST_ROWS each; four per multiprocessor of an H100
_LEAST_ROWS, _MOST_ROWS = 4, 64  # of a program; the memory for parts of masses is 1 / rows of S
_FEW_GROUPS = 8  # Each program adds up the masses of so many groups of rows by itself.
_TILE_OF_PARTS = (64, 32)  # groups and prototypes to add up at a time
# ----


def supports(scores: Tensor, iterations: int, sample_weight: Tensor | None = None) -> bool:
    """Tell whether :func:`codes_by_triton` can compute the codes."""
    if triton is None or torch.compiler.is_compiling() or type(scores) is not Tensor:
        return False
    on_device = scores.is_cuda or (triton.knobs.runtime.interpret and scores.device.type == "cpu")
    return bool(
        on_device
        and scores.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and scores.dim() in (2, 3)
        and 0 < scores.shape[-1] < 2**30
        and 0 < scores.shape[-2] < 2**30
        and (scores.dim() == 2 or 0 < len(scores) < 2**16)
        and (scores.stride(-1) == 1 or scores.shape[-1] == 1)
        and iterations <= SCALINGS_OF_ONE_KERNEL
        and (sample_weight is None or sample_weight.dtype == torch.bool)
    )


def codes_by_triton(
    scores: Tensor, epsilon: float | Tensor, iterations: int, sample_weight: Tensor | None = None
) -> Tensor:
    """Return the float32 codes of scores (B, K) or (N, B, K) with equal prototype masses.

    ``sample_weight``, (B,) or (N, B) bool, tells which samples are present.
    """
    shape = scores.shape
    scores = scores if scores.dim() == 3 else scores.unsqueeze(0)
    problems, samples, prototypes = scores.shape
    is_tensor = isinstance(epsilon, Tensor)
    epsilon = epsilon.to(scores.device, non_blocking=True) if is_tensor else float(epsilon)
    present = scores  # a pointer that is not used
    if sample_weight is not None:
        present = sample_weight.expand(problems, samples).contiguous().view(torch.uint8)

    rows = _rows_of_a_program(problems, samples, prototypes)
    groups = triton.cdiv(samples, rows)
    widest = triton.next_power_of_2(prototypes)
    columns = min(max(_VALUES_OF_A_TILE // rows, _TILE_OF_PARTS[1]), widest)
    # A factor of all distances between rows makes loads of several values at a time possible.
    sizes = (prototypes, scores.stride(1), scores.stride(0))
    alignment = math.gcd(*sizes, 8)
    sizes = (samples, *(size // alignment for size in sizes))
    settings = {
        "ON_DEVICE": is_tensor,
        "WEIGHTED": sample_weight is not None,
        "ALIGNMENT": alignment,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": _WARPS,
    }

    codes = scores.new_empty(scores.shape, dtype=torch.float32)
    shifts = codes.new_empty(problems, groups, prototypes)
    with torch.accelerator.device_index(scores.device.index):
        masses = torch.empty_like(shifts)
        grid = (groups, problems)
        _start[grid](scores, present, epsilon, shifts, masses, *sizes, **settings)
        for iteration in range(iterations):
            first, last = iteration == 0, iteration == iterations - 1
            if groups > _FEW_GROUPS:
                shifts, masses = _added_up(shifts, masses, epsilon, first)
            parts = codes if last else codes.new_empty(problems, groups, prototypes)
            vectors = (shifts, masses, masses.shape[1], parts)
            options = {"FIRST": first, "LAST": last, **settings}
            _scale[grid](scores, present, epsilon, *vectors, *sizes, **options)
            masses = parts
    return codes.view(shape)


def _rows_of_a_program(problems: int, samples: int, prototypes: int) -> int:
    """Return a power of 2 for which all multiprocessors have work, but not too little each."""
    programs = problems * samples * prototypes // _VALUES_OF_A_PROGRAM
    programs = min(max(programs, _FEW_GROUPS * problems), _PROGRAMS)
    rows = triton.next_power_of_2(triton.cdiv(problems * samples, programs))
    return min(max(rows, _LEAST_ROWS), _MOST_ROWS, triton.next_power_of_2(samples))


def _added_up(
    shifts: Tensor, masses: Tensor, epsilon: float | Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """Return the shifts and masses of all groups, (N, 1, K)."""
    problems, groups, prototypes = masses.shape
    total = masses.new_empty(problems, 1, prototypes)
    shift = torch.empty_like(total) if first else shifts
    rows, columns = _TILE_OF_PARTS
    grid = (triton.cdiv(prototypes, columns), problems)
    sizes = {"FIRST": first, "ROWS": rows, "COLUMNS": columns}
    sizes["ON_DEVICE"] = isinstance(epsilon, Tensor)
    _add_up[grid](shifts, masses, epsilon, shift, total, groups, prototypes, **sizes)
    return shift, total


@_jit
def _scale_and_rate(epsilon, ON_DEVICE: tl.constexpr):
    """Return two factors of scores, as ``scale_and_rate`` in kernel.py."""
    if ON_DEVICE:
        epsilon = tl.load(epsilon).to(tl.float32)
    else:
        epsilon = tl.full((), epsilon, tl.float32)
    epsilon = tl.minimum(epsilon, 1e38)
    scale = 0.125 / tl.maximum(epsilon, 1.0)
    return scale, tl.minimum(1.0 / (scale * epsilon), 3.4028234e38)


@_jit
def _f_and_u(shifts, masses, groups, prototypes, columns, inside, rate, FIRST: tl.constexpr):
    """Return f and u of some prototypes: 0 and 1 if no sample is present, u = 0 outside."""
    largest = tl.load(shifts + columns, mask=inside, other=0.0)
    total = tl.load(masses + columns, mask=inside, other=0.0)
    for group in range(1, groups):
        here = columns + group * prototypes
        shift = tl.load(shifts + here, mask=inside, other=0.0)
        mass = tl.load(masses + here, mask=inside, other=0.0)
        above = tl.maximum(largest, shift)
        if FIRST:
            total *= tl.exp(rate * (largest - above))
            mass *= tl.exp(rate * (shift - above))
        largest, total = above, total + mass
    u = tl.where(total == 0, 1.0, 1.0 / total)
    return tl.where(largest <= _LOWEST, 0.0, -largest), tl.where(inside, u, 0.0)


@_jit
def _rows_of(
    scores, present, samples, stride, stride_of_problems,
    WEIGHTED: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return numbers and pointers of a program's rows, whether they exist, and are present."""
    problem = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    exist = rows < samples
    counted = exist
    if WEIGHTED:
        counted = tl.load(present + problem * samples + rows, mask=exist, other=0) != 0
    scores += (problem * stride_of_problems + rows.to(tl.int64) * stride) * ALIGNMENT
    return problem * samples + rows, scores, exist, counted


@_jit
def _start(
    scores, present, epsilon, shifts, masses, samples, prototypes, stride, stride_of_problems,
    ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the largest scores of a group of rows, and the masses relative to these."""
    prototypes *= ALIGNMENT
    scale, rate = _scale_and_rate(epsilon, ON_DEVICE)
    _, scores, exist, counted = _rows_of(
        scores, present, samples, stride, stride_of_problems, WEIGHTED, ALIGNMENT, ROWS
    )
    nan_mask = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        values = tl.load(scores + columns, mask=exist & (columns < prototypes), other=0.0)
        values = values.to(tl.float32) * scale
        nan_mask += values - values
    counted = counted & (tl.sum(nan_mask, axis=1, keep_dims=True) == 0)

    first = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * prototypes
    for start in range(0, prototypes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < prototypes
        values = tl.load(scores + columns, mask=exist & inside, other=0.0)
        values = tl.where(counted, values.to(tl.float32) * scale, _LOWEST)
        largest = tl.max(values, axis=0, keep_dims=True)
        terms = tl.where(counted, tl.exp(rate * (values - largest)), 0.0)
        tl.store(shifts + first + columns, largest, mask=inside)
        tl.store(masses + first + columns, tl.sum(terms, axis=0, keep_dims=True), mask=inside)


@_jit
def _scale(
    scores, present, epsilon, shifts, masses, groups, results,
    samples, prototypes, stride, stride_of_problems,
    ON_DEVICE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, WEIGHTED: tl.constexpr,
    ALIGNMENT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find v of a group of rows, and then its masses without u, or its codes."""
    prototypes *= ALIGNMENT
    scale, rate = _scale_and_rate(epsilon, ON_DEVICE)
    numbers, scores, exist, counted = _rows_of(
        scores, present, samples, stride, stride_of_problems, WEIGHTED, ALIGNMENT, ROWS
    )
    problem = tl.program_id(1).to(tl.int64)
    shifts += problem * groups * prototypes
    masses += problem * groups * prototypes

    # Each place of a tile has a largest value and a sum of its own until the end.
    largest = tl.full((ROWS, COLUMNS), _BELOW_ALL_SUMS, tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < prototypes
        f, u = _f_and_u(shifts, masses, groups, prototypes, columns, inside, rate, FIRST)
        values = tl.load(scores + columns, mask=exist & inside, other=0.0).to(tl.float32) * scale
        nan_mask = values - values
        values = tl.where(inside, values + f, _BELOW_ALL_SUMS)
        change = values - largest
        factor = tl.exp(-rate * tl.abs(change))
        total = tl.where(change > 0, total * factor + u, total + factor * u) + nan_mask
        largest = tl.maximum(largest, values)
    level = tl.max(largest, axis=1, keep_dims=True)
    total = tl.sum(total * tl.exp(rate * (largest - level)), axis=1, keep_dims=True)
    finite = total == total  # A row with a score that is not finite has a NaN sum.
    v = 1.0 / total

    first = (problem * tl.num_programs(0) + tl.program_id(0)) * prototypes
    for start in range(0, prototypes, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)[None, :]
        inside = columns < prototypes
        f, u = _f_and_u(shifts, masses, groups, prototypes, columns, inside, rate, FIRST)
        values = tl.load(scores + columns, mask=exist & inside, other=0.0).to(tl.float32) * scale
        values = tl.exp(rate * (values + f - level))
        if LAST:
            values = tl.where(finite | counted, values * u * v, 0.0)
            tl.store(results + numbers * prototypes + columns, values, mask=exist & inside)
        else:
            values = tl.where(finite & counted, values * v, 0.0)
            sums = tl.sum(values, axis=0, keep_dims=True)
            tl.store(results + first + columns, sums, mask=inside)


@_jit
def _add_up(
    shifts, masses, epsilon, shift, total, groups, prototypes,
    ON_DEVICE: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the masses of all groups; the first ones are brought to their largest shift before."""
    _, rate = _scale_and_rate(epsilon, ON_DEVICE)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < prototypes
    problem = tl.program_id(1).to(tl.int64)
    shifts += problem * groups * prototypes + columns
    masses += problem * groups * prototypes + columns
    places = problem * prototypes + columns
    rows = tl.arange(0, ROWS)[:, None]
    if FIRST:
        largest = tl.full((ROWS, COLUMNS), _LOWEST, tl.float32)
        for start in range(0, groups, ROWS):
            here = inside & (start + rows < groups)
            values = tl.load(shifts + (start + rows) * prototypes, mask=here, other=_LOWEST)
            largest = tl.maximum(largest, values)
        largest = tl.max(largest, axis=0, keep_dims=True)
        tl.store(shift + places, largest, mask=inside)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, groups, ROWS):
        here = inside & (start + rows < groups)
        values = tl.load(masses + (start + rows) * prototypes, mask=here, other=0.0)
        if FIRST:
            own = tl.load(shifts + (start + rows) * prototypes, mask=here, other=_LOWEST)
            values *= tl.exp(rate * (own - largest))
        sums += values
    tl.store(total + places, tl.sum(sums, axis=0, keep_dims=True), mask=inside)
