"""A training step on several ranks: its time, and the share of communication.

The whole batch is the same for any number of ranks, which hold equal parts of it. The time includes
the loss, forward and backward. If prototypes are on every rank, it also includes the average of
their gradients, as in DDP. Communication is the time inside collectives, including the wait for
other ranks. Ranks that share the cores of a machine do not measure scaling.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_loss import CODE_VIEWS, FEATURE_DIM, Problem
from benchmarks.harness import OURS
from benchmarks.published import published_loss, published_step
from swavkit import SwAVLoss
from tests.ranks import Ranks

PROCESSES = (1, 2)
CASES = (Problem(256, 3000), Problem(64, 16_384))
QUICK = Problem(16, 50)
COLLECTIVES = ("all_reduce", "all_gather")

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]  # the loss, gradients of features, of prototypes


@dataclass(frozen=True)
class Row:
    """The result of one contender on one number of ranks: seconds of the slowest rank."""

    title: str
    processes: int
    cores: int
    contender: str
    error: float  # of loss and gradients, relative to the largest entry
    median: float
    lower_quartile: float
    upper_quartile: float
    communication: float  # as a share of the time
    collectives: int  # per step
    numbers: int  # entries of a rank's tensors in the collectives of a step


class Meter:
    """Counts and times the collectives of this rank."""

    def __enter__(self) -> Meter:
        self.seconds, self.calls, self.numbers = 0.0, 0, 0
        self.plain = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, call in self.plain.items():
            setattr(dist, name, self._timed(call))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.plain.items():
            setattr(dist, name, call)

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(first: Any, *others: Any, **settings: Any) -> Any:
            begin = time.perf_counter()
            result = call(first, *others, **settings)
            self.seconds += time.perf_counter() - begin
            self.calls += 1
            parts = [first] if isinstance(first, Tensor) else first
            self.numbers += sum(part.numel() for part in parts)
            return result

        return timed


def measure(*, quick: bool) -> list[Row]:
    """Verify and time every contender on every number of ranks."""
    rows = []
    for processes in PROCESSES:
        ranks = Ranks(processes)
        for problem in (QUICK,) if quick else CASES:
            seconds = 0.1 if quick else 2.0
            rows += _rows(problem, ranks.run(of_rank, [(problem, seconds)] * processes))
        ranks.close()
    return rows


def contenders(problem: Problem) -> dict[str, Step]:
    """Return a step of this rank for each contender."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    features, weight = problem.inputs()
    features = features.chunk(processes, dim=1)[rank].clone().requires_grad_()
    criteria = {
        OURS: SwAVLoss(FEATURE_DIM, problem.prototypes, num_code_views=CODE_VIEWS),
        f"{OURS}, sharded": SwAVLoss(
            FEATURE_DIM, problem.prototypes, num_code_views=CODE_VIEWS, shard_prototypes=True
        ),
    }
    for criterion in criteria.values():
        criterion.load_state_dict({"prototypes.weight": weight}, strict=False)
    weight = weight.clone().requires_grad_()

    def step_of(criterion: SwAVLoss) -> Step:
        parameter = criterion.prototypes.weight

        def step() -> tuple[Tensor, Tensor, Tensor]:
            loss = criterion(features)
            of_features, of_weight = torch.autograd.grad(loss, [features, parameter])
            if processes > 1 and type(of_weight) is Tensor:
                dist.all_reduce(of_weight)
                of_weight /= processes
            return loss, of_features, of_weight

        return step

    def published() -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            weight.div_(weight.norm(dim=-1, keepdim=True))
        scores = F.normalize(features, dim=-1) @ weight.T
        codes = [published_codes_of_ranks(view) for view in scores.detach()[:CODE_VIEWS]]
        loss = published_loss(scores, codes)
        of_features, of_weight = torch.autograd.grad(loss, [features, weight])
        if processes > 1:
            dist.all_reduce(of_weight)
            of_weight /= processes
        return loss, of_features, of_weight

    ours = {name: step_of(criterion) for name, criterion in criteria.items()}
    return {**ours, "published": published}


@torch.no_grad()
def published_codes_of_ranks(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the published codes of this rank's part of one view's scores, (b, K).

    All ranks must have equal parts.
    """
    samples = len(scores) * dist.get_world_size()
    plan = torch.exp(scores / epsilon)
    total = plan.sum()
    _sum(total)
    plan /= total
    for _ in range(iterations):
        mass = plan.sum(dim=0, keepdim=True)
        _sum(mass)
        plan /= mass * scores.shape[1]
        plan /= plan.sum(dim=1, keepdim=True) * samples
    return plan * samples


def _sum(values: Tensor) -> None:
    if dist.get_world_size() > 1:
        dist.all_reduce(values)


def of_rank(rank: int, argument: tuple[Problem, float]) -> dict[str, dict[str, Any]]:
    """Return the results of one rank for each contender."""
    problem, seconds = argument
    steps = contenders(problem)
    results = {}
    for name, step in steps.items():
        for _ in range(4):  # some of these compare settings, as a few later ones do
            answer = step()
        with Meter() as meter:
            begin = time.perf_counter()
            step()
            duration = time.perf_counter() - begin
        rounds = torch.tensor(min(max(5, int(seconds / duration)), 200))
        dist.broadcast(rounds, 0)
        durations, shares = [], []
        for _ in range(int(rounds)):
            dist.barrier()
            with Meter() as of_step:
                begin = time.perf_counter()
                step()
                durations.append(time.perf_counter() - begin)
            shares.append(of_step.seconds / durations[-1])
        results[name] = {
            "error": _error(problem, rank, *answer),
            "durations": durations,
            "communication": statistics.median(shares),
            "collectives": meter.calls,
            "numbers": meter.numbers,
        }
    return results


def _error(
    problem: Problem, rank: int, loss: Tensor, of_features: Tensor, of_weight: Tensor
) -> float:
    """Return the largest error relative to one rank in float64 on the whole batch.

    The gradient component along the prototypes is ignored, as in ``bench_loss.py``.
    """
    processes = dist.get_world_size()
    features, weight = (values.double().requires_grad_() for values in problem.inputs())
    reference = published_step(features, weight, CODE_VIEWS)
    expected = list(torch.autograd.grad(reference, [features, weight]))
    unit = F.normalize(weight.detach(), dim=-1)
    if type(of_weight) is not Tensor:
        of_weight = of_weight.full_tensor()
    turning = [
        values - (values * unit).sum(dim=-1, keepdim=True) * unit
        for values in (of_weight, expected[1])
    ]
    mean = loss.detach().double()
    _sum(mean)
    pairs = [
        (mean / processes, reference.detach()),
        # Averaging the gradients of the network's parameters divides by the number of ranks.
        (of_features / processes, expected[0].chunk(processes, dim=1)[rank]),
        (turning[0], turning[1]),
    ]
    return max(((ours - its).abs().max() / its.abs().max()).item() for ours, its in pairs)


def _rows(problem: Problem, results: list[dict[str, dict[str, Any]]]) -> list[Row]:
    rows = []
    for name in results[0]:
        of_ranks = [result[name] for result in results]
        slowest = [
            max(times) for times in zip(*(one["durations"] for one in of_ranks), strict=True)
        ]
        lower, median, upper = statistics.quantiles(slowest, n=4, method="inclusive")
        error = max(one["error"] for one in of_ranks)
        if name != "published" and not error <= problem.tolerance:
            raise ValueError(f"{name} must be within {problem.tolerance:g}, got {error:g}")
        rows.append(
            Row(
                title=f"ranks: {problem}",
                processes=len(results),
                cores=os.cpu_count() or 1,
                contender=name,
                error=error,
                median=median,
                lower_quartile=lower,
                upper_quartile=upper,
                communication=max(one["communication"] for one in of_ranks),
                collectives=max(one["collectives"] for one in of_ranks),
                numbers=max(one["numbers"] for one in of_ranks),
            )
        )
    return rows


HEADER = (
    "contender", "processes", "median", "quartiles",
    "communication", "collectives", "numbers", "error",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """Return a line of the table."""
    crowded = " (more than cores)" if row.processes > row.cores else ""
    return (
        row.contender,
        f"{row.processes}{crowded}",
        f"{row.median * 1e3:,.2f} ms",
        f"{row.lower_quartile * 1e3:,.2f}–{row.upper_quartile * 1e3:,.2f}",
        f"{row.communication:.0%}",
        f"{row.collectives}",
        f"{row.numbers:,}",
        f"{row.error:.0e}",
    )


def plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Return the rows as plain values."""
    return [asdict(row) for row in rows]
