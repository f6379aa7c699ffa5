"""The statistics of ``SwAVLoss``: in every form those of its codes and scores, at no cost else."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from benchmarks.kernels import operations
from swavkit import PrototypeLayer, SwAVDetails, SwAVLoss, _head_losses
from swavkit.swav_statistics import SwAVStatistics, cluster_statistics
from tests.modes import LargestTensor, LiveStorage, RefuseSynchronisation
from tests.states import same, snapshot
from tests.test_streaming import blocks_of

DIMENSION, PROTOTYPES, SIZES, SAMPLES = 6, 5, (5, 3, 1), 11
VECTORS = {"code_usage", "assigned"}
PRIOR = torch.tensor([1.0, 2.0, 0.0, 0.25, 4.0])
WEIGHT = torch.tensor([1, 0, 2, 1, 0, 0.5, 1, 1, 3, 0, 1])

# "auto" calls the parts of small losses, and is fused where there are more scores or a queue.
FORMS = ["full", "streamed", "auto, fused"]
ANY_FORM = pytest.mark.parametrize("form", FORMS)
ANY_SIZES = pytest.mark.parametrize("sizes", [PROTOTYPES, SIZES, (PROTOTYPES,)], ids=str)


@contextmanager
def of_form(form: str, rows: int = 6) -> Iterator[None]:
    """Compute in blocks of so many features, and let "auto, fused" be fused."""
    limits = {"SCORES_OF_PARTS_ON_CPU": 0, "SCORES_OF_PARTS": 0} if "fused" in form else {}
    with blocks_of(rows), patch.multiple(_head_losses, **limits) if limits else nullcontext():
        yield


def features_of(views: int = 3, samples: int = SAMPLES, **options: Any) -> Tensor:
    options = {"dtype": torch.float64} | options
    return torch.randn(views, samples, DIMENSION, **options)


def criterion_of(form: str, sizes: Any = PROTOTYPES, **settings: Any) -> SwAVLoss:
    return SwAVLoss(DIMENSION, sizes, memory=form.split(",")[0], **settings).double()


def twin_of(criterion: SwAVLoss, memory: str = "full") -> SwAVLoss:
    """Return a copy that calls the parts, unless told otherwise."""
    twin = copy.deepcopy(criterion)
    twin.memory = memory
    return twin


def in_a_tuple(of_heads: Any) -> tuple[Any, ...]:
    """Return what is known of each head, of one head too."""
    return (of_heads,) if isinstance(of_heads, (SwAVStatistics, SwAVDetails)) else of_heads


def by_the_details(
    criterion: SwAVLoss, features: Any, *, sample_weight: Tensor | None = None, **inputs: Any
) -> tuple[Tensor, tuple[SwAVStatistics, ...]]:
    """Return the loss, and the statistics of the codes and scores of each head."""
    loss, details = criterion(features, sample_weight=sample_weight, return_details=True, **inputs)
    return loss, tuple(
        cluster_statistics(
            of_head.scores,
            of_head.codes,
            temperature=criterion.loss.temperature,
            sample_weight=sample_weight,
        )
        for of_head in in_a_tuple(details)
    )


def assert_close(found: Any, expected: Any, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_statistics(
    found: Any, expected: tuple[SwAVStatistics, ...], atol: float = 1e-10
) -> None:
    found = in_a_tuple(found)
    assert isinstance(found, tuple)
    assert len(found) == len(expected)
    for of_head, reference in zip(found, expected, strict=True):
        assert isinstance(of_head, SwAVStatistics)
        for name, value in of_head._asdict().items():
            wanted = getattr(reference, name)
            assert value.dtype == wanted.dtype, name
            assert value.shape == wanted.shape, name
            assert not value.requires_grad, name
            assert value.grad_fn is None, name
            torch.testing.assert_close(
                value, wanted, rtol=atol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


def assert_a_step_is_that_of_the_details(
    form: str,
    criterion: SwAVLoss,
    features: Tensor,
    *,
    full: SwAVLoss,
    plain: SwAVLoss,
    **inputs: Any,
) -> None:
    """Compare statistics with those by details, and all else with what it is without them."""
    results = []
    for each, asked in ((criterion, True), (plain, False)):
        leaf = features.detach().clone().requires_grad_()
        with of_form(form):
            loss = each(leaf, **inputs, **({"return_statistics": True} if asked else {}))
        if asked:
            loss, found = loss
        gradients = torch.autograd.grad(loss, [leaf, *each.parameters()])
        results.append((loss.detach(), *gradients))
    assert_close(*results)
    assert same(snapshot(criterion), snapshot(plain))
    _, expected = by_the_details(full, features, **inputs)
    assert_statistics(found, expected)
    assert isinstance(found, SwAVStatistics) == isinstance(criterion.prototypes, PrototypeLayer)


# In every form those of codes and scores


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 20])
@ANY_SIZES
@ANY_FORM
def test_they_are_those_of_codes_and_scores_and_change_nothing_else(
    form: str, sizes: Any, queue_length: int, weighted: bool
) -> None:
    criterion = criterion_of(form, sizes, queue_length=queue_length, queue_start=1, freeze_steps=2)
    full, plain = twin_of(criterion), twin_of(criterion, criterion.memory)
    for step in range(4):
        features = features_of()
        weight = WEIGHT if weighted else None
        if weighted:
            features[1, 1, 0] = features[2, 4] = math.nan  # of absent samples
        assert_a_step_is_that_of_the_details(
            form, criterion, features, full=full, plain=plain, sample_weight=weight
        )
        assert criterion.steps == step + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"hard": True},
        {"hard": True, "queue_length": 20},
        {"prototype_weight": PRIOR},
        {"prototype_weight": PRIOR, "queue_length": 20, "hard": True},
        {"relaxation": 0.1},
        {"tolerance": 0.2, "iterations": 30},
        {"temperature": 0.5, "epsilon": 0.2, "iterations": 1},
        {"temperature": torch.tensor(0.25), "epsilon": torch.tensor(0.1)},
        {"num_code_views": 1},
        {"num_code_views": 3, "queue_length": 7},
        {"reduction": "global_mean"},
        {"prototype_gradient": "published", "queue_length": 7},
    ],
    ids=str,
)
@ANY_FORM
def test_settings_are_obeyed(form: str, settings: dict[str, Any]) -> None:
    criterion = criterion_of(form, **settings)
    full, plain = twin_of(criterion), twin_of(criterion, criterion.memory)
    for weight in (None, WEIGHT, WEIGHT != 0):
        assert_a_step_is_that_of_the_details(
            form, criterion, features_of(), full=full, plain=plain, sample_weight=weight
        )


@pytest.mark.parametrize("given", ["features", "prototypes", "both"])
@pytest.mark.parametrize("queue_length", [0, 20])
@ANY_SIZES
@ANY_FORM
def test_of_a_teacher_come_the_codes_and_of_the_student_the_scores(
    form: str, sizes: Any, queue_length: int, given: str
) -> None:
    criterion = criterion_of(form, sizes, queue_length=queue_length)
    full, plain = twin_of(criterion), twin_of(criterion, criterion.memory)
    teacher = copy.deepcopy(criterion.prototypes)
    for layer in teacher.modules():
        if isinstance(layer, PrototypeLayer):
            layer.reset_parameters()
    for weight in (None, WEIGHT):
        inputs: dict[str, Any] = {"sample_weight": weight}
        if given != "prototypes":
            inputs["code_features"] = features_of(2)
        if given != "features":
            inputs["code_prototypes"] = teacher
        features = features_of()
        assert_a_step_is_that_of_the_details(
            form, criterion, features, full=full, plain=plain, **inputs
        )


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
@pytest.mark.parametrize(("views", "samples"), [(2, 1), (4, 50), (5, 33)])
@pytest.mark.parametrize("form", ["streamed", "auto, fused"])
def test_blocks_of_any_size_add_up(form: str, views: int, samples: int, rows: int) -> None:
    criterion = criterion_of(form, (7, 12), queue_length=30)
    full = twin_of(criterion)
    for _ in range(2):
        features = features_of(views, samples)
        with of_form(form, rows):
            _, found = criterion(list(features), return_statistics=True)
        assert_statistics(found, by_the_details(full, features)[1])


@pytest.mark.parametrize("entries_of_a_part", [1, 12, 10**6])
def test_parts_of_blocks_add_up(entries_of_a_part: int) -> None:
    criterion = criterion_of("streamed", SIZES)
    features = features_of()
    expected = by_the_details(twin_of(criterion), features)
    with blocks_of(12, entries_of_a_part):
        _, found = criterion(features, return_statistics=True)
    assert_statistics(found, expected[1])


@ANY_SIZES
@ANY_FORM
def test_with_details_they_come_last(form: str, sizes: Any) -> None:
    criterion = criterion_of(form, sizes, queue_length=20)
    full = twin_of(criterion)
    for _ in range(2):
        features = features_of()
        if form == "streamed":
            before = snapshot(criterion)
            with pytest.raises(ValueError, match="memory must be 'full' or 'auto' for details"):
                criterion(features, return_details=True, return_statistics=True)
            assert same(snapshot(criterion), before)
            continue
        with of_form(form):
            loss, details, found = criterion(features, return_details=True, return_statistics=True)
        expected_loss, expected_details = twin_of(full)(features, return_details=True)
        assert_close(loss, expected_loss)
        assert isinstance(details, SwAVDetails) == isinstance(sizes, int)
        for of_head, wanted in zip(in_a_tuple(details), in_a_tuple(expected_details), strict=True):
            assert_close(tuple(of_head), tuple(wanted))
        assert_statistics(found, by_the_details(full, features)[1])


def test_the_loss_comes_alone_unless_they_are_asked_for() -> None:
    criterion = criterion_of("auto")
    assert isinstance(criterion(features_of(), return_statistics=False), Tensor)
    _, details = criterion(features_of(), return_details=True, return_statistics=False)
    assert isinstance(details, SwAVDetails)


@pytest.mark.parametrize("form", ["full", "auto"])
def test_parts_of_a_user_s_own_have_them_too(form: str) -> None:
    """Those of the codes and scores that the parts make, of whatever kind these are."""
    criterion = criterion_of(form, queue_length=10)
    criterion.sinkhorn.register_forward_hook(
        lambda module, given, codes: (
            [each.flip(-1) for each in codes] if isinstance(codes, list) else codes.flip(-1)
        )
    )
    full = twin_of(criterion)
    features = features_of()
    loss, found = criterion(features, return_statistics=True)
    expected_loss, expected = by_the_details(full, features)
    assert_close(loss, expected_loss)
    assert_statistics(found, expected)


# Dtypes


def near_prototypes(criterion: SwAVLoss, dtype: torch.dtype, views: int = 3) -> Tensor:
    """Return features each of which is far nearer to one prototype than to others."""
    directions = torch.eye(DIMENSION)[:PROTOTYPES]
    with torch.no_grad():
        for layer in criterion.prototypes:
            layer.weight.copy_(2 * directions[: layer.num_prototypes])
    nearest = torch.randint(0, PROTOTYPES, (views, SAMPLES))
    spread = torch.rand(PROTOTYPES, DIMENSION)[nearest] * 0.3
    return (2 * directions[nearest] + spread).to(dtype)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 20])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.float64, torch.bfloat16),
        (torch.float16, None),
        (torch.bfloat16, None),
    ],
    ids=str,
)
@ANY_FORM
def test_of_every_precision_they_are_in_float32_or_better(
    form: str, dtype: torch.dtype, low: torch.dtype | None, queue_length: int, weighted: bool
) -> None:
    criterion = criterion_of(form, (PROTOTYPES,), queue_length=queue_length, temperature=0.5).to(
        dtype
    )
    features = near_prototypes(criterion, dtype)
    full = twin_of(criterion)
    weight = WEIGHT if weighted else None
    halves = low is not None or dtype.itemsize == 2
    for _ in range(2):
        with torch.autocast("cpu", dtype=low, enabled=low is not None):
            with of_form(form):
                _, (found,) = criterion(features, sample_weight=weight, return_statistics=True)
            _, (expected,) = by_the_details(full, features, sample_weight=weight)
        # Rounded scores over ε move a code, and over τ a prediction, by so much.
        assert_close(tuple(found), tuple(expected), atol=0.5 if halves else 1e-3)
        for name in ("samples", "assigned", "code_rows", "prediction_rows", "agreeing", "pairs"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert {each.dtype for each in found} <= {torch.float32, torch.float64}
        features = features.flip(1)


# Who asks when


@pytest.mark.parametrize("queue_length", [0, 20])
@ANY_FORM
def test_in_eval_and_without_gradients(form: str, queue_length: int) -> None:
    criterion = criterion_of(form, SIZES, queue_length=queue_length)
    criterion(features_of())
    full = twin_of(criterion)
    features = features_of(requires_grad=True)
    before = snapshot(criterion)
    criterion.eval()
    with of_form(form):
        loss, found = criterion(features, return_statistics=True)
        assert loss.requires_grad
        assert same(snapshot(criterion), before)
        assert_statistics(found, by_the_details(twin_of(full).eval(), features.detach())[1])
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                loss, found = criterion(features, return_statistics=True)
            assert not loss.requires_grad
            assert same(snapshot(criterion), before)
            assert_statistics(found, by_the_details(twin_of(full).eval(), features.detach())[1])
        criterion.train()
        with torch.no_grad():
            _, found = criterion(features, return_statistics=True)
    assert_statistics(found, by_the_details(full, features.detach())[1])
    assert same(snapshot(criterion), snapshot(full))
    assert criterion.steps == 2
    if queue_length:  # 11 features twice
        assert criterion.queue.position == 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 20])
@ANY_FORM
def test_a_batch_of_nobody(form: str, queue_length: int, weighted: bool) -> None:
    criterion = criterion_of(form, SIZES, queue_length=queue_length)
    criterion(features_of())
    absent = features_of()
    absent[1, 2] = math.nan
    batches = [(features_of(samples=0), torch.ones(0))]
    batches += [(absent, torch.zeros(SAMPLES))] * weighted
    for features, weight in batches:
        with of_form(form):
            loss, found = criterion(
                features.requires_grad_(),
                sample_weight=weight if weighted else None,
                return_statistics=True,
            )
        assert loss == 0
        loss.backward()
        assert len(found) == len(SIZES)
        for of_head, size in zip(found, SIZES, strict=True):
            assert of_head.code_usage.shape == of_head.assigned.shape == (size,)
            assert not any(each.any() for each in of_head)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("view", [0, 2])
@ANY_FORM
def test_a_present_sample_that_is_not_finite_is_missing_and_leaves_them_finite(
    form: str, view: int, bad: float, queue_length: int, weighted: bool
) -> None:
    criterion = criterion_of(form, SIZES, queue_length=queue_length)
    full = twin_of(criterion)
    weight = torch.ones(SAMPLES) if weighted else None
    features = features_of()
    features[view, 3, 1] = bad
    for batch, missing in ((features, 1), (features_of(), 0)):
        with of_form(form):
            _, found = criterion(batch, sample_weight=weight, return_statistics=True)
        _, expected = by_the_details(full, batch, sample_weight=weight)
        assert_statistics(found, expected)
        for of_head in found:
            assert all(each.isfinite().all() for each in of_head)
            assert of_head.samples == SAMPLES
            assert of_head.prediction_rows == 3 * SAMPLES - missing
            assert of_head.assigned.sum() == 2 * SAMPLES - missing * (view < 2)
            assert of_head.pairs == 4 * SAMPLES - missing * (3 if view < 2 else 2)
            if view == 2 or not missing:  # else NaN is in the codes of others, too
                assert of_head.code_rows == 2 * SAMPLES
            else:
                assert of_head.code_rows <= 2 * SAMPLES - 1


def test_many_steps_are_told_apart() -> None:
    """What a step returns is its own, and no memory that the next one writes."""
    criterion = criterion_of("streamed", SIZES, queue_length=20)
    full = twin_of(criterion)
    kept, expected = [], []
    for _ in range(3):
        features = features_of()
        with of_form("streamed"):
            kept.append(criterion(features, return_statistics=True)[1])
        expected.append(by_the_details(full, features)[1])
    for found, wanted in zip(kept, expected, strict=True):
        assert_statistics(found, wanted)
        for each in tree_leaves(found):
            assert each.untyped_storage().nbytes() == each.numel() * each.element_size()


# Where it runs


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 20])
@ANY_FORM
def test_no_value_is_read_on_the_host(
    device: torch.device, form: str, queue_length: int, weighted: bool
) -> None:
    settings = {"queue_length": queue_length, "queue_start": 1, "freeze_steps": 2}
    criterion = criterion_of(form, SIZES, **settings).to(device)
    weight = WEIGHT.to(device) if weighted else None
    for mode in (True, True, True, False):
        criterion.train(mode)
        features = features_of(device=device, requires_grad=True)
        with RefuseSynchronisation(), of_form(form):
            loss, _ = criterion(features, sample_weight=weight, return_statistics=True)
            loss.backward()


@ANY_SIZES
@ANY_FORM
def test_shapes_and_dtypes_are_known_without_values(form: str, sizes: Any) -> None:
    with torch.device("meta"), of_form(form):
        criterion = SwAVLoss(DIMENSION, sizes, queue_length=20, memory=form.split(",")[0])
        features = torch.empty(3, SAMPLES, DIMENSION, requires_grad=True)
        for weight in (None, torch.empty(SAMPLES, dtype=torch.bool)):
            loss, found = criterion(features, sample_weight=weight, return_statistics=True)
            loss.backward()
            numbers = [sizes] if isinstance(sizes, int) else sizes
            for of_head, size in zip(in_a_tuple(found), numbers, strict=True):
                for name, value in of_head._asdict().items():
                    assert value.device.type == "meta"
                    assert value.dtype == torch.float32
                    assert value.shape == ((size,) if name in VECTORS else ())


class Model(nn.Module):
    """A linear encoder and its loss, which a checkpoint may surround."""

    def __init__(self, form: str, **settings: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, DIMENSION).double()
        self.criterion = criterion_of(form, **settings)

    def forward(self, inputs: Tensor, asked: bool) -> Any:
        features = self.encoder(inputs)
        if asked:
            return self.criterion(features, return_statistics=True)
        return self.criterion(features), None


@pytest.mark.parametrize("early_stop", [True, False])
@ANY_SIZES
@ANY_FORM
def test_under_activation_checkpointing_they_are_those_of_the_first_forward(
    form: str, sizes: Any, early_stop: bool
) -> None:
    model = Model(form, sizes=sizes)
    plain, full = copy.deepcopy(model), twin_of(model.criterion)
    for step in range(2):
        inputs = torch.randn(3, SAMPLES, 4).double()
        with of_form(form), set_checkpoint_early_stop(early_stop):
            loss, found = checkpoint(model, inputs, True, use_reentrant=False)
            kept = [each.clone() for each in tree_leaves(found)]
            loss.backward()
            expected_loss, _ = plain(inputs, False)
            expected_loss.backward()
        _, expected = by_the_details(full, model.encoder(inputs).detach())
        assert_statistics(found, expected)
        assert all(map(torch.equal, tree_leaves(found), kept))
        assert_close(loss, expected_loss)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert_close(one.grad, other.grad)
        assert model.criterion.steps == step + 1


@ANY_FORM
def test_functional_calls_have_them(form: str) -> None:
    criterion = criterion_of(form, SIZES)
    weights = {name: each + 0.1 for name, each in criterion.named_parameters()}
    features = features_of()
    with of_form(form):
        loss, found = torch.func.functional_call(
            criterion, weights, (features,), {"return_statistics": True}
        )
    full = twin_of(criterion)
    full.load_state_dict(weights, strict=False)
    full.steps.zero_()
    expected_loss, expected = by_the_details(full, features)
    assert_close(loss, expected_loss)
    assert_statistics(found, expected)


# What they cost


def most_bytes(form: str, rows: int, samples: int, prototypes: int, asked: bool) -> int:
    """Return the most bytes of the second step, in float32 and with a backward pass."""
    criterion = SwAVLoss(DIMENSION, prototypes, memory=form.split(",")[0], queue_length=30)
    inputs = {"return_statistics": True} if asked else {}
    for _ in range(2):
        features = features_of(4, samples, dtype=torch.float32, requires_grad=True)
        with of_form(form, rows), LiveStorage() as mode:
            loss = criterion(features, **inputs)
            (loss[0] if asked else loss).backward()
    return mode.peak


@pytest.mark.parametrize("form", ["streamed", "auto, fused"])
def test_no_matrix_of_samples_and_prototypes_is_kept_for_them(form: str) -> None:
    rows, samples, prototypes = 12, 120, 90
    without, asked = (most_bytes(form, rows, samples, prototypes, each) for each in (False, True))
    a_block, of_a_view = (4 * each * prototypes for each in (rows, samples))
    counts = 4 * (8 * 4 * samples + 8 * prototypes)  # some numbers of rows and of prototypes
    assert asked - without <= 4 * a_block + counts
    assert 4 * a_block + counts < of_a_view


@pytest.mark.parametrize("queue_length", [0, 300])
def test_no_tensor_is_larger_than_a_block(queue_length: int) -> None:
    rows, samples, prototypes = 12, 50, 90
    criterion = criterion_of("streamed", prototypes, queue_length=queue_length)
    with of_form("streamed", rows):
        criterion(features_of(4, samples))
    dtypes = [torch.float64, torch.float32, torch.bool, torch.int64, torch.int32]
    modes = [LargestTensor(dtype) for dtype in dtypes]
    features = features_of(4, samples, requires_grad=True)
    with of_form("streamed", rows), modes[0], modes[1], modes[2], modes[3], modes[4]:
        loss, _ = criterion(features, sample_weight=torch.ones(samples), return_statistics=True)
        loss.backward()
    factors = [4 * samples, 2 * (samples + queue_length), prototypes]
    most = max(rows * prototypes, *(each * DIMENSION for each in factors))
    assert max(mode.numel for mode in modes) <= most


def step_of(criterion: SwAVLoss, **inputs: Any) -> Callable[[], None]:
    """Return a training step; its first backward has no gradients to add to."""
    features = features_of(requires_grad=True)

    def step() -> None:
        result = criterion(features, **inputs)
        (result[0] if isinstance(result, tuple) else result).backward()

    step()
    return step


@pytest.mark.parametrize("form", ["full", "auto"])
def test_parts_take_no_operation_more_unless_they_are_asked_for(form: str) -> None:
    criterion, features = criterion_of(form), features_of(requires_grad=True)

    def by_hand() -> None:
        scores = criterion.prototypes(features)
        with torch.no_grad():
            (codes,) = criterion.sinkhorn([scores.detach()[:2]])
        criterion.loss(scores, codes).backward()

    by_hand()
    number = operations(by_hand, on_cpu=True) + 1  # the step is counted
    assert operations(step_of(criterion), on_cpu=True) == number
    assert operations(step_of(criterion, return_statistics=False), on_cpu=True) == number
    assert operations(step_of(criterion, return_statistics=True), on_cpu=True) > number


# Counted when there were no statistics yet.
@pytest.mark.parametrize(
    ("queue_length", "weighted", "number"),
    [(0, False, 584), (0, True, 743), (20, False, 1034), (20, True, 1265)],
)
def test_blocks_take_no_operation_more_unless_they_are_asked_for(
    queue_length: int, weighted: bool, number: int
) -> None:
    criterion = criterion_of("streamed", queue_length=queue_length)
    inputs = {"sample_weight": torch.ones(SAMPLES) if weighted else None}
    with of_form("streamed"):
        unasked = operations(step_of(criterion, **inputs), on_cpu=True)
        assert unasked <= number
        assert (
            operations(step_of(criterion, **inputs, return_statistics=False), on_cpu=True)
            == unasked
        )
        assert (
            operations(step_of(criterion, **inputs, return_statistics=True), on_cpu=True) > unasked
        )
