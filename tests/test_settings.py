"""Settings: each is obeyed or refused on every route, also once changed, also when compiled."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from swavkit import (
    FeatureQueue,
    PrototypeLayer,
    SinkhornKnopp,
    SwappedPredictionLoss,
    SwAVLoss,
    marginal_error,
    sinkhorn_knopp,
    swapped_prediction_loss,
)
from swavkit.distributed.agreement import Agreement

DIMENSION, PROTOTYPES, VIEWS = 6, 5, 3
ROUTES = ("full", "streamed", "hooked")


def criterion_of(route: str, **settings: Any) -> SwAVLoss:
    """Return a loss that is computed at once, block by block, or by calls of its parts."""
    memory = "streamed" if route == "streamed" else "full"
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, **settings)
    if route == "hooked":
        criterion.loss.register_forward_hook(lambda *_: None)
    return criterion


def features_of(samples: int = 8, **options: Any) -> Tensor:
    return torch.randn(VIEWS, samples, DIMENSION, **options)


# Settings that change


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_bad_temperature_is_refused_wherever_it_was_set(route: str, bad: float) -> None:
    criterion = criterion_of(route, queue_length=4)
    criterion.loss.temperature = bad
    with pytest.raises(ValueError, match="temperature must be a finite number"):
        criterion(features_of())
    assert int(criterion.steps) == len(criterion.queue) == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("part", "name", "value", "text"),
    [
        ("", "memory", "little", "memory must be 'full' or 'streamed' or 'auto', got 'little'"),
        ("", "reduction", "sum", "reduction must be 'mean' or 'global_mean', got 'sum'"),
        ("", "num_code_views", 0, "num_code_views must be at least 1, got 0"),
        ("", "queue_start", -1, "queue_start must be at least 0, got -1"),
        ("", "freeze_steps", -1, "freeze_steps must be at least 0, got -1"),
        ("sinkhorn", "epsilon", -0.1, "epsilon must be a finite number above 0, got -0.1"),
        ("sinkhorn", "iterations", 0, "iterations must be at least 1, got 0"),
        ("sinkhorn", "synchronize", "alway", "synchronize must be True or False or 'always', got"),
        ("prototypes", "gradient", "none", "gradient must be 'tangent' or 'published', got 'none'"),
    ],
)
def test_a_setting_changed_to_nonsense_is_refused(
    route: str, part: str, name: str, value: Any, text: str
) -> None:
    criterion = criterion_of(route, queue_length=4)
    setattr(criterion.get_submodule(part), name, value)
    with pytest.raises(ValueError, match=text):
        criterion(features_of())
    assert int(criterion.steps) == len(criterion.queue) == 0


@pytest.mark.parametrize("name", ["return_details", "return_statistics"])
@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)], ids=repr)
def test_a_request_is_true_or_false(name: str, value: Any) -> None:
    criterion = criterion_of("full", queue_length=4)
    with pytest.raises(ValueError, match=f"^{name} must be True or False, got "):
        criterion(features_of(), **{name: value})
    assert int(criterion.steps) == len(criterion.queue) == 0


def settings_of_codes(sinkhorn: SinkhornKnopp) -> None:
    sinkhorn.hard, sinkhorn.iterations, sinkhorn.epsilon = True, 5, 0.1


@pytest.mark.parametrize("route", ROUTES)
def test_a_changed_setting_is_that_of_a_new_module(route: str) -> None:
    changed = criterion_of(route)
    new = criterion_of(route, temperature=0.2, num_code_views=1)
    new.load_state_dict(changed.state_dict())
    for criterion in (changed, new):
        settings_of_codes(criterion.sinkhorn)
    changed.loss.temperature, changed.num_code_views = 0.2, 1
    features = features_of()
    assert torch.equal(changed(features), new(features))


@pytest.mark.parametrize(
    ("memory", "gradient", "backend"),
    [
        # The one that held on to an old number
        pytest.param("full", False, "inductor", marks=pytest.mark.slow),
        ("full", True, "aot_eager"),
        pytest.param("streamed", True, "aot_eager", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_loss_sees_each_temperature_and_epsilon(
    memory: str, gradient: bool, backend: str
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend(backend)
    eager = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, iterations=1).eval()
    changing = copy.deepcopy(eager)
    compiled = torch.compile(changing, backend=counting, fullgraph=True)
    features = features_of(requires_grad=gradient)
    for step in range(20):
        for criterion in (eager, changing):
            criterion.loss.temperature = 0.1 + 0.013 * step
            criterion.sinkhorn.epsilon = 0.05 + 0.007 * step
        with torch.set_grad_enabled(gradient):
            losses = compiled(features), eager(features)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    assert counting.frame_count <= 3  # as numbers, and as symbols when one and when both changed


def loss_of_scores(scores: Tensor, setting: float) -> Tensor:
    return swapped_prediction_loss(scores, scores[:2].softmax(-1), temperature=setting)


def codes_of_scores(scores: Tensor, setting: float) -> Tensor:
    return sinkhorn_knopp(scores, epsilon=setting, iterations=1)


def relaxed_codes_of_scores(scores: Tensor, setting: float) -> Tensor:
    return sinkhorn_knopp(scores, epsilon=0.05 + setting, relaxation=setting, iterations=1)


@pytest.mark.parametrize(
    ("function", "dynamic", "backend"),
    [
        pytest.param(loss_of_scores, None, "inductor", marks=pytest.mark.slow),
        (loss_of_scores, True, "eager"),
        (codes_of_scores, None, "aot_eager"),
        (codes_of_scores, True, "eager"),
        pytest.param(relaxed_codes_of_scores, None, "inductor", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_function_sees_each_value_of_a_setting(
    function: Callable[..., Tensor], dynamic: bool | None, backend: str
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=dynamic)
    scores = torch.randn(VIEWS, 8, PROTOTYPES)
    for step in range(20):
        setting = 0.1 + 0.013 * step
        torch.testing.assert_close(
            compiled(scores, setting), function(scores, setting), rtol=1e-5, atol=1e-5
        )
    assert counting.frame_count <= 2


# Compiled with changing sizes


def call_of(name: str) -> tuple[Callable[..., Any], Callable[[int, bool], tuple[Any, ...]]]:
    """Return a function, and its arguments for a number of samples, with weights or without."""
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=32 * (name == "loss with a queue"))
    queue = FeatureQueue(32, DIMENSION)

    def weight(samples: int, weighted: bool) -> Tensor | None:
        return torch.rand(samples) + 0.1 if weighted else None

    def of_scores(samples: int, weighted: bool) -> tuple[Any, ...]:
        return torch.randn(2, samples, PROTOTYPES), weight(samples, weighted)

    def of_features(samples: int, weighted: bool) -> tuple[Any, ...]:
        return features_of(samples), weight(samples, weighted)

    return {
        "loss": (lambda f, w: criterion(f, sample_weight=w), of_features),
        "loss with a queue": (lambda f, w: criterion(f, sample_weight=w), of_features),
        "loss of views": (
            lambda f, w: criterion(f, sample_weight=w),
            lambda samples, weighted: (list(features_of(samples)), weight(samples, weighted)),
        ),
        "loss of scores": (
            lambda s, w: swapped_prediction_loss(s, s.softmax(-1), sample_weight=w),
            of_scores,
        ),
        "codes": (lambda s, w: sinkhorn_knopp(s, sample_weight=w), of_scores),
        "codes with a prior": (
            lambda s, w: sinkhorn_knopp(s, prototype_weight=w),
            lambda samples, weighted: (
                torch.randn(2, samples, PROTOTYPES),
                weight(PROTOTYPES, weighted),
            ),
        ),
        "marginal error": (lambda s, w: marginal_error(s, sample_weight=w), of_scores),
        "queue": (
            lambda f, v: queue.push(f, valid=v),
            lambda samples, weighted: (
                torch.randn(2, samples, DIMENSION),
                torch.rand(samples) > 0.5 if weighted else None,
            ),
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        pytest.param("loss", None, marks=pytest.mark.slow),
        pytest.param("loss with a queue", True, marks=pytest.mark.slow),
        pytest.param("loss of views", None, marks=pytest.mark.slow),
        ("loss of scores", True),
        ("codes", None),
        pytest.param("codes with a prior", True, marks=pytest.mark.slow),
        ("marginal error", None),
        ("queue", None),
    ],
)
def test_a_changing_batch_and_then_a_weight_compile_without_a_break(
    name: str, dynamic: bool | None
) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("eager")
    function, arguments = call_of(name)
    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=dynamic)
    for weighted in (False, True):
        for samples in (8, 12, 20):
            compiled(*arguments(samples, weighted))
    assert counting.frame_count <= 4


# What cannot be done is refused in words of ours


def with_tangent(function: Callable[[Tensor], Any], inputs: Tensor) -> Any:
    with forward_ad.dual_level():
        return function(forward_ad.make_dual(inputs, inputs))


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "torch.func.grad": lambda function, inputs: torch.func.grad(function)(inputs),
    "vmap": lambda function, inputs: torch.vmap(function)(inputs[None]),
    "jvp": lambda function, inputs: torch.func.jvp(function, (inputs,), (inputs,)),
    "forward mode": with_tangent,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_are_refused_by_name(transform: str) -> None:
    scores = torch.randn(VIEWS, 8, PROTOTYPES)
    text = "must be outside torch.func transforms and forward-mode"
    with pytest.raises(RuntimeError, match=f"scores {text}"):
        TRANSFORMS[transform](lambda s: swapped_prediction_loss(s, scores[:2]), scores)
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=4)
    with pytest.raises(RuntimeError, match=f"features {text}"):
        TRANSFORMS[transform](criterion, features_of())
    assert int(criterion.steps) == len(criterion.queue) == 0


def test_codes_have_leading_dimensions_and_no_vmap() -> None:
    with pytest.raises(
        RuntimeError, match=r"scores must be outside torch\.vmap; expected a tensor"
    ):
        torch.vmap(sinkhorn_knopp)(torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    "module",
    [
        SwAVLoss(4, 3),
        PrototypeLayer(4, 3),
        SinkhornKnopp(),
        SwappedPredictionLoss(),
        FeatureQueue(4, 3),
    ],
    ids=lambda module: type(module).__name__,
)
def test_torch_script_is_refused_by_name(module: nn.Module) -> None:
    expected = f"{type(module).__name__} cannot be compiled by torch.jit.script"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit itself is deprecated
        with pytest.raises(RuntimeError, match=expected):
            torch.jit.script(module)


@pytest.mark.parametrize("sizes", [range(3, 6), (3, 4, 5)], ids=str)
def test_any_sequence_gives_the_sizes_of_heads(sizes: Any) -> None:
    criterion = SwAVLoss(DIMENSION, sizes)
    assert [head.num_prototypes for head in criterion.prototypes] == [3, 4, 5]


@pytest.mark.parametrize(
    ("module", "call"),
    [
        (SwAVLoss(DIMENSION, 3), lambda module: module(features_of(device="meta"))),
        (PrototypeLayer(DIMENSION, 3), lambda module: module(features_of(device="meta"))),
    ],
    ids=["SwAVLoss", "PrototypeLayer"],
)
def test_a_module_on_another_device_is_named(
    module: nn.Module, call: Callable[[nn.Module], Any]
) -> None:
    expected = rf"on device cpu, got meta; or move the {type(module).__name__} there, with \.to\("
    with pytest.raises(ValueError, match=expected):
        call(module)


@pytest.mark.parametrize("memory", ["full", "streamed"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_default_device_does_not_matter(memory: str, weighted: bool) -> None:
    criterion = SwAVLoss(DIMENSION, (PROTOTYPES, 3), memory=memory, queue_length=12, freeze_steps=1)
    copied = copy.deepcopy(criterion)
    weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1]) if weighted else None
    for _ in range(3):
        features = features_of(requires_grad=True)
        expected = copied(features, sample_weight=weight)
        gradient = torch.autograd.grad(expected, features)
        with torch.device("meta"):
            loss = criterion(features, sample_weight=weight)
            found = torch.autograd.grad(loss, features)
        torch.testing.assert_close((loss, found), (expected, gradient), rtol=0, atol=0)
    scores = torch.randn(VIEWS, 8, PROTOTYPES)
    with torch.device("meta"):
        loss = swapped_prediction_loss(scores, scores.softmax(-1), sample_weight=weight)
    assert loss.isfinite()


# Calls beside and within each other


def test_calls_of_two_threads_do_not_mix() -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES).double().eval()
    both = threading.Barrier(2, timeout=30)

    def meet(*_: Any) -> None:
        both.wait()

    criterion.sinkhorn.register_forward_pre_hook(meet)
    batches = [features_of(samples, dtype=torch.float64) for samples in (4, 9)]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = criterion(batches[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = SwAVLoss(DIMENSION, PROTOTYPES).double().eval()
    plain.load_state_dict(criterion.state_dict())
    for number, features in enumerate(batches):
        torch.testing.assert_close(found[number], plain(features), rtol=0, atol=1e-12)


def test_a_call_in_a_hook_of_a_backward_pass_is_a_step() -> None:
    outer = SwAVLoss(DIMENSION, PROTOTYPES)
    inner = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=32)
    features, others = features_of(requires_grad=True), features_of()
    features.register_hook(lambda gradient: inner(others) and None)
    outer(features).backward()
    assert int(inner.steps) == 1
    assert len(inner.queue) == 8


class Linear(PrototypeLayer):
    """Prototypes of a user's own: a plain product."""

    def forward(self, features: Tensor, *, frozen: Tensor | None = None) -> Tensor:
        return features @ self.weight.T


@pytest.mark.parametrize("route", ["full", "hooked"])
def test_a_change_in_place_before_the_backward_pass_is_noticed(route: str) -> None:
    criterion = criterion_of(route)
    criterion.prototypes = Linear(DIMENSION, PROTOTYPES)
    loss = criterion(features_of(requires_grad=True))
    with torch.no_grad():
        criterion.prototypes.weight.neg_()
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        loss.backward()


def test_a_comparison_waits_until_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "swavkit.distributed.agreement.require_same", lambda *_, **__: asked.append(1)
    )
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    agreement, group = Agreement(repeatedly=True), object.__new__(type("Group", (), {}))
    for _ in range(4):
        agreement.require(dict, group, torch.device("cuda"))
    assert asked == []
    capturing[0] = False
    agreement.require(dict, group, torch.device("cuda"))
    assert asked == [1]  # and the calls while capturing have not been counted
