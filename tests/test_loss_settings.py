"""Settings of the codes in the whole loss: obeyed in every form, with queue, heads and teacher."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swavkit import SinkhornKnopp, SwAVLoss, marginal_error
from tests import oracles, tolerances
from tests.states import same, snapshot
from tests.test_teacher import (
    ANY_MEMORY,
    ANY_QUEUE,
    ANY_SIZES,
    DIMENSION,
    PROTOTYPES,
    SIZES,
    ByHand,
    assert_close,
    assert_same_queue,
    criterion_of,
    features_of,
    heads_of,
    teacher_of,
)

# Exact in every dtype.
PRIOR, OTHER_PRIOR = torch.tensor([1, 2, 0.5, 0.25, 4]), torch.tensor([1, 0, 3.0])

OF_CODES: list[dict[str, Any]] = [
    {},
    {"hard": True},
    {"relaxation": 0.1},
    {"tolerance": 0.1, "iterations": 30},
    {"tolerance": 0.1, "iterations": 30, "hard": True},
    {"hard": True, "relaxation": 0.1, "iterations": 8},
]
ANY_SETTINGS = pytest.mark.parametrize("of_codes", OF_CODES, ids=str)


def prior_of(sizes: Any) -> Any:
    """Return a prior as the loss takes it: of one head, or of the first and of none other."""
    return PRIOR if isinstance(sizes, int) else [PRIOR, *[None] * (len(sizes) - 1)]


def sinkhorn_of(of_codes: dict[str, Any]) -> SinkhornKnopp:
    return SinkhornKnopp(0.05, of_codes.get("iterations", 3), **without(of_codes, "iterations"))


def without(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != name}


# By hand and by the equations


@pytest.mark.parametrize(("prior", "weighted"), [(False, True), (True, False)])
@ANY_SETTINGS
@ANY_QUEUE
@ANY_SIZES
@ANY_MEMORY
def test_it_is_its_parts_wired_by_hand(
    memory: str,
    sizes: Any,
    queue_length: int,
    of_codes: dict[str, Any],
    prior: bool,
    weighted: bool,
) -> None:
    prototype_weight = prior_of(sizes) if prior else None
    criterion = criterion_of(
        sizes,
        memory=memory,
        queue_length=queue_length,
        prototype_weight=prototype_weight,
        **of_codes,
    )
    by_hand = ByHand(
        criterion,
        sinkhorn_of(of_codes),
        [prototype_weight] if isinstance(prototype_weight, Tensor) else prototype_weight,
    )
    weight = torch.tensor([1, 0, 2, 1, 0, 0.5, 1, 1]) if weighted else None
    for _ in range(2):
        features = features_of(requires_grad=True)
        loss = criterion(features, sample_weight=weight)
        expected, _ = by_hand(features, sample_weight=weight)
        assert_close(loss, expected)
        assert_close(
            torch.autograd.grad(loss, [features, *criterion.parameters()]),
            torch.autograd.grad(expected, [features, *by_hand.weights]),
        )
        assert_same_queue(criterion, by_hand)


@pytest.mark.parametrize(
    "of_codes", [{}, {"hard": True}, {"relaxation": 0.1}, {"tolerance": 0.1, "iterations": 30}]
)
@ANY_QUEUE
@ANY_SIZES
@ANY_MEMORY
def test_so_it_is_with_a_teacher(
    memory: str, sizes: Any, queue_length: int, of_codes: dict[str, Any]
) -> None:
    prior, teacher = prior_of(sizes), teacher_of(sizes)
    criterion = criterion_of(
        sizes, memory=memory, queue_length=queue_length, prototype_weight=prior, **of_codes
    )
    by_hand = ByHand(
        criterion, sinkhorn_of(of_codes), [prior] if isinstance(prior, Tensor) else prior
    )
    for _ in range(2):
        features, code_features = features_of(requires_grad=True), features_of(2)
        given: dict[str, Any] = {"code_features": code_features, "code_prototypes": teacher}
        loss, (expected, _) = criterion(features, **given), by_hand(features, **given)
        assert_close(loss, expected)
        assert_close(
            torch.autograd.grad(loss, [features, *criterion.parameters()]),
            torch.autograd.grad(expected, [features, *by_hand.weights]),
        )


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("relaxation", [math.inf, 0.1])
@pytest.mark.parametrize("prior", [None, PRIOR])
@ANY_MEMORY
def test_the_settings_are_those_of_the_equations(
    memory: str, prior: Tensor | None, relaxation: float, hard: bool
) -> None:
    criterion = criterion_of(
        memory=memory, hard=hard, relaxation=relaxation, prototype_weight=prior, iterations=5
    )
    masses = None if prior is None else prior.double().numpy()
    for _ in range(2):
        features = features_of()
        prototypes = criterion.prototypes.weight.detach().numpy()
        scores = np.stack([oracles.cosines(view, prototypes) for view in features.numpy()])
        codes = np.stack(
            [
                oracles.sinkhorn(view, 0.05, 5, None, masses)
                if relaxation == math.inf
                else oracles.relaxed_sinkhorn(view, 0.05, 5, relaxation, None, masses)
                for view in scores[:2]
            ]
        )
        if hard:
            codes = np.eye(PROTOTYPES)[codes.argmax(axis=-1)]
        expected = oracles.loss(scores, codes, 0.1)
        assert criterion(features).item() == pytest.approx(expected, rel=0, abs=1e-10)


@ANY_QUEUE
def test_a_prior_is_that_of_the_equations_with_a_queue(queue_length: int) -> None:
    criterion = criterion_of(queue_length=queue_length, prototype_weight=PRIOR)
    ring = oracles.Ring(queue_length) if queue_length else None
    for _ in range(3):
        features = features_of()
        expected = oracles.swav_loss(
            features.numpy(),
            criterion.prototypes.weight.detach().numpy(),
            2,
            temperature=0.1,
            epsilon=0.05,
            iterations=3,
            queue=ring,
            prototype_weight=PRIOR.double().numpy(),
        )
        assert criterion(features).item() == pytest.approx(expected, rel=0, abs=1e-11)


@ANY_SETTINGS
@ANY_MEMORY
def test_a_setting_given_is_that_setting_set(memory: str, of_codes: dict[str, Any]) -> None:
    given = criterion_of(memory=memory, **of_codes)
    later = criterion_of(memory=memory)
    later.load_state_dict(given.state_dict())
    for name, value in of_codes.items():
        assert getattr(given.sinkhorn, name) == value
        setattr(later.sinkhorn, name, value)
    features = features_of()
    assert torch.equal(given(features), later(features))


@pytest.mark.parametrize("forms", [list, tuple])
def test_each_head_has_a_prior_of_its_own_or_none(forms: Callable[..., Any]) -> None:
    features = features_of()
    for priors in ([PRIOR, OTHER_PRIOR], [None, OTHER_PRIOR], [PRIOR, None], [None, None]):
        together = criterion_of(SIZES, prototype_weight=forms(priors)).eval()
        losses = []
        for head, size, prior in zip(together.prototypes, SIZES, priors, strict=True):
            single = criterion_of(size, prototype_weight=prior).eval()
            single.prototypes.load_state_dict(head.state_dict())
            losses.append(single(features))
        assert_close(together(features), torch.stack(losses).mean())


def test_a_prototype_of_weight_zero_gives_no_code_and_any_scale_serves() -> None:
    criterion = criterion_of(3, prototype_weight=OTHER_PRIOR)
    scaled = criterion_of(3, prototype_weight=1000 * OTHER_PRIOR)
    scaled.load_state_dict(criterion.state_dict())
    features = features_of()
    loss, details = criterion(features, return_details=True)
    assert not details.codes[..., 1].any()
    assert details.codes[..., 0].all()
    assert_close(scaled(features), loss)


def test_a_prior_may_be_bool() -> None:
    mask = torch.tensor([True, False, True, True, True])
    criterion = criterion_of(prototype_weight=mask)
    expected = criterion_of(prototype_weight=mask.float())
    expected.load_state_dict(criterion.state_dict())
    features = features_of()
    assert_close(criterion(features), expected(features))


# The marginal error


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@ANY_QUEUE
@ANY_SIZES
def test_details_have_the_marginal_error_of_current_and_queued_samples(
    sizes: Any, queue_length: int, prior: bool, weighted: bool
) -> None:
    of_codes: dict[str, Any] = {"tolerance": 0.2, "iterations": 40}
    prototype_weight = prior_of(sizes) if prior else None
    criterion = criterion_of(
        sizes, queue_length=queue_length, prototype_weight=prototype_weight, **of_codes
    )
    priors = prototype_weight
    if isinstance(sizes, int):
        priors = [prototype_weight]
    by_hand = ByHand(criterion, sinkhorn_of(of_codes), priors if prior else None)
    weight = torch.tensor([1, 0, 2, 1, 0, 0.5, 1, 1]) if weighted else torch.ones(8)
    for _ in range(3):
        valid = torch.zeros(0) if criterion.queue is None else criterion.queue.valid.clone()
        features = features_of()
        given = weight if weighted else None
        _, details = criterion(features, sample_weight=given, return_details=True)
        _, all_codes = by_hand(features, sample_weight=given)
        of_heads = [details] if isinstance(sizes, int) else details
        together = torch.cat([weight, valid.float()])
        for head, (of_head, codes) in enumerate(zip(of_heads, all_codes, strict=True)):
            found = of_head.marginal_error
            assert found.shape == (2,)
            assert found.dtype == torch.float64
            assert not found.requires_grad
            mass = priors[head] if prior else None
            expected = marginal_error(codes, sample_weight=together, prototype_weight=mass)
            assert_close(found, expected, 1e-9)
            assert (found <= 0.2 + 1e-9).all()
            for view, error in zip(codes, found, strict=True):
                by_equation = oracles.marginal_error(
                    view.numpy(),
                    together.double().numpy(),
                    None if mass is None else mass.double().numpy(),
                )
                assert error.item() == pytest.approx(by_equation, rel=0, abs=1e-9)


def test_the_marginal_error_is_that_of_a_teacher_and_of_float32() -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, tolerance=0.2, iterations=40)
    features = features_of(dtype=torch.float32)
    code_features, teacher = features_of(2, dtype=torch.float32), teacher_of(dtype=torch.float32)
    _, details = criterion(
        features, code_features=code_features, code_prototypes=teacher, return_details=True
    )
    assert details.marginal_error.dtype == torch.float32
    assert_close(details.marginal_error, marginal_error(details.codes), 1e-5)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("prior", [False, True])
@ANY_QUEUE
@ANY_SIZES
def test_the_marginal_error_is_that_of_codes_before_they_are_rounded(
    sizes: Any, queue_length: int, prior: bool, hard: bool, dtype: torch.dtype | None
) -> None:
    settings: dict[str, Any] = {
        "queue_length": queue_length,
        "prototype_weight": prior_of(sizes) if prior else None,
        "epsilon": 0.5,
        "iterations": 100,
        "tolerance": 1e-6,
    }
    criterion, exact = criterion_of(sizes, hard=hard, **settings), criterion_of(sizes, **settings)
    exact.load_state_dict(criterion.state_dict())
    criterion.sinkhorn.dtype = dtype
    for _ in range(2):
        features = features_of()
        weight = torch.tensor([1, 0, 2, 1, 1, 0.5, 1, 1])
        results = [
            each(features, sample_weight=weight, return_details=True)[1]
            for each in (criterion, exact)
        ]
        for found, expected in [results] if isinstance(sizes, int) else zip(*results, strict=True):
            assert found.codes.dtype == (dtype or torch.float64)
            assert not hard or ((found.codes == 0) | (found.codes == 1)).all()
            assert found.marginal_error.dtype == torch.float64
            assert torch.equal(found.marginal_error, expected.marginal_error)
            assert (found.marginal_error <= 1.01e-6).all()


def test_copies_of_details_keep_the_marginal_error() -> None:
    criterion = criterion_of(tolerance=0.2, iterations=40)
    _, details = criterion(features_of(), return_details=True)
    others = [
        details._replace(codes=details.codes.half()),
        getattr(copy, "replace", lambda each, **fields: each._replace(**fields))(details, codes=0),
        copy.copy(details),
        copy.deepcopy(details),
        pickle.loads(pickle.dumps(details)),
    ]
    for other in others:
        assert type(other) is type(details)
        assert torch.equal(other.marginal_error, details.marginal_error)
        assert torch.equal(other.scores, details.scores)
        assert len(other) == 2
    assert others[0].codes.dtype == torch.float16
    assert others[1].codes == 0
    with pytest.raises((TypeError, ValueError), match="unexpected field names"):
        details._replace(errors=None)


@pytest.mark.parametrize("of_codes", [{}, {"relaxation": 0.1}, {"hard": True}], ids=str)
@ANY_SIZES
def test_there_is_no_marginal_error_without_a_tolerance(
    sizes: Any, of_codes: dict[str, Any]
) -> None:
    criterion = criterion_of(sizes, queue_length=10, **of_codes)
    _, details = criterion(features_of(), return_details=True)
    for of_head in [details] if isinstance(sizes, int) else details:
        assert of_head.marginal_error is None
        assert of_head.codes.shape[:2] == (2, 8)
        assert of_head.scores.shape[:2] == (3, 8)


# State, dtypes, devices


@pytest.mark.parametrize("prior", [False, True])
@ANY_SIZES
def test_the_settings_add_nothing_to_the_state(sizes: Any, prior: bool) -> None:
    plain = criterion_of(sizes, queue_length=10)
    criterion = criterion_of(
        sizes,
        queue_length=10,
        hard=True,
        relaxation=0.5,
        prototype_weight=prior_of(sizes) if prior else None,
    )
    assert list(criterion.state_dict()) == list(plain.state_dict())
    names = [name for name, _ in criterion.named_parameters()]
    assert names == [name for name, _ in plain.named_parameters()]
    criterion.load_state_dict(plain.state_dict(), strict=True)
    assert type(criterion).__name__ in repr(criterion)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@ANY_SIZES
def test_a_copy_has_the_settings(sizes: Any, duplicate: Callable[[SwAVLoss], SwAVLoss]) -> None:
    for of_codes in OF_CODES:
        criterion = criterion_of(
            sizes, queue_length=10, prototype_weight=prior_of(sizes), **of_codes
        )
        criterion(features_of())
        twin = duplicate(criterion)
        features = features_of()
        assert torch.equal(twin(features), criterion(features))
        assert same(snapshot(twin), snapshot(criterion))


@pytest.mark.parametrize("whole", [False, True], ids=["features alone", "module and features"])
@pytest.mark.parametrize("prior_dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("memory", ["full", "streamed"])
def test_a_prior_of_any_dtype_serves_features_of_any_dtype(
    memory: str, dtype: torch.dtype, prior_dtype: torch.dtype, whole: bool
) -> None:
    prior = PRIOR.to(prior_dtype)
    settings = {"epsilon": 0.5, "temperature": 0.5, "memory": memory}
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, prototype_weight=prior, **settings)
    if whole:
        criterion.to(dtype)
    exact = SwAVLoss(
        DIMENSION, PROTOTYPES, prototype_weight=PRIOR, epsilon=0.5, temperature=0.5
    ).double()
    exact.load_state_dict(criterion.state_dict())
    features = features_of(dtype=dtype, requires_grad=True)
    loss = criterion(features)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    narrow = dtype if whole or dtype.itemsize < 8 else torch.float32
    assert_close(loss.double(), exact(features.double()), 8 * tolerances.ATOL[narrow])
    assert torch.autograd.grad(loss, features)[0].isfinite().all()


@ANY_SIZES
@ANY_MEMORY
def test_a_prior_follows_its_module_to_another_device(memory: str, sizes: Any) -> None:
    criterion = SwAVLoss(
        DIMENSION, sizes, memory=memory, queue_length=10, prototype_weight=prior_of(sizes)
    ).to("meta")
    features = torch.empty(3, 8, DIMENSION, device="meta", requires_grad=True)
    loss = criterion(features)
    loss.backward()
    assert loss.device.type == "meta"
    assert features.grad.shape == features.shape


def test_a_prior_follows_parameters_that_were_moved_without_it() -> None:
    criterion = SwAVLoss(DIMENSION, PROTOTYPES, queue_length=10, prototype_weight=PRIOR)
    for name, parameter in list(criterion.prototypes.named_parameters()):  # as FSDP2 does
        setattr(criterion.prototypes, name, nn.Parameter(parameter.to("meta")))
    assert criterion(torch.empty(3, 8, DIMENSION, device="meta")).device.type == "meta"


@ANY_SIZES
@ANY_MEMORY
def test_a_call_on_meta_loses_no_prior(memory: str, sizes: Any) -> None:
    criterion = criterion_of(sizes, memory=memory, prototype_weight=prior_of(sizes))
    state = copy.deepcopy(criterion.state_dict())
    expected = criterion(features := features_of())
    criterion.to("meta")(features.to("meta"))
    criterion.to_empty(device="cpu").load_state_dict(state)
    assert_close(criterion(features), expected)


# Bad settings


def test_the_settings_have_the_names_and_defaults_of_the_codes() -> None:
    of_loss = inspect.signature(SwAVLoss).parameters
    of_codes = inspect.signature(SinkhornKnopp).parameters
    for name in ("hard", "relaxation", "tolerance"):
        assert of_loss[name].default == of_codes[name].default
        assert of_loss[name].annotation == of_codes[name].annotation
        assert of_loss[name].kind == inspect.Parameter.KEYWORD_ONLY
    assert of_loss["prototype_weight"].default is None
    assert of_loss["prototype_weight"].kind == inspect.Parameter.KEYWORD_ONLY


BAD_SETTINGS: list[tuple[Any, dict[str, Any], str]] = [
    (PROTOTYPES, {"hard": 1}, "hard"),
    (PROTOTYPES, {"hard": None}, "hard"),
    (PROTOTYPES, {"relaxation": 0.0}, "relaxation"),
    (PROTOTYPES, {"relaxation": -1.0}, "relaxation"),
    (PROTOTYPES, {"relaxation": "strict"}, "relaxation"),
    (PROTOTYPES, {"relaxation": math.nan}, "relaxation"),
    (PROTOTYPES, {"tolerance": 0.0}, "tolerance"),
    (PROTOTYPES, {"tolerance": -0.1}, "tolerance"),
    (PROTOTYPES, {"tolerance": True}, "tolerance"),
    (PROTOTYPES, {"tolerance": 0.1, "relaxation": 0.5}, "tolerance"),
    *(
        (PROTOTYPES, {"prototype_weight": bad}, "prototype_weight")
        for bad in (
            torch.ones(PROTOTYPES + 1),
            torch.ones(1),
            torch.ones(()),
            torch.ones(1, PROTOTYPES),
            torch.ones(PROTOTYPES, 1),
            torch.ones(PROTOTYPES, dtype=torch.int64),
            [1.0] * PROTOTYPES,
            [PRIOR],
            [None],
            1.0,
            torch.zeros(PROTOTYPES),
            torch.zeros(PROTOTYPES, dtype=torch.bool),
            -PRIOR,
            PRIOR.log() / 0,
            PRIOR / 0,
            PRIOR.to("meta"),
            PRIOR.to(torch.float8_e5m2),
            PRIOR.clone().requires_grad_(),
            nn.Parameter(PRIOR),
            nn.Parameter(PRIOR, requires_grad=False),
            nn.Buffer(PRIOR),
        )
    ),
    *(
        (SIZES, {"prototype_weight": bad}, "prototype_weight")
        for bad in (
            PRIOR,
            torch.ones(2, PROTOTYPES),
            [PRIOR],
            [None, None, None],
            [OTHER_PRIOR, PRIOR],
            [PRIOR, PRIOR],
            [PRIOR, OTHER_PRIOR.long()],
            [PRIOR, [1.0, 1.0, 1.0]],
            [PRIOR, 0 * OTHER_PRIOR],
            [PRIOR, nn.Parameter(OTHER_PRIOR, requires_grad=False)],
            [PRIOR, OTHER_PRIOR.to("meta")],
            [],
            1.0,
        )
    ),
]


@pytest.mark.parametrize(
    ("sizes", "settings", "name"), BAD_SETTINGS, ids=[str(n) for n in range(len(BAD_SETTINGS))]
)
def test_a_bad_setting_is_named_at_construction(
    sizes: Any, settings: dict[str, Any], name: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.* must "):
        SwAVLoss(DIMENSION, sizes, **settings)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (0 * OTHER_PRIOR, "have a positive sum, got 0.0"),
        (OTHER_PRIOR - 2, "be finite and at least 0, got -1.0"),
        (OTHER_PRIOR * math.inf, "be finite and at least 0, got inf"),
    ],
)
def test_the_values_of_a_prior_are_checked_at_construction(bad: Tensor, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^prototype_weight\[1\] must {text}$"):
        SwAVLoss(DIMENSION, SIZES, prototype_weight=[PRIOR, bad])


@ANY_MEMORY
def test_a_prior_changed_to_nonsense_is_refused(memory: str) -> None:
    for bad in (PRIOR.to("meta"), nn.Parameter(PRIOR, requires_grad=False)):
        criterion = SwAVLoss(DIMENSION, PROTOTYPES, memory=memory, queue_length=10)
        criterion.prototype_weight = bad
        before = snapshot(criterion)
        for call in (partial(criterion, features_of(dtype=torch.float32)), criterion.double):
            with pytest.raises((TypeError, ValueError), match=r"^prototype_weight must "):
                call()
            assert same(snapshot(criterion), before)


@ANY_MEMORY
def test_a_setting_changed_to_nonsense_is_refused(memory: str) -> None:
    for name, bad in (("hard", 1), ("relaxation", 0.0), ("tolerance", -1.0)):
        criterion = criterion_of(memory=memory, queue_length=10)
        setattr(criterion.sinkhorn, name, bad)
        before = snapshot(criterion)
        with pytest.raises(ValueError, match=f"^{name} must "):
            criterion(features_of())
        assert same(snapshot(criterion), before)


def test_heads_without_a_prior_are_heads_of_equal_masses() -> None:
    equal = criterion_of(SIZES, prototype_weight=[torch.ones(size) for size in SIZES])
    plain = criterion_of(SIZES)
    plain.load_state_dict(equal.state_dict())
    features = features_of()
    assert_close(equal(features), plain(features))
    assert [head.num_prototypes for head in heads_of(plain.prototypes)] == list(SIZES)
