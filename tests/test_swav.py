"""The whole loss: its value, its parts, its steps and its state, training, arguments."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
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
    SwAVDetails,
    SwAVLoss,
)
from tests import oracles, tolerances
from tests.bad_input import BAD_SAMPLE_WEIGHTS
from tests.optimizers import Lars, adam, adamw, sgd
from tests.states import same, snapshot

CHECKPOINT = Path(__file__).resolve().parent / "data" / "swav_loss_v1.pt"
DIMENSION, PROTOTYPES = 6, 5
FIRST_QUEUE_KEYS = ["queue.features", "queue.valid", "queue.position", "queue.rejected"]
QUEUE_KEYS = [*FIRST_QUEUE_KEYS, "queue.written", "queue.pushes"]


def criterion_of(device: torch.device | str = "cpu", **settings: Any) -> SwAVLoss:
    """Return a loss in float64, so that only the equations are compared and not the rounding."""
    return SwAVLoss(DIMENSION, PROTOTYPES, **settings).to(device).double()


def features_of(
    views: int = 3, samples: int = 8, device: torch.device | str = "cpu", **options: Any
) -> Tensor:
    options = {"dtype": torch.float64} | options
    return torch.randn(views, samples, DIMENSION, device=device, **options)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def assert_close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


# The value


@pytest.mark.parametrize("queue_length", [0, 7, 40])
@pytest.mark.parametrize("code_views", [1, 2])
@pytest.mark.parametrize("views", [2, 3, 4])
def test_twenty_training_steps_have_the_losses_of_the_equations(
    device: torch.device, views: int, code_views: int, queue_length: int
) -> None:
    criterion = criterion_of(device, num_code_views=code_views, queue_length=queue_length)
    ring = oracles.Ring(queue_length) if queue_length else None
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    smallest = 0 if queue_length else 1  # the oracle has no codes of nobody
    for samples in [8, 3, 2, smallest, 9] * 4:
        features = 3 * features_of(views, samples, device)
        loss = criterion(features)
        expected = oracles.swav_loss(
            features.cpu().numpy(),
            criterion.prototypes.weight.detach().cpu().numpy(),
            code_views,
            temperature=0.1,
            epsilon=0.05,
            iterations=3,
            queue=ring,
        )
        assert loss.shape == ()
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(expected, rel=0, abs=1e-11)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert criterion.steps == 20
    if ring is not None:
        assert criterion.queue.position == ring.position
        for slot, held in enumerate(ring.slots):
            found = criterion.queue.features[:, slot].cpu().numpy()
            np.testing.assert_allclose(found, 0 if held is None else held, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.3}, {"epsilon": 0.2}, {"iterations": 7}], ids=str
)
def test_the_settings_are_those_of_the_equations(settings: dict[str, float]) -> None:
    criterion, features = criterion_of(**settings), features_of()
    expected = oracles.swav_loss(
        features.numpy(),
        criterion.prototypes.weight.detach().numpy(),
        2,
        **({"temperature": 0.1, "epsilon": 0.05, "iterations": 3} | settings),
    )
    assert criterion(features).item() == pytest.approx(expected, rel=0, abs=1e-11)


def test_without_a_queue_it_is_its_parts_to_the_last_digit(device: torch.device) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES).to(device)
    features = features_of(4, dtype=torch.float32, device=device, requires_grad=True)
    prototypes = PrototypeLayer(DIMENSION, PROTOTYPES).to(device)
    prototypes.load_state_dict({"weight": criterion.prototypes.weight})

    scores = prototypes(features)
    expected = SwappedPredictionLoss()(scores, SinkhornKnopp()(scores[:2]))
    loss = criterion(features)
    assert torch.equal(loss, expected)
    found = gradients(loss, features, criterion.prototypes.weight)
    wanted = gradients(expected, features, prototypes.weight)
    # The same products, multiplied by the same factor before or after.
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerances.ATOL[torch.float32])

    criterion.loss.register_forward_hook(lambda *_: None)  # so that it goes by its parts
    found = gradients(criterion(features), features, criterion.prototypes.weight)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("code_views", [1, 2])
def test_with_a_queue_it_is_its_parts_wired_by_hand(device: torch.device, code_views: int) -> None:
    criterion = criterion_of(device, num_code_views=code_views, queue_length=20)
    prototypes = PrototypeLayer(DIMENSION, PROTOTYPES).to(device).double()
    prototypes.load_state_dict({"weight": criterion.prototypes.weight})
    queue = FeatureQueue(20, DIMENSION, code_views).to(device).double()
    sinkhorn, swapped = SinkhornKnopp(), SwappedPredictionLoss()

    def by_hand(features: Tensor) -> Tensor:
        scores = [prototypes(view) for view in features]
        recent = prototypes(queue.features)
        together = torch.cat([torch.stack(scores[:code_views]), recent], dim=1)
        present = torch.ones(features.shape[1], dtype=torch.bool, device=device)
        codes = sinkhorn(together, torch.cat([present, queue.valid]))[:, : features.shape[1]]
        queue.push(F.normalize(features[:code_views], dim=-1))
        return swapped(scores, codes)

    layers = (criterion.prototypes, prototypes)
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.5) for layer in layers]
    for _ in range(5):
        features = features_of(3, 8, device, requires_grad=True)
        losses = criterion(features), by_hand(features)
        assert_close(*losses)
        results = [
            gradients(loss, features, layer.weight)
            for loss, layer in zip(losses, layers, strict=True)
        ]
        assert_close(*results)
        for optimizer, layer, (_, gradient) in zip(optimizers, layers, results, strict=True):
            layer.weight.grad = gradient
            optimizer.step()


def test_the_gradient_is_that_of_the_value_with_the_codes_as_constants() -> None:
    criterion = criterion_of()
    features = features_of(3, 4, requires_grad=True)
    _, details = criterion(features, return_details=True)
    criterion.sinkhorn.register_forward_hook(lambda *_: details.codes)

    def loss(features: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(criterion, {"prototypes.weight": weight}, features)

    weight = (2 * torch.randn(PROTOTYPES, DIMENSION, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (features, weight))


@pytest.mark.parametrize("form", [list, tuple, torch.stack])
def test_views_come_as_a_sequence_or_as_one_tensor(
    device: torch.device, form: Callable[..., Any]
) -> None:
    criterion, features = criterion_of(device), features_of(device=device)
    assert torch.equal(criterion(form(features.unbind())), criterion(features))


def test_norms_of_features_do_not_matter(device: torch.device) -> None:
    plain, scaled = (criterion_of(device, queue_length=10) for _ in range(2))
    scaled.load_state_dict(plain.state_dict())
    for _ in range(3):
        features = features_of(device=device)
        norms = 10 ** torch.empty(3, 8, 1, dtype=torch.float64, device=device).uniform_(-30, 30)
        assert_close(scaled(norms * features), plain(features))
    lengths = scaled.queue.features.norm(dim=-1)
    assert_close(lengths, torch.ones_like(lengths))


def test_features_without_a_direction_give_the_logarithm_of_the_number_of_prototypes(
    device: torch.device,
) -> None:
    criterion = criterion_of(device, queue_length=10)
    for _ in range(2):
        loss = criterion(torch.zeros(3, 8, DIMENSION, dtype=torch.float64, device=device))
        assert loss.item() == pytest.approx(math.log(PROTOTYPES), rel=1e-12)


def test_codes_use_all_prototypes_though_one_is_the_nearest_of_all() -> None:
    criterion = criterion_of(epsilon=0.2, iterations=50)
    favourite = criterion.prototypes.directions[2]
    features = favourite + 0.1 * features_of(2, 100)
    assert torch.equal(criterion.prototypes.assign(features), torch.full((2, 100), 2))
    _, details = criterion(features, return_details=True)
    for codes in details.codes:
        assert oracles.marginal_error(codes.numpy()) < 1e-3


# Steps, queue and freezing


@pytest.mark.parametrize("queue_start", [0, 1, 3])
def test_the_queue_takes_part_from_its_start_and_not_before_the_second_step(
    device: torch.device, queue_start: int
) -> None:
    criterion = criterion_of(device, queue_length=16, queue_start=queue_start)
    sinkhorn = SinkhornKnopp()
    for step in range(5):
        features = features_of(device=device)
        held, valid = criterion.queue.features.clone(), criterion.queue.valid.clone()
        criterion.eval()(features_of(device=device))  # is not counted
        _, details = criterion.train()(features, return_details=True)
        scores = details.scores[:2]
        alone = sinkhorn(scores)
        together = sinkhorn(torch.cat([scores, criterion.prototypes(held)[:, valid]], dim=1))[:, :8]
        takes_part = step >= max(queue_start, 1)
        assert_close(details.codes, together if takes_part else alone)
        assert ((together - alone).abs().max() > 1e-3) == (step > 0)
        assert len(criterion.queue) == min(8 * (step + 1), 16)


def test_codes_are_computed_before_the_features_enter_the_queue(device: torch.device) -> None:
    criterion = criterion_of(device, queue_length=8)
    features = features_of(device=device)
    _, details = criterion(features, return_details=True)
    assert_close(details.codes, SinkhornKnopp()(details.scores[:2]))
    assert_close(criterion.queue.features, F.normalize(features[:2], dim=-1))


def test_the_queue_is_scored_with_the_prototypes_of_today(device: torch.device) -> None:
    criterion = criterion_of(device, queue_length=8)
    first, second = features_of(device=device), features_of(device=device)
    criterion(first)
    criterion.prototypes.reset_parameters()
    _, details = criterion(second, return_details=True)
    together = torch.cat([second, first], dim=1)[:2]
    assert_close(details.codes, SinkhornKnopp()(criterion.prototypes(together))[:, :8])


@pytest.mark.parametrize("freeze_steps", [0, 1, 3])
def test_prototypes_are_frozen_for_so_many_training_steps(
    device: torch.device, freeze_steps: int
) -> None:
    criterion = criterion_of(device, freeze_steps=freeze_steps)
    for step in range(5):
        assert criterion.steps == step
        criterion.eval()(features_of(device=device))  # is not counted
        features = features_of(device=device, requires_grad=True)
        loss = criterion.train()(features)
        to_features, to_weight = gradients(loss, features, criterion.prototypes.weight)
        assert to_features.any()
        assert to_weight.any() == (step >= freeze_steps)


@pytest.mark.parametrize("gradient", ["tangent", "published"])
@pytest.mark.parametrize("optimizer_of", [sgd, adam, adamw, Lars])
def test_frozen_prototypes_do_not_turn_and_then_do(
    device: torch.device, optimizer_of: Callable[[Any], torch.optim.Optimizer], gradient: str
) -> None:
    settings = {"freeze_steps": 30, "queue_length": 10, "prototype_gradient": gradient}
    criterion = criterion_of(device, **settings)
    network = nn.Linear(DIMENSION, DIMENSION).to(device).double()
    start, first = criterion.prototypes.directions, network.weight.detach().clone()
    optimizer = optimizer_of([*network.parameters(), *criterion.parameters()])

    def step() -> None:
        optimizer.zero_grad()
        criterion(network(features_of(device=device))).backward()
        optimizer.step()

    for _ in range(30):
        step()
    cosine = (start * criterion.prototypes.directions).sum(dim=-1)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)
    assert (network.weight - first).abs().max() > 1e-3
    for _ in range(3):
        step()
    assert ((start * criterion.prototypes.directions).sum(dim=-1) < 1 - 1e-8).all()


def test_freezing_and_its_end_survive_a_checkpoint() -> None:
    criterion, twin = (criterion_of(freeze_steps=2) for _ in range(2))
    criterion(features_of())
    twin.load_state_dict(criterion.state_dict())
    for frozen in (True, False):
        (gradient,) = gradients(twin(features_of()), twin.prototypes.weight)
        assert gradient.any() != frozen


def test_a_forward_in_eval_changes_no_state(device: torch.device) -> None:
    criterion = criterion_of(device, queue_length=10, queue_start=1, freeze_steps=2)
    criterion(features_of(device=device))
    before = snapshot(criterion)
    criterion.eval()
    features = features_of(device=device)
    features[0, 0] = math.nan
    for _ in range(3):
        criterion(features)
        criterion(features_of(device=device), sample_weight=torch.ones(8, device=device))
    assert same(snapshot(criterion), before)
    criterion.train()(features)
    after = snapshot(criterion)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"steps", *QUEUE_KEYS}


def test_two_forwards_may_come_before_a_backward(device: torch.device) -> None:
    criterion, twin = (criterion_of(device, queue_length=10) for _ in range(2))
    twin.load_state_dict(criterion.state_dict())
    batches = [features_of(device=device) for _ in range(2)]
    for features in batches:
        twin(features).backward()
    sum(criterion(features) for features in batches).backward()
    assert_close(criterion.prototypes.weight.grad, twin.prototypes.weight.grad)


# Weights of samples


@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float64])
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_an_absent_sample_is_as_if_it_had_been_removed(
    device: torch.device, weight_dtype: torch.dtype, bad: float
) -> None:
    # The queue is longer than what is pushed, because absent samples leave empty slots in it.
    padded, removed = (criterion_of(device, queue_length=40) for _ in range(2))
    removed.load_state_dict(padded.state_dict())
    present = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], device=device).bool()
    for step in range(3):
        whole = features_of(device=device)
        whole[:, ~present] = bad
        part = whole[:, present].clone().requires_grad_()
        whole.requires_grad_()
        losses = padded(whole, sample_weight=present.to(weight_dtype)), removed(part)
        assert_close(*losses)
        for_whole = gradients(losses[0], whole, padded.prototypes.weight)
        for_part = gradients(losses[1], part, removed.prototypes.weight)
        assert_close(for_whole[0][:, present], for_part[0])
        assert not for_whole[0][:, ~present].any()
        assert_close(for_whole[1], for_part[1])
        assert len(padded.queue) == len(removed.queue) == 5 * (step + 1)
        assert torch.equal(
            padded.queue.features[:, padded.queue.valid],
            removed.queue.features[:, removed.queue.valid],
        )
    assert padded.queue.rejected == 0


def test_weights_are_multiplicities(device: torch.device) -> None:
    criterion = criterion_of(device)
    features = features_of(samples=4, device=device)
    counts = torch.tensor([1, 3, 0, 2], device=device)
    weighted = criterion(features, sample_weight=counts.double())
    assert_close(weighted, criterion(features.repeat_interleave(counts, dim=1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_weights_of_any_dtype_serve_along_with_the_queue(
    device: torch.device, dtype: torch.dtype
) -> None:
    criterion, twin = (criterion_of(device, queue_length=10) for _ in range(2))
    twin.load_state_dict(criterion.state_dict())
    weight = torch.tensor([1, 2, 0, 1, 0.5, 1, 1, 1], device=device)
    for _ in range(2):
        features = features_of(device=device)
        found = criterion(features, sample_weight=weight.to(dtype))
        assert_close(found, twin(features, sample_weight=weight.double()))


@pytest.mark.parametrize("queue_length", [0, 10])
def test_nobody_present_gives_zero_with_zero_gradients(
    device: torch.device, queue_length: int
) -> None:
    criterion = criterion_of(device, queue_length=queue_length)
    criterion(features_of(device=device))
    valid = len(criterion.queue) if criterion.queue else 0
    features = features_of(device=device)
    features[0, 0] = math.nan
    features.requires_grad_()
    loss = criterion(features, sample_weight=torch.zeros(8, device=device))
    assert loss == 0
    for gradient in gradients(loss, features, criterion.prototypes.weight):
        assert not gradient.any()
    if criterion.queue is not None:
        assert len(criterion.queue) <= valid


# Limits


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 10])
def test_an_empty_batch_gives_zero_connected_to_the_graph(
    device: torch.device, queue_length: int, weighted: bool
) -> None:
    criterion = criterion_of(device, queue_length=queue_length)
    criterion(features_of(device=device))
    before = snapshot(criterion)
    features = features_of(3, 0, device, requires_grad=True)
    weight = torch.ones(0, device=device) if weighted else None
    loss, details = criterion(features, sample_weight=weight, return_details=True)
    assert loss == 0
    assert details.codes.shape == (2, 0, PROTOTYPES)
    to_features, to_weight = gradients(loss, features, criterion.prototypes.weight)
    assert to_features.shape == features.shape
    assert not to_weight.any()
    after = snapshot(criterion)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        "steps",
        *(["queue.pushes"] if queue_length else []),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 2])
def test_a_present_sample_that_is_not_finite_is_seen_in_the_loss_and_kept_out_of_the_queue(
    device: torch.device, view: int, bad: float, weighted: bool
) -> None:
    criterion = criterion_of(device, queue_length=10)
    weight = torch.ones(8, device=device) if weighted else None
    features = features_of(device=device)
    features[view, 3, 1] = bad
    loss = criterion(features, sample_weight=weight)
    assert loss.isnan()
    (gradient,) = gradients(loss, criterion.prototypes.weight)
    assert gradient.isnan().any()  # where a GradScaler looks
    gives_codes = view < 2
    assert criterion.queue.rejected == int(gives_codes)
    assert len(criterion.queue) == 8 - gives_codes
    assert criterion(features_of(device=device), sample_weight=weight).isfinite()


# Dtypes and details


@pytest.mark.parametrize("queue_length", [0, 10])
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["features alone", "module and features"])
def test_codes_and_loss_are_float32_or_float64(
    device: torch.device, whole: bool, dtype: torch.dtype, queue_length: int
) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=queue_length).to(device)
    if whole:
        criterion.to(dtype)
    for _ in range(2):
        features = features_of(dtype=dtype, device=device, requires_grad=True)
        loss, details = criterion(features, return_details=True)
    expected = torch.promote_types(dtype, torch.float32)
    assert loss.shape == ()
    assert loss.dtype == details.codes.dtype == expected
    assert details.scores.dtype == (dtype if whole else expected)
    assert loss.isfinite()
    to_features, to_weight = gradients(loss, features, criterion.prototypes.weight)
    assert to_features.dtype == dtype
    assert to_weight.dtype == criterion.prototypes.weight.dtype


@pytest.mark.parametrize("queue_length", [0, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_multiplies_low_and_keeps_codes_and_loss(
    device: torch.device, dtype: torch.dtype, queue_length: int
) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=queue_length).to(device)
    for _ in range(2):
        features = features_of(dtype=dtype, device=device, requires_grad=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss, details = criterion(features, return_details=True)
    assert details.scores.dtype == torch.bfloat16
    assert loss.dtype == details.codes.dtype == torch.float32
    sums = details.codes.sum(dim=-1)  # which in bfloat16 would be wrong in the third digit
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    loss.backward()
    assert criterion.prototypes.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_codes_of_low_scores_are_those_of_the_equations(
    device: torch.device, dtype: torch.dtype
) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES).to(device, dtype)
    _, details = criterion(features_of(dtype=dtype, device=device), return_details=True)
    for codes, scores in zip(details.codes, details.scores[:2], strict=True):
        expected = oracles.sinkhorn(scores.double().cpu().numpy(), 0.05, 3)
        tolerance = tolerances.of_codes(torch.float32, epsilon=0.05, largest=1)
        np.testing.assert_allclose(codes.cpu().numpy(), expected, rtol=0, atol=tolerance)


def test_details_are_constants_of_the_current_samples(device: torch.device) -> None:
    criterion = criterion_of(device, num_code_views=2, queue_length=10)
    features = features_of(4, device=device, requires_grad=True)
    loss, details = criterion(features, return_details=True)
    assert isinstance(details, SwAVDetails)
    codes, scores = details
    assert codes.shape == (2, 8, PROTOTYPES)
    assert scores.shape == (4, 8, PROTOTYPES)
    assert loss.requires_grad
    assert not codes.requires_grad
    assert not scores.requires_grad
    assert_close(scores, criterion.prototypes(features).detach())
    assert_close(loss, SwappedPredictionLoss()(scores, codes))
    assert isinstance(criterion(features), Tensor)


def test_details_of_absent_samples_are_theirs_if_finite_else_nan_scores_and_zero_codes() -> None:
    criterion, features = criterion_of(), features_of(samples=4)
    features[0, 1] = math.inf
    weight = torch.tensor([True, False, False, True])
    loss, details = criterion(features, sample_weight=weight, return_details=True)
    assert loss.isfinite()
    assert details.scores[0, 1].isnan().all()
    assert not details.codes[0, 1].any()
    assert_close(details.scores[:, 2:], criterion.prototypes(features[:, 2:]).detach())
    assert_close(details.codes, criterion.sinkhorn(details.scores[:2], weight))
    assert details.codes[:, 2].all()


# State


@pytest.mark.parametrize("queue_length", [0, 10])
def test_the_keys_of_the_state_are_these(queue_length: int) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=queue_length)
    keys = ["steps", "prototypes.weight", *(QUEUE_KEYS if queue_length else [])]
    assert list(criterion.state_dict()) == keys
    assert [name for name, _ in criterion.named_parameters()] == ["prototypes.weight"]
    assert not list(criterion.named_buffers())  # which weight averaging would average
    assert criterion.steps.dtype == torch.int64
    assert criterion.steps.shape == ()
    assert (criterion.queue is None) == (queue_length == 0)


def test_every_version_loads_the_first_checkpoint() -> None:
    saved = torch.load(CHECKPOINT, weights_only=True)
    assert list(saved["state_dict"]) == ["steps", "prototypes.weight", *FIRST_QUEUE_KEYS]
    criterion = SwAVLoss(**saved["settings"])
    criterion.load_state_dict(saved["state_dict"], strict=True)
    assert criterion.steps == 3
    assert len(criterion.queue) == 9
    loss = criterion.eval()(saved["features"])
    assert loss.item() == pytest.approx(saved["loss"], rel=1e-5)
    criterion.queue = None  # which takes part in the loss that was stored
    assert criterion(saved["features"]).item() != pytest.approx(saved["loss"], rel=1e-3)


def test_training_goes_on_from_a_checkpoint_as_if_unbroken() -> None:
    settings = {"queue_length": 20, "queue_start": 3, "freeze_steps": 2}
    batches = [features_of() for _ in range(6)]

    def train(criterion: SwAVLoss, batches: list[Tensor]) -> list[float]:
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
        losses = []
        for features in batches:
            optimizer.zero_grad()
            loss = criterion(features)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    unbroken = criterion_of(**settings)
    start = snapshot(unbroken)
    expected = train(unbroken, batches)
    for cut in range(1, 6):
        before, after = criterion_of(**settings), criterion_of(**settings)
        before.load_state_dict(start)
        losses = train(before, batches[:cut])
        file = io.BytesIO()
        torch.save(before.state_dict(), file)
        file.seek(0)
        after.load_state_dict(torch.load(file, weights_only=True))
        assert losses + train(after, batches[cut:]) == expected
        assert same(snapshot(after), snapshot(unbroken))


def test_a_state_of_another_size_is_refused() -> None:
    criterion = criterion_of(queue_length=10)
    other = SwAVLoss(DIMENSION, PROTOTYPES + 1, queue_length=10).double()
    with pytest.raises(RuntimeError, match=r"size mismatch for prototypes\.weight"):
        criterion.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for queue\.features"):
        criterion.load_state_dict(criterion_of(queue_length=11).state_dict())
    with pytest.raises(RuntimeError, match=r'Missing key.*"queue\.features"'):
        criterion.load_state_dict(criterion_of().state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"queue\.features"'):
        criterion_of().load_state_dict(criterion.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_equal_and_its_own(duplicate: Callable[[SwAVLoss], SwAVLoss]) -> None:
    criterion = criterion_of(queue_length=10, queue_start=1, freeze_steps=2, temperature=0.2)
    criterion(features_of())
    before = snapshot(criterion)
    twin = duplicate(criterion)
    assert repr(twin) == repr(criterion)
    assert same(snapshot(twin), before)
    features = features_of()
    loss = twin(features)
    assert same(snapshot(criterion), before)
    assert torch.equal(loss, criterion(features))


def test_the_module_shows_its_settings() -> None:
    text = repr(criterion_of(num_code_views=1, queue_length=10, queue_start=2, freeze_steps=4))
    assert "num_code_views=1, queue_start=2, freeze_steps=4" in text
    assert "FeatureQueue(length=10, feature_dim=6, num_views=1)" in text


# Where it runs


def test_shapes_and_dtypes_are_known_without_values() -> None:
    with torch.device("meta"):
        criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=10, freeze_steps=2)
        optimizer = torch.optim.SGD(criterion.parameters(), lr=0.1, momentum=0.9)
        features = torch.empty(3, 8, DIMENSION, requires_grad=True)
        loss, details = criterion(
            features, sample_weight=torch.empty(8, dtype=torch.bool), return_details=True
        )
        loss.backward()
        optimizer.step()
    assert loss.shape == ()
    assert details.codes.shape == (2, 8, PROTOTYPES)
    assert features.grad.shape == features.shape
    tensors = [loss, *details, features.grad, *criterion.state_dict().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_module_made_on_meta_gets_its_state_from_a_checkpoint() -> None:
    criterion = criterion_of(queue_length=10)
    criterion(features_of())
    with torch.device("meta"):
        twin = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=10).double()
    twin.to_empty(device="cpu").load_state_dict(criterion.state_dict())
    features = features_of()
    assert torch.equal(twin(features), criterion(features))


# It learns


@pytest.mark.parametrize(
    "settings",
    [{}, {"queue_length": 64, "queue_start": 5, "freeze_steps": 10}],
    ids=["batch alone", "queue and freezing"],
)
def test_it_learns_the_clusters_of_unlabelled_data_and_uses_all_prototypes(
    settings: dict[str, int],
) -> None:
    clusters, samples = 8, 32
    centres = F.normalize(torch.randn(clusters, 16), dim=1)
    network = nn.Linear(16, 8)
    criterion = SwAVLoss(8, clusters, **settings)
    optimizer = torch.optim.Adam([*network.parameters(), *criterion.parameters()], lr=0.02)

    def batch() -> tuple[Tensor, Tensor]:
        """Return two views of samples, and the clusters that they come from."""
        labels = torch.arange(samples) % clusters
        return labels, centres[labels] + 0.05 * torch.randn(2, samples, 16)

    for _ in range(150):
        _, views = batch()
        optimizer.zero_grad()
        loss = criterion(network(views))
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * math.log(clusters)
    labels, views = batch()
    index = criterion.prototypes.assign(network(views[0]))
    # Each cluster has a prototype of its own: collapse onto one would have the least loss of all.
    assert len(index.unique()) == clusters
    assert len({*zip(labels.tolist(), index.tolist(), strict=True)}) == clusters


# Bad input

BAD_SETTINGS = [
    *(
        ({name: value}, error, text.format(name))
        for name in ("feature_dim", "num_prototypes", "num_code_views", "iterations")
        for value, error, text in [
            (0, ValueError, "{} must be at least 1, got 0"),
            (-2, ValueError, "{} must be at least 1, got -2"),
            (1.0, TypeError, "{} must be an int, got float"),
            (True, TypeError, "{} must be an int, got bool"),
            ((5, 5), TypeError, "{} must be an int, got tuple"),
        ]
        if not (name == "num_prototypes" and isinstance(value, tuple))  # which are heads
    ),
    (
        {"prototype_gradient": "other"},
        ValueError,
        "gradient must be 'tangent' or 'published', got 'other'",
    ),
    *(
        ({name: value}, error, text.format(name))
        for name in ("queue_length", "queue_start", "freeze_steps")
        for value, error, text in [
            (-1, ValueError, "{} must be at least 0, got -1"),
            (1.5, TypeError, "{} must be an int, got float"),
            (None, TypeError, "{} must be an int, got NoneType"),
        ]
    ),
    *(
        ({name: value}, error, text.format(name))
        for name in ("temperature", "epsilon")
        for value, error, text in [
            (0, ValueError, "{} must be a finite number above 0, got 0"),
            (-0.1, ValueError, "{} must be a finite number above 0, got -0.1"),
            (math.nan, ValueError, "{} must be a finite number, got nan"),
            (math.inf, ValueError, "{} must be a finite number, got inf"),
            ("0.1", TypeError, "{} must be a number, got str"),
        ]
    ),
    ({"synchronize": 1}, ValueError, "synchronize must be True or False or 'always', got 1"),
    ({"memory": "half"}, ValueError, "memory must be 'full' or 'streamed' or 'auto', got 'half'"),
    ({"memory": None}, ValueError, "memory must be 'full' or 'streamed' or 'auto', got None"),
    ({"reduction": "sum"}, ValueError, "reduction must be 'mean' or 'global_mean', got 'sum'"),
    (
        {"queue_length": 4, "queue_dtype": torch.int8},
        ValueError,
        "dtype must be None or torch.float16 or .*, got torch.int8",
    ),
]
VIEW = torch.zeros(4, DIMENSION)
BAD_INPUTS = [
    ({"features": None}, TypeError, "features must be a .* or a sequence of .*, got NoneType"),
    ({"features": [VIEW]}, ValueError, "features must hold at least 3 views, got 1"),
    ({"features": [VIEW] * 2}, ValueError, "features must hold at least 3 views, got 2"),
    (
        {"features": VIEW},
        ValueError,
        r"features as one tensor must have 3 dimensions .*, got shape \(4, 6\)",
    ),
    (
        {"features": torch.zeros(1, 3, 4, 6)},
        ValueError,
        r"features as one tensor must have 3 dimensions .*, got shape \(1, 3, 4, 6\)",
    ),
    (
        {"features": [VIEW, VIEW[0], VIEW]},
        ValueError,
        r"features\[1\] must have 2 dimensions \(samples, features\), got shape \(6,\)",
    ),
    (
        {"features": [VIEW, VIEW, VIEW[:3]]},
        ValueError,
        r"features\[2\] must have the shape of features\[0\], \(4, 6\), got \(3, 6\)",
    ),
    (
        {"features": [VIEW, VIEW, VIEW[:, :5]]},
        ValueError,
        r"features\[2\] must have 6 features in its last dimension, got shape \(4, 5\)",
    ),
    (
        {"features": torch.zeros(3, 4, 7)},
        ValueError,
        r"features\[0\] must have 6 features in its last dimension, got shape \(4, 7\)",
    ),
    (
        {"features": torch.zeros(3, 4, 6, dtype=torch.int64)},
        TypeError,
        r"features must have a floating-point dtype, got torch\.int64",
    ),
    (
        {"features": [VIEW, VIEW, VIEW.int()]},
        TypeError,
        r"features\[2\] must have a floating-point dtype, got torch\.int32",
    ),
    (
        {"features": [VIEW, VIEW, VIEW.half()]},
        TypeError,
        r"features\[2\] must have the dtype of features\[0\], torch\.float32, got torch\.float16",
    ),
    (
        {"features": [VIEW, VIEW, VIEW.tolist()]},
        TypeError,
        r"features\[2\] must be a torch\.Tensor, got list",
    ),
    (
        {"features": [VIEW, VIEW, VIEW.to("meta")]},
        ValueError,
        r"features\[2\] must be on device cpu, got meta",
    ),
    (
        {"features": [VIEW.to("meta")] * 3},
        ValueError,
        "features must be on device cpu, got meta",
    ),
    *BAD_SAMPLE_WEIGHTS,
]


@pytest.mark.parametrize(("settings", "error", "text"), BAD_SETTINGS)
def test_a_bad_setting_is_named(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        SwAVLoss(**({"feature_dim": DIMENSION, "num_prototypes": PROTOTYPES} | settings))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(("inputs", "error", "text"), BAD_INPUTS)
def test_bad_input_is_named_and_changes_nothing(
    inputs: dict[str, Any], error: type[Exception], text: str, mode: bool
) -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, num_code_views=3, queue_length=10)
    criterion(torch.randn(3, 4, DIMENSION))
    before = snapshot(criterion)
    with pytest.raises(error, match=text):
        criterion.train(mode)(**({"features": [VIEW] * 3} | inputs))
    assert same(snapshot(criterion), before)


def test_one_view_is_not_enough_with_one_code_view_either() -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, num_code_views=1)
    with pytest.raises(ValueError, match="features must hold at least 2 views, got 1"):
        criterion([VIEW])
