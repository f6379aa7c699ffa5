"""The codes in a few fused CUDA kernels, without a matrix of intermediate results.

The steps are those of :func:`~swavkit.sinkhorn.at_once.codes_at_once`. A program takes a few rows
of one problem and goes over their prototypes twice, tile by tile: first for v, then for its part of
the prototypes' masses, or for the codes. Parts of masses are added up in a fixed order, so results
do not differ from run to run. The first part is relative to its largest score of each prototype.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# ruff: noqa: N803

from __future__ import annotations

import math

import torch
from torch import Tensor

from swavkit._triton import jit, takes, tl, triton
from swavkit.sinkhorn.kernel import SCALINGS_OF_ONE_KERNEL

# No new compilation for another batch.
_jit = jit(["groups", "samples", "prototypes", "stride", "stride_of_problems"])
if triton is not None:
    # Scaled scores are within float32's largest number / 8, see kernel.py.
    _LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 4)
    _BELOW_ALL_SUMS = tl.constexpr(torch.finfo(torch.float32).min / 2)

usable = True  # until a kernel could not be run

# ---- The configuration. On an H200, 1,056 programs take 0.85 of the time of 528.
_VALUES_OF_A_TILE, _WARPS = 2**12, 8
_PROGRAMS = 1056  # at most; eight for each multiprocessor
_VALUES_OF_A_PROGRAM = 2**13  # at least, if there are more than _FEW_GROUPS programs
_LEAST_ROWS, _MOST_ROWS = 4, 64  # of a program. There is a sum of masses for each program.
_FEW_GROUPS = 8  # Each program adds up the masses of so many groups of rows by itself.
_TILE_OF_MASSES = (64, 32)  # groups and prototypes, otherwise
# ----


def supports(scores: Tensor, iterations: int, sample_weight: Tensor | None = None) -> bool:
    """Tell whether :func:`codes_by_triton` can compute the codes."""
    return bool(
        takes(scores)
        and scores.dim() in (2, 3)
        and all(0 < size < 2**28 for size in scores.shape)
        and (scores.dim() == 2 or len(scores) < 2**16)
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
    on_device = isinstance(epsilon, Tensor)
    if isinstance(epsilon, Tensor):
        epsilon = epsilon.to(scores.device, non_blocking=True)
    present = scores  # a pointer that is not used
    if sample_weight is not None:
        present = sample_weight.expand(problems, samples).contiguous().view(torch.uint8)

    rows, columns = _tile_sizes(problems, samples, prototypes)
    groups = triton.cdiv(samples, rows)
    # Several values can be loaded at a time if all rows are as well aligned as the first.
    alignment = math.gcd(prototypes, scores.stride(1), scores.stride(0), 8)
    sizes = [each // alignment for each in (prototypes, scores.stride(1), scores.stride(0))]
    settings: dict[str, int] = {"ON_DEVICE": on_device, "WEIGHTED": sample_weight is not None}
    settings |= {"ALIGNMENT": alignment, "ROWS": rows, "COLUMNS": columns, "num_warps": _WARPS}

    codes = scores.new_empty(scores.shape, dtype=torch.float32)
    size = (2, problems, groups, prototypes)
    add_up = groups > _FEW_GROUPS
    # Until the codes are written, their memory is free for the masses of all groups.
    memory = codes.view(-1)[: math.prod(size)].view(size) if add_up else codes.new_empty(size)
    shifts, masses = memory
    grid = (groups, problems)
    with torch.accelerator.device_index(scores.device.index):
        _start[grid](scores, present, epsilon, shifts, masses, samples, *sizes, **settings)
        for iteration in range(iterations):
            turn = {"FIRST": iteration == 0, "LAST": iteration == iterations - 1}
            if add_up:
                shifts, masses = _of_all_groups(shifts, masses, epsilon, turn["FIRST"])
            given = (shifts, masses, masses.shape[1])
            turn["GROUPS"] = triton.next_power_of_2(masses.shape[1])
            result = memory[1] if add_up else torch.empty_like(masses)
            if turn["LAST"]:
                result = codes
            _scale[grid](
                scores, present, epsilon, *given, result, samples, *sizes, **turn, **settings
            )
            masses = result
    return codes.view(shape)


def _tile_sizes(problems: int, samples: int, prototypes: int) -> tuple[int, int]:
    """Return rows and columns, powers of 2, that give all multiprocessors enough work."""
    programs = min(problems * samples * prototypes // _VALUES_OF_A_PROGRAM, _PROGRAMS)
    programs = max(programs, _FEW_GROUPS * problems)
    rows: int = triton.next_power_of_2(triton.cdiv(problems * samples, programs))
    rows = min(max(rows, _LEAST_ROWS), _MOST_ROWS, triton.next_power_of_2(samples))
    return rows, min(max(_VALUES_OF_A_TILE // rows, 32), triton.next_power_of_2(prototypes))


def _of_all_groups(
    shifts: Tensor, masses: Tensor, epsilon: float | Tensor, first: bool
) -> tuple[Tensor, Tensor]:
    """Return shifts and masses, (N, 1, K), of all groups (N, G, K)."""
    problems, groups, prototypes = masses.shape
    total = masses.new_empty(problems, 1, prototypes)
    shift = torch.empty_like(total) if first else shifts
    rows, columns = _TILE_OF_MASSES
    settings: dict[str, int] = {"ON_DEVICE": isinstance(epsilon, Tensor), "FIRST": first}
    settings |= {"ROWS": rows, "COLUMNS": columns}
    grid = (triton.cdiv(prototypes, columns), problems)
    _add_up[grid](shifts, masses, epsilon, shift, total, groups, prototypes, **settings)
    return shift, total


@_jit
def _scale_and_rate(epsilon, ON_DEVICE: tl.constexpr):
    """Return two factors of scores, as ``scale_and_rate`` in kernel.py."""
    if ON_DEVICE:
        epsilon = tl.load(epsilon)
    epsilon = tl.minimum(tl.full((), epsilon, tl.float32), 1e38)
    scale = 0.125 / tl.maximum(epsilon, 1.0)
    return scale, tl.minimum(1.0 / (scale * epsilon), 3.4028234e38)


@_jit
def _rows_of(
    scores, present, samples, stride, stride_of_problems,
    WEIGHTED: tl.constexpr, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return numbers and pointers of a program's rows, and whether they exist and count."""
    problem = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    exist = rows < samples
    count = exist
    if WEIGHTED:
        count = tl.load(present + problem * samples + rows, mask=exist, other=0) != 0
    scores += (problem * stride_of_problems + rows.to(tl.int64) * stride) * ALIGNMENT
    return problem * samples + rows, scores, exist, count


@_jit
def _tile(scores, start, prototypes, exist, scale, COLUMNS: tl.constexpr):
    """Return numbers of prototypes, whether they exist, and scaled scores."""
    columns = start + tl.arange(0, COLUMNS)[None, :]
    inside = columns < prototypes
    values = tl.load(scores + columns, mask=exist & inside, other=0.0)
    return columns, inside, values.to(tl.float32) * scale


@_jit
def _f_and_u(
    shifts, masses, groups, prototypes, columns, inside, rate,
    FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Return f and u of some prototypes: 0 and 1 if no sample counts, and u = 0 outside."""
    group = tl.arange(0, GROUPS)[:, None]
    places, here = group * prototypes + columns, (group < groups) & inside
    shift = tl.load(shifts + places, mask=here, other=_LOWEST)
    mass = tl.load(masses + places, mask=here, other=0.0)
    largest = tl.max(shift, axis=0, keep_dims=True)
    if FIRST:
        mass *= tl.exp(rate * (shift - largest))
    total = tl.sum(mass, axis=0, keep_dims=True)
    u = tl.where(total == 0, 1.0, 1.0 / total)
    return tl.where(largest <= _LOWEST, 0.0, -largest), tl.where(inside, u, 0.0)


@_jit
def _start(
    scores, present, epsilon, shifts, masses, samples, prototypes, stride, stride_of_problems,
    ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find the largest scores of a group of rows, and the masses relative to these."""
    prototypes *= ALIGNMENT
    scale, rate = _scale_and_rate(epsilon, ON_DEVICE)
    _rows, scores, exist, count = _rows_of(
        scores, present, samples, stride, stride_of_problems, WEIGHTED, ALIGNMENT, ROWS
    )
    nan_mask = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        _columns, _inside, values = _tile(scores, start, prototypes, exist, scale, COLUMNS)
        nan_mask += tl.where(tl.abs(values) < float("inf"), 0.0, 1.0)
    count = count & (tl.sum(nan_mask, axis=1, keep_dims=True) == 0)

    first = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * prototypes
    for start in range(0, prototypes, COLUMNS):
        columns, inside, values = _tile(scores, start, prototypes, exist, scale, COLUMNS)
        values = tl.where(count, values, _LOWEST)
        largest = tl.max(values, axis=0, keep_dims=True)
        terms = tl.where(count, tl.exp(rate * (values - largest)), 0.0)
        tl.store(shifts + first + columns, largest, mask=inside)
        tl.store(masses + first + columns, tl.sum(terms, axis=0, keep_dims=True), mask=inside)


@_jit
def _scale(
    scores, present, epsilon, shifts, masses, groups, result,
    samples, prototypes, stride, stride_of_problems,
    ON_DEVICE: tl.constexpr, WEIGHTED: tl.constexpr, ALIGNMENT: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Find v of a group of rows, and with it their masses without u, or codes."""
    prototypes *= ALIGNMENT
    scale, rate = _scale_and_rate(epsilon, ON_DEVICE)
    rows, scores, exist, count = _rows_of(
        scores, present, samples, stride, stride_of_problems, WEIGHTED, ALIGNMENT, ROWS
    )
    problem = tl.program_id(1).to(tl.int64)
    shifts += problem * groups * prototypes
    masses += problem * groups * prototypes

    # Each place of a tile has a largest value and a sum of its own until the end.
    largest = tl.full((ROWS, COLUMNS), _BELOW_ALL_SUMS, tl.float32)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, prototypes, COLUMNS):
        columns, inside, values = _tile(scores, start, prototypes, exist, scale, COLUMNS)
        f, u = _f_and_u(shifts, masses, groups, prototypes, columns, inside, rate, FIRST, GROUPS)
        nan_mask = tl.where(tl.abs(values) < float("inf"), 0.0, float("nan"))
        values = tl.where(inside, values + f, _BELOW_ALL_SUMS)
        factor = tl.exp(-rate * tl.abs(values - largest))
        total = tl.where(values > largest, total * factor + u, total + factor * u) + nan_mask
        largest = tl.maximum(largest, values)
    level = tl.max(largest, axis=1, keep_dims=True)
    total = tl.sum(total * tl.exp(rate * (largest - level)), axis=1, keep_dims=True)
    finite = total == total  # A row with a score that is not finite has a NaN sum.
    v = 1.0 / total

    first = (problem * tl.num_programs(0) + tl.program_id(0)) * prototypes
    for start in range(0, prototypes, COLUMNS):
        columns, inside, values = _tile(scores, start, prototypes, exist, scale, COLUMNS)
        f, u = _f_and_u(shifts, masses, groups, prototypes, columns, inside, rate, FIRST, GROUPS)
        values = tl.exp(rate * (values + f - level))
        if LAST:
            values = tl.where(finite | count, values * u * v, 0.0)
            tl.store(result + rows * prototypes + columns, values, mask=exist & inside)
        else:
            values = tl.where(finite & count, values * v, 0.0)
            sums = tl.sum(values, axis=0, keep_dims=True)
            tl.store(result + first + columns, sums, mask=inside)


@_jit
def _add_up(
    shifts, masses, epsilon, shift, total, groups, prototypes,
    ON_DEVICE: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the masses of all groups, the first ones relative to the largest shift."""
    _, rate = _scale_and_rate(epsilon, ON_DEVICE)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < prototypes
    problem = tl.program_id(1).to(tl.int64)
    rows = tl.arange(0, ROWS)[:, None]
    largest = tl.full((ROWS, COLUMNS), _LOWEST, tl.float32)
    if FIRST:
        for start in range(0, groups, ROWS):
            here = inside & (start + rows < groups)
            places = (problem * groups + start + rows) * prototypes + columns
            values = tl.load(shifts + places, mask=here, other=_LOWEST)
            largest = tl.maximum(largest, values)
        largest = tl.max(largest, axis=0, keep_dims=True)
        tl.store(shift + problem * prototypes + columns, largest, mask=inside)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, groups, ROWS):
        here = inside & (start + rows < groups)
        places = (problem * groups + start + rows) * prototypes + columns
        values = tl.load(masses + places, mask=here, other=0.0)
        if FIRST:
            own = tl.load(shifts + places, mask=here, other=_LOWEST)
            values *= tl.exp(rate * (own - largest))
        sums += values
    sums = tl.sum(sums, axis=0, keep_dims=True)
    tl.store(total + problem * prototypes + columns, sums, mask=inside)
