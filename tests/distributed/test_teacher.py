"""Teachers and settings of the codes on two ranks: as on one with the data of both."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from swavkit import PrototypeLayer, SinkhornKnopp, SwAVLoss
from tests.ranks import Ranks, refusal
from tests.states import same, snapshot

pytestmark = pytest.mark.distributed

DIMENSION, VIEWS, STEPS = 4, 3, 3
SAMPLES = (5, 3)  # of each rank
SIZES = (5, 3)  # of the heads
PRIOR = [1.0, 2.0, 0.5, 0.25, 4.0]


@dataclass(frozen=True)
class Work:
    """What a rank has to compute: features (steps, V, B, D), those of the teacher, and weights."""

    features: np.ndarray
    code_features: np.ndarray
    weight: np.ndarray | None
    settings: dict[str, Any]
    prior: bool = False
    temperatures: bool = False  # as tensors, on a schedule
    details: bool = False


def teacher_of() -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(PrototypeLayer(DIMENSION, size) for size in SIZES).double()


def train(rank: int, work: Work) -> dict[str, Any]:
    """Return each step's loss, gradients and codes."""
    torch.manual_seed(0)
    priors = [torch.tensor(PRIOR), None] if work.prior else None
    criterion = SwAVLoss(
        DIMENSION, SIZES, reduction="global_mean", prototype_weight=priors, **work.settings
    ).double()
    teacher = teacher_of()
    found: dict[str, Any] = {"loss": [], "features": [], "weights": [], "codes": [], "error": []}
    for step in range(STEPS):
        if work.temperatures:
            criterion.sinkhorn.epsilon = torch.tensor(0.0625 * (step + 1))
            criterion.loss.temperature = torch.tensor(0.125 * (step + 1))
        features = torch.tensor(work.features[step]).requires_grad_()
        loss = criterion(
            features,
            code_features=torch.tensor(work.code_features[step]),
            code_prototypes=teacher,
            sample_weight=None if work.weight is None else torch.tensor(work.weight[step]),
            return_details=work.details,
        )
        if work.details:
            loss, details = loss
            found["codes"].append([of_head.codes.numpy() for of_head in details])
            errors = [of_head.marginal_error for of_head in details]
            found["error"].append([each.numpy() for each in errors if each is not None])
        to_features, *to_weights = torch.autograd.grad(loss, [features, *criterion.parameters()])
        found["loss"].append(loss.item())
        found["features"].append(to_features.numpy())
        found["weights"].append([gradient.numpy() for gradient in to_weights])
        with torch.no_grad():  # as a moving average, equal on all ranks
            for layer in teacher:
                layer.weight.mul_(1.1).add_(0.05)
    return found


def work_of(weighted: bool, **options: Any) -> Work:
    random = np.random.default_rng(0)
    samples = sum(SAMPLES)
    weight = random.integers(0, 4, (STEPS, samples)) / 2 if weighted else None
    features = random.normal(size=(STEPS, VIEWS, samples, DIMENSION))
    code_features = random.normal(size=(STEPS, 2, samples, DIMENSION))
    if weight is not None:
        features[:, 1][weight == 0] = np.nan
        code_features[:, 0][weight == 0] = np.inf
    return Work(features, code_features, weight, **options)


def shards(work: Work) -> list[Work]:
    (cut,) = np.cumsum(SAMPLES)[:-1]
    parts = zip(
        np.split(work.features, [cut], axis=2),
        np.split(work.code_features, [cut], axis=2),
        [None, None] if work.weight is None else np.split(work.weight, [cut], axis=1),
        strict=True,
    )
    return [
        replace(work, features=features, code_features=code_features, weight=weight)
        for features, code_features, weight in parts
    ]


def assert_one_answer(ranks: Ranks, work: Work) -> None:
    """Compare two ranks with one that has the samples of both, and a queue of twice the length."""
    results = ranks.run(train, shards(work))
    longer = {"queue_length": len(SAMPLES) * work.settings.get("queue_length", 0)}
    alone = train(0, replace(work, settings={**work.settings, **longer}))
    close = {"rtol": 0, "atol": 1e-10}
    for step in range(STEPS):
        losses = [result["loss"][step] for result in results]
        np.testing.assert_allclose(np.mean(losses), alone["loss"][step], **close)
        to_features = [result["features"][step] / len(SAMPLES) for result in results]
        to_features = np.concatenate(to_features, axis=1)
        np.testing.assert_allclose(to_features, alone["features"][step], **close)
        for head in range(len(SIZES)):
            of_ranks = np.mean([result["weights"][step][head] for result in results], axis=0)
            np.testing.assert_allclose(of_ranks, alone["weights"][step][head], **close)
            if work.details:
                codes = [result["codes"][step][head] for result in results]
                codes = np.concatenate(codes, axis=1)
                np.testing.assert_allclose(codes, alone["codes"][step][head], **close)
        for result in results:
            if work.details:
                for found, expected in zip(
                    result["error"][step], alone["error"][step], strict=True
                ):
                    np.testing.assert_allclose(found, expected, **close)


@pytest.fixture
def two_ranks(start_ranks: Callable[[int], Ranks]) -> Ranks:
    return start_ranks(len(SAMPLES))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 16])  # which does not overflow: the order may differ
@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_a_teacher_on_two_ranks_is_that_of_one(
    two_ranks: Ranks, memory: str, queue_length: int, weighted: bool
) -> None:
    settings = {"memory": memory, "queue_length": queue_length}
    details = memory != "streamed" and queue_length == 0
    assert_one_answer(two_ranks, work_of(weighted, settings=settings, details=details))


@pytest.mark.parametrize(
    "of_codes",
    [
        {},
        {"hard": True},
        {"relaxation": 0.1},
        {"tolerance": 0.1, "iterations": 30},
        {"tolerance": 0.1, "iterations": 30, "hard": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_settings_of_the_codes_on_two_ranks_are_those_of_one(
    two_ranks: Ranks, memory: str, of_codes: dict[str, Any]
) -> None:
    settings = {"memory": memory, "queue_length": 16, **of_codes}
    details = memory != "streamed"
    work = work_of(False, settings=settings, prior=True, details=details)
    assert_one_answer(two_ranks, work)


@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_temperatures_as_tensors_on_two_ranks_are_those_of_one(
    two_ranks: Ranks, memory: str
) -> None:
    work = work_of(True, settings={"memory": memory, "queue_length": 16}, temperatures=True)
    assert_one_answer(two_ranks, work)


def losses_with_shards(rank: int, memory: str) -> list[str | float]:
    """Return what a loss says of a teacher in shards, and its values with the teacher gathered."""
    torch.manual_seed(0)
    criterion = SwAVLoss(DIMENSION, SIZES, memory=memory, queue_length=4)
    features = torch.randn(VIEWS, 4, DIMENSION)
    teacher = nn.Sequential(nn.Linear(DIMENSION, DIMENSION), copy.deepcopy(criterion.prototypes))
    for layer in teacher[1]:
        layer.reset_parameters()
    around_all, around_each = copy.deepcopy(teacher), copy.deepcopy(teacher)
    fully_shard(around_all)
    for layer in around_each[1]:
        fully_shard(layer)
    before = snapshot(criterion)
    outcome: list[str | float] = []
    with pytest.raises(RuntimeError) as caught:
        criterion(features, code_prototypes=around_all[1])
    outcome.append(str(caught.value))
    assert same(snapshot(criterion), before)
    criterion.eval()
    around_all.unshard()
    outcome.append(criterion(features, code_prototypes=around_all[1]).item())
    around_all.reshard()
    if memory != "streamed":  # which calls no part, so that no hook gathers it
        outcome.append(criterion(features, code_prototypes=around_each[1]).item())
    return [*outcome, criterion(features, code_prototypes=teacher[1]).item()]


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_a_teacher_in_shards_is_gathered_or_refused_by_name(two_ranks: Ranks, memory: str) -> None:
    for text, *losses in two_ranks.run(losses_with_shards, [memory] * len(SAMPLES)):
        assert str(text).startswith("code_prototypes[0] must have its whole weight on each rank")
        assert "between unshard() and reshard()" in str(text)
        assert len(losses) == 2 + (memory != "streamed")
        assert losses[1:] == pytest.approx([losses[0]] * (len(losses) - 1), rel=1e-5)


def codes_of(rank: int, scores: np.ndarray) -> list[np.ndarray]:
    sinkhorn = SinkhornKnopp(torch.tensor(0.0625), dtype=torch.float64)
    codes = [sinkhorn(torch.tensor(scores))]
    sinkhorn.epsilon = torch.tensor(0.25)
    codes += sinkhorn([torch.tensor(scores), torch.tensor(scores[:, :3])])
    return [each.numpy() for each in codes]


def test_codes_with_a_tensor_on_two_ranks_are_those_of_one(two_ranks: Ranks) -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (8, 5)).astype(np.float32)
    results = two_ranks.run(codes_of, [scores[:5], scores[5:]])
    for first, second, expected in zip(*results, codes_of(0, scores), strict=True):
        assert first.dtype == np.float64
        np.testing.assert_allclose(np.concatenate([first, second]), expected, rtol=0, atol=2e-5)


def with_a_prior_on_one_rank(rank: int, memory: str) -> str | None:
    torch.manual_seed(0)
    prior = torch.tensor(PRIOR) if rank == 1 else None
    criterion = SwAVLoss(DIMENSION, 5, memory=memory, prototype_weight=prior)
    return refusal(lambda: criterion(torch.randn(VIEWS, 4, DIMENSION)))


def with_other_priors(rank: int) -> list[str | None]:
    torch.manual_seed(0)
    powers = [torch.tensor([1.0, 2, 4, 8]), torch.tensor([8.0, 4, 2, 1])][rank]
    heads = [[powers[:2], None], [None, powers.flip(0)[:2]]][rank]  # the same one, elsewhere
    criteria = [
        SwAVLoss(DIMENSION, 4, prototype_weight=powers),
        SwAVLoss(DIMENSION, [2, 2], prototype_weight=heads),
    ]
    features = torch.randn(VIEWS, 4, DIMENSION)
    return [refusal(lambda loss=loss: loss(features)) for loss in criteria]


def test_priors_that_differ_are_found(two_ranks: Ranks) -> None:
    for texts in two_ranks.run(with_other_priors):
        assert all("prototype_weight must be the same" in str(text) for text in texts)


@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_a_prior_on_one_rank_alone_is_found(two_ranks: Ranks, memory: str) -> None:
    for text in two_ranks.run(with_a_prior_on_one_rank, [memory] * len(SAMPLES)):
        assert text is not None
        assert "prototype_weight" in text
