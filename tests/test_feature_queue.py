"""The feature queue: what it keeps, its state, its arguments."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swavkit import FeatureQueue, PrototypeLayer
from tests import oracles, tolerances
from tests.modes import CountingBackend, RefuseSynchronisation
from tests.states import same, snapshot

KEYS = ["features", "valid", "position", "rejected", "written", "pushes"]


@st.composite
def pushes(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    """A length and batches (A, B, D) to push, in which a few entries are not finite."""
    length = draw(st.integers(1, 7))
    views, features = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batches = []
    for samples in draw(st.lists(st.integers(0, 2 * length + 1), max_size=5)):
        numbers = np.arange(views * samples * features, dtype=np.float64) + 1000 * len(batches)
        batch = numbers.reshape(views, samples, features)
        spoiled = draw(arrays(np.bool_, batch.shape, elements=st.booleans(), fill=st.just(False)))
        batch[spoiled] = draw(st.sampled_from([math.nan, math.inf, -math.inf]))
        batches.append(batch)
    return length, batches


def filled(samples: int = 3, **to: Any) -> FeatureQueue:
    """Return a queue of 4 slots, 2 views and 3 features after pushes of this many samples."""
    queue = FeatureQueue(4, 3).to(**to)
    queue.push(torch.randn(2, samples, 3, **to))
    return queue


def assert_ring(queue: FeatureQueue, ring: oracles.Ring) -> None:
    """Compare every slot, and all counts."""
    for slot, expected in enumerate(ring.slots):
        held = queue.features[:, slot].cpu().numpy()
        np.testing.assert_array_equal(held, np.zeros_like(held) if expected is None else expected)
    assert queue.valid.tolist() == [slot is not None for slot in ring.slots]
    assert queue.position.item() == ring.position
    assert queue.rejected.item() == ring.rejected
    assert len(queue) == sum(slot is not None for slot in ring.slots)


# What it keeps


@given(pushes())
def test_any_pushes_leave_what_a_ring_of_single_samples_holds(
    problem: tuple[int, list[np.ndarray]],
) -> None:
    length, batches = problem
    views, _, features = batches[0].shape if batches else (2, 0, 3)
    queue, ring = FeatureQueue(length, features, views).double(), oracles.Ring(length)
    assert_ring(queue, ring)
    for batch in batches:
        queue.push(torch.tensor(batch))
        ring.push(batch)
        assert_ring(queue, ring)


@pytest.mark.parametrize("samples", [0, 1, 3, 4, 5, 8, 11])
def test_batches_of_one_size_leave_what_the_ring_holds(device: torch.device, samples: int) -> None:
    queue, ring = FeatureQueue(4, 3).to(device).double(), oracles.Ring(4)
    for _ in range(4):
        batch = torch.randn(2, samples, 3, dtype=torch.float64, device=device)
        queue.push(batch)
        ring.push(batch.cpu().numpy())
        assert_ring(queue, ring)


def test_the_last_of_too_many_samples_stay_and_nothing_is_dropped_where_the_ring_closes() -> None:
    queue = FeatureQueue(4, 1, 1)
    queue.push(torch.arange(3.0).view(1, 3, 1))
    queue.push(torch.arange(3.0, 6.0).view(1, 3, 1))
    assert queue.features.flatten().tolist() == [4, 5, 2, 3]
    queue.push(torch.arange(10.0, 15.0).view(1, 5, 1))
    assert queue.features.flatten().tolist() == [12, 13, 14, 11]
    assert queue.position == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("view", [0, 1])
def test_a_sample_that_is_not_finite_in_one_view_is_rejected_in_all(
    device: torch.device, view: int, bad: float
) -> None:
    queue = FeatureQueue(4, 3).to(device)
    features = torch.randn(2, 3, 3, device=device)
    features[view, 1, 2] = bad
    queue.push(features)
    assert queue.valid.tolist() == [True, False, True, False]
    assert queue.rejected == 1
    assert not queue.features[:, 1].any()
    assert torch.equal(queue.features[:, [0, 2]], features[:, [0, 2]])
    queue.push(torch.randn(2, 4, 3, device=device))
    assert queue.valid.all()
    assert queue.rejected == 1


def test_what_overflows_the_dtype_of_the_queue_is_rejected(device: torch.device) -> None:
    queue = FeatureQueue(4, 1, 1).to(device).half()
    queue.push(torch.tensor([[[6e4], [7e4]]], device=device))
    assert queue.valid.tolist() == [True, False, False, False]
    assert queue.rejected == 1


def test_samples_marked_as_not_valid_are_kept_out_and_not_counted(device: torch.device) -> None:
    queue = filled(4, device=device)
    features = torch.randn(2, 3, 3, device=device)
    features[0, 0] = math.nan  # not offered, hence not rejected
    features[0, 2] = math.nan
    queue.push(features, valid=torch.tensor([False, True, True], device=device))
    assert queue.valid.tolist() == [False, True, False, True]
    assert queue.rejected == 1
    assert not queue.features[:, [0, 2]].any()
    assert torch.equal(queue.features[:, 1], features[:, 1])
    assert queue.position == 3


def test_the_mark_is_cut_with_the_samples_when_they_are_too_many(device: torch.device) -> None:
    queue = FeatureQueue(2, 1, 1).to(device)
    mark = torch.tensor([False, False, True, False, True], device=device)
    queue.push(torch.arange(5.0, device=device).view(1, 5, 1), valid=mark)
    assert queue.position == 1
    assert queue.features.flatten().tolist() == [4, 0]
    assert queue.valid.tolist() == [True, False]


def test_features_are_stored_as_given_and_detached(device: torch.device) -> None:
    queue = FeatureQueue(4, 3).to(device)
    features = torch.randn(2, 3, 3, device=device).mul(100).requires_grad_()
    given = features.detach().clone()
    assert queue.push(2 * features) is None
    with torch.no_grad():
        features.zero_()
    assert torch.equal(queue.features[:, :3], 2 * given)
    assert not queue.features.requires_grad
    assert features.grad is None


@pytest.mark.parametrize("form", [list, tuple, torch.stack])
def test_views_come_as_a_sequence_or_as_one_tensor(
    device: torch.device, form: Callable[..., Any]
) -> None:
    queue = FeatureQueue(4, 3).to(device)
    features = torch.randn(2, 3, 3, device=device)
    queue.push(form(features.unbind()))
    assert torch.equal(queue.features[:, :3], features)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_features_of_any_dtype_are_stored_in_that_of_the_queue(
    device: torch.device, dtype: torch.dtype
) -> None:
    queue = FeatureQueue(4, 3).to(device)
    features = torch.randn(2, 3, 3, device=device, dtype=dtype)
    queue.push(features)
    assert queue.features.dtype == torch.float32
    assert torch.equal(queue.features[:, :3], features.float())


def test_a_queue_is_true_even_when_it_is_empty() -> None:
    queue = FeatureQueue(4, 3)
    assert len(queue) == 0
    assert bool(queue) is True
    queue.push(torch.randn(2, 3, 3))
    assert len(queue) == 3
    assert bool(queue) is True


def ages(length: int, batches: list[np.ndarray]) -> list[int]:
    """How many batches ago a usable sample was written to each slot, or -1; sample by sample."""
    written: list[int | None] = [None] * length
    position = 0
    for number, batch in enumerate(batches):
        for sample in np.moveaxis(batch, 1, 0):
            written[position] = number if np.isfinite(sample).all() else None
            position = (position + 1) % length
    return [-1 if number is None else len(batches) - 1 - number for number in written]


@given(pushes())
def test_the_age_of_a_slot_is_how_many_pushes_ago_it_was_written(
    problem: tuple[int, list[np.ndarray]],
) -> None:
    length, batches = problem
    views, _, features = batches[0].shape if batches else (2, 0, 3)
    queue = FeatureQueue(length, features, views).double()
    assert queue.age.tolist() == [-1] * length
    for done, batch in enumerate(batches, start=1):
        queue.push(torch.tensor(batch))
        assert queue.age.tolist() == ages(length, batches[:done])
    assert queue.pushes == len(batches)


def test_a_push_of_nothing_makes_all_a_push_older(device: torch.device) -> None:
    queue = filled(3, device=device)
    queue.push(torch.zeros(2, 0, 3, device=device))
    assert queue.age.tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_can_be_stored_in_another_dtype(device: torch.device, dtype: torch.dtype) -> None:
    queue = FeatureQueue(4, 3, dtype=dtype).to(device)
    assert queue.features.dtype == dtype
    features = torch.randn(2, 3, 3, device=device)
    queue.push(features)
    assert torch.equal(queue.features[:, :3], features.to(dtype))
    # What is saved in one dtype loads into another.
    wide = FeatureQueue(4, 3, dtype=torch.float64).to(device)
    wide.load_state_dict(queue.state_dict())
    assert torch.equal(wide.features, queue.features.double())
    narrow = FeatureQueue(4, 3, dtype=dtype).to(device)
    narrow.load_state_dict(wide.state_dict())
    assert narrow.features.dtype == dtype
    assert same(snapshot(narrow), snapshot(queue))


def test_half_precision_is_shown_and_takes_half_the_memory() -> None:
    half, single = FeatureQueue(4, 3, dtype=torch.float16), FeatureQueue(4, 3)
    assert repr(half) == "FeatureQueue(length=4, feature_dim=3, num_views=2, dtype=torch.float16)"
    assert 2 * half.features.nbytes == single.features.nbytes


def test_prototypes_score_what_is_stored_in_half_precision(device: torch.device) -> None:
    prototypes = PrototypeLayer(3, 5).to(device)
    features = torch.nn.functional.normalize(torch.randn(2, 4, 3, device=device), dim=-1)
    for dtype in (torch.float16, torch.bfloat16):
        queue = FeatureQueue(4, 3, dtype=dtype).to(device)
        queue.push(features)
        scores = prototypes(queue.features)
        assert scores.dtype == torch.float32
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(scores, prototypes(features), rtol=0, atol=tolerance)


@pytest.mark.parametrize("stored", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("given", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_what_is_stored_is_what_was_given(
    device: torch.device, stored: torch.dtype, given: torch.dtype, autocast: torch.dtype
) -> None:
    features = torch.randn(2, 3, 3, device=device).to(given)
    mark = torch.tensor([True, False, True], device=device)
    for form in (features, list(features)):
        queue = FeatureQueue(4, 3, dtype=stored).to(device)
        with torch.autocast(device.type, dtype=autocast):
            queue.push(form, valid=mark)
            age = queue.age
        assert age.tolist() == [0, -1, 0, -1]
        assert queue.features.dtype == stored
        assert torch.equal(queue.features[:, [0, 2]], features[:, [0, 2]].to(stored))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_push_stores_in_eval_and_without_gradients(
    device: torch.device, mode: Callable[[], AbstractContextManager[Any]]
) -> None:
    queue = FeatureQueue(4, 3).to(device).eval()
    with mode():
        features = torch.randn(2, 3, 3, device=device)
        queue.push(features)
    assert torch.equal(queue.features[:, :3], features)
    queue.push(torch.randn(2, 3, 3, device=device))  # and goes on outside
    assert len(queue) == 4


# State


def test_the_state_is_in_the_state_dict_and_nowhere_else() -> None:
    queue = filled()
    assert list(queue.state_dict()) == KEYS
    # DistributedDataParallel would send rank 0's buffers to all.
    assert not list(queue.named_buffers())
    assert not list(queue.named_parameters())
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in queue.state_dict().items()}
    assert shapes == {
        "features": ((2, 4, 3), torch.float32),
        "valid": ((4,), torch.bool),
        "position": ((), torch.int64),
        "rejected": ((), torch.int64),
        "written": ((4,), torch.int64),
        "pushes": ((), torch.int64),
    }


def test_the_state_survives_a_round_trip_and_the_ring_goes_on() -> None:
    queue = filled()
    queue.push(torch.full((2, 2, 3), math.nan))
    twin = FeatureQueue(4, 3)
    assert str(twin.load_state_dict(queue.state_dict())) == "<All keys matched successfully>"
    assert same(snapshot(twin), snapshot(queue))
    features = torch.randn(2, 2, 3)
    queue.push(features)
    assert not same(snapshot(twin), snapshot(queue))  # two queues, not one
    twin.push(features)
    assert same(snapshot(twin), snapshot(queue))


def test_the_state_carries_the_prefix_of_the_modules_around_it() -> None:
    outer = nn.ModuleDict({"recent": filled(), "head": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert set(state) == {"head.weight", "head.bias", *(f"recent.{key}" for key in KEYS)}
    twin = nn.ModuleDict({"recent": FeatureQueue(4, 3), "head": nn.Linear(2, 2)})
    twin.load_state_dict(state)
    assert same(snapshot(twin["recent"]), snapshot(outer["recent"]))
    del state["recent.position"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"recent\.position"'):
        twin.load_state_dict(state)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(
    "other",
    [FeatureQueue(5, 3), FeatureQueue(4, 2), FeatureQueue(4, 3, 1)],
    ids=["length", "feature_dim", "num_views"],
)
def test_a_state_of_another_size_is_refused_and_changes_nothing(
    other: FeatureQueue, assign: bool
) -> None:
    queue = filled()
    before = snapshot(queue)
    text = (
        rf"size mismatch for features: expected shape \(2, 4, 3\), got .*{other.features.shape[0]}"
    )
    with pytest.raises(RuntimeError, match=text):
        queue.load_state_dict(other.state_dict(), assign=assign)
    with pytest.raises(RuntimeError, match=text):
        queue.load_state_dict(other.state_dict(), strict=False, assign=assign)
    assert same(snapshot(queue), before)


def test_a_state_without_ages_counts_as_written_by_the_latest_push() -> None:
    saved = filled(5)
    old = {key: value for key, value in snapshot(saved).items() if key not in ("written", "pushes")}
    queue = filled(2)  # whose own ages must not stay
    queue.load_state_dict(old)
    assert same({key: snapshot(queue)[key] for key in old}, old)
    assert queue.age.tolist() == [0, 0, 0, 0]
    queue.push(torch.randn(2, 1, 3))
    assert queue.age.tolist() == [1, 0, 1, 1]


def test_a_state_without_features_leaves_the_ages_alone() -> None:
    queue = filled()
    before = snapshot(queue)
    queue.load_state_dict({}, strict=False)
    assert same(snapshot(queue), before)


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_an_error_unless_the_load_is_not_strict(key: str) -> None:
    queue = FeatureQueue(4, 3)
    state = filled().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{key}"'):
        queue.load_state_dict(state)
    fresh = FeatureQueue(4, 3)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    assert same({k: v for k, v in snapshot(fresh).items() if k != key}, dict(state))


def test_an_unexpected_key_is_an_error_unless_the_load_is_not_strict() -> None:
    state = {**filled().state_dict(), "other": torch.zeros(2)}
    queue = FeatureQueue(4, 3)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other"'):
        queue.load_state_dict(state)
    assert queue.load_state_dict(state, strict=False).unexpected_keys == ["other"]


def test_a_state_can_be_assigned() -> None:
    state = {key: value.clone() for key, value in filled().double().state_dict().items()}
    with torch.device("meta"):
        queue = FeatureQueue(4, 3)
    queue.load_state_dict(state, assign=True)
    assert queue.features is state["features"]
    assert queue.features.dtype == torch.float64
    queue.push(torch.randn(2, 3, 3))
    assert queue.valid.all()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_equal_and_its_own(duplicate: Callable[[FeatureQueue], FeatureQueue]) -> None:
    queue = filled()
    before = snapshot(queue)
    twin = duplicate(queue)
    assert repr(twin) == repr(queue) == "FeatureQueue(length=4, feature_dim=3, num_views=2)"
    assert same(snapshot(twin), before)
    twin.push(torch.full((2, 2, 3), math.nan))
    assert twin.rejected == 2
    assert same(snapshot(queue), before)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_features_change_dtype_with_the_module_and_counts_do_not(
    device: torch.device, dtype: torch.dtype
) -> None:
    queue = nn.Sequential(filled(device=device)).to(dtype)[0]
    assert {key: value.dtype for key, value in queue.state_dict().items()} == {
        "features": dtype,
        "valid": torch.bool,
        "position": torch.int64,
        "rejected": torch.int64,
        "written": torch.int64,
        "pushes": torch.int64,
    }
    assert len(queue) == 3
    queue.push(torch.ones(2, 2, 3, device=device))
    assert queue.features.dtype == dtype
    assert len(queue) == 4


def test_all_state_moves_with_the_module() -> None:
    queue = nn.Sequential(filled()).to("meta")[0]
    assert {value.device.type for value in queue.state_dict().values()} == {"meta"}
    queue.push(torch.empty(2, 5, 3, device="meta"), valid=torch.ones(5, device="meta").bool())
    assert queue.features.shape == (2, 4, 3)


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_a_queue_is_emptied_in_place(device: torch.device, dtype: torch.dtype) -> None:
    queue, new = (FeatureQueue(4, 3, dtype=dtype).to(device) for _ in range(2))
    held = list(queue.state_dict().values())
    features = torch.randn(2, 7, 3, device=device)
    features[0, 0] = math.nan
    with RefuseSynchronisation():
        queue.push(features)
        assert queue.reset_parameters() is None
    assert all(a is b for a, b in zip(queue.state_dict().values(), held, strict=True))
    assert same(snapshot(queue), snapshot(new))
    for each in (queue, new):
        each.push(features)
    assert same(snapshot(queue), snapshot(new))


# Where it runs


def batches_of(device: torch.device, *sizes: int) -> Iterator[Tensor]:
    for size in sizes:
        batch = torch.randn(2, size, 3, device=device)
        batch[0, 0, 0] = math.nan
        yield batch


class NewTensors(TorchDispatchMode):
    """Adds up the entries of all tensors that operations make, in place ones aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable:
            self.numel += sum(leaf.numel() for leaf in tree_leaves(result))
        return result


def test_what_a_push_makes_grows_with_the_batch_and_not_with_the_length() -> None:
    def made(length: int, samples: int) -> int:
        queue, features = FeatureQueue(length, 3), torch.randn(2, samples, 3)
        with NewTensors() as new:
            queue.push(features)
        return new.numel

    assert made(10_000, 5) == made(10, 5) < 1_000
    assert made(10_000, 5_000) > 500 * made(10_000, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("samples", [2, 6])
def test_pushes_compile_once(device: torch.device, samples: int, dtype: torch.dtype) -> None:
    backend = CountingBackend()
    queue, eager = (FeatureQueue(4, 3, dtype=dtype).to(device) for _ in range(2))
    compiled = torch.compile(queue.push, fullgraph=True, backend=backend)
    for batch in batches_of(device, *[samples] * 5):
        compiled(batch)
        eager.push(batch)
        assert same(snapshot(queue), snapshot(eager))
    assert backend.graphs == 1


def test_pushes_of_any_size_compile(device: torch.device) -> None:
    torch._dynamo.reset()
    queue, eager = (FeatureQueue(9, 3).to(device) for _ in range(2))
    compiled = torch.compile(queue.push, fullgraph=True, dynamic=True, backend="eager")
    for batch in batches_of(device, 2, 3, 5, 9, 12, 20, 1):
        compiled(batch)
        eager.push(batch)
        assert same(snapshot(queue), snapshot(eager))


# Bad input

VIEW = torch.zeros(5, 3)
BAD_SIZES = [
    (0, ValueError, "{} must be at least 1, got 0"),
    (-1, ValueError, "{} must be at least 1, got -1"),
    (2.0, TypeError, "{} must be an int, got float"),
    (True, TypeError, "{} must be an int, got bool"),
    (None, TypeError, "{} must be an int, got NoneType"),
]
BAD_PUSHES = [
    ({"features": None}, TypeError, "features must be a .* or a sequence of .*, got NoneType"),
    ({"features": [VIEW]}, ValueError, "features must hold at least 2 views, got 1"),
    ({"features": [VIEW] * 3}, ValueError, "features must hold 2 views, got 3"),
    (
        {"features": VIEW},
        ValueError,
        r"features as one tensor must have 3 dimensions .*, got shape \(5, 3\)",
    ),
    (
        {"features": [VIEW[0], VIEW]},
        ValueError,
        r"features\[0\] must have 2 dimensions \(samples, features\), got shape \(3,\)",
    ),
    (
        {"features": [VIEW[:, :2]] * 2},
        ValueError,
        r"features\[0\] must have 3 features in its last dimension, got shape \(5, 2\)",
    ),
    (
        {"features": [VIEW, VIEW[:4]]},
        ValueError,
        r"features\[1\] must have the shape of features\[0\], \(5, 3\), got \(4, 3\)",
    ),
    (
        {"features": [VIEW, VIEW.double()]},
        TypeError,
        r"features\[1\] must have the dtype of features\[0\], torch\.float32, got torch\.float64",
    ),
    (
        {"features": [VIEW, VIEW.long()]},
        TypeError,
        r"features\[1\] must have a floating-point dtype, got torch\.int64",
    ),
    (
        {"features": torch.zeros(2, 5, 3, dtype=torch.int64)},
        TypeError,
        r"features must have a floating-point dtype, got torch\.int64",
    ),
    ({"features": [VIEW, [0.0]]}, TypeError, r"features\[1\] must be a torch\.Tensor, got list"),
    (
        {"features": [VIEW, VIEW.to("meta")]},
        ValueError,
        r"features\[1\] must be on device cpu, got meta",
    ),
    ({"features": [VIEW.to("meta")] * 2}, ValueError, "features must be on device cpu, got meta"),
    (
        {"valid": torch.ones(4, dtype=torch.bool)},
        ValueError,
        r"valid must have shape \(5,\), got \(4,\)",
    ),
    (
        {"valid": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        r"valid must have shape \(5,\), got \(2, 5\)",
    ),
    (
        {"valid": torch.ones(5)},
        TypeError,
        r"valid must be a bool torch\.Tensor, got torch\.float32",
    ),
    ({"valid": [True] * 5}, TypeError, r"valid must be a bool torch\.Tensor, got list"),
    (
        {"valid": torch.ones(5, dtype=torch.bool, device="meta")},
        ValueError,
        "valid must be on device cpu, got meta",
    ),
]


@pytest.mark.parametrize("name", ["length", "feature_dim", "num_views"])
@pytest.mark.parametrize(("value", "error", "text"), BAD_SIZES)
def test_a_bad_size_is_named(name: str, value: Any, error: type[Exception], text: str) -> None:
    sizes = {"length": 4, "feature_dim": 3, "num_views": 2, name: value}
    with pytest.raises(error, match=text.format(name)):
        FeatureQueue(**sizes)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "half", 16])
def test_a_bad_dtype_is_named(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype must be None or torch\.float16 or .*, got "):
        FeatureQueue(4, 3, dtype=dtype)


@pytest.mark.parametrize(("inputs", "error", "text"), BAD_PUSHES)
def test_a_bad_push_is_named_and_changes_nothing(
    inputs: dict[str, Any], error: type[Exception], text: str
) -> None:
    queue = filled()
    before = snapshot(queue)
    with pytest.raises(error, match=text):
        queue.push(**({"features": [VIEW, VIEW]} | inputs))
    assert same(snapshot(queue), before)
