"""Several heads, and the short way that SwAVLoss takes while nobody looks at its parts."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swavkit import PrototypeLayer, SwappedPredictionLoss, SwAVDetails, SwAVLoss
from tests import tolerances
from tests.states import same, snapshot

DIMENSION, SIZES = 6, (5, 3, 7)


def features_of(views: int = 3, samples: int = 8, **options: Any) -> Tensor:
    options = {"dtype": torch.float64} | options
    return torch.randn(views, samples, DIMENSION, **options)


def heads_and_singles(
    device: torch.device | str = "cpu", **settings: Any
) -> tuple[SwAVLoss, list[SwAVLoss]]:
    """Return a loss of several heads, and losses of one each with the same prototypes."""
    together = SwAVLoss(DIMENSION, SIZES, **settings).to(device).double()
    singles = [SwAVLoss(DIMENSION, size, **settings).to(device).double() for size in SIZES]
    for head, single in zip(together.prototypes, singles, strict=True):
        single.prototypes.load_state_dict(head.state_dict())
    return together, singles


def assert_close(found: Any, expected: Any, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Several heads


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 10])
def test_several_heads_are_the_mean_of_separate_losses(
    device: torch.device, queue_length: int, weighted: bool
) -> None:
    together, singles = heads_and_singles(device, queue_length=queue_length, queue_start=1)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1], device=device) if weighted else None
    for _ in range(4):
        features = features_of(device=device, requires_grad=True)
        loss, details = together(features, sample_weight=weight, return_details=True)
        parts = [one(features, sample_weight=weight, return_details=True) for one in singles]
        expected = torch.stack([part for part, _ in parts]).mean()
        assert_close(loss, expected)
        assert isinstance(details, tuple)
        assert all(isinstance(of_head, SwAVDetails) for of_head in details)
        for of_head, (_, of_single) in zip(details, parts, strict=True):
            assert_close(tuple(of_head), tuple(of_single))
        leaves = [features, *(head.weight for head in together.prototypes)]
        wanted = [features, *(single.prototypes.weight for single in singles)]
        assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, wanted))
    assert together.steps == 4  # forwards, not heads
    if queue_length:
        assert_close(together.queue.state_dict(), singles[0].queue.state_dict())


@pytest.mark.parametrize("form", [tuple, list])
def test_the_state_of_heads_has_a_key_for_each(form: Callable[..., Any]) -> None:
    criterion = SwAVLoss(DIMENSION, form(SIZES), queue_length=4)
    assert isinstance(criterion.prototypes, nn.ModuleList)
    assert [key for key in criterion.state_dict() if key.startswith("prototypes")] == [
        "prototypes.0.weight",
        "prototypes.1.weight",
        "prototypes.2.weight",
    ]
    assert [head.num_prototypes for head in criterion.prototypes] == list(SIZES)
    assert {head.feature_dim for head in criterion.prototypes} == {DIMENSION}
    twin = SwAVLoss(DIMENSION, SIZES, queue_length=4)
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert same(snapshot(twin), snapshot(criterion))


def test_a_sequence_of_one_number_is_one_head_in_a_list(device: torch.device) -> None:
    listed = SwAVLoss(DIMENSION, [5]).to(device).double()
    single = SwAVLoss(DIMENSION, 5).to(device).double()
    assert list(listed.state_dict()) == ["steps", "prototypes.0.weight"]
    listed.prototypes[0].load_state_dict(single.prototypes.state_dict())
    features = features_of(device=device)
    loss, (details,) = listed(features, return_details=True)
    expected, expected_details = single(features, return_details=True)
    assert torch.equal(loss, expected)
    assert torch.equal(details.codes, expected_details.codes)


@pytest.mark.parametrize("freeze_steps", [0, 2])
def test_all_heads_are_frozen_for_as_long(device: torch.device, freeze_steps: int) -> None:
    criterion, _ = heads_and_singles(device, freeze_steps=freeze_steps)
    for step in range(4):
        criterion.zero_grad()
        criterion(features_of(device=device)).backward()
        for head in criterion.prototypes:
            assert head.weight.grad.any() == (step >= freeze_steps)


def test_heads_learn_together() -> None:
    criterion, _ = heads_and_singles()
    directions = [head.directions.clone() for head in criterion.prototypes]
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        criterion(features_of()).backward()
        optimizer.step()
    for head, start in zip(criterion.prototypes, directions, strict=True):
        assert ((head.directions * start).sum(dim=-1) < 1 - 1e-6).all()


@pytest.mark.parametrize(
    ("sizes", "error", "text"),
    [
        ((), ValueError, "num_prototypes as a sequence must hold at least 1 number, got none"),
        ([], ValueError, "num_prototypes as a sequence must hold at least 1 number, got none"),
        ((5, 0), ValueError, r"num_prototypes\[1\] must be at least 1, got 0"),
        ((5, 3.0), TypeError, r"num_prototypes\[1\] must be an int, got float"),
        (((5,), 3), TypeError, r"num_prototypes\[0\] must be an int, got tuple"),
        ("5", TypeError, "num_prototypes must be an int, got str"),
    ],
)
def test_bad_heads_are_named(sizes: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        SwAVLoss(DIMENSION, sizes)


# The short way, and who looks at the parts


class Remembering(SwappedPredictionLoss):
    """A loss of a user's own."""

    def forward(self, scores: Any, codes: Any, sample_weight: Tensor | None = None) -> Tensor:
        self.scores = scores
        return 2 * super().forward(scores, codes, sample_weight)


OBSERVERS: dict[str, Callable[[SwAVLoss, list[Any]], Any]] = {
    "forward hook": lambda criterion, seen: criterion.prototypes.register_forward_hook(
        lambda module, given, scores: seen.append(scores)
    ),
    "forward hook of the codes": lambda criterion, seen: criterion.sinkhorn.register_forward_hook(
        lambda module, given, codes: seen.append(given[0])
    ),
    "forward hook of the loss": lambda criterion, seen: criterion.loss.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    ),
    "backward hook": lambda criterion, seen: criterion.prototypes.register_full_backward_hook(
        lambda module, to_given, to_scores: seen.append(to_scores[0])
    ),
    "backward pre-hook": lambda criterion, seen: criterion.loss.register_full_backward_pre_hook(
        lambda module, to_loss: seen.append(to_loss[0])
    ),
}


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_who_looks_at_the_parts_sees_what_they_do_and_changes_nothing(
    device: torch.device, observer: str, dtype: torch.dtype
) -> None:
    plain = SwAVLoss(DIMENSION, 5, queue_length=10).to(device, dtype)
    observed = copy.deepcopy(plain)
    seen: list[Any] = []
    OBSERVERS[observer](observed, seen)
    features = features_of(device=device, dtype=dtype, requires_grad=True)
    losses = plain(features), observed(features)
    results = [
        torch.autograd.grad(loss, [features, each.prototypes.weight])
        for loss, each in zip(losses, (plain, observed), strict=True)
    ]
    assert_close(*losses, atol=tolerances.ATOL[losses[0].dtype])
    # The gradient of the scores is rounded on the long way, the products on the short one.
    assert_close(*results, atol=8 * tolerances.ATOL[dtype])
    assert seen
    with torch.no_grad():
        scores = plain.prototypes(features)
    if "forward hook" in observer:  # whose tensor has not been overwritten
        (found, *_) = seen
        assert torch.equal(found[:2, :8], scores[: len(found)][:2].to(found.dtype))


def test_a_loss_of_a_user_s_own_is_called(device: torch.device) -> None:
    plain = SwAVLoss(DIMENSION, 5).to(device).double()
    replaced = copy.deepcopy(plain)
    replaced.loss = Remembering()
    features = features_of(device=device)
    assert_close(replaced(features), 2 * plain(features))
    assert_close(replaced.loss.scores, plain.prototypes(features))


def test_a_forward_put_onto_a_part_is_called(device: torch.device) -> None:
    plain = SwAVLoss(DIMENSION, 5).to(device).double()
    patched = copy.deepcopy(plain)
    of_class = patched.loss.forward
    patched.loss.forward = lambda *inputs: 2 * of_class(*inputs)
    features = features_of(device=device)
    assert_close(patched(features), 2 * plain(features))


def test_prototypes_of_a_user_s_own_are_called(device: torch.device) -> None:
    class Doubling(PrototypeLayer):
        def forward(self, features: Tensor, *, frozen: Tensor | None = None) -> Tensor:
            return 2 * super().forward(features, frozen=frozen)

    criterion = SwAVLoss(DIMENSION, 5, temperature=0.2, epsilon=0.1).to(device).double()
    doubled = SwAVLoss(DIMENSION, 5, temperature=0.4, epsilon=0.2).to(device).double()
    doubled.prototypes = Doubling(DIMENSION, 5).to(device).double()
    doubled.prototypes.load_state_dict(criterion.prototypes.state_dict())
    features = features_of(device=device)
    assert_close(doubled(features), criterion(features))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gradient", ["tangent", "published"])
def test_details_change_neither_loss_nor_gradients(
    device: torch.device, gradient: str, weighted: bool
) -> None:
    settings = {"queue_length": 10, "prototype_gradient": gradient}
    quiet = SwAVLoss(DIMENSION, 5, **settings).to(device).double()
    asked = copy.deepcopy(quiet)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1], device=device) if weighted else None
    for _ in range(2):
        features = features_of(device=device)
        features[1, 1] *= torch.nan if weighted else 1
        features.requires_grad_()
        losses = (
            quiet(features, sample_weight=weight),
            asked(features, sample_weight=weight, return_details=True)[0],
        )
        assert_close(*losses)
        results = [
            torch.autograd.grad(loss, [features, each.prototypes.weight])
            for loss, each in zip(losses, (quiet, asked), strict=True)
        ]
        assert_close(*results)
        assert results[0][1].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 2.0**16], ids=["as it is", "scaled"])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_under_autocast_are_right_at_any_scale(
    device: torch.device, low: torch.dtype, scale: float
) -> None:
    criterion = SwAVLoss(64, 100).to(device)
    exact = copy.deepcopy(criterion).double()
    features = torch.randn(8, 1024, 64, device=device, requires_grad=True)
    with torch.autocast(device.type, dtype=low):
        loss = criterion(features)
    found = torch.autograd.grad(scale * loss, [features, criterion.prototypes.weight])
    expected = torch.autograd.grad(exact(features.double()), [features, exact.prototypes.weight])
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        error = (gradient / scale - reference).abs().sum() / reference.abs().sum()
        assert error < 12 * tolerances.ATOL[low]  # that of scores over the temperature, mostly


def test_a_gradient_scaler_finds_the_gradients(device: torch.device) -> None:
    criterion = SwAVLoss(DIMENSION, 5).to(device)
    features = features_of(dtype=torch.float32, device=device)
    (expected,) = torch.autograd.grad(criterion(features), criterion.prototypes.weight)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler(device.type)
    scaler.scale(criterion(features)).backward()
    scaler.unscale_(optimizer)
    assert_close(criterion.prototypes.weight.grad, expected, atol=1e-6)


def test_nothing_keeps_a_gradient_without_a_need() -> None:
    criterion = SwAVLoss(DIMENSION, 5)
    with torch.no_grad():
        assert not criterion(features_of(dtype=torch.float32)).requires_grad
    criterion.requires_grad_(False)
    assert not criterion(features_of(dtype=torch.float32)).requires_grad
    features = features_of(dtype=torch.float32, requires_grad=True)
    criterion(features).backward()
    assert features.grad.any()
    assert criterion.prototypes.weight.grad is None
