"""One write to the feature queue, compared with the published shift of the whole queue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import OURS, Calls, Suite
from benchmarks.inputs import CPU
from swavkit import FeatureQueue
from tests import oracles

FEATURE_DIM = 128
CODE_VIEWS = 2


@dataclass(frozen=True)
class Problem:
    """Features (2, B, 128) of a step, to be stored in a queue.

    With ``other_length``, the queue is compared with a longer one instead of the published one. The
    previous call determines the cache contents, and both queues then follow similar calls.
    """

    samples: int
    length: int
    other_length: int | None = None

    def __str__(self) -> str:
        slots = f"{self.length:,}" + (f" and {self.other_length:,}" if self.other_length else "")
        return f"{CODE_VIEWS} views of {self.samples:,} into {slots} slots"

    @property
    def tolerance(self) -> float:
        """The tolerance: features are stored without rounding."""
        return 1e-12

    def steps(self, number: int, device: torch.device = CPU) -> Iterator[Tensor]:
        """Return the features of ``number`` steps, from a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(number):
            sizes = CODE_VIEWS, self.samples, FEATURE_DIM
            yield torch.randn(sizes, generator=generator).to(device)


class Queue(Protocol):
    """The interface of the compared queues."""

    features: Tensor

    def push(self, features: Tensor) -> None: ...


class Published:
    """The published queue, which shifts its contents by a batch, through a copy."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.features = torch.zeros(CODE_VIEWS, length, FEATURE_DIM, device=device)

    def push(self, features: Tensor) -> None:
        samples = features.shape[1]
        for queue, new in zip(self.features, features, strict=True):
            queue[samples:] = queue[:-samples].clone()
            queue[:samples] = new


def queues(problem: Problem, device: torch.device) -> dict[str, Queue]:
    ours = FeatureQueue(problem.length, FEATURE_DIM, CODE_VIEWS).to(device)
    if problem.other_length is None:
        return {OURS: ours, "published": Published(problem.length, device)}
    longer = FeatureQueue(problem.other_length, FEATURE_DIM, CODE_VIEWS).to(device)
    return {OURS: ours, f"{OURS}, {problem.other_length:,} slots": longer}


def prepare(problem: Problem, device: torch.device = CPU) -> Calls:
    (features,) = problem.steps(1, device)
    return {name: partial(queue.push, features) for name, queue in queues(problem, device).items()}


def newest(steps: list[Tensor], length: int) -> Tensor:
    """Return the last ``length`` samples of the steps, with zeros in front if there are fewer."""
    together = torch.cat([steps[0].new_zeros(CODE_VIEWS, length, FEATURE_DIM), *steps], dim=1)
    return together[:, -length:]


def check_reference() -> None:
    problem = Problem(samples=3, length=7)
    steps = list(problem.steps(4))
    ring = oracles.Ring(problem.length)
    for features in steps:
        ring.push(features.numpy())
    held = torch.tensor(np.stack([slot for slot in ring.slots if slot is not None], axis=1))
    torch.testing.assert_close(in_order(held), in_order(newest(steps, problem.length)))


def errors(problem: Problem, calls: Calls, device: torch.device = CPU) -> dict[str, float]:
    """Return the largest error of any entry after enough steps to fill the queue.

    Contenders may differ in the order of the slots.
    """
    made = queues(problem, device)
    steps = list(problem.steps(problem.length // problem.samples + 2, device))
    for features in steps:
        for queue in made.values():
            queue.push(features)
    return {
        name: (
            (in_order(queue.features) - in_order(newest(steps, queue.features.shape[1])))
            .abs()
            .max()
            .item()
        )
        for name, queue in made.items()
    }


def in_order(features: Tensor) -> Tensor:
    """Sort samples by a weighted sum of their features, independent of their slots."""
    features = features.cpu()
    weights = torch.linspace(1, 2, FEATURE_DIM, dtype=torch.float64)
    return features[:, (features.double() @ weights).sum(dim=0).argsort()]


SUITE = Suite(
    name="queue",
    cases=(Problem(256, 3840), Problem(256, 65_536), Problem(256, 3840, other_length=65_536)),
    quick=Problem(16, 64),
    prepare=prepare,
    check_reference=check_reference,
    errors=errors,
)
