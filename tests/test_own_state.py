"""State that is no buffer: on the meta device, under weight averaging, under FSDP, compiled."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from swavkit import FeatureQueue, PrototypeLayer, SwAVLoss
from tests.states import same, snapshot

SETTINGS: dict[str, Any] = {"queue_length": 6, "queue_start": 1, "freeze_steps": 3}


def criterion_of(num_prototypes: Any = 5, **settings: Any) -> SwAVLoss:
    return SwAVLoss(4, num_prototypes, **(SETTINGS | settings))


def train(criterion: SwAVLoss, steps: int) -> list[Tensor]:
    """Return the losses of some steps on the same batches, and the last gradients."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(criterion.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(torch.randn(3, 2, 4, generator=generator))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses + [parameter.grad for parameter in criterion.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


# Made on the meta device


def module_by_module(criterion: SwAVLoss) -> None:
    for module in criterion.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


@pytest.mark.parametrize("num_prototypes", [5, [5, 3]], ids=str)
@pytest.mark.parametrize("queue_dtype", [None, torch.float16], ids=str)
@pytest.mark.parametrize("reset", [SwAVLoss.reset_parameters, module_by_module])
def test_a_criterion_made_on_meta_is_reset_to_a_new_one(
    num_prototypes: Any, queue_dtype: torch.dtype | None, reset: Callable[[SwAVLoss], None]
) -> None:
    with torch.device("meta"):
        criterion = criterion_of(num_prototypes, queue_dtype=queue_dtype)
    assert {value.device.type for value in criterion.state_dict().values()} == {"meta"}
    criterion.to_empty(device="cpu")
    for value in criterion.state_dict().values():
        value.fill_(1)  # as random memory may be: all slots valid, no longer frozen
    held = dict(criterion.state_dict())
    reset(criterion)
    for key, value in criterion.state_dict().items():
        assert value is held[key] or key.startswith("prototypes")
        assert not value.any() or key.startswith("prototypes")
    for parameter in criterion.parameters():
        norms = parameter.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
        assert not torch.equal(parameter[0], parameter[1])

    new = criterion_of(num_prototypes, queue_dtype=queue_dtype)
    new.prototypes.load_state_dict(criterion.prototypes.state_dict())
    assert equal(train(criterion, 5), train(new, 5))
    assert same(snapshot(criterion), snapshot(new))


@pytest.mark.parametrize("num_prototypes", [5, [5, 3]], ids=str)
def test_the_prototypes_are_drawn_as_in_a_new_criterion(num_prototypes: Any) -> None:
    criterion = criterion_of(num_prototypes)
    train(criterion, 4)
    torch.manual_seed(3)
    criterion.reset_parameters()
    torch.manual_seed(3)
    assert same(snapshot(criterion), snapshot(criterion_of(num_prototypes)))


def test_a_state_that_is_left_on_meta_begins_as_a_new_one() -> None:
    # FSDP1 and others give memory to parameters and buffers only, module by module.
    with torch.device("meta"):
        criterion = criterion_of()
    for module in criterion.modules():
        if list(itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    new = criterion_of()
    new.prototypes.load_state_dict(criterion.prototypes.state_dict())
    assert equal(train(criterion, 5), train(new, 5))
    assert same(snapshot(criterion), snapshot(new))


def test_a_load_that_meta_cannot_take_is_told() -> None:
    saved = criterion_of()
    train(saved, 2)
    with torch.device("meta"):
        queue = FeatureQueue(6, 4)
    with pytest.warns(
        UserWarning, match=r"is on the meta device, .* expected assign=True, or"
    ) as told:
        queue.load_state_dict(saved.queue.state_dict())
    assert {Path(warning.filename) for warning in told} == {Path(__file__)}
    queue.load_state_dict(saved.queue.state_dict(), assign=True)
    assert same(snapshot(queue), snapshot(saved.queue))


def test_counts_and_masks_of_a_converted_state_keep_their_dtypes() -> None:
    saved = criterion_of()
    train(saved, 2)
    converted = {key: value.double() for key, value in saved.state_dict().items()}
    loaded = criterion_of()
    loaded.load_state_dict(converted, assign=True)
    for key, value in loaded.state_dict().items():
        of_saved = saved.state_dict()[key]
        assert value.dtype == (torch.float64 if of_saved.is_floating_point() else of_saved.dtype)
        assert torch.equal(value, of_saved.to(value.dtype))
    train(loaded.double(), 1)


def test_a_dtype_for_everything_leaves_counts_and_masks() -> None:
    criterion = criterion_of()
    train(criterion, 4)
    before = snapshot(criterion)
    criterion.type(torch.float16)
    for key, value in snapshot(criterion).items():
        assert value.dtype == (
            torch.float16 if before[key].is_floating_point() else before[key].dtype
        )
        assert torch.equal(value, before[key].to(value.dtype))
    train(criterion.float(), 1)


# Copies whose parameters are averaged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"avg_fn": get_ema_avg_fn(0.9)},
        {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    ],
    ids=["mean", "moving mean", "moving mean of several"],
)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaging_leaves_counter_and_queue_alone(
    options: dict[str, Any], use_buffers: bool
) -> None:
    criterion = criterion_of()
    train(criterion, 2)
    averaged = AveragedModel(nn.Sequential(criterion), use_buffers=use_buffers, **options)
    copied = averaged.module[0]
    before = snapshot(copied)
    for _ in range(10):
        train(criterion, 1)
        averaged.update_parameters(nn.Sequential(criterion))
    assert criterion.steps == 12
    after = snapshot(copied)
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        "prototypes.weight"
    ]
    state = snapshot(criterion)
    # What Lightning does when training ends, and around each validation.
    pairs = zip(
        itertools.chain(copied.parameters(), copied.buffers()),
        itertools.chain(criterion.parameters(), criterion.buffers()),
        strict=True,
    )
    for mean, current in pairs:
        current.data.copy_(mean.data)
    assert torch.equal(criterion.prototypes.weight, copied.prototypes.weight)
    assert {key for key, value in snapshot(criterion).items() if not value.equal(state[key])} == {
        "prototypes.weight"
    }
    assert train(criterion, 1)[-1].any()  # and not frozen anew


# Parameters that are moved without the module


def leave_state_behind(module: nn.Module, device: str) -> nn.Module:
    """Move parameters and buffers as FSDP does, without a call of ``to``."""
    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = nn.Parameter(value.detach().to(device))
        for name, value in part._buffers.items():
            part._buffers[name] = value.to(device)
    return module


@pytest.mark.parametrize("num_prototypes", [5, [5, 3]], ids=str)
@pytest.mark.parametrize("queue_dtype", [None, torch.float16], ids=str)
def test_the_state_follows_the_parameters(
    num_prototypes: Any, queue_dtype: torch.dtype | None
) -> None:
    criterion = criterion_of(num_prototypes, queue_dtype=queue_dtype)
    train(criterion, 2)
    dtypes = {key: value.dtype for key, value in criterion.state_dict().items()}
    network = leave_state_behind(nn.Sequential(nn.Linear(4, 4), criterion), "meta")
    network(torch.empty(3, 2, 4, device="meta")).backward()
    assert {value.device.type for value in network.state_dict().values()} == {"meta"}
    assert {key: value.dtype for key, value in criterion.state_dict().items()} == dtypes


def test_a_device_that_the_parameters_are_not_on_moves_nothing() -> None:
    criterion = criterion_of()
    with pytest.raises(ValueError, match="features must be on device cpu"):
        criterion(torch.empty(3, 2, 4, device="meta"))
    assert {value.device.type for value in criterion.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_has_followed_in_a_validation_takes_writes_in_training(
    mode: Callable[[], Any],
) -> None:
    with torch.device("meta"):
        criterion = criterion_of().eval()
    weight = PrototypeLayer(4, 5).weight
    criterion.prototypes.weight = weight
    with mode():
        criterion(torch.randn(3, 2, 4))
    train(criterion.train(), 2)
    assert criterion.steps == 2
    assert len(criterion.queue) == 4


@pytest.mark.slow
def test_a_compiled_step_follows_too() -> None:
    torch._dynamo.reset()
    with torch.device("meta"):
        criterion = criterion_of()
    criterion.prototypes.weight = PrototypeLayer(4, 5).weight
    twin = criterion_of()
    twin.load_state_dict({**twin.state_dict(), **dict(criterion.named_parameters())})
    step = torch.compile(criterion, backend="eager", fullgraph=True)
    for _ in range(4):
        features = torch.randn(3, 2, 4)
        torch.testing.assert_close(step(features), twin(features), rtol=0, atol=1e-6)
    assert criterion.steps == 4
    assert len(criterion.queue) == 6


# What others see of it


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_a_criterion_can_be_exported(training: bool, strict: bool) -> None:
    criterion, features = criterion_of().train(training), torch.randn(3, 2, 4)
    expected = copy.deepcopy(criterion)(features)
    exported = torch.export.export(criterion, (features,), strict=strict).module()
    torch.testing.assert_close(exported(features), expected, rtol=0, atol=1e-6)


def test_no_state_is_a_part_of_something_larger() -> None:
    criterion = criterion_of(queue_length=3)
    criterion(torch.randn(3, 500, 4))
    for value in [*criterion.state_dict().values(), criterion.queue.age]:
        assert value.untyped_storage().nbytes() == value.nbytes
    file = io.BytesIO()
    torch.save(criterion.state_dict(), file)
    assert file.tell() < 6_000
