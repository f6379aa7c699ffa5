"""Codes from a teacher: its features and prototypes give the codes and fill the queue."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swavkit import (
    FeatureQueue,
    PrototypeLayer,
    SinkhornKnopp,
    SwappedPredictionLoss,
    SwAVLoss,
)
from tests import oracles, tolerances
from tests.states import same, snapshot

DIMENSION, PROTOTYPES, SIZES = 6, 5, (5, 3)
ANY_MEMORY = pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
ANY_QUEUE = pytest.mark.parametrize("queue_length", [0, 20])
ANY_SIZES = pytest.mark.parametrize("sizes", [PROTOTYPES, SIZES], ids=str)


def features_of(views: int = 3, samples: int = 8, **options: Any) -> Tensor:
    options = {"dtype": torch.float64} | options
    return torch.randn(views, samples, DIMENSION, **options)


def criterion_of(sizes: Any = PROTOTYPES, **settings: Any) -> SwAVLoss:
    """Return a loss in float64, so that only the equations are compared and not the rounding."""
    return SwAVLoss(DIMENSION, sizes, **settings).double()


def teacher_of(sizes: Any = PROTOTYPES, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return prototypes as those of a loss, with other values."""
    if isinstance(sizes, int):
        return PrototypeLayer(DIMENSION, sizes).to(dtype)
    return nn.ModuleList(PrototypeLayer(DIMENSION, size) for size in sizes).to(dtype)


def heads_of(prototypes: Any) -> list[PrototypeLayer]:
    several = isinstance(prototypes, (list, tuple, nn.ModuleList))
    return list(prototypes) if several else [prototypes]


def assert_close(found: Any, expected: Any, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


class ByHand:
    """The parts of a loss, assembled as in the docstring of SwAVLoss, with a queue of their own."""

    def __init__(
        self,
        criterion: SwAVLoss,
        sinkhorn: SinkhornKnopp,
        prototype_weight: Sequence[Tensor | None] | None = None,
    ) -> None:
        self.heads = copy.deepcopy(heads_of(criterion.prototypes))
        self.sinkhorn, self.prototype_weight = sinkhorn, prototype_weight
        self.loss = SwappedPredictionLoss(criterion.loss.temperature)
        self.num_code_views, self.freeze_steps = criterion.num_code_views, criterion.freeze_steps
        self.queue, self.steps = None, 0
        if criterion.queue is not None:
            self.queue = FeatureQueue(criterion.queue.length, DIMENSION, self.num_code_views)
            self.queue = self.queue.to(criterion.queue.features.dtype)

    @property
    def weights(self) -> list[Tensor]:
        return [head.weight for head in self.heads]

    def __call__(
        self,
        features: Tensor,
        *,
        code_features: Tensor | None = None,
        code_prototypes: Any = None,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and the codes (A, B + L, K) of each head."""
        samples = features.shape[1]
        own = features[: self.num_code_views].detach()
        code_features = own if code_features is None else code_features.detach()
        present = torch.ones(samples, dtype=torch.bool)
        if sample_weight is not None:  # what is absent is multiplied with nothing
            present = sample_weight != 0
            features = features.masked_fill(~present[:, None], 0)
            code_features = code_features.masked_fill(~present[:, None], 0)
        frozen = torch.tensor(self.steps < self.freeze_steps)
        teachers = self.heads if code_prototypes is None else heads_of(code_prototypes)
        weight = present.double() if sample_weight is None else sample_weight.double()
        if self.queue is not None:
            weight = torch.cat([weight, self.queue.valid.double()])
        with torch.no_grad():
            to_code = []
            for teacher in teachers:
                scores = teacher(code_features)
                if self.queue is not None:
                    queued = teacher(self.queue.features).to(scores.dtype)
                    scores = torch.cat([scores, queued], dim=1)
                to_code.append(scores.to(torch.promote_types(scores.dtype, torch.float32)))
            all_codes = self.sinkhorn(to_code, [weight] * len(to_code), self.prototype_weight)
        losses = [
            self.loss(head(features, frozen=frozen), codes[:, :samples], sample_weight)
            for head, codes in zip(self.heads, all_codes, strict=True)
        ]
        self.steps += 1
        if self.queue is not None:
            unit = F.normalize(code_features.to(self.queue.features.dtype), dim=-1)
            self.queue.push(unit, valid=present)
        return torch.stack(losses).mean(), all_codes


def assert_same_queue(criterion: SwAVLoss, by_hand: ByHand, atol: float = 1e-11) -> None:
    if criterion.queue is None:
        return
    for found, expected in (
        (criterion.queue.features, by_hand.queue.features),
        (criterion.queue.valid, by_hand.queue.valid),
        (criterion.queue.rejected, by_hand.queue.rejected),
    ):
        assert_close(found, expected, atol)


# By the equations and by hand


@pytest.mark.parametrize("code_views", [1, 2])
@ANY_QUEUE
@ANY_MEMORY
def test_training_steps_have_the_losses_of_the_equations(
    memory: str, queue_length: int, code_views: int
) -> None:
    settings = {"num_code_views": code_views, "queue_length": queue_length}
    criterion, teacher = criterion_of(memory=memory, **settings), teacher_of()
    ring = oracles.Ring(queue_length) if queue_length else None
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    for samples in (8, 3, 9, 8):
        features, code_features = features_of(3, samples), features_of(code_views, samples)
        loss = criterion(features, code_features=code_features, code_prototypes=teacher)
        expected = oracles.swav_loss(
            features.numpy(),
            criterion.prototypes.weight.detach().numpy(),
            code_views,
            temperature=0.1,
            epsilon=0.05,
            iterations=3,
            queue=ring,
            code_features=code_features.numpy(),
            code_prototypes=teacher.weight.detach().numpy(),
        )
        assert loss.shape == ()
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=0, abs=1e-11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():  # as a moving average does
            teacher.weight.lerp_(criterion.prototypes.weight, 0.1)
    assert criterion.steps == 4
    if ring is not None:
        for slot, held in enumerate(ring.slots):
            found = criterion.queue.features[:, slot].numpy()
            np.testing.assert_allclose(found, 0 if held is None else held, rtol=0, atol=1e-12)


@pytest.mark.parametrize("given", ["features", "prototypes", "both"])
@pytest.mark.parametrize("weighted", [False, True])
@ANY_QUEUE
@ANY_SIZES
@ANY_MEMORY
def test_it_is_its_parts_wired_by_hand(
    memory: str, sizes: Any, queue_length: int, weighted: bool, given: str
) -> None:
    criterion = criterion_of(sizes, memory=memory, queue_length=queue_length, freeze_steps=1)
    by_hand = ByHand(criterion, SinkhornKnopp())
    weight = torch.tensor([1, 0, 2, 1, 0, 0.5, 1, 1]) if weighted else None
    for step in range(3):
        features, code_features = features_of(), features_of(2)
        if weighted:
            features[1, 1, 0] = features[2, 4] = math.nan
            code_features[0, 1] = math.inf
            code_features[1, 4] = math.nan
        features.requires_grad_()
        teacher: dict[str, Any] = {}
        if given != "prototypes":
            teacher["code_features"] = code_features.clone().requires_grad_()
        if given != "features":
            teacher["code_prototypes"] = teacher_of(sizes)
        loss = criterion(features, sample_weight=weight, **teacher)
        expected, _ = by_hand(features, sample_weight=weight, **teacher)
        assert_close(loss, expected)
        if given != "prototypes":
            assert torch.autograd.grad(
                loss, teacher["code_features"], retain_graph=True, allow_unused=True
            ) == (None,)
        found = torch.autograd.grad(loss, [features, *criterion.parameters()])
        wanted = torch.autograd.grad(expected, [features, *by_hand.weights])
        assert_close(found, wanted)
        assert found[0].isfinite().all()
        if weighted:
            assert not found[0][:, weight == 0].any()
        assert all(bool(of_head.any()) == (step > 0) for of_head in found[1:])
        assert_same_queue(criterion, by_hand)
        assert criterion.steps == step + 1
        with torch.no_grad():
            for layer, twin in zip(heads_of(criterion.prototypes), by_hand.heads, strict=True):
                layer.weight.add_(0.1)
                twin.weight.add_(0.1)


@ANY_MEMORY
@ANY_SIZES
def test_no_gradient_flows_to_a_teacher(memory: str, sizes: Any) -> None:
    criterion, teacher = criterion_of(sizes, memory=memory, queue_length=10), teacher_of(sizes)
    network = nn.Linear(DIMENSION, DIMENSION).double()
    for _ in range(2):
        features = features_of(requires_grad=True)
        criterion(features, code_features=network(features[:2]), code_prototypes=teacher).backward()
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad.any() for parameter in criterion.parameters())
    assert not criterion.queue.features.requires_grad


@ANY_MEMORY
def test_prototypes_that_are_their_own_teacher_get_the_gradient_of_a_student(memory: str) -> None:
    criterion = criterion_of(memory=memory, queue_length=10)
    twin = copy.deepcopy(criterion)
    for _ in range(2):
        features, code_features = features_of(requires_grad=True), features_of(2)
        losses = (
            criterion(features, code_features=code_features, code_prototypes=criterion.prototypes),
            twin(features, code_features=code_features),
        )
        assert_close(*losses)
        assert_close(
            *(
                torch.autograd.grad(loss, [features, each.prototypes.weight])
                for loss, each in zip(losses, (criterion, twin), strict=True)
            )
        )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@ANY_QUEUE
@ANY_SIZES
@ANY_MEMORY
def test_the_features_themselves_as_teacher_change_nothing(
    memory: str, sizes: Any, queue_length: int, training: bool, weighted: bool
) -> None:
    plain = criterion_of(sizes, memory=memory, queue_length=queue_length, freeze_steps=1)
    plain(features_of())
    taught = copy.deepcopy(plain)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1]) if weighted else None
    for criterion in (plain, taught):
        criterion.train(training)
    for _ in range(2):
        features = features_of(requires_grad=True)
        losses = (
            taught(features, code_features=features[:2].detach(), sample_weight=weight),
            plain(features, sample_weight=weight),
        )
        assert_close(*losses)
        assert_close(
            *(
                torch.autograd.grad(loss, [features, *each.parameters()])
                for loss, each in zip(losses, (taught, plain), strict=True)
            )
        )
        assert_close(taught.state_dict(), plain.state_dict())


@pytest.mark.parametrize("form", [list, tuple, torch.stack])
@ANY_MEMORY
def test_views_come_as_a_sequence_or_as_one_tensor(memory: str, form: Callable[..., Any]) -> None:
    criterion = criterion_of(memory=memory).eval()
    features, code_features = features_of(), features_of(2)
    expected = criterion(features, code_features=code_features)
    assert_close(criterion(features, code_features=form(code_features.unbind())), expected)
    assert_close(criterion(list(features), code_features=form(code_features.unbind())), expected)


@pytest.mark.parametrize("form", [list, tuple, nn.ModuleList])
@pytest.mark.parametrize("sizes", [SIZES, (PROTOTYPES,)], ids=str)
def test_prototypes_of_heads_come_as_a_sequence_or_a_list_of_modules(
    sizes: tuple[int, ...], form: Callable[..., Any]
) -> None:
    criterion, teacher = criterion_of(sizes).eval(), teacher_of(sizes)
    features = features_of()
    expected = criterion(features, code_prototypes=teacher)
    assert torch.equal(criterion(features, code_prototypes=form(list(teacher))), expected)
    loss, _ = ByHand(criterion, SinkhornKnopp())(features, code_prototypes=teacher)
    assert_close(expected, loss)


# Queue, steps and details


@ANY_MEMORY
def test_the_queue_holds_the_unit_features_of_the_teacher(memory: str) -> None:
    criterion = criterion_of(memory=memory, queue_length=10)
    code_features = 7 * features_of(2)
    criterion(features_of(), code_features=code_features)
    assert_close(criterion.queue.features[:, :8], F.normalize(code_features, dim=-1))
    assert len(criterion.queue) == 8
    assert not criterion.queue.features.requires_grad


@pytest.mark.parametrize("queue_start", [0, 2])
def test_the_queue_is_scored_with_the_teacher_of_today(queue_start: int) -> None:
    criterion = criterion_of(queue_length=40, queue_start=queue_start)
    held: list[Tensor] = []
    for step in range(4):
        teacher = teacher_of()
        features, code_features = features_of(), features_of(2)
        _, details = criterion(
            features, code_features=code_features, code_prototypes=teacher, return_details=True
        )
        takes_part = step >= max(queue_start, 1)
        together = torch.cat([code_features, *(held if takes_part else [])], dim=1)
        with torch.no_grad():
            assert_close(details.codes, SinkhornKnopp()(teacher(together))[:, :8])
            assert_close(details.scores, criterion.prototypes(features))
        held.append(code_features)


@ANY_SIZES
@ANY_QUEUE
def test_details_have_the_codes_of_the_teacher_and_the_scores_of_the_student(
    sizes: Any, queue_length: int
) -> None:
    criterion, teacher = criterion_of(sizes, queue_length=queue_length), teacher_of(sizes)
    by_hand = ByHand(criterion, SinkhornKnopp())
    for _ in range(2):
        features, code_features = features_of(4, requires_grad=True), features_of(2)
        settings: dict[str, Any] = {
            "code_features": code_features,
            "code_prototypes": teacher,
        }
        loss, details = criterion(features, **settings, return_details=True)
        expected, all_codes = by_hand(features, **settings)
        assert_close(loss, expected)
        of_heads = [details] if isinstance(sizes, int) else details
        for head, of_head, codes in zip(by_hand.heads, of_heads, all_codes, strict=True):
            assert_close(of_head.codes, codes[:, :8])
            assert_close(of_head.scores, head(features).detach())
            assert not of_head.codes.requires_grad
            assert not of_head.scores.requires_grad


@ANY_MEMORY
def test_a_forward_in_eval_changes_no_state(memory: str) -> None:
    criterion = criterion_of(memory=memory, queue_length=10, freeze_steps=2)
    settings: dict[str, Any] = {"code_features": features_of(2), "code_prototypes": teacher_of()}
    criterion(features_of(), **settings)
    before = snapshot(criterion)
    criterion.eval()
    for _ in range(2):
        criterion(features_of(), **settings)
    assert same(snapshot(criterion), before)


@ANY_MEMORY
def test_a_teacher_may_be_in_eval_and_without_gradients(memory: str) -> None:
    criterion, teacher = criterion_of(memory=memory).eval(), teacher_of()
    features, code_features = features_of(requires_grad=True), features_of(2)
    expected = criterion(features, code_features=code_features, code_prototypes=teacher)
    teacher.eval().requires_grad_(False)
    loss = criterion(features, code_features=code_features, code_prototypes=teacher)
    assert torch.equal(loss, expected)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert torch.autograd.grad(loss, features)[0].any()


@ANY_QUEUE
@ANY_MEMORY
def test_an_empty_batch_gives_zero_connected_to_the_graph(memory: str, queue_length: int) -> None:
    criterion = criterion_of(memory=memory, queue_length=queue_length)
    settings: dict[str, Any] = {"code_prototypes": teacher_of()}
    criterion(features_of(), code_features=features_of(2), **settings)
    features = features_of(3, 0, requires_grad=True)
    loss = criterion(features, code_features=features_of(2, 0), **settings)
    assert loss == 0
    to_features, to_weight = torch.autograd.grad(loss, [features, criterion.prototypes.weight])
    assert to_features.shape == features.shape
    assert not to_weight.any()


@ANY_MEMORY
def test_a_present_code_feature_that_is_not_finite_is_seen_and_kept_out_of_the_queue(
    memory: str,
) -> None:
    criterion = criterion_of(memory=memory, queue_length=10)
    code_features = features_of(2)
    code_features[1, 3, 1] = math.nan
    assert criterion(features_of(), code_features=code_features).isnan()
    assert criterion.queue.rejected == 1
    assert len(criterion.queue) == 7
    # And one of the student's is none of the queue's.
    features = features_of()
    features[0, 3, 1] = math.nan
    assert criterion(features, code_features=features_of(2)).isnan()
    assert criterion.queue.rejected == 1
    assert criterion(features_of(), code_features=features_of(2)).isfinite()


# Dtypes, autocast, compilation


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@ANY_QUEUE
@ANY_MEMORY
def test_code_features_may_have_another_dtype(
    memory: str, queue_length: int, dtype: torch.dtype
) -> None:
    settings = {"epsilon": 0.5, "temperature": 0.5}  # which amplify rounding little
    criterion = SwAVLoss(
        DIMENSION, PROTOTYPES, memory=memory, queue_length=queue_length, **settings
    )
    by_hand = ByHand(criterion, SinkhornKnopp(0.5))
    for _ in range(2):
        features = features_of(dtype=torch.float32, requires_grad=True)
        code_features = features_of(2, dtype=dtype)
        loss = criterion(features, code_features=code_features)
        expected, _ = by_hand(features, code_features=code_features.float())
        assert loss.dtype == torch.float32
        assert_close(loss, expected, 4 * tolerances.ATOL[torch.float32])
        found = torch.autograd.grad(loss, [features, criterion.prototypes.weight])
        wanted = torch.autograd.grad(expected, [features, *by_hand.weights])
        assert_close(found, wanted, 4 * tolerances.ATOL[torch.float32])


@pytest.mark.parametrize(
    ("memory", "details"),
    [("full", False), ("full", True), ("streamed", False), ("auto", False), ("auto", True)],
)
@ANY_QUEUE
def test_autocast_keeps_codes_and_loss_in_float32(
    memory: str, queue_length: int, details: bool
) -> None:
    criterion = SwAVLoss(
        DIMENSION,
        PROTOTYPES,
        memory=memory,
        queue_length=queue_length,
        epsilon=0.5,
        temperature=0.5,
    )
    teacher = teacher_of(dtype=torch.float32)
    by_hand = ByHand(criterion, SinkhornKnopp(0.5))
    for _ in range(2):
        features = features_of(dtype=torch.float32, requires_grad=True)
        code_features = features_of(2, dtype=torch.float32)
        given: dict[str, Any] = {"code_features": code_features, "code_prototypes": teacher}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(features, **given, return_details=details)
        if details:
            loss, found_details = loss
            assert found_details.codes.dtype == torch.float32
            sums = found_details.codes.sum(dim=-1)  # not rounded to bfloat16
            assert_close(sums, torch.ones_like(sums), 1e-5)
        expected, _ = by_hand(features, **given)  # in float32
        assert loss.dtype == torch.float32
        assert_close(loss, expected, 8 * tolerances.ATOL[torch.bfloat16])
        found = torch.autograd.grad(loss, [features, criterion.prototypes.weight])
        wanted = torch.autograd.grad(expected, [features, *by_hand.weights])
        assert [gradient.dtype for gradient in found] == [torch.float32] * 2
        assert_close(found, wanted, 8 * tolerances.ATOL[torch.bfloat16])


# Bad input

VIEWS = torch.zeros(2, 4, DIMENSION)
LAYER = PrototypeLayer(DIMENSION, PROTOTYPES)
BAD_FEATURES: list[Any] = [
    torch.zeros(1, 4, DIMENSION),
    torch.zeros(3, 4, DIMENSION),
    torch.zeros(2, 3, DIMENSION),
    torch.zeros(2, 1, DIMENSION),
    torch.zeros(2, 5, DIMENSION),
    torch.zeros(2, 4, DIMENSION - 1),
    torch.zeros(4, DIMENSION),
    torch.zeros(1, 2, 4, DIMENSION),
    VIEWS.long(),
    VIEWS.bool(),
    VIEWS.to(torch.complex64),
    VIEWS.to("meta"),
    [],
    [VIEWS[0]],
    [VIEWS[0]] * 3,
    [VIEWS[0], VIEWS[1, :3]],
    [VIEWS[0, :3], VIEWS[1, :3]],
    [VIEWS[0], VIEWS[1, :, :5]],
    [VIEWS[0], VIEWS[1].int()],
    [VIEWS[0], VIEWS[1].tolist()],
    VIEWS.tolist(),
    0.5,
]
BAD_PROTOTYPES: list[Any] = [
    PrototypeLayer(DIMENSION + 1, PROTOTYPES),
    PrototypeLayer(DIMENSION, PROTOTYPES + 1),
    PrototypeLayer(DIMENSION, 1),
    PrototypeLayer(DIMENSION, PROTOTYPES).to("meta"),
    nn.Linear(DIMENSION, PROTOTYPES, bias=False),
    LAYER.weight,
    SwAVLoss(DIMENSION, PROTOTYPES),
    [LAYER, LAYER],
    nn.ModuleList([LAYER, LAYER]),
    [],
    0.5,
]
OTHER = PrototypeLayer(DIMENSION, SIZES[1])
BAD_PROTOTYPES_OF_HEADS: list[Any] = [
    LAYER,
    [LAYER],
    [LAYER, OTHER, OTHER],
    nn.ModuleList([LAYER]),
    nn.ModuleList(),
    [OTHER, LAYER],
    [LAYER, PrototypeLayer(DIMENSION - 1, SIZES[1])],
    [LAYER, nn.Linear(DIMENSION, SIZES[1], bias=False)],
    [LAYER, None],
    nn.ModuleList([LAYER, nn.Linear(DIMENSION, SIZES[1], bias=False)]),
]
BAD_TEACHERS = [
    *((PROTOTYPES, "code_features", bad) for bad in BAD_FEATURES),
    *((PROTOTYPES, "code_prototypes", bad) for bad in BAD_PROTOTYPES),
    *((SIZES, "code_prototypes", bad) for bad in BAD_PROTOTYPES_OF_HEADS),
]


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@ANY_MEMORY
@pytest.mark.parametrize(
    ("sizes", "name", "bad"), BAD_TEACHERS, ids=[str(number) for number in range(len(BAD_TEACHERS))]
)
def test_a_bad_teacher_is_named_and_changes_nothing(
    sizes: Any, name: str, bad: Any, memory: str, mode: bool
) -> None:
    criterion = SwAVLoss(DIMENSION, sizes, memory=memory, queue_length=10)
    criterion(torch.randn(3, 4, DIMENSION))
    before = snapshot(criterion)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must "):
        criterion.train(mode)(torch.randn(3, 4, DIMENSION), **{name: bad})
    assert same(snapshot(criterion), before)


def test_a_teacher_is_named_by_keyword_only() -> None:
    with pytest.raises(TypeError, match="positional argument"):
        SwAVLoss(DIMENSION, PROTOTYPES)(torch.zeros(3, 4, DIMENSION), VIEWS)
