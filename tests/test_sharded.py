"""The functions behind sharded prototypes, on one process that has all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from swavkit.sharded.loss import sharded_codes, sharded_losses
from tests import oracles, tolerances
from tests.strategies import CodesProblem, LossProblem, codes_problems, loss_problems, reals


def codes_of(
    scores: np.ndarray,
    problem: CodesProblem,
    weight: np.ndarray | None = None,
    dtype: torch.dtype = torch.float64,
) -> np.ndarray:
    given_weight = np.ones(scores.shape[-2]) if weight is None else weight
    codes = sharded_codes(
        torch.tensor(scores, dtype=dtype),
        torch.tensor(given_weight),
        scores.shape[-1],
        epsilon=problem.epsilon,
        iterations=problem.iterations,
        fractional=weight is not None and weight.dtype != bool,
        group=None,
    )
    assert codes.dtype == torch.promote_types(dtype, torch.float32)
    return codes.double().numpy()


@given(codes_problems(), st.data())
def test_codes_are_those_of_the_oracle(problem: CodesProblem, data: st.DataObject) -> None:
    second = data.draw(reals(*problem.scores.shape))
    codes = codes_of(np.stack([problem.scores, second]), problem)
    for view, scores in enumerate([problem.scores, second]):
        expected = oracles.sinkhorn(scores, problem.epsilon, problem.iterations)
        np.testing.assert_allclose(codes[view], expected, rtol=0, atol=1e-10)


@given(codes_problems(), st.data())
def test_samples_count_as_often_as_they_weigh(problem: CodesProblem, data: st.DataObject) -> None:
    samples = len(problem.scores)
    weight = np.array(
        data.draw(
            st.one_of(
                st.lists(st.booleans(), min_size=samples, max_size=samples),
                st.lists(
                    st.sampled_from([0.0, 1e-3, 1, 2, 50]), min_size=samples, max_size=samples
                ),
            ).filter(any)
        )
    )
    codes = codes_of(problem.scores[None], problem, weight)[0]
    expected = oracles.sinkhorn(problem.scores, problem.epsilon, problem.iterations, weight)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("iterations", [1, 3, 5, 6, 40])
@pytest.mark.parametrize("epsilon", [0.05, 0.005])
def test_codes_stay_finite_with_a_sample_and_a_prototype_far_from_all_others(
    epsilon: float, iterations: int
) -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (30, 12)).astype(np.float32)
    scores[4] -= 30
    scores[:, 7] -= 50
    problem = CodesProblem(scores, epsilon, iterations)
    codes = codes_of(scores[None], problem, dtype=torch.float32)[0]
    expected = oracles.sinkhorn(scores, epsilon, iterations)
    tolerance = tolerances.of_codes(torch.float32, epsilon=epsilon, largest=51)
    np.testing.assert_allclose(codes, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("iterations", [3, 7])
def test_a_sample_with_a_score_that_is_not_finite_has_a_code_of_nan_and_no_part(
    iterations: int,
) -> None:
    scores = np.random.default_rng(0).uniform(-1, 1, (7, 5))
    scores[2, 1], scores[5, 0] = np.nan, np.inf
    weight = np.arange(7) != 5
    codes = codes_of(scores[None], CodesProblem(scores, 0.05, iterations), weight)[0]
    usable = [0, 1, 3, 4, 6]
    expected = oracles.sinkhorn(scores[usable], 0.05, iterations)
    np.testing.assert_allclose(codes[usable], expected, rtol=0, atol=1e-12)
    assert np.isnan(codes[2]).all()
    np.testing.assert_array_equal(codes[5], 0)


def test_codes_where_nobody_is() -> None:
    scores = torch.tensor([[[0.0, 0.1, 0.3]]], dtype=torch.float64)
    settings = {"epsilon": 0.1, "iterations": 3, "fractional": False, "group": None}
    assert sharded_codes(scores[:, :0], torch.ones(0), 3, **settings).shape == (1, 0, 3)
    absent = sharded_codes(scores, torch.zeros(1), 3, **settings)
    torch.testing.assert_close(absent, (scores / 0.1).softmax(dim=-1))


@given(loss_problems(), st.data())
def test_losses_and_gradients_are_those_of_the_oracle(
    problem: LossProblem, data: st.DataObject
) -> None:
    samples = problem.scores.shape[1]
    weight = np.array(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 2]), min_size=samples, max_size=samples))
    )
    normalized_weight = weight / max(weight.sum(), 1)
    scores = torch.tensor(problem.scores, requires_grad=True)
    losses = sharded_losses(
        scores,
        torch.tensor(problem.codes),
        torch.tensor(normalized_weight),
        temperature=problem.temperature,
        group=None,
    )
    assert losses.shape == (samples, 1)
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    expected = np.zeros_like(problem.scores)
    for sample in range(samples):
        one = slice(sample, sample + 1)
        terms = problem.scores[:, one], problem.codes[:, one], problem.temperature
        loss = normalized_weight[sample] * oracles.loss(*terms)
        np.testing.assert_allclose(losses[sample].detach().numpy(), loss, rtol=1e-10, atol=1e-12)
        expected[:, one] = normalized_weight[sample] * oracles.loss_gradient(*terms)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=0, atol=1e-10)
