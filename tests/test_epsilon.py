"""Temperatures as tensors, and the dtype of codes: obeyed on every route, read by no host."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import (
    CodePredictionLoss,
    SinkhornKnopp,
    SwappedPredictionLoss,
    SwAVLoss,
    code_prediction_loss,
    sinkhorn_knopp,
    swapped_prediction_loss,
)
from tests import tolerances
from tests.modes import RefuseSynchronisation
from tests.states import same, snapshot

DIMENSION, PROTOTYPES, VIEWS, SAMPLES = 6, 5, 3, 8
ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)

# Of the codes; what reads a value on the host anyway is apart.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "many iterations": {"iterations": 12},
    "weighted": {"sample_weight": torch.arange(SAMPLES) % 3 / 2},
    "prior": {"prototype_weight": 1.0 + torch.arange(PROTOTYPES)},
    "relaxed": {"relaxation": 0.1},
    "hard": {"hard": True},
}
READING: dict[str, dict[str, Any]] = {
    "tolerance": {"tolerance": 0.3, "iterations": 30},
    "validated": {"validate": True},
}


def setting_of(value: float, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    return torch.tensor(value, dtype=dtype, **options)


def scores_of(*leading: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    scores = 2 * torch.rand(*leading, SAMPLES, PROTOTYPES, **options) - 1
    return scores.to(dtype)


def features_of(**options: Any) -> Tensor:
    return torch.randn(VIEWS, SAMPLES, DIMENSION, **options)


def assert_codes(found: Tensor, expected: Tensor, epsilon: float) -> None:
    assert found.dtype == expected.dtype
    atol = tolerances.of_codes(expected.dtype, epsilon=epsilon, largest=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# ε of the codes


@pytest.mark.parametrize("options", OPTIONS | READING)
@ANY_DTYPE
def test_a_tensor_gives_the_codes_of_its_value(
    device: torch.device, dtype: torch.dtype, options: str
) -> None:
    scores = scores_of(2, dtype=dtype, device=device)
    settings = {
        name: each.to(device) if isinstance(each, Tensor) else each
        for name, each in (OPTIONS | READING)[options].items()
    }
    for of_setting in tolerances.DTYPES:
        for value in (0.05, 2.0):
            epsilon = setting_of(value, of_setting, device=device)
            expected = sinkhorn_knopp(scores, epsilon=epsilon.item(), **settings)
            found = sinkhorn_knopp(scores, epsilon=epsilon, **settings)
            assert_codes(found, expected, epsilon.item())


@pytest.mark.parametrize("options", [{}, {"iterations": 7}, {"relaxation": 0.1}], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_large_scores_have_the_codes_of_the_value(options: dict[str, Any], weighted: bool) -> None:
    scores = 2 * torch.rand(600, 2000) - 1  # more than are solved at once
    weight = torch.rand(600) if weighted else None
    for value in (0.05, 0.2):
        expected = sinkhorn_knopp(scores, epsilon=value, sample_weight=weight, **options)
        found = sinkhorn_knopp(scores, epsilon=setting_of(value), sample_weight=weight, **options)
        assert_codes(found, expected, value)


def test_extreme_tensors_give_the_codes_of_their_value() -> None:
    scores = scores_of(2, dtype=torch.float64)
    for value in (1e-3, 5e-3, 50.0, 1e4):
        expected = sinkhorn_knopp(scores, epsilon=value)
        found = sinkhorn_knopp(scores, epsilon=setting_of(value, torch.float64))
        assert found.isfinite().all()
        assert_codes(found, expected, value)


@pytest.mark.parametrize("options", ["plain", "relaxed", "hard", "tolerance"])
def test_a_tensor_serves_for_a_list_of_scores(options: str) -> None:
    settings = (OPTIONS | READING)[options]
    scores = [scores_of(), scores_of(2, dtype=torch.bfloat16), torch.rand(0, 4), torch.rand(9, 3)]
    expected = sinkhorn_knopp(scores, epsilon=0.125, **settings)
    for codes, each in zip(
        sinkhorn_knopp(scores, epsilon=setting_of(0.125), **settings), expected, strict=True
    ):
        assert_codes(codes, each, 0.125)


@pytest.mark.parametrize("route", ["given", "set"])
def test_the_modules_take_a_tensor_when_made_or_later(route: str) -> None:
    scores = scores_of(3)
    setting = setting_of(0.25)
    if route == "given":
        sinkhorn, swapped = SinkhornKnopp(setting), SwappedPredictionLoss(setting)
        prediction = CodePredictionLoss(setting)
    else:
        sinkhorn, swapped, prediction = (
            SinkhornKnopp(),
            SwappedPredictionLoss(),
            CodePredictionLoss(),
        )
        sinkhorn.epsilon = swapped.temperature = prediction.temperature = setting
    codes = sinkhorn(scores[:2])
    assert_codes(codes, sinkhorn_knopp(scores[:2], epsilon=0.25), 0.25)
    pairs = [
        (swapped(scores, codes), swapped_prediction_loss(scores, codes, temperature=0.25)),
        (
            prediction(scores[:2], codes),
            code_prediction_loss(scores[:2], codes, temperature=0.25),
        ),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_tensor_filled_in_place_changes_the_next_call() -> None:
    scores, setting = scores_of(3), setting_of(0.25)
    codes = sinkhorn_knopp(scores[:2])
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = [
        (SinkhornKnopp(setting), (scores,)),
        (SwappedPredictionLoss(setting), (scores, codes)),
        (CodePredictionLoss(setting), (scores[:2], codes)),
        (SwAVLoss(DIMENSION, PROTOTYPES, epsilon=setting).eval(), (features_of(),)),
        (SwAVLoss(DIMENSION, PROTOTYPES, temperature=setting).eval(), (features_of(),)),
    ]
    for module, arguments in calls:
        setting.fill_(0.25)
        before = module(*arguments)
        setting.fill_(0.5)
        after = module(*arguments)
        assert (after - before).abs().max() > 1e-3
        fresh = copy.deepcopy(module)
        for part in fresh.modules():
            for name in ("epsilon", "temperature"):
                if isinstance(getattr(part, name, None), Tensor):
                    setattr(part, name, 0.5)
        torch.testing.assert_close(after, fresh(*arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_tensor_is_copied_with_its_module_and_is_no_state(
    duplicate: Callable[[nn.Module], nn.Module],
) -> None:
    for module, name in (
        (SinkhornKnopp(), "epsilon"),
        (SwappedPredictionLoss(), "temperature"),
        (CodePredictionLoss(), "temperature"),
    ):
        setting = setting_of(0.25)
        setattr(module, name, setting)
        twin = duplicate(module)
        setting.fill_(0.5)
        assert getattr(twin, name) == 0.25
        assert getattr(module, name) == 0.5
        assert not module.state_dict()
        assert not list(module.parameters())
        assert type(module).__name__ in repr(module)
    criterion = SwAVLoss(
        DIMENSION, PROTOTYPES, epsilon=setting_of(0.1), temperature=setting_of(0.1)
    )
    assert list(criterion.state_dict()) == ["steps", "prototypes.weight"]
    assert [name for name, _ in criterion.named_parameters()] == ["prototypes.weight"]
    twin = duplicate(criterion)
    features = features_of()
    assert torch.equal(twin(features), criterion(features))


# τ of the losses


def functions(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return a loss of (3, B, K) scores with a temperature, and one of the module."""
    codes = torch.rand(2, SAMPLES, PROTOTYPES, dtype=torch.float64)
    index = torch.arange(3 * SAMPLES).view(3, SAMPLES) % PROTOTYPES
    swapped = name == "swapped"

    def target(scores: Tensor) -> Tensor:
        if swapped:
            return codes.to(scores.device)
        hard = name == "hard"
        return index.to(scores.device) if hard else codes[:1].expand_as(scores).to(scores.device)

    function: Callable[..., Tensor] = swapped_prediction_loss if swapped else code_prediction_loss
    module = SwappedPredictionLoss if swapped else CodePredictionLoss

    def by_function(scores: Tensor, temperature: Any) -> Tensor:
        return function(scores, target(scores), temperature=temperature)

    def by_module(scores: Tensor, temperature: Any) -> Tensor:
        loss: Tensor = module(temperature)(scores, target(scores))
        return loss

    return by_function, by_module


@pytest.mark.parametrize("name", ["swapped", "soft", "hard"])
@ANY_DTYPE
def test_a_tensor_gives_the_loss_and_gradient_of_its_value(
    device: torch.device, dtype: torch.dtype, name: str
) -> None:
    leaf = scores_of(3, dtype=dtype, device=device).requires_grad_()
    for of_setting in tolerances.DTYPES:
        temperature = setting_of(0.1, of_setting, device=device)
        for function in functions(name):
            losses = [function(leaf, each) for each in (temperature, temperature.item())]
            found, expected = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
            assert losses[0].dtype == torch.promote_types(dtype, torch.float32)
            atol = tolerances.ATOL[losses[0].dtype]
            torch.testing.assert_close(*losses, rtol=atol, atol=atol)
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=tolerances.ATOL[dtype])


# The whole loss


def three_steps(
    criterion: SwAVLoss, setting: Callable[[float], Any], weight: Tensor | None
) -> Iterator[tuple[Tensor, ...]]:
    """Give the loss and its gradients of each step, under a schedule of both settings."""
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        criterion.sinkhorn.epsilon = setting(0.0625 * (step + 1))
        criterion.loss.temperature = setting(0.125 * (step + 1))
        features = torch.randn(VIEWS, SAMPLES, DIMENSION, generator=generator).double()
        loss = criterion(features.requires_grad_(), sample_weight=weight)
        yield loss.detach(), *torch.autograd.grad(loss, [features, *criterion.parameters()])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("queue_length", [0, 10])
@pytest.mark.parametrize("sizes", [PROTOTYPES, (PROTOTYPES, 3)], ids=str)
@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_the_whole_loss_obeys_tensors(
    memory: str, sizes: Any, queue_length: int, weighted: bool
) -> None:
    numbers = SwAVLoss(DIMENSION, sizes, memory=memory, queue_length=queue_length).double()
    tensors = copy.deepcopy(numbers)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1]) if weighted else None
    pairs = zip(
        three_steps(tensors, setting_of, weight), three_steps(numbers, float, weight), strict=True
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert same(snapshot(tensors), snapshot(numbers))


@pytest.mark.parametrize("option", ["hard", "relaxation", "tolerance"])
@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_the_whole_loss_obeys_tensors_with_options_of_the_codes(memory: str, option: str) -> None:
    numbers = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, queue_length=10).double()
    numbers.sinkhorn.iterations = 20
    setattr(numbers.sinkhorn, option, {"hard": True, "relaxation": 0.1, "tolerance": 0.2}[option])
    tensors = copy.deepcopy(numbers)
    pairs = zip(
        three_steps(tensors, setting_of, None), three_steps(numbers, float, None), strict=True
    )
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_the_whole_loss_takes_tensors_when_made(memory: str) -> None:
    settings = {"epsilon": 0.25, "temperature": 0.5}
    criterion = SwAVLoss(
        DIMENSION,
        PROTOTYPES,
        memory=memory,
        **{name: setting_of(value) for name, value in settings.items()},
    )
    assert criterion.sinkhorn.epsilon == 0.25
    assert criterion.loss.temperature == 0.5
    expected = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, **settings)
    expected.load_state_dict(criterion.state_dict())
    features = features_of()
    torch.testing.assert_close(criterion(features), expected(features), rtol=1e-5, atol=1e-5)


# No host reads it


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("listed", [False, True])
def test_no_host_reads_the_temperature_of_codes(
    device: torch.device, options: str, listed: bool
) -> None:
    settings = {
        name: each.to(device) if isinstance(each, Tensor) else each
        for name, each in OPTIONS[options].items()
    }
    scores = scores_of(2, device=device)
    epsilon = setting_of(0.1, device=device)
    module = SinkhornKnopp(epsilon)
    with RefuseSynchronisation():
        if listed:
            settings = {
                name: [each] if isinstance(each, Tensor) else each
                for name, each in settings.items()
            }
        sinkhorn_knopp([scores] if listed else scores, epsilon=epsilon, **settings)
        module(scores)
        module.epsilon = epsilon * 2
        module([scores, scores])
        with pytest.raises(RuntimeError, match="waits for the device"):
            epsilon.item()  # else the mode would prove nothing


def test_no_host_reads_the_temperature_of_large_scores() -> None:
    scores, epsilon = torch.rand(600, 2000), setting_of(0.1)
    with RefuseSynchronisation():
        for settings in ({}, {"iterations": 7}, {"relaxation": 0.1}):
            sinkhorn_knopp(scores, epsilon=epsilon, **settings)


@pytest.mark.parametrize("queue_length", [0, 10])
@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_no_host_reads_the_temperatures_of_the_whole_loss(
    device: torch.device, memory: str, queue_length: int
) -> None:
    criterion = SwAVLoss(
        DIMENSION,
        (PROTOTYPES, 3),
        memory=memory,
        queue_length=queue_length,
        epsilon=setting_of(0.1, device=device),
        temperature=setting_of(0.2, device=device),
    ).to(device)
    for _ in range(2):
        features = features_of(device=device, requires_grad=True)
        with RefuseSynchronisation():
            criterion(features).backward()
            criterion.sinkhorn.epsilon = criterion.sinkhorn.epsilon * 0.5
            criterion.loss.temperature = criterion.loss.temperature * 0.5


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
def test_shapes_and_dtypes_are_known_without_values(fake: bool) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        setting = torch.empty((), device="meta")
        for options in ({}, {"relaxation": 0.1}, {"hard": True}, {"iterations": 8}):
            for scores in (
                torch.empty(2, SAMPLES, PROTOTYPES, device="meta"),
                torch.empty(3000, 1000, device="meta", dtype=torch.bfloat16),
            ):
                codes = sinkhorn_knopp(scores, epsilon=setting, **options)
                assert codes.shape == scores.shape
                assert codes.dtype == scores.dtype
        scores = torch.empty(3, SAMPLES, PROTOTYPES, device="meta", requires_grad=True)
        swapped_prediction_loss(scores, scores[:2].detach(), temperature=setting).backward()
        assert scores.grad.shape == scores.shape


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_the_whole_loss_has_its_shapes_without_values(memory: str) -> None:
    with torch.device("meta"):
        criterion = SwAVLoss(
            DIMENSION,
            PROTOTYPES,
            memory=memory,
            queue_length=10,
            epsilon=torch.empty(()),
            temperature=torch.empty(()),
        )
        features = features_of(requires_grad=True)
        loss = criterion(features)
        loss.backward()
    assert loss.shape == ()
    assert loss.device.type == "meta"
    assert features.grad.shape == features.shape


# One graph for a schedule


def weighted_codes_of(scores: Tensor, setting: Tensor) -> Tensor:
    weight = scores[0, :, 0] > 0
    return sinkhorn_knopp(scores, epsilon=setting, iterations=2, sample_weight=weight)


def relaxed_codes_of(scores: Tensor, setting: Tensor) -> Tensor:
    return sinkhorn_knopp(scores, epsilon=setting, relaxation=0.3, iterations=2)


def swapped_of(scores: Tensor, setting: Tensor) -> Tensor:
    return swapped_prediction_loss(scores, scores[:2].softmax(-1), temperature=setting)


def prediction_of(scores: Tensor, setting: Tensor) -> Tensor:
    return code_prediction_loss(scores, scores.argmin(-1), temperature=setting)


@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (weighted_codes_of, "eager"),
        (relaxed_codes_of, "eager"),
        (swapped_of, "aot_eager"),
        pytest.param(prediction_of, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_schedule_of_an_argument_makes_one_graph(
    function: Callable[[Tensor, Tensor], Tensor], backend: str
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counting, fullgraph=True)
    scores = scores_of(3)
    for step in range(20):
        setting = setting_of(0.05 + 0.05 * step)  # above 1 too
        found = compiled(scores, setting)
        torch.testing.assert_close(found, function(scores, setting), rtol=1e-5, atol=2e-5)
    assert counting.frame_count == 1


@pytest.mark.parametrize(
    ("memory", "queue_length", "gradient", "backend", "in_place"),
    [
        pytest.param("full", 0, False, "inductor", False, marks=pytest.mark.slow),
        ("full", 10, True, "aot_eager", True),
        pytest.param("streamed", 0, True, "aot_eager", False, marks=pytest.mark.slow),
    ],
)
def test_a_schedule_of_the_whole_loss_makes_one_graph(
    memory: str, queue_length: int, gradient: bool, backend: str, in_place: bool
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend(backend)
    settings = {"memory": memory, "queue_length": queue_length}
    eager = SwAVLoss(DIMENSION, PROTOTYPES, **settings)
    changing = copy.deepcopy(eager)
    changing.sinkhorn.epsilon, changing.loss.temperature = setting_of(1.0), setting_of(1.0)
    compiled = torch.compile(changing, backend=counting, fullgraph=True)
    for step in range(20):
        epsilon, temperature = 0.05 + 0.05 * step, 0.1 + 0.03 * step
        eager.sinkhorn.epsilon, eager.loss.temperature = epsilon, temperature
        if in_place:
            changing.sinkhorn.epsilon.fill_(epsilon)
            changing.loss.temperature.fill_(temperature)
        else:
            changing.sinkhorn.epsilon = setting_of(epsilon)
            changing.loss.temperature = setting_of(temperature)
        features = features_of(requires_grad=gradient)
        with torch.set_grad_enabled(gradient):
            losses = compiled(features), eager(features)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=2e-5)
        if gradient:
            found, expected = (
                torch.autograd.grad(loss, [features, each.prototypes.weight])
                for loss, each in zip(losses, (changing, eager), strict=True)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counting.frame_count == 1


def test_a_schedule_of_a_module_of_codes_makes_one_graph() -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    changing = SinkhornKnopp(setting_of(1.0))
    compiled = torch.compile(changing, backend=counting, fullgraph=True)
    scores = scores_of(2)
    for step in range(20):
        changing.epsilon = setting_of(0.05 + 0.05 * step)
        expected = sinkhorn_knopp(scores, epsilon=0.05 + 0.05 * step)
        torch.testing.assert_close(compiled(scores), expected, rtol=1e-5, atol=2e-5)
    assert counting.frame_count == 1


# Bad settings

BAD_TENSORS: list[tuple[Tensor, Any]] = [
    (torch.tensor([0.1]), ValueError),
    (torch.full((2, 3), 0.1), ValueError),
    (torch.empty(0), ValueError),
    (torch.tensor(0.1, requires_grad=True), ValueError),
    (nn.Parameter(torch.tensor(0.1)), ValueError),
    (nn.Parameter(torch.tensor(0.1), requires_grad=False), TypeError),
    (torch.tensor(0.1).to(torch.float8_e5m2), TypeError),
    (torch.tensor(1), (TypeError, ValueError)),
    (torch.tensor(True), (TypeError, ValueError)),
    (torch.tensor(1 + 0j), (TypeError, ValueError)),
]
A_BAD_TENSOR = pytest.mark.parametrize(
    ("bad", "error"), BAD_TENSORS, ids=[f"{bad.dtype}, {bad.shape}" for bad, _ in BAD_TENSORS]
)


@A_BAD_TENSOR
def test_a_bad_tensor_is_named(bad: Tensor, error: Any) -> None:
    scores = scores_of(3)
    for call in (
        lambda: sinkhorn_knopp(scores, epsilon=bad),
        lambda: SinkhornKnopp(bad),
        lambda: SwAVLoss(DIMENSION, PROTOTYPES, epsilon=bad),
    ):
        with pytest.raises(error, match=r"^epsilon must "):
            call()
    for call in (
        lambda: swapped_prediction_loss(scores, scores, temperature=bad),
        lambda: SwappedPredictionLoss(bad),
        lambda: code_prediction_loss(scores, scores, temperature=bad),
        lambda: CodePredictionLoss(bad),
        lambda: SwAVLoss(DIMENSION, PROTOTYPES, temperature=bad),
    ):
        with pytest.raises(error, match=r"^temperature must "):
            call()


def test_a_buffer_is_named_at_construction() -> None:
    for part, name in ((SinkhornKnopp, "epsilon"), (SwappedPredictionLoss, "temperature")):
        with pytest.raises(TypeError, match=f"^{name} must be a plain .* got a Buffer"):
            part(nn.Buffer(torch.tensor(0.1)))


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
def test_a_tensor_without_a_value_is_named_where_one_is_needed(memory: str) -> None:
    scores, unknown = scores_of(3), torch.empty((), device="meta")
    calls: dict[str, list[Callable[[], Any]]] = {
        "epsilon": [lambda: sinkhorn_knopp(scores, epsilon=unknown)],
        "temperature": [
            lambda: swapped_prediction_loss(scores, scores, temperature=unknown),
            lambda: code_prediction_loss(scores, scores, temperature=unknown),
        ],
    }
    for name, functions in calls.items():
        criterion = SwAVLoss(
            DIMENSION, PROTOTYPES, memory=memory, queue_length=4, **{name: unknown}
        )
        before = snapshot(criterion)
        for call in (*functions, lambda criterion=criterion: criterion(features_of())):
            with pytest.raises(ValueError, match=f"^{name} must have values, got .* meta device"):
                call()
        assert same(snapshot(criterion), before)


@pytest.mark.parametrize("memory", ["full", "streamed", "auto"])
@A_BAD_TENSOR
def test_a_bad_tensor_that_was_set_is_named_and_changes_nothing(
    bad: Tensor, error: Any, memory: str
) -> None:
    for part, name in (("sinkhorn", "epsilon"), ("loss", "temperature")):
        criterion = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, queue_length=4)
        criterion(features_of())
        before = snapshot(criterion)
        setattr(criterion.get_submodule(part), name, bad)
        with pytest.raises(error, match=f"^{name} must "):
            criterion(features_of())
        assert all(torch.equal(criterion.state_dict()[key], before[key]) for key in before)


# The dtype of the codes


@pytest.mark.parametrize("options", OPTIONS | READING)
@pytest.mark.parametrize("wanted", tolerances.DTYPES, ids=str)
@ANY_DTYPE
def test_codes_have_the_dtype_that_was_asked_for(
    device: torch.device, dtype: torch.dtype, wanted: torch.dtype, options: str
) -> None:
    settings = {
        name: each.to(device) if isinstance(each, Tensor) else each
        for name, each in (OPTIONS | READING)[options].items()
    }
    scores = scores_of(2, dtype=dtype, device=device)
    codes = sinkhorn_knopp(scores, dtype=wanted, **settings)
    assert codes.dtype == wanted
    assert codes.shape == scores.shape
    wide = torch.promote_types(dtype, torch.float32)
    expected = sinkhorn_knopp(scores.to(wide), **settings)
    narrow = min(wanted, wide, key=lambda each: (each.itemsize, torch.finfo(each).bits))
    atol = tolerances.of_codes(narrow, epsilon=0.05, largest=1)
    torch.testing.assert_close(codes.to(wide), expected, rtol=0, atol=atol)
    default = sinkhorn_knopp(scores, **settings)
    assert default.dtype == dtype
    assert torch.equal(sinkhorn_knopp(scores, dtype=None, **settings), default)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [(4, 7), (3, 8, 5), (600, 2000), (0, 5), (2, 0, 5), (1, 1)], ids=str
)
def test_float32_codes_of_half_precision_are_not_rounded(
    low: torch.dtype, shape: tuple[int, ...]
) -> None:
    scores = (2 * torch.rand(shape) - 1).to(low)
    codes = sinkhorn_knopp(scores, dtype=torch.float32)
    assert codes.dtype == torch.float32
    expected = sinkhorn_knopp(scores.float())
    torch.testing.assert_close(codes, expected, rtol=0, atol=2e-5)
    if codes.numel():
        sums = codes.sum(dim=-1)  # which of rounded codes would be wrong in the third digit
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_the_dtype_is_that_of_each_problem_of_a_list() -> None:
    scores = [scores_of(dtype=dtype) for dtype in tolerances.DTYPES]
    for codes, each in zip(sinkhorn_knopp(scores, dtype=torch.float32), scores, strict=True):
        assert codes.dtype == torch.float32
        wide = torch.promote_types(each.dtype, torch.float32)
        assert_codes(codes, sinkhorn_knopp(each.to(wide)).float(), 0.05)
    assert [codes.dtype for codes in sinkhorn_knopp(scores)] == tolerances.DTYPES


@pytest.mark.parametrize("wanted", tolerances.DTYPES, ids=str)
def test_the_module_has_a_dtype(wanted: torch.dtype) -> None:
    sinkhorn = SinkhornKnopp(dtype=wanted)
    scores = scores_of(2, dtype=torch.bfloat16)
    for module in (sinkhorn, copy.deepcopy(sinkhorn), pickle.loads(pickle.dumps(sinkhorn))):
        assert torch.equal(module(scores), sinkhorn_knopp(scores, dtype=wanted))
        assert [codes.dtype for codes in module([scores, scores.float()])] == [wanted] * 2
    assert SinkhornKnopp()(scores).dtype == torch.bfloat16


def test_the_dtype_holds_under_autocast_and_on_meta() -> None:
    scores = scores_of(2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn_knopp(scores, dtype=torch.float32)
    assert torch.equal(codes, sinkhorn_knopp(scores, dtype=torch.float32))
    codes = sinkhorn_knopp(scores.to("meta"), dtype=torch.float32)
    assert codes.device.type == "meta"
    assert codes.dtype == torch.float32


def test_codes_of_another_dtype_compile_once() -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("eager")
    module = SinkhornKnopp(dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend=counting)
    for _ in range(3):
        scores = scores_of(2, dtype=torch.bfloat16)
        codes = compiled(scores)
        assert codes.dtype == torch.float32
        torch.testing.assert_close(codes, module(scores), rtol=0, atol=2e-5)
    assert counting.frame_count == 1


def test_module_and_function_have_the_same_settings() -> None:
    settings = inspect.signature(SinkhornKnopp).parameters
    of_function = inspect.signature(sinkhorn_knopp).parameters
    for name in ("epsilon", "dtype"):
        assert settings[name].default == of_function[name].default
        assert settings[name].annotation == of_function[name].annotation
    assert settings["dtype"].default is None
    assert settings["dtype"].kind == inspect.Parameter.KEYWORD_ONLY
    losses = [SwappedPredictionLoss, swapped_prediction_loss, CodePredictionLoss]
    for function in (*losses, code_prediction_loss):
        assert inspect.signature(function).parameters["temperature"].default == 0.1


@pytest.mark.parametrize(
    "bad",
    [
        torch.int64,
        torch.int8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float4_e2m1fn_x2,
        "float32",
        float,
        math.inf,
    ],
)
def test_a_bad_dtype_is_named(bad: Any) -> None:
    for call in (
        lambda: sinkhorn_knopp(scores_of(), dtype=bad),
        lambda: sinkhorn_knopp([scores_of()], dtype=bad),
        lambda: SinkhornKnopp(dtype=bad),
    ):
        with pytest.raises((TypeError, ValueError), match=r"^dtype must "):
            call()
