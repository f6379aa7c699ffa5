"""A training step of the loss, forward and backward, with the product with the prototypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import OURS, Calls, Suite
from benchmarks.inputs import CPU, clustered
from benchmarks.peers import LIGHTLY, installed, lightly_loss
from benchmarks.published import published_codes, published_loss, published_step
from swavkit import PrototypeLayer, SwAVLoss
from tests import oracles

FEATURE_DIM = 128
CODE_VIEWS = 2
FULL, STREAMED, OBSERVED = f"{OURS}, full", f"{OURS}, streamed", f"{OURS}, with statistics"
_MOST_SCORES_IN_FLOAT64 = 2**28  # the reference holds several matrices of this size


@dataclass(frozen=True)
class Problem:
    """Features (V, B, D) in float32, with the settings of the paper. Two views give codes.

    With a ``teacher``, the codes come from features and prototypes of its own.
    """

    samples: int
    prototypes: int
    views: int = 8
    queue: int = 0
    feature_dim: int = FEATURE_DIM
    teacher: bool = False

    def __str__(self) -> str:
        text = f"{self.views} views of {self.samples:,}, {self.prototypes:,} prototypes"
        text += f" of {self.feature_dim} features" * (self.feature_dim != FEATURE_DIM)
        return text + f", queue of {self.queue:,}" * bool(self.queue) + ", teacher" * self.teacher

    @property
    def tolerance(self) -> float:
        """The tolerance relative to the largest entry, for the loss and both gradients."""
        return 1e-4

    def inputs(self, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
        """Return features (V, B, D) and prototypes."""
        sizes = self.views, self.samples, self.feature_dim
        return clustered(*sizes, prototypes=self.prototypes, device=device)

    def of_teacher(self, device: torch.device = CPU) -> tuple[Tensor, Tensor] | None:
        """Return its unit features (2, B, D) and unit prototypes."""
        if not self.teacher:
            return None
        features, directions = replace(self, samples=self.samples + 1).inputs(device)
        return F.normalize(features[:CODE_VIEWS, 1:], dim=-1), directions

    def queued(self, device: torch.device = CPU) -> Tensor | None:
        """Return the features of a full queue, (2, L, D)."""
        if not self.queue:
            return None
        sizes = CODE_VIEWS, self.queue, self.feature_dim
        features, _ = clustered(*sizes, prototypes=self.prototypes, device=device)
        return F.normalize(features, dim=-1)


def prepare(problem: Problem, device: torch.device = CPU) -> Calls:
    (features, weight), queued = problem.inputs(device), problem.queued(device)
    of_teacher = problem.of_teacher(device)
    features.requires_grad_()
    weight = nn.Parameter(weight)

    def ours(
        memory: Literal["auto", "full", "streamed"], *, statistics: bool = False
    ) -> Callable[[], tuple[Tensor, ...]]:
        criterion = SwAVLoss(
            problem.feature_dim,
            problem.prototypes,
            num_code_views=CODE_VIEWS,
            memory=memory,
            queue_length=problem.queue,
        ).to(device)
        criterion.prototypes.weight = weight  # the same matrix for all contenders
        if queued is not None and criterion.queue is not None:
            criterion.queue.push(queued)
            criterion.eval()  # the same queue at every call

        teacher: dict[str, Any] = {}
        if of_teacher is not None:
            teacher["code_features"], directions = of_teacher
            teacher["code_prototypes"] = PrototypeLayer(problem.feature_dim, problem.prototypes)
            teacher["code_prototypes"].weight = nn.Parameter(directions)

        def step() -> tuple[Tensor, ...]:
            loss = criterion(features, **teacher, return_statistics=statistics)
            if statistics:
                loss, _ = loss
            return loss, *torch.autograd.grad(loss, [features, weight])

        return step

    def published() -> tuple[Tensor, ...]:
        loss = published_step(features, weight, CODE_VIEWS, queued, of_teacher)
        return loss, *torch.autograd.grad(loss, [features, weight])

    def lightly() -> Callable[[], tuple[Tensor, ...]]:
        criterion = lightly_loss()

        def step() -> tuple[Tensor, ...]:
            with torch.no_grad():
                weight.copy_(F.normalize(weight, dim=-1))
            views = [view @ weight.T for view in F.normalize(features, dim=-1)]
            of_queue = None if queued is None else [view @ weight.detach().T for view in queued]
            loss = criterion(views[:CODE_VIEWS], views[CODE_VIEWS:], of_queue)
            return loss, *torch.autograd.grad(loss, [features, weight])

        return step

    @torch.no_grad()
    def products() -> tuple[Tensor, ...]:
        """Compute the products of every such step, and nothing else."""
        scores = features @ weight.T
        of_weight = scores.flatten(0, 1).T @ features.flatten(0, 1)
        return scores, scores @ weight, of_weight

    def autocast(step: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
        def inside() -> tuple[Tensor, ...]:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                return step()

        return inside

    calls = {
        OURS: ours("auto"),
        FULL: ours("full"),
        STREAMED: ours("streamed"),
        OBSERVED: ours("auto", statistics=True),
        "published": published,
        "its 3 matrix products": products,
    }
    if installed(LIGHTLY) and not problem.teacher:
        calls[LIGHTLY] = lightly()
    if device.type != "cpu":
        calls[f"{OURS}, bfloat16 autocast"] = autocast(ours("auto"))
        calls["published, bfloat16 autocast"] = autocast(published)
    return calls


def check_reference() -> None:
    features, directions = Problem(6, 5, views=3).inputs()
    scores = F.normalize(features.double(), dim=-1) @ directions.double().T
    codes = [published_codes(view) for view in scores[:CODE_VIEWS]]
    loss = published_loss(scores, codes)
    expected = oracles.loss(scores.numpy(), torch.stack(codes).numpy(), 0.1)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


def errors(problem: Problem, calls: Calls, device: torch.device = CPU) -> dict[str, float]:
    """Return the largest error of the loss and of its gradients, relative to the largest entry."""
    scores = problem.views * problem.samples * problem.prototypes
    dtype = torch.float64 if scores <= _MOST_SCORES_IN_FLOAT64 else torch.float32
    features, weight = (values.to(dtype).requires_grad_() for values in problem.inputs(device))
    queued = problem.queued(device)
    queued = None if queued is None else queued.to(dtype)
    of_teacher = problem.of_teacher(device)
    if of_teacher is not None:
        of_teacher = of_teacher[0].to(dtype), of_teacher[1].to(dtype)
    loss = published_step(features, weight, CODE_VIEWS, queued, of_teacher)
    expected = loss, *torch.autograd.grad(loss, [features, weight])
    return {
        name: max(
            ((theirs - reference).abs().max() / reference.abs().max()).item()
            for theirs, reference in zip(
                comparable(*calls[name](), weight), comparable(*expected, weight), strict=True
            )
        )
        for name in (OURS, FULL, STREAMED, OBSERVED, "published", LIGHTLY)
        if name in calls
    }


def comparable(
    loss: Tensor, of_features: Tensor, of_weight: Tensor, weight: Tensor
) -> list[Tensor]:
    """Remove the component of the prototypes' gradient that only changes their norms.

    Our gradient has no such component. In the published procedure, the next in-place normalization
    reverses it.
    """
    unit = F.normalize(weight.detach(), dim=-1)
    along = (of_weight * unit).sum(dim=-1, keepdim=True) * unit
    return [loss.detach(), of_features, of_weight - along]


SWEEP = (300, 3_000, 30_000, 100_000, 300_000, 1_000_000)
SUITE = Suite(
    name="loss",
    cases=(
        *(Problem(64, prototypes) for prototypes in SWEEP),
        Problem(256, 3000),
        Problem(256, 65_536),
        Problem(64, 3000, queue=3840),
        Problem(256, 3000, queue=3840),
        Problem(32, 131_072, feature_dim=256, teacher=True),
    ),
    quick=Problem(16, 50),
    prepare=prepare,
    check_reference=check_reference,
    errors=errors,
    missing=lambda: [] if installed(LIGHTLY) else [LIGHTLY],
)
