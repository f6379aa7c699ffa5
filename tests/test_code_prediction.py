"""The code prediction loss: the equation and its gradient, its laws, its arguments."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import CodePredictionLoss, code_prediction_loss, swapped_prediction_loss
from tests import oracles, tolerances
from tests.bad_input import BAD_SAMPLE_WEIGHTS
from tests.modes import CountingBackend
from tests.signatures import described
from tests.strategies import PredictionProblem, prediction_problems, reals
from tests.test_settings import TRANSFORMS

REDUCTIONS = ["mean", "sum", "none"]
ANY_REDUCTION = pytest.mark.parametrize("reduction", REDUCTIONS)
ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
SOFT_OR_HARD = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
ANY_PLACES = pytest.mark.parametrize("places", [(), (4,), (2, 3), (2, 1, 3, 2)], ids=str)


def problem_of(
    *places: int, prototypes: int = 5, hard: bool = False, seed: int = 0
) -> PredictionProblem:
    """Return scores in [-1, 1] and codes, soft ones in [0, 1] that do not sum to 1, at τ = 0.1."""
    random = np.random.default_rng(seed)
    scores = random.uniform(-1, 1, (*places, prototypes)).astype(np.float32)
    codes: np.ndarray = random.uniform(0, 1, (*places, prototypes)).astype(np.float32)
    codes = codes.astype(np.float64)
    if hard:
        codes = np.asarray(random.integers(0, prototypes, places), dtype=np.int64)
    return PredictionProblem(scores.astype(np.float64), codes, 0.1)


def weight_of(places: tuple[int, ...]) -> np.ndarray:
    """Return weights of which some are 0 and at least one is not."""
    count = math.prod(places)
    return (np.arange(1, count + 1) % 4 / 2).reshape(places)


def tensors(
    problem: PredictionProblem, device: torch.device | str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return scores and codes; indices remain int64."""
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device)
    return scores, codes.to(dtype) if codes.is_floating_point() else codes


def in_float64(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor; of indices as they are."""
    return (tensor.double() if tensor.is_floating_point() else tensor).detach().cpu().numpy()


def value_and_gradient(scores: Tensor, codes: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Return the loss, and the gradient of its sum for the scores."""
    leaf = scores.detach().clone().requires_grad_()
    loss = code_prediction_loss(leaf, codes, **settings)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def solve(problem: PredictionProblem, weight: Any = None, **settings: Any) -> np.ndarray:
    """Return our loss of a problem, in float64."""
    loss = code_prediction_loss(
        torch.tensor(problem.scores),
        torch.tensor(problem.codes),
        temperature=problem.temperature,
        sample_weight=None if weight is None else torch.as_tensor(weight),
        **settings,
    )
    return loss.numpy()


def assert_close(found: Any, expected: Any, atol: float = 1e-11) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=atol)


# The equation and its gradient


@ANY_PLACES
@SOFT_OR_HARD
@ANY_DTYPE
def test_value_and_gradient_are_those_of_the_equation(
    device: torch.device, dtype: torch.dtype, hard: bool, places: tuple[int, ...]
) -> None:
    scores, codes = tensors(problem_of(*places, hard=hard), device, dtype)
    for reduction in REDUCTIONS:
        for weight in (None, weight_of(places)):
            loss, gradient = value_and_gradient(
                scores,
                codes,
                sample_weight=None if weight is None else torch.tensor(weight, device=device),
                reduction=reduction,
            )
            rest = (in_float64(scores), in_float64(codes), 0.1, weight, reduction)
            expected = oracles.code_prediction_loss(*rest)
            assert loss.shape == (places if reduction == "none" else ())
            assert loss.dtype == torch.promote_types(dtype, torch.float32)
            assert loss.device == scores.device
            atol = tolerances.ATOL[loss.dtype]
            np.testing.assert_allclose(in_float64(loss), expected, rtol=atol, atol=atol)
            expected = oracles.code_prediction_gradient(*rest)
            assert gradient.dtype == dtype
            # Rounded twice: as it is stored, and after its factor.
            atol = 2 * tolerances.ATOL[dtype] * np.abs(expected).max(initial=1)
            np.testing.assert_allclose(in_float64(gradient), expected, rtol=0, atol=atol)


@given(prediction_problems(), st.data(), st.sampled_from(REDUCTIONS))
def test_any_problem_has_value_and_gradient_of_the_equation(
    problem: PredictionProblem, data: st.DataObject, reduction: str
) -> None:
    weight = data.draw(st.none() | reals(*problem.places, low=0.0, high=4.0))
    loss, gradient = value_and_gradient(
        torch.tensor(problem.scores),
        torch.tensor(problem.codes),
        temperature=problem.temperature,
        sample_weight=None if weight is None else torch.tensor(weight),
        reduction=reduction,
    )
    rest = (problem.scores, problem.codes, problem.temperature, weight, reduction)
    assert_close(loss.numpy(), oracles.code_prediction_loss(*rest))
    assert_close(gradient.numpy(), oracles.code_prediction_gradient(*rest), atol=1e-10)


@ANY_REDUCTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hard_codes_have_the_cross_entropy_of_torch(
    device: torch.device, dtype: torch.dtype, reduction: str
) -> None:
    scores, codes = tensors(problem_of(3, 4, hard=True), device, dtype)
    loss, gradient = value_and_gradient(scores, codes, reduction=reduction, temperature=0.3)
    scores.requires_grad_()
    expected = F.cross_entropy(scores.flatten(0, 1) / 0.3, codes.flatten(), reduction=reduction)
    expected = expected.view(loss.shape)
    expected.sum().backward()
    atol = tolerances.ATOL[dtype]
    torch.testing.assert_close(loss, expected.detach(), rtol=atol, atol=atol)
    torch.testing.assert_close(gradient, scores.grad, rtol=atol, atol=atol)


@SOFT_OR_HARD
@ANY_REDUCTION
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_value(reduction: str, weighted: bool, hard: bool) -> None:
    scores, codes = tensors(problem_of(2, 3, prototypes=4, hard=hard), "cpu", torch.float64)
    weight = torch.tensor([[2.0, 0.0, 0.5], [1.0, 1.0, 0.0]]) if weighted else None
    assert torch.autograd.gradcheck(
        lambda scores: code_prediction_loss(
            scores, codes, sample_weight=weight, reduction=reduction
        ),
        scores.requires_grad_(),
    )


def test_each_error_has_a_gradient_of_its_own(device: torch.device) -> None:
    scores, codes = tensors(problem_of(2, 3), device, torch.float64)
    incoming = torch.randn(2, 3, device=device, dtype=torch.float64)
    scores.requires_grad_()
    loss = code_prediction_loss(scores, codes, reduction="none")
    (found,) = torch.autograd.grad(loss, scores, incoming)
    once = oracles.code_prediction_gradient(in_float64(scores), in_float64(codes), 0.1, None, "sum")
    assert_close(in_float64(found), in_float64(incoming)[..., None] * once)


@pytest.mark.parametrize("codes_dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("scores_dtype", tolerances.DTYPES, ids=str)
def test_codes_may_have_another_dtype_than_scores(
    device: torch.device, scores_dtype: torch.dtype, codes_dtype: torch.dtype
) -> None:
    scores, codes = tensors(problem_of(4), device, torch.float64)
    scores, codes = scores.to(scores_dtype), codes.to(codes_dtype)
    loss, gradient = value_and_gradient(scores, codes)
    expected = oracles.code_prediction_loss(in_float64(scores), in_float64(codes), 0.1)
    assert loss.dtype == torch.promote_types(scores_dtype, torch.float32)
    assert gradient.dtype == scores_dtype
    assert loss.item() == pytest.approx(float(expected), rel=tolerances.ATOL[loss.dtype])


@SOFT_OR_HARD
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_are_not_flushed_to_zero(
    device: torch.device, dtype: torch.dtype, hard: bool
) -> None:
    problem = problem_of(16, prototypes=65_536, hard=hard)  # fewer rows would overflow float16
    codes = problem.codes if hard else problem.codes / problem.codes.sum(-1, keepdims=True)
    scores = torch.tensor(problem.scores).to(device, dtype).requires_grad_()
    scale = 2.0**16  # the first factor of a GradScaler
    loss = code_prediction_loss(scores, torch.tensor(codes, device=device))
    (scale * loss).backward()
    expected = scale * oracles.code_prediction_gradient(in_float64(scores), codes, 0.1)
    error = np.abs(in_float64(scores.grad) - expected)
    # Without the entry of a hard code, which is half of the sum and would hide what is lost.
    small = np.abs(expected) < 0.01 * scale
    assert error[small].sum() / np.abs(expected[small]).sum() < tolerances.ATOL[dtype]
    assert error.sum() / np.abs(expected).sum() < tolerances.ATOL[dtype]


def test_no_gradient_flows_into_the_codes(device: torch.device) -> None:
    scores, codes = tensors(problem_of(2, 3), device, torch.float64)
    _, expected = value_and_gradient(scores, codes)
    scores.requires_grad_()
    codes.requires_grad_()
    code_prediction_loss(scores, codes).backward()
    assert codes.grad is None
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-12)
    assert not code_prediction_loss(scores.detach(), codes).requires_grad

    scores.grad = None
    code_prediction_loss(scores, scores.softmax(dim=-1)).backward()
    _, expected = value_and_gradient(scores, scores.detach().softmax(dim=-1))
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-12)


@ANY_REDUCTION
def test_backward_may_run_twice_and_gradients_may_be_changed(reduction: str) -> None:
    scores, codes = tensors(problem_of(4), "cpu", torch.float64)
    scores.requires_grad_()
    loss = code_prediction_loss(scores, codes, reduction=reduction).sum()
    (first,) = torch.autograd.grad(loss, scores, retain_graph=True)
    expected = first.clone()
    first.zero_()  # as an optimizer may
    (second,) = torch.autograd.grad(3 * loss, scores)
    torch.testing.assert_close(second, 3 * expected, rtol=1e-12, atol=0)


def test_no_input_changes(device: torch.device) -> None:
    scores, codes = tensors(problem_of(4), device, torch.float64)
    weight = torch.tensor([1, 0, 2, 1.0], device=device)
    before = scores.clone(), codes.clone()
    value_and_gradient(scores, codes, sample_weight=weight)
    assert torch.equal(scores, before[0])
    assert torch.equal(codes, before[1])
    assert weight.tolist() == [1, 0, 2, 1]


@ANY_REDUCTION
def test_a_second_derivative_is_refused(reduction: str) -> None:
    scores, codes = tensors(problem_of(4), "cpu", torch.float64)
    loss = code_prediction_loss(scores.requires_grad_(), codes, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, scores, create_graph=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_are_refused_by_name(transform: str) -> None:
    scores, codes = tensors(problem_of(4), "cpu", torch.float32)
    with pytest.raises(RuntimeError, match=r"scores must be outside torch\.func transforms"):
        TRANSFORMS[transform](lambda scores: code_prediction_loss(scores, codes), scores)


# Scores of -inf and large ones


@SOFT_OR_HARD
@ANY_REDUCTION
@ANY_DTYPE
def test_a_score_of_minus_infinity_forbids_a_prototype(
    device: torch.device, dtype: torch.dtype, reduction: str, hard: bool
) -> None:
    scores, codes = tensors(problem_of(2, 3, hard=hard), device, dtype)
    expected = value_and_gradient(scores, codes, reduction=reduction)
    forbidden = scores.new_full((2, 3, 2), -math.inf)
    masked = torch.cat([scores, forbidden], dim=-1)
    if not hard:
        codes = F.pad(codes, (0, 2))
    loss, gradient = value_and_gradient(masked, codes, reduction=reduction)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    assert not gradient[..., 5:].any()  # NaN is true
    torch.testing.assert_close(
        gradient[..., :5], expected[1], rtol=0, atol=20 * tolerances.ATOL[dtype]
    )


@SOFT_OR_HARD
@ANY_REDUCTION
@ANY_DTYPE
def test_a_code_at_a_score_of_minus_infinity_has_an_infinite_error(
    device: torch.device, dtype: torch.dtype, reduction: str, hard: bool
) -> None:
    scores, codes = tensors(problem_of(2, 3, hard=hard), device, dtype)
    scores[0, 1, 2] = scores[0, 1, 3] = -math.inf
    codes[0, 1] = 2 if hard else torch.tensor([0.5, 0, 1e-5, 0, 0])  # as small as codes are
    loss, gradient = value_and_gradient(scores, codes, reduction=reduction)
    expected = oracles.code_prediction_loss(
        in_float64(scores), in_float64(codes), 0.1, reduction=reduction
    )
    assert np.isinf(expected).sum() == 1
    np.testing.assert_allclose(in_float64(loss), expected, rtol=1e-3)
    assert gradient.isfinite().all()


@SOFT_OR_HARD
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(device: torch.device, dtype: torch.dtype, hard: bool) -> None:
    scores = torch.tensor([[1e4, 0.0], [-1e4, 1e4]], device=device, dtype=dtype)
    codes = torch.tensor([1, 0] if hard else [[0.5, 0.5], [1.0, 0.0]], device=device)
    loss, gradient = value_and_gradient(scores, codes, reduction="none")
    expected = oracles.code_prediction_errors(in_float64(scores), in_float64(codes), 0.1)
    np.testing.assert_allclose(in_float64(loss), expected, rtol=1e-5)
    assert gradient.isfinite().all()


# Laws


@given(prediction_problems(hard=True), st.sampled_from(REDUCTIONS))
def test_an_index_is_a_code_with_one_entry(problem: PredictionProblem, reduction: str) -> None:
    one_hot = np.eye(problem.scores.shape[-1])[problem.codes]
    soft = PredictionProblem(problem.scores, one_hot, problem.temperature)
    assert_close(solve(problem, reduction=reduction), solve(soft, reduction=reduction))


@given(prediction_problems(hard=False), st.data())
def test_linear_in_the_codes(problem: PredictionProblem, data: st.DataObject) -> None:
    other = data.draw(reals(*problem.codes.shape, low=0.0))
    both, alone = (
        PredictionProblem(problem.scores, codes, problem.temperature)
        for codes in (3 * problem.codes + other, other)
    )
    for reduction in REDUCTIONS:
        expected = 3 * solve(problem, reduction=reduction) + solve(alone, reduction=reduction)
        assert_close(solve(both, reduction=reduction), expected, atol=1e-10)


@given(prediction_problems(), st.sampled_from([0.5, 2.0, 8.0]))
def test_the_temperature_is_the_unit_of_the_scores(
    problem: PredictionProblem, factor: float
) -> None:
    rescaled = PredictionProblem(
        factor * problem.scores, problem.codes, factor * problem.temperature
    )
    assert_close(solve(rescaled), solve(problem))


@given(prediction_problems(), st.data())
def test_the_reductions_are_sums_of_each_other(
    problem: PredictionProblem, data: st.DataObject
) -> None:
    weight = data.draw(reals(*problem.places, low=0.125))
    each, total, mean = (
        solve(problem, weight, reduction=reduction) for reduction in ("none", "sum", "mean")
    )
    assert_close(each, weight * solve(problem, reduction="none"))
    assert_close(total, each.sum(), atol=1e-10)
    assert_close(mean * weight.sum(), total, atol=1e-10)


@given(prediction_problems(), st.data())
def test_leading_dimensions_are_one_batch(problem: PredictionProblem, data: st.DataObject) -> None:
    weight = data.draw(reals(*problem.places, low=0.0))
    prototypes = problem.scores.shape[-1]
    flat = PredictionProblem(
        problem.scores.reshape(-1, prototypes),
        problem.codes.reshape(-1, *problem.codes.shape[len(problem.places) :]),
        problem.temperature,
    )
    assert_close(solve(flat, weight.ravel()), solve(problem, weight))
    each = solve(problem, weight, reduction="none")
    assert_close(solve(flat, weight.ravel(), reduction="none"), each.ravel())


@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_two_views_of_which_one_gives_codes_have_the_swapped_prediction_loss(
    data: st.DataObject, samples: int, prototypes: int, weighted: bool
) -> None:
    scores = torch.tensor(data.draw(reals(2, samples, prototypes)))
    codes = torch.tensor(data.draw(reals(samples, prototypes, low=0.0)))
    weight = torch.tensor(data.draw(reals(samples, low=0.0))) if weighted else None
    leaf = scores.clone().requires_grad_()
    expected = swapped_prediction_loss(leaf, codes[None], sample_weight=weight)
    (to_scores,) = torch.autograd.grad(expected, leaf)
    loss, gradient = value_and_gradient(scores[1], codes, sample_weight=weight)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gradient, to_scores[1], rtol=0, atol=1e-10)


# Weights

multiplicities = st.integers(0, 3).map(float)


@given(prediction_problems(), st.data(), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 50.0]))
def test_sample_weights_are_multiplicities_in_the_value_and_in_the_gradient(
    problem: PredictionProblem, data: st.DataObject, of_absent: float
) -> None:
    weight = data.draw(arrays(np.float64, problem.places, elements=multiplicities))
    absent = weight == 0
    scores, codes = problem.scores.copy(), problem.codes.copy()
    scores[absent, 0] = of_absent
    if codes.dtype == np.int64:
        codes[absent] = data.draw(st.sampled_from([-1, -100, 99, 2**62]))
    else:
        codes[absent, -1] = of_absent
    settings: dict[str, Any] = {"temperature": problem.temperature}
    loss, gradient = value_and_gradient(
        torch.tensor(scores),
        torch.tensor(codes),
        sample_weight=torch.tensor(weight),
        **settings,
    )
    repeats = weight.ravel().astype(int)
    repeated, repeated_codes = (
        np.repeat(values.reshape(repeats.size, *values.shape[len(problem.places) :]), repeats, 0)
        for values in (problem.scores, problem.codes)
    )
    expected, of_repeated = value_and_gradient(
        torch.tensor(repeated), torch.tensor(repeated_codes), **settings
    )
    assert_close(loss.item(), expected.item())
    assert not gradient[torch.tensor(absent)].any()  # NaN is true
    summed = torch.zeros(repeats.size, problem.scores.shape[-1], dtype=torch.float64)
    places = torch.arange(repeats.size).repeat_interleave(torch.tensor(repeats))
    summed.index_add_(0, places, of_repeated)
    torch.testing.assert_close(gradient.view(summed.shape), summed, rtol=0, atol=1e-10)


@SOFT_OR_HARD
@ANY_REDUCTION
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("weight_dtype", [torch.bool, torch.float32], ids=str)
@ANY_DTYPE
def test_absent_rows_may_hold_anything(
    device: torch.device,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    bad: float,
    reduction: str,
    hard: bool,
) -> None:
    scores, codes = tensors(problem_of(2, 3, hard=hard), device, dtype)
    present = torch.tensor([[1, 0, 1], [0, 1, 1]], device=device).to(weight_dtype)
    expected = value_and_gradient(scores, codes, sample_weight=present, reduction=reduction)
    scores[0, 1] = scores[1, 0, 2] = bad
    codes[0, 1] = codes[1, 0] = -100 if hard else bad
    loss, gradient = value_and_gradient(scores, codes, sample_weight=present, reduction=reduction)
    assert torch.equal(loss, expected[0])
    assert torch.equal(gradient, expected[1])
    assert not gradient[present == 0].any()
    if reduction == "none":
        assert not loss[present == 0].any()


@given(prediction_problems(), st.data())
def test_weights_mean_the_same_at_any_scale(
    problem: PredictionProblem, data: st.DataObject
) -> None:
    weight = data.draw(reals(*problem.places, low=0.125))
    scale = 2.0 ** data.draw(st.integers(-100, 100))
    assert_close(solve(problem, scale * weight), solve(problem, weight))


@given(prediction_problems(), st.data(), st.sampled_from(REDUCTIONS))
def test_bool_weights_are_weights_of_one_and_zero(
    problem: PredictionProblem, data: st.DataObject, reduction: str
) -> None:
    present = data.draw(arrays(np.bool_, problem.places))
    assert_close(
        solve(problem, present, reduction=reduction),
        solve(problem, present.astype(float), reduction=reduction),
    )
    assert_close(
        solve(problem, np.ones_like(present), reduction=reduction),
        solve(problem, reduction=reduction),
    )


@ANY_REDUCTION
@ANY_DTYPE
def test_weights_may_have_any_floating_dtype(
    device: torch.device, dtype: torch.dtype, reduction: str
) -> None:
    scores, codes = tensors(problem_of(4), device, torch.float64)
    weight = torch.tensor([1, 0, 2, 0.5], device=device, dtype=dtype)
    loss = code_prediction_loss(scores, codes, sample_weight=weight, reduction=reduction)
    expected = oracles.code_prediction_loss(
        in_float64(scores), in_float64(codes), 0.1, in_float64(weight), reduction
    )
    assert loss.dtype == torch.float64
    assert_close(in_float64(loss), expected)


@SOFT_OR_HARD
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("places", [(), (3,), (0,), (3, 0), (0, 2)], ids=str)
@ANY_DTYPE
def test_nobody_present_or_nothing_there_gives_zero_connected_to_the_graph(
    device: torch.device, dtype: torch.dtype, places: tuple[int, ...], reduction: str, hard: bool
) -> None:
    scores, codes = tensors(problem_of(*places, hard=hard), device, dtype)
    weights = [torch.zeros(places, device=device)]
    if math.prod(places) == 0:
        weights.append(None)
    for weight in weights:
        scores.requires_grad_()
        loss = code_prediction_loss(scores, codes, sample_weight=weight, reduction=reduction)
        assert loss.shape == ()
        assert loss.item() == 0
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        (gradient,) = torch.autograd.grad(loss, scores)
        assert gradient.shape == scores.shape
        assert not gradient.any()


def test_nothing_there_gives_errors_of_no_places(device: torch.device) -> None:
    scores, codes = tensors(problem_of(3, 0), device, torch.float32)
    loss = code_prediction_loss(scores.requires_grad_(), codes, reduction="none")
    assert loss.shape == (3, 0)
    (gradient,) = torch.autograd.grad(loss.sum(), scores)
    assert gradient.shape == scores.shape


# Where it runs


@SOFT_OR_HARD
@ANY_DTYPE
def test_autocast_changes_nothing(device: torch.device, dtype: torch.dtype, hard: bool) -> None:
    scores, codes = tensors(problem_of(4, prototypes=64, hard=hard), device, dtype)
    expected, expected_gradient = value_and_gradient(scores, codes)
    scores.requires_grad_()
    for low in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=low):
            loss = code_prediction_loss(scores, codes)
            (inside,) = torch.autograd.grad(loss, scores, retain_graph=True)
        (outside,) = torch.autograd.grad(loss, scores)
        assert loss.dtype == expected.dtype
        torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
        for gradient in (inside, outside):
            torch.testing.assert_close(
                gradient, expected_gradient, rtol=torch.finfo(dtype).eps, atol=1e-9
            )


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
@pytest.mark.parametrize("places", [(), (0,), (2, 3)], ids=str)
@SOFT_OR_HARD
@ANY_DTYPE
def test_shapes_and_dtypes_are_known_without_values(
    dtype: torch.dtype, hard: bool, places: tuple[int, ...], fake: bool
) -> None:
    for reduction in REDUCTIONS:
        with FakeTensorMode() if fake else torch.device("meta"):
            scores = torch.empty(*places, 5, dtype=dtype, device="meta", requires_grad=True)
            if hard:
                codes = torch.empty(places, dtype=torch.int64, device="meta")
            else:
                codes = torch.empty(*places, 5, dtype=dtype, device="meta")
            loss = code_prediction_loss(
                scores,
                codes,
                temperature=torch.empty((), device="meta"),
                sample_weight=torch.empty(places, dtype=torch.bool, device="meta"),
                reduction=reduction,
            )
            loss.sum().backward()
        assert loss.shape == (places if reduction == "none" else ())
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert loss.device.type == "meta"
        assert scores.grad.shape == scores.shape
        assert scores.grad.dtype == dtype


@SOFT_OR_HARD
def test_compiles_once_for_changing_values(device: torch.device, hard: bool) -> None:
    backend = CountingBackend()
    criterion = CodePredictionLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    for seed in range(3):
        scores, codes = tensors(problem_of(4, hard=hard, seed=seed), device, torch.float64)
        weight = torch.arange(4, device=device) > seed
        loss = compiled(scores, codes, weight)
        torch.testing.assert_close(loss, criterion(scores, codes, weight), rtol=0, atol=1e-12)
    assert backend.graphs == 1


@pytest.mark.parametrize(
    ("hard", "reduction"), [(False, "mean"), (True, "mean"), (False, "none"), (True, "sum")]
)
def test_the_function_compiles_with_its_gradient(hard: bool, reduction: str) -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(code_prediction_loss, fullgraph=True, backend=counting)
    for seed in range(2):
        problem = problem_of(2, 3, hard=hard, seed=seed)
        scores, codes = tensors(problem, "cpu", torch.float64)
        loss = compiled(scores.requires_grad_(), codes, reduction=reduction)
        loss.sum().backward()
        rest = (problem.scores, problem.codes, 0.1, None, reduction)
        assert_close(in_float64(loss), oracles.code_prediction_loss(*rest))
        assert_close(scores.grad.numpy(), oracles.code_prediction_gradient(*rest))
    assert counting.frame_count == 1


def test_a_changing_batch_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    counting = CompileCounterWithBackend("eager")
    compiled = torch.compile(code_prediction_loss, fullgraph=True, backend=counting)
    for samples in (8, 12, 20):
        scores, codes = tensors(problem_of(samples), "cpu", torch.float32)
        torch.testing.assert_close(compiled(scores, codes), code_prediction_loss(scores, codes))
    assert counting.frame_count <= 2


# The module


def test_the_module_computes_with_its_settings(device: torch.device) -> None:
    scores, codes = tensors(problem_of(4), device, torch.float64)
    weight = torch.tensor([1, 0, 2, 0.5], device=device)
    for reduction in REDUCTIONS:
        expected = code_prediction_loss(
            scores, codes, temperature=0.3, sample_weight=weight, reduction=reduction
        )
        assert torch.equal(CodePredictionLoss(0.3, reduction)(scores, codes, weight), expected)
    criterion = CodePredictionLoss()
    default = code_prediction_loss(scores, codes)
    assert torch.equal(criterion(scores, codes), default)
    criterion.temperature = 0.3
    expected = code_prediction_loss(scores, codes, temperature=0.3)
    assert torch.equal(criterion(scores, codes, sample_weight=None), expected)
    criterion.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        criterion(scores, codes)
    criterion.temperature, criterion.reduction = 0.1, "median"
    with pytest.raises(ValueError, match=r"reduction must be .*, got 'median'"):
        criterion(scores, codes)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_of_the_module_has_its_settings(
    duplicate: Callable[[CodePredictionLoss], CodePredictionLoss],
) -> None:
    criterion = CodePredictionLoss(0.3, reduction="sum")
    twin = duplicate(criterion)
    assert repr(twin) == repr(criterion)
    assert repr(criterion).startswith("CodePredictionLoss(temperature=0.3, reduction=")
    scores, codes = tensors(problem_of(4), "cpu", torch.float64)
    assert torch.equal(twin(scores, codes), criterion(scores, codes))
    twin.temperature = 0.2
    assert criterion.temperature == 0.3
    assert not criterion.state_dict()


def test_module_and_function_have_the_same_settings() -> None:
    settings = described(CodePredictionLoss)
    tensors = described(CodePredictionLoss().forward)
    assert described(code_prediction_loss) == settings | tensors
    defaults = {name: default for name, (default, _) in settings.items()}
    assert defaults == {"temperature": 0.1, "reduction": "mean"}
    kinds = {
        name: parameter.kind
        for name, parameter in inspect.signature(code_prediction_loss).parameters.items()
    }
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert [name for name, kind in kinds.items() if kind == positional] == ["scores", "codes"]


def test_torch_script_is_refused_by_name() -> None:
    expected = r"CodePredictionLoss cannot be compiled by torch\.jit\.script"
    with pytest.raises(RuntimeError, match=expected):
        torch.jit.script(CodePredictionLoss())


# Bad input

SCORES, CODES, INDEX = torch.zeros(4, 5), torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scores": 0.0}, TypeError, r"scores must be a torch\.Tensor, got float"),
    ({"scores": [SCORES]}, TypeError, r"scores must be a torch\.Tensor, got list"),
    ({"scores": SCORES.long()}, TypeError, r"scores must have a floating-point dtype, got"),
    ({"scores": torch.zeros(())}, ValueError, "scores must have at least 1 dimension"),
    (
        {"scores": torch.zeros(4, 0), "codes": torch.zeros(4, 0)},
        ValueError,
        r"scores must have at least 1 .*, got shape \(4, 0\)",
    ),
    ({"scores": torch.zeros(4, 0), "codes": INDEX}, ValueError, "scores must have at least 1 "),
    ({"codes": 0}, TypeError, r"codes must be a torch\.Tensor, got int"),
    ({"codes": [CODES]}, TypeError, r"codes must be a torch\.Tensor, got list"),
    *(
        ({"codes": codes.to(dtype)}, TypeError, f"codes must .*, got {dtype}")
        for dtype in (torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
        for codes in (CODES, INDEX)
    ),
    *(
        ({"codes": codes}, ValueError, rf"codes must .*\({', '.join(map(str, codes.shape))},?\)")
        for codes in (CODES[0], CODES[:3], CODES[:, :3], CODES[:1], CODES[None], CODES[:, :1])
    ),
    *(
        ({"codes": codes}, ValueError, rf"codes must .*\({', '.join(map(str, codes.shape))},?\)")
        for codes in (INDEX[:3], INDEX[:1], INDEX[0], INDEX[None], CODES.long(), INDEX[:, None])
    ),
    ({"codes": CODES.to("meta")}, ValueError, "codes must be on device cpu, got meta"),
    ({"codes": INDEX.to("meta")}, ValueError, "codes must be on device cpu, got meta"),
    ({"codes": INDEX + 5}, ValueError, "codes must .*5"),
    ({"codes": INDEX - 1}, ValueError, "codes must .*-1"),
    ({"codes": torch.tensor([0, 1, 2, -100])}, ValueError, "codes must .*-100"),
    ({"codes": torch.tensor([0, 4, 5, 0])}, ValueError, "codes must .*5"),
    (
        {"codes": torch.tensor([0, 4, 5, 9]), "sample_weight": torch.tensor([1, 1, 1.0, 0])},
        ValueError,
        "codes must .*5",
    ),
    ({"reduction": "median"}, ValueError, "reduction must be .*'mean'.*, got 'median'"),
    ({"reduction": None}, ValueError, "reduction must be .*, got None"),
    ({"reduction": "global_mean"}, ValueError, "reduction must be .*, got 'global_mean'"),
    ({"temperature": 0.0}, ValueError, r"temperature must be a finite number above 0, got 0\.0"),
    ({"temperature": -0.1}, ValueError, r"temperature must be a finite number above 0, got -0\.1"),
    ({"temperature": math.nan}, ValueError, "temperature must be a finite number, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be a finite number, got inf"),
    ({"temperature": "0.1"}, TypeError, "temperature must be .*, got str"),
    ({"temperature": True}, TypeError, "temperature must be .*, got bool"),
    ({"temperature": None}, TypeError, "temperature must be .*, got NoneType"),
    *BAD_SAMPLE_WEIGHTS,
]


@pytest.mark.parametrize(("inputs", "error", "text"), BAD_INPUTS)
def test_bad_input_is_named(inputs: dict[str, Any], error: type[Exception], text: str) -> None:
    complete = {"scores": SCORES, "codes": CODES} | inputs
    with pytest.raises(error, match=text):
        code_prediction_loss(**complete)
    settings = {name: complete.pop(name) for name in ("temperature", "reduction") & complete.keys()}
    with pytest.raises(error, match=text):
        CodePredictionLoss(**settings)(**complete)
    if settings:
        with pytest.raises(error, match=text):
            CodePredictionLoss(**settings)


@pytest.mark.parametrize("mass", [1e-30, 1e-37, 1e-44])
def test_codes_of_hardly_any_mass_have_a_finite_gradient_in_float16(mass: float) -> None:
    scores = torch.randn(2, 4).half().requires_grad_()
    code_prediction_loss(scores, torch.full((2, 4), mass)).backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
