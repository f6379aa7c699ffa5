"""Statistics of a step: as their definitions as loops, and the laws that sums obey."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from swavkit import SinkhornKnopp
from swavkit.swav_statistics import SwAVStatistics, cluster_statistics
from tests import oracles, tolerances
from tests.bad_input import BAD_SAMPLE_WEIGHTS
from tests.strategies import permutations, reals, seeds

VIEWS, SAMPLES, PROTOTYPES = 3, 8, 5
VECTORS = {"code_usage", "assigned"}


def assert_close(found: SwAVStatistics, expected: Any, atol: float = 1e-11) -> None:
    """Compare with other statistics, or with those of the oracle."""
    named = expected if isinstance(expected, dict) else expected._asdict()
    assert list(found._fields) == sorted(named, key=found._fields.index)
    for name, value in found._asdict().items():
        reference = torch.as_tensor(named[name], dtype=torch.float64)
        torch.testing.assert_close(
            value.double(),
            reference.to(value.device),
            rtol=atol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def by_the_loops(
    scores: Tensor, codes: Tensor, temperature: float = 0.1, sample_weight: Tensor | None = None
) -> dict[str, np.ndarray]:
    return oracles.cluster_statistics(
        scores.double().cpu().numpy(),
        codes.double().cpu().numpy(),
        temperature,
        None if sample_weight is None else sample_weight.double().cpu().numpy(),
    )


def scores_and_codes(
    code_views: int = 2,
    samples: int = SAMPLES,
    prototypes: int = PROTOTYPES,
    views: int = VIEWS,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return random scores, and codes that sum to 1 but are not of them."""
    options = {"dtype": torch.float64} | options
    scores = torch.randn(views, samples, prototypes, **options)
    codes = torch.randn(code_views, samples, prototypes, **options).mul(2).softmax(-1)
    return scores, codes


# As the definitions


@pytest.mark.parametrize("weights", [None, "bool", "float", "zeros", "half"])
@pytest.mark.parametrize("code_views", [1, 2, 3])
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_statistics_are_the_sums_of_their_definitions(
    device: torch.device, dtype: torch.dtype, code_views: int, weights: str | None
) -> None:
    exact = dtype == torch.float64
    of_codes = [dtype] if exact else [dtype, torch.float32]  # as SwAVLoss holds them
    for of_code in of_codes:
        scores, codes = scores_and_codes(code_views, device=device, dtype=torch.float32)
        scores, codes = scores.to(dtype), codes.to(of_code)
        weight = None
        if weights is not None:
            weight = torch.tensor([1, 0, 2, 0.5, 0, 3, 1, 1], device=device)
            if weights == "bool":
                weight = weight != 0
            if weights == "zeros":
                weight = torch.zeros(SAMPLES, device=device)
            if weights == "half":
                weight = weight.bfloat16()
            scores[:, 1] = math.nan
            scores[1, 4, 2] = math.inf
            codes[0, 1] = math.nan
            codes[-1, 4, 1] = math.inf
        for temperature in (0.1, 1.0):
            found = cluster_statistics(scores, codes, temperature=temperature, sample_weight=weight)
            expected = by_the_loops(scores, codes, temperature, weight)
            assert_close(found, expected, atol=1e-12 if exact else 2e-5)
            assert_close(
                cluster_statistics(scores, codes, sample_weight=weight),
                by_the_loops(scores, codes, 0.1, weight),
                atol=1e-12 if exact else 2e-5,
            )
        for name, value in found._asdict().items():
            assert value.dtype == (torch.float64 if exact else torch.float32)
            assert value.shape == ((PROTOTYPES,) if name in VECTORS else ())
            assert value.device.type == device.type


def test_views_may_come_as_a_sequence(device: torch.device) -> None:
    scores, codes = scores_and_codes(device=device)
    weight = torch.rand(SAMPLES, device=device)
    expected = cluster_statistics(scores, codes, sample_weight=weight)
    for form in (list, tuple):
        for inputs in ((form(scores), form(codes)), (scores, form(codes)), (form(scores), codes)):
            assert_close(cluster_statistics(*inputs, sample_weight=weight), expected)


def test_a_temperature_may_be_a_tensor(device: torch.device) -> None:
    scores, codes = scores_and_codes(device=device)
    found = cluster_statistics(scores, codes, temperature=torch.tensor(0.25, device=device))
    assert_close(found, cluster_statistics(scores, codes, temperature=0.25))


def test_what_is_known_without_arithmetic(device: torch.device) -> None:
    """Views that agree, codes that are sure, predictions that are not."""
    scores = torch.eye(3, device=device).repeat(4, 1, 1) * 1e-30
    statistics = cluster_statistics(scores, torch.eye(3, device=device).repeat(2, 1, 1))
    assert statistics.samples == 3
    assert statistics.code_usage.tolist() == statistics.assigned.tolist() == [2, 2, 2]
    assert statistics.code_entropy == 0
    assert statistics.prediction_entropy.item() == pytest.approx(12 * math.log(3), rel=1e-6)
    assert (statistics.code_rows, statistics.prediction_rows) == (6, 12)
    assert statistics.agreeing == statistics.pairs == 2 * 3 * 3  # of views with others, samples


@pytest.mark.parametrize("prototypes", [70, 192, 3000])  # the last two in chunks on a CPU
@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_of_equal_scores_the_first_is_the_largest(
    device: torch.device, dtype: torch.dtype, prototypes: int
) -> None:
    scores = torch.zeros(VIEWS, SAMPLES, prototypes, device=device, dtype=dtype)
    scores[1:, :, 40:] = 1
    scores[:, 3, -20] = scores[:, 3, -11] = 2
    codes = torch.ones(2, SAMPLES, prototypes, device=device, dtype=dtype) / prototypes
    found = cluster_statistics(scores, codes)
    assert found.assigned[[0, -20, 40]].tolist() == [SAMPLES - 1, 2, SAMPLES - 1]
    assert found.assigned.sum() == 2 * SAMPLES
    assert found.pairs == 4 * SAMPLES
    assert found.agreeing == 4 + (SAMPLES - 1)  # of view 1 with the last view


def test_codes_need_not_sum_to_one(device: torch.device) -> None:
    scores, codes = scores_and_codes(device=device)
    codes = codes * torch.rand(2, SAMPLES, 1, device=device, dtype=torch.float64)
    codes[0, 2] = 0
    assert_close(cluster_statistics(scores, codes), by_the_loops(scores, codes))


# Limits


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("samples", [0, 1])
@pytest.mark.parametrize("prototypes", [PROTOTYPES, 300])  # 300: in chunks
def test_few_or_no_samples(
    device: torch.device, samples: int, prototypes: int, dtype: torch.dtype
) -> None:
    both = scores_and_codes(samples=samples, prototypes=prototypes, device=device)
    scores, codes = (each.to(dtype) for each in both)
    for weight in (None, torch.ones(samples, device=device)):
        found = cluster_statistics(scores, codes, sample_weight=weight)
        assert_close(found, by_the_loops(scores, codes), atol=2e-5)
        assert found.samples == samples


def test_one_prototype(device: torch.device) -> None:
    scores, codes = scores_and_codes(prototypes=1, device=device)
    found = cluster_statistics(scores, codes)
    assert_close(found, by_the_loops(scores, codes))
    for entropy in (found.prediction_entropy, found.code_entropy):  # of 1, up to rounding
        assert entropy.abs() < 1e-12
    assert found.agreeing == found.pairs


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_scores_of_minus_infinity_are_those_of_prototypes_that_nobody_gets(
    device: torch.device, dtype: torch.dtype
) -> None:
    scores, codes = (each.to(dtype) for each in scores_and_codes(device=device))
    scores[..., 1] = -math.inf
    scores[1, 2, [0, 2, 3]] = -math.inf
    scores[2, 5, :4] = -math.inf  # one is left, and sure
    scores[0, 6] = -math.inf  # none is left
    scores[1, 7] = -math.inf
    found = cluster_statistics(scores, codes)
    assert_close(found, by_the_loops(scores, codes), atol=2e-5)
    assert found.prediction_rows == VIEWS * SAMPLES - 2
    assert found.assigned[1] == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_of_scores_that_are_not_finite_are_missing_and_spread_nowhere(
    device: torch.device, bad: float, weighted: bool
) -> None:
    scores, codes = scores_and_codes(device=device)
    weight = torch.rand(SAMPLES, device=device).double() if weighted else None
    scores[0, 3, 1] = bad
    scores[2, 3] = bad
    scores[1, 5, 0] = bad
    found = cluster_statistics(scores, codes, sample_weight=weight)
    assert_close(found, by_the_loops(scores, codes, sample_weight=weight))
    if not weighted:
        assert found.samples == SAMPLES
        assert found.code_rows == 2 * SAMPLES
        assert found.prediction_rows == VIEWS * SAMPLES - 3
        assert found.assigned.sum() == 2 * SAMPLES - 2
        assert found.pairs == 4 * SAMPLES - 4 - 3  # of sample 3 none is left, of 5 that of 0 and 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_codes_that_are_not_finite_are_missing_and_spread_nowhere(
    device: torch.device, bad: float
) -> None:
    scores, codes = scores_and_codes(device=device)
    codes[0, 3, 1] = bad
    codes[1, 5] = bad
    found = cluster_statistics(scores, codes)
    assert_close(found, by_the_loops(scores, codes))
    assert found.code_rows == 2 * SAMPLES - 2
    assert found.assigned.sum() == 2 * SAMPLES


@pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
def test_a_step_without_a_finite_row_gives_zeros(device: torch.device, dtype: torch.dtype) -> None:
    scores = torch.full((VIEWS, SAMPLES, PROTOTYPES), math.nan, device=device, dtype=dtype)
    found = cluster_statistics(scores, scores[:2])
    assert found.samples == SAMPLES
    assert not any(each.any() for each in found[1:])


def test_halves_are_counted_beyond_their_own_range(device: torch.device) -> None:
    """Float16 ends at 65,504, and bfloat16 counts no further than 256."""
    for dtype in (torch.float16, torch.bfloat16):
        scores = torch.zeros(2, 40_000, 1, device=device, dtype=dtype)
        for weight in (None, torch.ones(40_000, device=device, dtype=dtype)):
            found = cluster_statistics(scores, scores + 1, sample_weight=weight)
            assert found.samples == 40_000
            for each in (found.assigned[0], found.code_usage[0], found.agreeing, found.pairs):
                assert each == 80_000


# Laws


@dataclass(frozen=True)
class Step:
    """Scores (V, B, K), codes (A, B, K), weights (B,) and a temperature."""

    scores: np.ndarray
    codes: np.ndarray
    weight: np.ndarray
    temperature: float

    def statistics(
        self, samples: Any = slice(None), prototypes: Any = slice(None), weighted: bool = True
    ) -> SwAVStatistics:
        return cluster_statistics(
            torch.tensor(self.scores[:, samples][..., prototypes]),
            torch.tensor(self.codes[:, samples][..., prototypes]),
            temperature=self.temperature,
            sample_weight=torch.tensor(self.weight[samples]) if weighted else None,
        )


@st.composite
def steps(draw: st.DrawFn, ties: bool = True) -> Step:
    """Draw a step with rows that do not count; with equal scores unless they must differ."""
    views, samples = draw(st.integers(2, 4)), draw(st.integers(0, 5))
    prototypes = draw(st.integers(1, 5))
    random = np.random.default_rng(draw(seeds))
    shape = (views, samples, prototypes)
    scores = draw(reals(*shape)) if ties else random.normal(size=shape)
    scores[random.random(shape) < draw(st.sampled_from([0.0, 0.2]))] = -np.inf
    lost = random.random(shape) < draw(st.sampled_from([0.0, 0.1]))
    scores[lost] = random.choice([np.nan, np.inf], lost.sum())
    codes = random.dirichlet(np.full(prototypes, 0.5), (draw(st.integers(1, views)), samples))
    codes[random.random(codes.shape[:2]) < draw(st.sampled_from([0.0, 0.2]))] = np.nan
    weight = random.integers(0, 4, samples) / draw(st.sampled_from([1, 2]))
    return Step(scores, codes, weight, draw(st.sampled_from([0.05, 0.1, 1.0])))


@given(steps())
def test_any_step_has_the_statistics_of_the_loops(step: Step) -> None:
    for weight in (step.weight, None):
        expected = oracles.cluster_statistics(step.scores, step.codes, step.temperature, weight)
        assert_close(step.statistics(weighted=weight is not None), expected)


@given(steps(), st.data())
def test_the_order_of_samples_does_not_matter(step: Step, data: st.DataObject) -> None:
    order = data.draw(permutations(len(step.weight)))
    assert_close(step.statistics(order), step.statistics())


@given(steps(ties=False), st.data())
def test_the_order_of_prototypes_is_that_of_the_counts(step: Step, data: st.DataObject) -> None:
    order = data.draw(permutations(step.scores.shape[-1]))
    expected = step.statistics()
    expected = expected._replace(
        code_usage=expected.code_usage[order], assigned=expected.assigned[order]
    )
    assert_close(step.statistics(prototypes=order), expected)


@given(steps(), st.integers(0, 5))
def test_statistics_of_two_batches_add_up_to_those_of_both(step: Step, cut: int) -> None:
    parts = step.statistics(slice(None, cut)), step.statistics(slice(cut, None))
    added = SwAVStatistics(*(one + other for one, other in zip(*parts, strict=True)))
    assert_close(added, step.statistics())


@given(steps())
def test_a_weight_is_how_often_a_sample_is_there(step: Step) -> None:
    whole = Step(step.scores, step.codes, np.ceil(step.weight), step.temperature)
    repeated = np.repeat(np.arange(len(whole.weight)), whole.weight.astype(int))
    assert_close(whole.statistics(repeated, weighted=False), whole.statistics())


@given(steps())
def test_a_sample_of_weight_zero_may_hold_anything(step: Step) -> None:
    absent = step.weight == 0
    expected = step.statistics()
    for value in (np.nan, np.inf, -np.inf, 7.0):
        step.scores[:, absent] = step.codes[:, absent] = value
        assert_close(step.statistics(), expected)


@given(steps())
def test_sums_are_within_the_bounds_of_their_numbers_of_rows(step: Step) -> None:
    found, code_views = step.statistics(), len(step.codes)
    views, most = len(step.scores), math.log(step.scores.shape[-1])
    assert all(each.isfinite().all() and (each >= -1e-12).all() for each in found)
    assert found.samples.item() == pytest.approx(step.weight.sum())
    assert found.code_entropy <= found.code_rows * most + 1e-9
    assert found.prediction_entropy <= found.prediction_rows * most + 1e-9
    assert found.code_usage.sum().item() == pytest.approx(found.code_rows.item(), abs=1e-9)
    assert found.code_rows <= code_views * found.samples
    assert found.prediction_rows <= views * found.samples
    assert found.assigned.sum() <= code_views * found.samples
    assert found.agreeing <= found.pairs <= code_views * (views - 1) * found.samples
    if np.isfinite(step.scores[:, step.weight > 0]).all():
        assert found.assigned.sum() == code_views * found.samples
        assert found.prediction_rows == views * found.samples
        assert found.pairs == code_views * (views - 1) * found.samples


# Bad input


def scores_of(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(*shape, **options)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scores": scores_of(1, 4, 5)}, ValueError, "scores must hold at least 2 views, got 1"),
    ({"scores": scores_of(4, 5)}, ValueError, r"scores as one tensor must have 3 dimensions"),
    ({"scores": scores_of(2, 4, 5).long()}, TypeError, "scores must have a floating-point dtype"),
    ({"scores": scores_of(3, 4, 0)}, ValueError, r"scores must have at least 1 .*\(4, 0\)"),
    ({"scores": None}, TypeError, "scores must be a torch.Tensor or a sequence"),
    (
        {"scores": [scores_of(4, 5), scores_of(3, 5)]},
        ValueError,
        r"scores\[1\] must have the shape of scores\[0\], \(4, 5\), got \(3, 5\)",
    ),
    ({"codes": scores_of(2, 3, 5)}, ValueError, r"codes .*\(4, 5\).*\(3, 5\)"),
    ({"codes": scores_of(2, 4, 6)}, ValueError, r"codes .*\(4, 5\).*\(4, 6\)"),
    ({"codes": [scores_of(4, 6)]}, ValueError, r"codes.*\(4, 5\).*\(4, 6\)"),
    ({"codes": scores_of(2, 4, 1)}, ValueError, r"codes .*\(4, 5\).*\(4, 1\)"),
    ({"codes": scores_of(2, 1, 5)}, ValueError, r"codes .*\(4, 5\).*\(1, 5\)"),
    ({"codes": scores_of(4, 4, 5)}, ValueError, "codes .*at most.* scores, 3, got 4"),
    ({"codes": scores_of(0, 4, 5)}, ValueError, "codes must hold at least 1 view, got 0"),
    ({"codes": scores_of(4, 5)}, ValueError, "codes as one tensor must have 3 dimensions"),
    ({"codes": scores_of(2, 4, 5).long()}, TypeError, "codes must have a floating-point dtype"),
    ({"codes": scores_of(2, 4, 5, device="meta")}, ValueError, "codes must be on device cpu"),
    ({"temperature": 0}, ValueError, "temperature must be a finite number above 0, got 0"),
    ({"temperature": -0.1}, ValueError, "temperature must be a finite number above 0"),
    ({"temperature": math.nan}, ValueError, "temperature must be a finite number, got nan"),
    ({"temperature": "0.1"}, TypeError, "temperature must be a number, got str"),
    *BAD_SAMPLE_WEIGHTS,
]


@pytest.mark.parametrize(("wrong", "error", "text"), BAD)
def test_bad_input_is_named(wrong: dict[str, Any], error: type[Exception], text: str) -> None:
    usual = {"scores": scores_of(3, 4, 5), "codes": scores_of(2, 4, 5)}
    inputs = usual | wrong
    with pytest.raises(error, match=text):
        cluster_statistics(inputs.pop("scores"), inputs.pop("codes"), **inputs)


def test_settings_are_given_by_name() -> None:
    scores, codes = scores_and_codes()
    with pytest.raises(TypeError, match="positional"):
        cluster_statistics(scores, codes, 0.1)


# Where it runs


def test_shapes_and_dtypes_are_known_without_values() -> None:
    for dtype in tolerances.DTYPES:
        scores, codes = scores_and_codes(device="meta", dtype=dtype)
        for weight in (None, torch.ones(SAMPLES, device="meta")):
            found = cluster_statistics(scores, codes, sample_weight=weight)
            for name, value in found._asdict().items():
                assert value.device.type == "meta"
                assert value.shape == ((PROTOTYPES,) if name in VECTORS else ())
                assert value.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_compiles_once_for_any_number_of_samples(weighted: bool) -> None:
    torch._dynamo.reset()
    counted = CompileCounterWithBackend("aot_eager")
    compiled: Callable[..., SwAVStatistics] = torch.compile(
        cluster_statistics, fullgraph=True, dynamic=True, backend=counted
    )
    for samples in (8, 5, 13):
        scores, codes = scores_and_codes(samples=samples)
        scores[0, 2] = math.nan
        weight = torch.rand(samples) if weighted else None
        found = compiled(scores, codes, sample_weight=weight)
        assert isinstance(found, SwAVStatistics)
        assert_close(found, by_the_loops(scores, codes, sample_weight=weight))
    assert counted.frame_count == 1


@pytest.mark.parametrize("prototypes", [PROTOTYPES, 100])  # 100: entries in chunks
def test_the_default_device_does_not_matter(prototypes: int) -> None:
    scores, codes = scores_and_codes(prototypes=prototypes)
    expected = cluster_statistics(scores, codes)
    with torch.device("meta"):
        found = cluster_statistics(scores, codes)
    assert_close(found, expected, 0)


def test_statistics_have_no_gradient_and_inputs_stay_as_they_are(device: torch.device) -> None:
    scores, codes = scores_and_codes(device=device)
    scores[0, 1, 1] = codes[0, 2, 2] = math.nan
    weight = torch.ones(SAMPLES, device=device, dtype=torch.float64)
    inputs = [scores, codes, weight]
    before = [each.clone() for each in inputs]
    for each in inputs:
        each.requires_grad_()
    found = cluster_statistics(scores, codes, sample_weight=weight)
    for value in found:
        assert not value.requires_grad
        assert value.grad_fn is None
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    for each, copy in zip(inputs, before, strict=True):
        torch.testing.assert_close(each.detach(), copy, rtol=0, atol=0, equal_nan=True)
    with torch.inference_mode():
        assert_close(cluster_statistics(scores, codes, sample_weight=weight), found)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(low: torch.dtype) -> None:
    scores, codes = scores_and_codes(dtype=torch.float32)
    weight = torch.rand(SAMPLES)
    expected = cluster_statistics(scores, codes, sample_weight=weight)
    with torch.autocast("cpu", dtype=low):
        for form in (torch.Tensor.clone, list):
            found = cluster_statistics(form(scores), form(codes), sample_weight=weight)
            assert_close(found, expected, atol=1e-6)
            assert found.code_usage.dtype == torch.float32


def test_codes_of_the_package_use_every_prototype_alike() -> None:
    scores, _ = scores_and_codes(samples=64)
    codes = SinkhornKnopp(epsilon=0.5, iterations=500)(scores[:2])
    usage = cluster_statistics(scores, codes).code_usage
    torch.testing.assert_close(usage, torch.full_like(usage, 2 * 64 / PROTOTYPES))
