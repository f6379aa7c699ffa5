"""The swapped prediction loss: the equation and its gradient, its laws, its arguments."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import (
    SwappedPredictionLoss,
    _prediction_errors,
    swapped_prediction,
    swapped_prediction_loss,
)
from tests import oracles, tolerances
from tests.bad_input import BAD_SAMPLE_WEIGHTS
from tests.modes import CountingBackend, LargestTensor, LiveStorage
from tests.signatures import described
from tests.strategies import LossProblem, loss_problems, permutations, reals

SHAPES = [(views, code_views) for views in range(2, 6) for code_views in range(1, views + 1)]
ANY_SHAPE = pytest.mark.parametrize(("views", "code_views"), SHAPES)
ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)


def problem_of(
    views: int = 3, code_views: int = 2, samples: int = 4, prototypes: int = 5, seed: int = 0
) -> LossProblem:
    """Return scores in [-1, 1] and codes in [0, 1], whose rows do not sum to 1, at τ = 0.1."""
    random = np.random.default_rng(seed)
    scores = random.uniform(-1, 1, (views, samples, prototypes)).astype(np.float32)
    codes = random.uniform(0, 1, (code_views, samples, prototypes)).astype(np.float32)
    return LossProblem(scores.astype(np.float64), codes.astype(np.float64), 0.1)


def solve(problem: LossProblem, sample_weight: np.ndarray | None = None) -> float:
    """Return our loss of a problem, in float64."""
    loss = swapped_prediction_loss(
        torch.tensor(problem.scores),
        torch.tensor(problem.codes),
        temperature=problem.temperature,
        sample_weight=None if sample_weight is None else torch.tensor(sample_weight),
    )
    return loss.item()


def value_and_gradient(
    scores: torch.Tensor, codes: torch.Tensor, **settings: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss and its gradient for (V, B, K) scores."""
    leaf = scores.detach().clone().requires_grad_()
    loss = swapped_prediction_loss(leaf, codes, **settings)
    loss.backward()
    return loss.detach(), leaf.grad


def with_sums_of_one(problem: LossProblem) -> LossProblem:
    """Return the problem with the rows of its codes scaled to a sum of 1."""
    codes = problem.codes + 2**-10
    return LossProblem(
        problem.scores, codes / codes.sum(axis=-1, keepdims=True), problem.temperature
    )


def assert_same(loss: float, expected: float) -> None:
    """Compare two losses in float64, whose rounding is that of the logits, up to about 60."""
    assert loss == pytest.approx(expected, rel=1e-12, abs=1e-11)


# The equation


@ANY_SHAPE
@ANY_DTYPE
def test_the_loss_is_that_of_the_equation(
    device: torch.device, dtype: torch.dtype, views: int, code_views: int
) -> None:
    problem = problem_of(views, code_views, seed=views)
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device, dtype)
    loss = swapped_prediction_loss(scores, codes)
    expected = oracles.loss(scores.double().cpu().numpy(), codes.double().cpu().numpy(), 0.1)
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.device == scores.device
    assert loss.item() == pytest.approx(expected, rel=tolerances.ATOL[loss.dtype])


@given(loss_problems(), st.data())
def test_any_problem_has_the_loss_of_the_equation(
    problem: LossProblem, data: st.DataObject
) -> None:
    weight = data.draw(reals(problem.scores.shape[1], low=0.0, high=4.0))
    assert_same(solve(problem), oracles.loss(problem.scores, problem.codes, problem.temperature))
    assert_same(
        solve(problem, weight),
        oracles.loss(problem.scores, problem.codes, problem.temperature, weight),
    )


@pytest.mark.parametrize("scores_form", [list, tuple, torch.stack])
@pytest.mark.parametrize("codes_form", [list, tuple, torch.stack])
def test_views_come_as_a_sequence_or_as_one_tensor(
    device: torch.device, scores_form: Callable[..., Any], codes_form: Callable[..., Any]
) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).unbind()
    codes = torch.tensor(problem.codes, device=device).unbind()
    loss = swapped_prediction_loss(scores_form(scores), codes_form(codes))
    assert_same(loss.item(), oracles.loss(problem.scores, problem.codes, 0.1))


@pytest.mark.parametrize("codes_dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("scores_dtype", tolerances.DTYPES, ids=str)
def test_codes_may_have_another_dtype_than_scores(
    device: torch.device, scores_dtype: torch.dtype, codes_dtype: torch.dtype
) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores).to(device, scores_dtype)
    codes = torch.tensor(problem.codes).to(device, codes_dtype)
    loss = swapped_prediction_loss(scores, codes)
    expected = oracles.loss(scores.double().cpu().numpy(), codes.double().cpu().numpy(), 0.1)
    assert loss.dtype == torch.promote_types(scores_dtype, torch.float32)
    assert loss.item() == pytest.approx(expected, rel=tolerances.ATOL[loss.dtype])


def test_views_need_not_be_contiguous(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).permute(2, 1, 0).contiguous()
    codes = torch.tensor(problem.codes, device=device).permute(2, 1, 0).contiguous()
    loss = swapped_prediction_loss(scores.permute(2, 1, 0), codes.permute(2, 1, 0))
    assert_same(loss.item(), oracles.loss(problem.scores, problem.codes, 0.1))


# The gradient


@ANY_SHAPE
@ANY_DTYPE
def test_the_gradient_is_that_of_the_equation(
    device: torch.device, dtype: torch.dtype, views: int, code_views: int
) -> None:
    problem = problem_of(views, code_views, seed=views)
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device, dtype)
    _, gradient = value_and_gradient(scores, codes)
    expected = oracles.loss_gradient(
        scores.double().cpu().numpy(), codes.double().cpu().numpy(), 0.1
    )
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        gradient.double().cpu().numpy(),
        expected,
        rtol=0,
        # Rounded twice: as it is stored, and after its factor.
        atol=2 * tolerances.ATOL[dtype] * np.abs(expected).max(initial=1),
    )


@given(loss_problems())
def test_any_problem_has_the_gradient_of_the_equation(problem: LossProblem) -> None:
    _, gradient = value_and_gradient(
        torch.tensor(problem.scores), torch.tensor(problem.codes), temperature=problem.temperature
    )
    expected = oracles.loss_gradient(problem.scores, problem.codes, problem.temperature)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=1e-10)


@ANY_SHAPE
@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_the_value(views: int, code_views: int, weighted: bool) -> None:
    problem = problem_of(views, code_views, samples=3, prototypes=4)
    scores = torch.tensor(problem.scores).requires_grad_()
    codes = torch.tensor(problem.codes)
    weight = torch.tensor([2.0, 0.0, 0.5]) if weighted else None
    assert torch.autograd.gradcheck(
        lambda scores: swapped_prediction_loss(scores, codes, sample_weight=weight), scores
    )


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients_are_not_flushed_to_zero(
    device: torch.device, dtype: torch.dtype, views: int
) -> None:
    problem = with_sums_of_one(problem_of(views, 2, samples=8, prototypes=65_536))
    scores = torch.tensor(problem.scores).to(device, dtype).requires_grad_()
    codes = torch.tensor(problem.codes).to(device)
    scale = 2.0**16  # the first factor of a GradScaler
    (scale * swapped_prediction_loss(scores, codes)).backward()
    expected = scale * oracles.loss_gradient(
        scores.detach().double().cpu().numpy(), problem.codes, 0.1
    )
    error = np.abs(scores.grad.double().cpu().numpy() - expected)
    assert error.sum() / np.abs(expected).sum() < tolerances.ATOL[dtype]


def test_no_gradient_flows_into_the_codes(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).requires_grad_()
    codes = torch.tensor(problem.codes, device=device).requires_grad_()
    swapped_prediction_loss(scores, codes).backward()
    assert codes.grad is None
    np.testing.assert_allclose(
        scores.grad.cpu().numpy(),
        oracles.loss_gradient(problem.scores, problem.codes, 0.1),
        rtol=0,
        atol=1e-12,
    )


def test_codes_of_scores_are_constants(device: torch.device) -> None:
    problem = problem_of(2, 2)
    scores = torch.tensor(problem.scores, device=device).requires_grad_()
    swapped_prediction_loss(scores, scores.softmax(dim=-1)).backward()
    _, expected = value_and_gradient(scores, scores.detach().softmax(dim=-1))
    torch.testing.assert_close(scores.grad, expected, rtol=0, atol=1e-12)


def test_backward_may_run_twice_and_scores_may_be_used_twice(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).requires_grad_()
    codes = torch.tensor(problem.codes, device=device)
    once = oracles.loss_gradient(problem.scores, problem.codes, 0.1)

    loss = swapped_prediction_loss(scores, codes)
    loss.backward(retain_graph=True)
    loss.backward()
    np.testing.assert_allclose(scores.grad.cpu().numpy(), 2 * once, rtol=0, atol=1e-12)

    scores.grad = None
    (swapped_prediction_loss(scores, codes) + 2 * swapped_prediction_loss(scores, codes)).backward()
    np.testing.assert_allclose(scores.grad.cpu().numpy(), 3 * once, rtol=0, atol=1e-11)


def test_an_incoming_gradient_scales_the_gradient_and_may_come_again(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).requires_grad_()
    codes = torch.tensor(problem.codes, device=device)
    once = torch.tensor(oracles.loss_gradient(problem.scores, problem.codes, 0.1), device=device)
    loss = swapped_prediction_loss(scores, codes)
    total = 3 * loss + loss.square()
    for _ in range(2):
        (found,) = torch.autograd.grad(total, scores, retain_graph=True)
        torch.testing.assert_close(found, (3 + 2 * loss.detach()) * once, rtol=0, atol=1e-10)
    (found,) = torch.autograd.grad(2.0**16 * loss, scores)
    torch.testing.assert_close(found / 2**16, once, rtol=0, atol=1e-12)


def test_a_first_gradient_may_be_changed_before_the_second(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).requires_grad_()
    loss = swapped_prediction_loss(scores, torch.tensor(problem.codes, device=device))
    (first,) = torch.autograd.grad(loss, scores, retain_graph=True)
    expected = first.clone()
    first.zero_()  # as an optimizer may
    (second,) = torch.autograd.grad(loss, scores)
    assert torch.equal(second, expected)


def test_only_the_views_that_ask_get_a_gradient() -> None:
    problem = problem_of()
    scores = list(torch.tensor(problem.scores))
    scores[2].requires_grad_()
    swapped_prediction_loss(scores, torch.tensor(problem.codes)).backward()
    expected = oracles.loss_gradient(problem.scores, problem.codes, 0.1)
    np.testing.assert_allclose(scores[2].grad.numpy(), expected[2], rtol=0, atol=1e-12)
    assert scores[0].grad is None


@pytest.mark.parametrize("needed", [False, True])
def test_no_gradient_is_formed_that_nobody_needs(
    monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    monkeypatch.setattr(swapped_prediction, "_SCORES_AT_ONCE_ON_CPU", 0)  # as for larger views
    scores, codes = torch.zeros(3, 64, 50, requires_grad=True), torch.zeros(2, 64, 50)
    with torch.set_grad_enabled(needed), LargestTensor(torch.float32) as largest:
        loss = swapped_prediction_loss(scores, codes)
    assert loss.requires_grad == needed
    assert largest.numel == (scores.numel() if needed else codes[0].numel())


@pytest.mark.parametrize("form", [torch.stack, list])
@pytest.mark.parametrize("at_once", [0, 10**6])  # views in one block
@ANY_SHAPE
@ANY_DTYPE
def test_blocks_of_samples_have_the_loss_and_the_gradient_of_all(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    views: int,
    code_views: int,
    at_once: int,
    form: Callable[..., Any],
) -> None:
    rows = {"_blocks": lambda scores: [slice(0, 3), slice(3, 6), slice(6, 7)]}
    limits = dict.fromkeys(["_SCORES_AT_ONCE", "_SCORES_AT_ONCE_ON_CPU"], at_once)
    for name, value in {**rows, **limits}.items():
        monkeypatch.setattr(swapped_prediction, name, value)
    problem = problem_of(views, code_views, samples=7, seed=views)
    leaf = torch.tensor(problem.scores).to(device, dtype).requires_grad_()
    codes = torch.tensor(problem.codes).to(device, dtype)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 3.0], dtype=torch.float64, device=device)
    loss = swapped_prediction_loss(form(leaf.unbind()), form(codes.unbind()), sample_weight=weight)
    loss.backward()
    exact = (leaf.double().detach().cpu().numpy(), codes.double().cpu().numpy(), 0.1)
    weight = weight.cpu().numpy()
    expected = oracles.loss(*exact, weight)
    assert loss.item() == pytest.approx(expected, rel=tolerances.ATOL[loss.dtype])
    np.testing.assert_allclose(
        leaf.grad.double().cpu().numpy(),
        oracles.loss_gradient(*exact) * (len(weight) * weight / weight.sum())[:, None],
        rtol=4 * tolerances.ATOL[dtype],
        atol=4 * tolerances.ATOL[dtype],
    )


@pytest.mark.parametrize("samples", [64, 256, 4096])
@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_blocks_are_all_samples_once(kind: str, samples: int) -> None:
    scores = torch.empty(8, 1, 3000, device=kind).expand(8, samples, 3000)
    blocks = swapped_prediction._blocks(scores)
    assert [row for rows in blocks for row in range(samples)[rows]] == list(range(samples))
    assert len(blocks) == {64: 1, 256: 1, 4096: 12 if kind == "cpu" else 6}[samples]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("views", [2, 8])
def test_a_loss_of_many_scores_takes_little_more_than_its_gradient(
    views: int, dtype: torch.dtype
) -> None:
    scores = torch.empty(views, 2**15, 3000, dtype=dtype, device="meta", requires_grad=True)
    codes = torch.empty(2, 2**15, 3000, device="meta")
    with LiveStorage() as memory:
        loss = swapped_prediction_loss(scores, codes)
    assert loss.requires_grad
    assert scores.nbytes <= memory.peak < 1.1 * 4 * scores.numel()


def test_a_second_derivative_is_refused() -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores).requires_grad_()
    codes = torch.tensor(problem.codes)
    with pytest.raises(RuntimeError, match=r"has no second derivative: .*create_graph=True"):
        swapped_prediction_loss(scores, codes).backward(create_graph=True)


@pytest.mark.parametrize("mass", [0.0, 1.0, 3.0])
@ANY_DTYPE
def test_the_error_of_some_samples_of_one_view_and_what_is_left_of_them(
    device: torch.device, dtype: torch.dtype, mass: float
) -> None:
    arithmetic = torch.promote_types(dtype, torch.float32)
    scores = torch.tensor(problem_of().scores[0]).to(device, dtype)
    target = torch.tensor(problem_of().codes[0]).to(device, arithmetic)
    target *= mass / target.sum(dim=-1, keepdim=True)
    residual = scores.clone()
    targets = [_prediction_errors.Target(0, target, target.sum(dim=-1))]
    found = _prediction_errors.prediction_errors(
        residual[None], targets, 1 / 0.1, residual=residual[None]
    )
    alone = _prediction_errors.prediction_errors(scores[None], targets, 1 / 0.1)
    assert torch.equal(found, alone)
    assert found.dtype == arithmetic
    pair = torch.stack([scores, scores]).double().cpu().numpy()
    of_view = target.double().cpu().numpy()
    expected = [oracles.loss(pair[:, [i]], of_view[None, [i]], 0.1) for i in range(4)]
    tolerance = 100 * tolerances.ATOL[arithmetic]
    np.testing.assert_allclose(found.double().cpu().numpy(), expected, rtol=0, atol=tolerance)
    left = oracles.loss_gradient(pair, of_view[None], 0.1)[1] * -0.1 * len(scores)
    np.testing.assert_allclose(
        residual.double().cpu().numpy(), left, rtol=0, atol=4 * tolerances.ATOL[dtype]
    )


@pytest.mark.parametrize("masked", [1, 2])
@ANY_DTYPE
def test_a_finite_mask_forbids_prototypes(
    device: torch.device, dtype: torch.dtype, masked: int
) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device).to(dtype)
    codes = torch.tensor(problem.codes, device=device)[..., masked:]
    expected = value_and_gradient(scores[..., masked:], codes)
    scores[..., :masked] = torch.finfo(dtype).min
    codes = torch.nn.functional.pad(codes, (masked, 0))
    loss, gradient = value_and_gradient(scores, codes)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    assert not gradient[..., :masked].any()
    torch.testing.assert_close(gradient[..., masked:], expected[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("code", [0.0, 2.0**-20, 1.0])
@ANY_DTYPE
def test_a_code_at_a_score_of_minus_infinity_has_an_infinite_error_and_no_code_has_none(
    device: torch.device, dtype: torch.dtype, code: float
) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device, dtype)
    scores[1, 2, 3] = -math.inf
    codes[0, 2, 3] = code
    loss, gradient = value_and_gradient(scores, codes)
    expected = oracles.loss(scores.double().cpu().numpy(), codes.double().cpu().numpy(), 0.1)
    assert math.isinf(expected) == (code > 0)
    assert loss.item() == pytest.approx(expected, rel=tolerances.ATOL[loss.dtype])
    assert gradient.isfinite().all()


def test_no_input_changes(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device)
    codes = torch.tensor(problem.codes, device=device)
    weight = torch.tensor([1, 0, 2, 1.0], device=device)
    value_and_gradient(scores, codes, sample_weight=weight)
    np.testing.assert_array_equal(scores.cpu().numpy(), problem.scores)
    np.testing.assert_array_equal(codes.cpu().numpy(), problem.codes)
    assert weight.tolist() == [1, 0, 2, 1]


# Laws


@given(loss_problems().map(with_sums_of_one))
def test_the_loss_is_between_the_entropy_of_the_codes_and_the_logarithm_of_their_number(
    problem: LossProblem,
) -> None:
    entropy = -(problem.codes * np.log(problem.codes)).sum(axis=-1).mean()
    loss = solve(problem)
    assert entropy - 1e-10 <= loss
    assert loss <= math.log(problem.codes.shape[-1]) + 2 / problem.temperature + 1e-10


@given(loss_problems())
def test_predictions_that_equal_the_codes_reach_the_entropy(problem: LossProblem) -> None:
    codes = with_sums_of_one(problem).codes[0]
    scores = problem.temperature * np.log(codes)
    agreeing = LossProblem(np.stack([scores] * 3), np.stack([codes] * 2), problem.temperature)
    assert_same(solve(agreeing), float(-(codes * np.log(codes)).sum(axis=-1).mean()))


@given(loss_problems(), st.floats(-1, 1))
def test_equal_scores_give_the_logarithm_of_their_number_times_the_mass_of_the_codes(
    problem: LossProblem, score: float
) -> None:
    equal = np.full_like(problem.scores, score)
    of_one = with_sums_of_one(problem)
    stuck = math.log(problem.scores.shape[-1])
    assert_same(solve(LossProblem(equal, of_one.codes, problem.temperature)), stuck)
    mass = problem.codes.sum(axis=-1).mean()
    assert_same(solve(LossProblem(equal, problem.codes, problem.temperature)), stuck * mass)


@given(loss_problems(), st.data())
def test_invariant_under_permutation_of_samples_and_of_prototypes(
    problem: LossProblem, data: st.DataObject
) -> None:
    _, samples, prototypes = problem.scores.shape
    sample_order = data.draw(permutations(samples))
    order = np.ix_(sample_order, data.draw(permutations(prototypes)))
    permuted = LossProblem(
        problem.scores[(slice(None), *order)],
        problem.codes[(slice(None), *order)],
        problem.temperature,
    )
    assert_same(solve(permuted), solve(problem))


@given(loss_problems(), st.data())
def test_invariant_under_permutation_of_views_that_keeps_codes_with_their_views(
    problem: LossProblem, data: st.DataObject
) -> None:
    views, code_views = len(problem.scores), len(problem.codes)
    of_codes = data.draw(permutations(code_views))
    of_others = code_views + data.draw(permutations(views - code_views))
    order = np.concatenate([of_codes, of_others])
    permuted = LossProblem(problem.scores[order], problem.codes[of_codes], problem.temperature)
    assert_same(solve(permuted), solve(problem))


@given(loss_problems(), st.data())
def test_invariant_to_a_constant_per_sample_and_view(
    problem: LossProblem, data: st.DataObject
) -> None:
    constants = data.draw(reals(*problem.scores.shape[:2], 1))
    shifted = LossProblem(problem.scores + constants, problem.codes, problem.temperature)
    assert_same(solve(shifted), solve(problem))


@given(loss_problems(), st.data())
def test_linear_in_the_codes(problem: LossProblem, data: st.DataObject) -> None:
    other = data.draw(reals(*problem.codes.shape, low=0.0))
    sum_of_codes = LossProblem(problem.scores, 3 * problem.codes + other, problem.temperature)
    expected = 3 * solve(problem) + solve(LossProblem(problem.scores, other, problem.temperature))
    assert_same(solve(sum_of_codes), expected)


@given(loss_problems())
def test_the_mean_over_code_views(problem: LossProblem) -> None:
    alone = []
    for own, code in enumerate(problem.codes):
        others = np.delete(problem.scores, own, axis=0)
        own_first = np.concatenate([problem.scores[own : own + 1], others])
        alone.append(solve(LossProblem(own_first, code[np.newaxis], problem.temperature)))
    assert_same(solve(problem), float(np.mean(alone)))


@given(loss_problems(), st.sampled_from([0.5, 2.0, 8.0]))
def test_the_temperature_is_the_unit_of_the_scores(problem: LossProblem, factor: float) -> None:
    rescaled = LossProblem(factor * problem.scores, problem.codes, factor * problem.temperature)
    assert_same(solve(rescaled), solve(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_scores_do_not_overflow(device: torch.device, dtype: torch.dtype) -> None:
    scores = torch.tensor([[[1e4, 0.0]], [[-1e4, 1e4]]], device=device, dtype=dtype)
    codes = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]], device=device)
    loss, gradient = value_and_gradient(scores, codes)
    expected = oracles.loss(scores.double().cpu().numpy(), codes.double().cpu().numpy(), 0.1)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert gradient.isfinite().all()


# Weights


@pytest.mark.parametrize("factor", [2.0**127, 2.0**-140])
def test_only_the_ratios_of_sample_weights_count(device: torch.device, factor: float) -> None:
    scores, codes = torch.randn(3, 4, 5, device=device), torch.rand(2, 4, 5, device=device)
    weight = torch.tensor([1.5, 1, 0, 1.5], device=device)
    expected = value_and_gradient(scores, codes, sample_weight=weight)
    found = value_and_gradient(scores, codes, sample_weight=weight * factor)
    torch.testing.assert_close(found, expected)


multiplicities = st.integers(0, 3).map(float)


@given(loss_problems(), st.data(), st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 50.0]))
def test_sample_weights_are_multiplicities_in_the_value_and_in_the_gradient(
    problem: LossProblem, data: st.DataObject, of_absent: float
) -> None:
    samples = problem.scores.shape[1]
    weight = data.draw(arrays(np.float64, samples, elements=multiplicities))
    zero_weight_mask = weight == 0
    scores, codes = problem.scores.copy(), problem.codes.copy()
    scores[:, zero_weight_mask, 0] = of_absent
    codes[:, zero_weight_mask, -1] = of_absent
    repeats = weight.astype(int)
    loss, gradient = value_and_gradient(
        torch.tensor(scores),
        torch.tensor(codes),
        temperature=problem.temperature,
        sample_weight=torch.tensor(weight),
    )
    expected, gradient_of_repeated = value_and_gradient(
        torch.tensor(np.repeat(problem.scores, repeats, axis=1)),
        torch.tensor(np.repeat(problem.codes, repeats, axis=1)),
        temperature=problem.temperature,
    )
    assert_same(loss.item(), expected.item())
    assert not gradient[:, zero_weight_mask].any()
    summed = torch.zeros_like(gradient).index_add_(
        1, torch.arange(samples).repeat_interleave(torch.tensor(repeats)), gradient_of_repeated
    )
    torch.testing.assert_close(gradient, summed, rtol=0, atol=1e-10)


@given(loss_problems(), st.data())
def test_weights_mean_the_same_at_any_scale(problem: LossProblem, data: st.DataObject) -> None:
    weight = data.draw(reals(problem.scores.shape[1], low=0.125))
    scale = 2.0 ** data.draw(st.integers(-300, 300))
    assert_same(solve(problem, scale * weight), solve(problem, weight))


@given(loss_problems(), st.data())
def test_bool_weights_are_weights_of_one_and_zero(
    problem: LossProblem, data: st.DataObject
) -> None:
    present = data.draw(arrays(np.bool_, problem.scores.shape[1]))
    assert_same(solve(problem, present), solve(problem, present.astype(float)))
    assert_same(solve(problem, np.ones_like(present)), solve(problem))


@ANY_DTYPE
def test_weights_may_have_any_floating_dtype(device: torch.device, dtype: torch.dtype) -> None:
    problem = problem_of()
    weight = torch.tensor([1, 0, 2, 0.5], device=device, dtype=dtype)
    loss = swapped_prediction_loss(
        torch.tensor(problem.scores, device=device),
        torch.tensor(problem.codes, device=device),
        sample_weight=weight,
    )
    expected = oracles.loss(problem.scores, problem.codes, 0.1, np.array([1, 0, 2, 0.5]))
    assert_same(loss.item(), expected)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@ANY_DTYPE
def test_no_sample_with_a_weight_gives_zero_with_zero_gradients(
    device: torch.device, dtype: torch.dtype, bad: float
) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device, dtype)
    scores[1, 2, 3] = codes[1, 2, 3] = bad
    loss, gradient = value_and_gradient(scores, codes, sample_weight=torch.zeros(4, device=device))
    assert loss.item() == 0
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.shape == scores.shape
    assert not gradient.any()  # NaN is true


@pytest.mark.parametrize("weighted", [False, True])
@ANY_SHAPE
def test_an_empty_batch_gives_zero_connected_to_the_graph(
    device: torch.device, views: int, code_views: int, weighted: bool
) -> None:
    head = torch.nn.Linear(3, 5, device=device)
    scores = [head(torch.zeros(0, 3, device=device)) for _ in range(views)]
    loss = swapped_prediction_loss(
        scores,
        torch.zeros(code_views, 0, 5, device=device),
        sample_weight=torch.zeros(0, device=device) if weighted else None,
    )
    assert loss.item() == 0
    loss.backward()
    assert not head.weight.grad.any()
    assert not head.bias.grad.any()


# Where it runs


@ANY_DTYPE
def test_autocast_changes_nothing(device: torch.device, dtype: torch.dtype) -> None:
    problem = problem_of(prototypes=64)
    scores = torch.tensor(problem.scores).to(device, dtype)
    codes = torch.tensor(problem.codes).to(device, dtype)
    expected, expected_gradient = value_and_gradient(scores, codes)
    scores.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = swapped_prediction_loss(scores, codes)
    loss.backward()
    assert loss.dtype == expected.dtype
    assert torch.equal(loss, expected)
    assert torch.equal(scores.grad, expected_gradient)


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
@pytest.mark.parametrize("samples", [0, 4])
@ANY_DTYPE
def test_shapes_and_dtypes_are_known_without_values(
    dtype: torch.dtype, samples: int, fake: bool
) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        scores = torch.empty(3, samples, 5, dtype=dtype, device="meta", requires_grad=True)
        codes = torch.empty(2, samples, 5, dtype=dtype, device="meta")
        weight = torch.empty(samples, dtype=torch.bool, device="meta")
        loss = swapped_prediction_loss(scores, codes, sample_weight=weight)
        loss.backward()
    assert loss.shape == ()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert loss.device.type == "meta"
    assert scores.grad.shape == scores.shape
    assert scores.grad.dtype == dtype


def test_compiles_once_for_changing_values(device: torch.device) -> None:
    backend = CountingBackend()
    criterion = SwappedPredictionLoss()
    compiled = torch.compile(criterion, fullgraph=True, backend=backend)
    for seed in range(3):
        problem = problem_of(seed=seed)
        scores = torch.tensor(problem.scores, device=device)
        codes = torch.tensor(problem.codes, device=device)
        weight = torch.arange(4, device=device) > seed
        loss = compiled(scores, codes, weight)
        torch.testing.assert_close(loss, criterion(scores, codes, weight), rtol=0, atol=1e-12)
    assert backend.graphs == 1


# The module


def test_the_module_computes_with_its_temperature(device: torch.device) -> None:
    problem = problem_of()
    scores = torch.tensor(problem.scores, device=device)
    codes = torch.tensor(problem.codes, device=device)
    weight = torch.tensor([1, 0, 2, 0.5], device=device)
    expected = swapped_prediction_loss(scores, codes, temperature=0.3, sample_weight=weight)
    criterion = SwappedPredictionLoss(0.3)
    assert torch.equal(criterion(scores, codes, weight), expected)
    criterion.temperature = 0.1
    assert torch.equal(criterion(scores, codes), swapped_prediction_loss(scores, codes))
    assert torch.equal(criterion(scores, codes), SwappedPredictionLoss()(scores, codes))
    criterion.temperature = 0.0
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        criterion(scores, codes)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_of_the_module_has_its_temperature(
    duplicate: Callable[[SwappedPredictionLoss], SwappedPredictionLoss],
) -> None:
    criterion = SwappedPredictionLoss(0.3)
    twin = duplicate(criterion)
    assert repr(twin) == repr(criterion) == "SwappedPredictionLoss(temperature=0.3)"
    twin.temperature = 0.2
    assert criterion.temperature == 0.3
    assert not criterion.state_dict()


def test_module_and_function_have_the_same_settings() -> None:
    settings = described(SwappedPredictionLoss)
    tensors = described(SwappedPredictionLoss().forward)
    assert described(swapped_prediction_loss) == settings | tensors
    assert settings == {"temperature": (0.1, "float | Tensor")}


# Bad input

VIEW = torch.zeros(4, 5)
CODES = torch.zeros(2, 4, 5)
BAD_TEMPERATURES = [
    (0.0, ValueError, r"temperature must be a finite number above 0, got 0\.0"),
    (-0.1, ValueError, r"temperature must be a finite number above 0, got -0\.1"),
    (math.nan, ValueError, "temperature must be a finite number, got nan"),
    (math.inf, ValueError, "temperature must be a finite number, got inf"),
    ("0.1", TypeError, "temperature must be a number, got str"),
    (True, TypeError, "temperature must be a number, got bool"),
    (None, TypeError, "temperature must be a number, got NoneType"),
    (torch.tensor([0.1]), ValueError, r"temperature must be 0-dimensional .*, got shape \(1,\)"),
]
BAD_VIEWS = [  # of scores and of codes; {} is the name
    (0.0, TypeError, r"{} must be a torch\.Tensor or a sequence of torch\.Tensor, got float"),
    (VIEW, ValueError, r"{} as one tensor must have 3 dimensions .*, got shape \(4, 5\)"),
    (
        torch.zeros(2, 4, 5, dtype=torch.int64),
        TypeError,
        r"{} must have a floating-point dtype, got torch\.int64",
    ),
    (
        [VIEW, VIEW.long()],
        TypeError,
        r"{}\[1\] must have a floating-point dtype, got torch\.int64",
    ),
    ([VIEW, [0.0]], TypeError, r"{}\[1\] must be a torch\.Tensor, got list"),
    ([VIEW, VIEW[0]], ValueError, r"{}\[1\] must have 2 dimensions .*, got shape \(5,\)"),
    (
        [VIEW, VIEW[:3]],
        ValueError,
        r"{0}\[1\] must have the shape of {0}\[0\], \(4, 5\), got \(3, 5\)",
    ),
    (
        [VIEW, VIEW[:, :3]],
        ValueError,
        r"{0}\[1\] must have the shape of {0}\[0\], \(4, 5\), got \(4, 3\)",
    ),
    (
        [VIEW, VIEW.double()],
        TypeError,
        r"{0}\[1\] must have the dtype of {0}\[0\], torch\.float32, got torch\.float64",
    ),
    ([VIEW, VIEW.to("meta")], ValueError, r"{}\[1\] must be on device cpu, got meta"),
]
BAD_PAIRS = [
    ({"scores": VIEW[None]}, ValueError, "scores must hold at least 2 views, got 1"),
    ({"scores": [VIEW]}, ValueError, "scores must hold at least 2 views, got 1"),
    ({"scores": []}, ValueError, "scores must hold at least 2 views, got 0"),
    ({"codes": []}, ValueError, "codes must hold at least 1 view, got 0"),
    ({"codes": CODES[:0]}, ValueError, "codes must hold at least 1 view, got 0"),
    (
        {"codes": [VIEW] * 4},
        ValueError,
        "codes must hold at most as many views as scores, 3, got 4",
    ),
    (
        {"codes": CODES[:, :3]},
        ValueError,
        r"codes must have the shape of scores per view, \(4, 5\), got \(3, 5\)",
    ),
    (
        {"codes": CODES[:, :, :3]},
        ValueError,
        r"codes must have the shape of scores per view, \(4, 5\), got \(4, 3\)",
    ),
    ({"codes": CODES.to("meta")}, ValueError, "codes must be on device cpu, got meta"),
    (
        {"scores": torch.zeros(2, 4, 0), "codes": torch.zeros(1, 4, 0)},
        ValueError,
        r"scores must have at least 1 of the prototypes in its last dimension, got shape \(4, 0\)",
    ),
    *BAD_SAMPLE_WEIGHTS,
]


@pytest.mark.parametrize(("value", "error", "text"), BAD_TEMPERATURES)
def test_a_bad_temperature_is_named(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        swapped_prediction_loss([VIEW] * 3, CODES, temperature=value)
    with pytest.raises(error, match=text):
        SwappedPredictionLoss(value)


@pytest.mark.parametrize("name", ["scores", "codes"])
@pytest.mark.parametrize(("value", "error", "text"), BAD_VIEWS)
def test_bad_views_are_named_with_their_index(
    name: str, value: Any, error: type[Exception], text: str
) -> None:
    inputs = {"scores": [VIEW] * 3, "codes": CODES, name: value}
    with pytest.raises(error, match=text.format(name)):
        swapped_prediction_loss(**inputs)


@pytest.mark.parametrize(("inputs", "error", "text"), BAD_PAIRS)
def test_inputs_that_do_not_fit_are_named(
    inputs: dict[str, Any], error: type[Exception], text: str
) -> None:
    complete = {"scores": [VIEW] * 3, "codes": CODES} | inputs
    with pytest.raises(error, match=text):
        swapped_prediction_loss(**complete)
    with pytest.raises(error, match=text):
        SwappedPredictionLoss()(**complete)
