"""Marginals: how equally codes use the prototypes, and the prior of a power law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch._subclasses.fake_tensor import FakeTensorMode

from swavkit import marginal_error, power_law_prior, sinkhorn_knopp
from tests import oracles, tolerances
from tests.bad_input import BAD_SAMPLE_WEIGHTS
from tests.modes import CountingBackend
from tests.strategies import permutations, reals, seeds

ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)


def error_of(codes: np.ndarray, **weights: np.ndarray) -> float:
    """Return our error of (B, K) codes, in float64."""
    tensors = {name: torch.tensor(weight) for name, weight in weights.items()}
    return marginal_error(torch.tensor(codes), **tensors).item()


def codes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Return float64 codes whose rows sum to 1, but for the rounding to what float16 holds."""
    codes = np.random.default_rng(seed).dirichlet(np.ones(shape[-1]), shape[:-1])
    return torch.tensor(codes).half().double()


def assert_error(found: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    np.testing.assert_allclose(
        found, expected, rtol=tolerances.ATOL[dtype], atol=tolerances.ATOL[dtype]
    )


@st.composite
def weighted_codes(draw: st.DrawFn) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Non-negative entries (B, K), whose rows need not sum to 1, and masses for both sides."""
    samples, prototypes = draw(st.tuples(st.integers(1, 9), st.integers(1, 7)))
    return draw(reals(samples, prototypes, low=0.0)), {
        "sample_weight": draw(reals(samples, low=0.125, high=4.0)),
        "prototype_weight": draw(reals(prototypes, low=0.125, high=4.0)),
    }


# The equation


@pytest.mark.parametrize("weighted", ["neither", "samples", "prototypes", "both"])
@ANY_DTYPE
def test_the_error_is_that_of_the_equation(
    device: torch.device, dtype: torch.dtype, weighted: str
) -> None:
    codes = codes_of(9, 5).to(device, dtype)
    masses = {}
    if weighted in ("samples", "both"):
        masses["sample_weight"] = torch.tensor([1, 0, 2, 0.5, 3, 1, 0, 0.25, 4])
    if weighted in ("prototypes", "both"):
        masses["prototype_weight"] = torch.tensor([1, 2, 0.5, 0.25, 4])
    error = marginal_error(codes, **{name: mass.to(device, dtype) for name, mass in masses.items()})
    expected = oracles.marginal_error(
        codes.double().cpu().numpy(), **{name: mass.numpy() for name, mass in masses.items()}
    )
    assert error.shape == ()
    assert error.dtype == torch.promote_types(dtype, torch.float32)
    assert error.device == codes.device
    assert_error(error.item(), expected, error.dtype)


@given(weighted_codes())
def test_any_codes_have_the_error_of_the_equation(drawn: Any) -> None:
    codes, weights = drawn
    assert_error(error_of(codes), oracles.marginal_error(codes))
    assert_error(error_of(codes, **weights), oracles.marginal_error(codes, **weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_many_samples_are_not_rounded_to_half_precision(
    device: torch.device, dtype: torch.dtype
) -> None:
    codes = codes_of(4096, 16).to(device, dtype)
    expected = oracles.marginal_error(codes.double().cpu().numpy())
    assert_error(marginal_error(codes).item(), expected, torch.float32)


@pytest.mark.parametrize("weights", ["none", "shared", "own"])
def test_leading_dimensions_are_independent_problems(device: torch.device, weights: str) -> None:
    codes = codes_of(2, 3, 6, 4).to(device)
    weight = {
        "none": None,
        "shared": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "own": torch.arange(36.0, device=device).view(2, 3, 6) % 5,
    }[weights]
    errors = marginal_error(codes, sample_weight=weight)
    assert errors.shape == (2, 3)
    for index in np.ndindex(2, 3):
        own = weight[index] if weights == "own" else weight
        alone = oracles.marginal_error(
            codes[index].cpu().numpy(), None if own is None else own.cpu().numpy()
        )
        assert_error(errors[index].item(), alone)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 4, 5), (2, 0, 4, 5)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@ANY_DTYPE
def test_no_sample_has_no_error(
    device: torch.device, dtype: torch.dtype, weighted: bool, shape: tuple[int, ...]
) -> None:
    codes = torch.zeros(shape, dtype=dtype, device=device)
    weight = torch.ones(shape[:-1], device=device) if weighted else None
    error = marginal_error(codes, sample_weight=weight)
    expected = torch.zeros(shape[:-2], dtype=torch.promote_types(dtype, torch.float32))
    assert error.dtype == expected.dtype
    assert torch.equal(error.cpu(), expected)


@pytest.mark.parametrize("held", [0.25, math.nan, math.inf])
def test_nobody_present_has_no_error(device: torch.device, held: float) -> None:
    codes = torch.full((2, 6, 4), held, device=device)
    error = marginal_error(
        codes,
        sample_weight=torch.zeros(2, 6, device=device),
        prototype_weight=torch.tensor([1, 2, 0, 1.0], device=device),
    )
    assert error.tolist() == [0, 0]


# Laws


@given(st.integers(1, 7), st.integers(1, 9))
def test_a_prototype_that_takes_all_is_off_by_the_number_of_the_others(
    prototypes: int, samples: int
) -> None:
    codes = np.zeros((samples, prototypes))
    codes[:, 0] = 1
    assert_error(error_of(codes), prototypes - 1)


@given(st.integers(1, 7), st.integers(1, 4))
def test_equal_use_has_no_error(prototypes: int, times: int) -> None:
    assert_error(error_of(np.tile(np.eye(prototypes), (times, 1))), 0)
    assert_error(error_of(np.full((times, prototypes), 1 / prototypes)), 0)


@given(weighted_codes())
def test_codes_have_no_error_against_their_own_use(drawn: Any) -> None:
    codes, weights = drawn
    codes += 0.125
    codes /= codes.sum(axis=1, keepdims=True)
    use = weights["sample_weight"] @ codes
    error = error_of(codes, sample_weight=weights["sample_weight"], prototype_weight=use)
    assert_error(error, 0)


@given(weighted_codes(), st.data())
def test_invariant_under_permutation_of_samples_and_of_prototypes(
    drawn: Any, data: st.DataObject
) -> None:
    codes, weights = drawn
    rows, columns = (data.draw(permutations(count)) for count in codes.shape)
    permuted = {
        "sample_weight": weights["sample_weight"][rows],
        "prototype_weight": weights["prototype_weight"][columns],
    }
    error = error_of(codes[np.ix_(rows, columns)], **permuted)
    assert_error(error, error_of(codes, **weights))


@given(weighted_codes(), st.data(), st.sampled_from([math.nan, math.inf, 0.0, 50.0]))
def test_sample_weights_are_multiplicities(
    drawn: Any, data: st.DataObject, code_of_absent: float
) -> None:
    codes, _ = drawn
    weight = data.draw(arrays(np.int64, len(codes), elements=st.integers(0, 3)).filter(np.any))
    repeated = np.repeat(codes, weight, axis=0)
    codes[weight == 0, 0] = code_of_absent
    assert_error(error_of(codes, sample_weight=weight.astype(float)), error_of(repeated))


@given(weighted_codes(), st.integers(-300, 300), st.integers(-300, 300))
def test_weights_mean_the_same_at_any_scale(drawn: Any, of_samples: int, of_masses: int) -> None:
    codes, weights = drawn
    scaled = error_of(
        codes,
        sample_weight=weights["sample_weight"] * 2.0**of_samples,
        prototype_weight=weights["prototype_weight"] * 2.0**of_masses,
    )
    assert_error(scaled, error_of(codes, **weights))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_scale_of_weights_exhausts_no_range(device: torch.device, scale: float) -> None:
    codes = codes_of(6, 4).float().to(device)
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3.0], device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], device=device),
    }
    scaled = marginal_error(codes, **{name: scale * weight for name, weight in weights.items()})
    assert_error(scaled.item(), marginal_error(codes, **weights).item(), torch.float32)


@given(weighted_codes(), st.data())
def test_bool_weights_are_weights_of_one_and_zero(drawn: Any, data: st.DataObject) -> None:
    codes, _ = drawn
    present = data.draw(arrays(np.bool_, codes.shape[0]))
    used = data.draw(arrays(np.bool_, codes.shape[1]).filter(np.any))
    error = error_of(codes, sample_weight=present, prototype_weight=used)
    numbers = {"sample_weight": present.astype(float), "prototype_weight": used.astype(float)}
    assert error == error_of(codes, **numbers)


@ANY_DTYPE
def test_a_prototype_of_mass_zero_is_in_error_only_if_it_is_used(
    device: torch.device, dtype: torch.dtype
) -> None:
    masses = torch.tensor([1, 0, 3], dtype=dtype, device=device)
    unused = torch.tensor([[1, 0, 0], [0, 0, 1]], dtype=dtype, device=device)
    assert marginal_error(unused, prototype_weight=masses).item() == 1  # 1/2 in place of 1/4
    used = torch.tensor([[1, 0, 0], [0, 0.5, 0.5]], dtype=dtype, device=device)
    assert marginal_error(used, prototype_weight=masses).item() == math.inf
    absent = torch.tensor([True, False], device=device)
    error = marginal_error(used, sample_weight=absent, prototype_weight=masses)
    assert error.item() == 3  # all in place of 1/4


@pytest.mark.parametrize("weight", [None, 1.0, 0.5])
def test_a_code_that_counts_and_is_nan_is_no_small_error(
    device: torch.device, weight: float | None
) -> None:
    codes = codes_of(6, 4).to(device)
    codes[2] = math.nan
    given_weight = None if weight is None else torch.full((6,), weight, device=device)
    assert marginal_error(codes, sample_weight=given_weight).isnan()


@pytest.mark.parametrize(
    ("dtype", "weight"),
    [
        (torch.float32, [1e-16, 6e-12, 1e28, 3e27]),
        (torch.float32, [1e-40, 3e-40, 2e-40, 1e-40]),
        (torch.float32, [2.4e38, 3e38, 1e38, 2.4e38]),
        (torch.float64, [1e300, 3e300, 1e299, 1e300]),
        (torch.float64, [1e-300, 3e-300, 1e-299, 1e-300]),
        (torch.float16, [65504.0, 65504.0, 1.0, 65504.0]),
    ],
)
@pytest.mark.parametrize("name", ["sample_weight", "prototype_weight"])
def test_only_ratios_of_weights_count_over_many_decades(
    device: torch.device, name: str, dtype: torch.dtype, weight: list[float]
) -> None:
    codes = codes_of(4, 4).float().to(device)
    given_weight = {name: torch.tensor(weight, dtype=dtype, device=device)}
    expected = oracles.marginal_error(
        codes.double().cpu().numpy(), **{name: given_weight[name].double().cpu().numpy()}
    )
    error = marginal_error(codes, **given_weight).item()
    expected = expected if expected < 3e38 else math.inf  # the end of float32
    assert error == pytest.approx(expected, rel=1e-4)


def test_the_default_device_does_not_matter() -> None:
    codes, weight = codes_of(6, 4), torch.arange(6)
    expected = marginal_error(codes, sample_weight=weight.float())
    with torch.device("meta"):
        error = marginal_error(codes, sample_weight=weight.float())
        prior = power_law_prior(4)
    assert torch.equal(error, expected)
    assert torch.equal(prior, power_law_prior(4))


@settings(max_examples=15)  # of hundreds of iterations each
@given(seeds, st.sampled_from([0.5, 1.0]), st.data())
def test_converged_codes_have_no_error(seed: int, epsilon: float, data: st.DataObject) -> None:
    scores = torch.tensor(np.random.default_rng(seed).uniform(-1, 1, (8, 5)))
    weights = {
        "sample_weight": torch.tensor(data.draw(reals(8, low=0.125))),
        "prototype_weight": torch.tensor(data.draw(reals(5, low=0.125))),
    }
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=300, **weights)
    assert marginal_error(codes, **weights).item() <= 1e-9


# What it leaves alone


def test_autocast_changes_nothing(device: torch.device) -> None:
    codes = codes_of(64, 16).float().to(device)
    weight = torch.rand(64, device=device)
    expected = marginal_error(codes, sample_weight=weight)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        error = marginal_error(codes, sample_weight=weight)
    assert error.dtype == torch.float32
    assert torch.equal(error, expected)


@ANY_DTYPE
def test_no_gradient_flows_and_no_input_changes(device: torch.device, dtype: torch.dtype) -> None:
    codes = codes_of(6, 4).to(device, dtype).requires_grad_()
    weights = {
        "sample_weight": torch.tensor([1, 0, 2, 1, 1, 3], dtype=dtype, device=device),
        "prototype_weight": torch.tensor([1, 2, 0.5, 1], dtype=dtype, device=device),
    }
    for weight in weights.values():
        weight.requires_grad_()
    inputs = [codes, *weights.values()]
    before = [tensor.detach().clone() for tensor in inputs]
    for error in (marginal_error(codes), marginal_error(codes, **weights)):
        assert not error.requires_grad
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake meta"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 6, 4), (0, 4)], ids=str)
@ANY_DTYPE
def test_shapes_and_dtypes_are_known_without_values(
    dtype: torch.dtype, shape: tuple[int, ...], fake: bool
) -> None:
    with FakeTensorMode() if fake else torch.device("meta"):
        error = marginal_error(
            torch.empty(shape, dtype=dtype, device="meta"),
            sample_weight=torch.empty(shape[:-1], device="meta"),
            prototype_weight=torch.empty(shape[-1], device="meta"),
        )
    assert error.shape == shape[:-2]
    assert error.dtype == torch.promote_types(dtype, torch.float32)
    assert error.device.type == "meta"


def test_compiles_once_for_changing_values(device: torch.device) -> None:
    backend = CountingBackend()
    compiled = torch.compile(marginal_error, fullgraph=True, backend=backend)
    for seed in range(3):
        codes = codes_of(2, 6, 4, seed=seed).to(device)
        weight = torch.arange(6, device=device) > seed  # as a queue fills
        expected = marginal_error(codes, sample_weight=weight)
        assert_error(compiled(codes, sample_weight=weight).cpu(), expected.cpu())
    assert backend.graphs == 1


# The prior of a power law

exponents = st.floats(0, 4)


@pytest.mark.parametrize("exponent", [0, 0.25, 1, 2.5])
@pytest.mark.parametrize("prototypes", [1, 2, 7, 3000])
def test_masses_fall_off_by_the_power_law(prototypes: int, exponent: float) -> None:
    masses = power_law_prior(prototypes, exponent)
    powers = np.array([k**-exponent for k in range(1, prototypes + 1)])
    assert masses.shape == (prototypes,)
    assert masses.dtype == torch.float32
    np.testing.assert_allclose(masses.numpy(), powers / math.fsum(powers), rtol=1e-6)


def test_the_exponent_is_a_quarter_unless_told() -> None:
    assert torch.equal(power_law_prior(10), power_law_prior(10, 0.25))
    assert torch.equal(power_law_prior(10), power_law_prior(num_prototypes=10, exponent=0.25))


@given(st.integers(1, 5000), exponents)
def test_masses_sum_to_one_and_never_rise(prototypes: int, exponent: float) -> None:
    masses = power_law_prior(prototypes, exponent).double().numpy()
    np.testing.assert_allclose(masses.sum(), 1, rtol=0, atol=1e-6)
    assert (np.diff(masses) <= 0).all()


@given(st.integers(1, 500), exponents)
def test_twice_the_place_has_a_fixed_share_of_the_mass(half: int, exponent: float) -> None:
    masses = power_law_prior(2 * half, exponent).double().numpy()
    np.testing.assert_allclose(masses[1::2], masses[:half] * 2.0**-exponent, rtol=1e-6)


@given(st.integers(1, 5000))
def test_an_exponent_of_zero_gives_equal_masses(prototypes: int) -> None:
    np.testing.assert_allclose(power_law_prior(prototypes, 0).numpy(), 1 / prototypes, rtol=1e-6)


@pytest.mark.parametrize("exponent", [100.0, 1e6, 1e308])
def test_a_steep_law_leaves_all_mass_to_the_first(exponent: float) -> None:
    masses = power_law_prior(3000, exponent)
    assert masses[0] == 1
    assert masses[1:].max() < 1e-29


def test_a_million_masses_keep_their_sum() -> None:
    masses = power_law_prior(10**6).double()
    assert abs(masses.sum().item() - 1) < 1e-6
    assert masses[-1] > 0


def test_the_default_dtype_changes_nothing() -> None:
    expected = power_law_prior(7)
    torch.set_default_dtype(torch.float64)
    try:
        masses = power_law_prior(7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert masses.dtype == torch.float32
    assert torch.equal(masses, expected)


@settings(max_examples=15)  # of hundreds of iterations each
@given(seeds, st.sampled_from([0.5, 1.0]), exponents)
def test_codes_converge_to_the_prior(seed: int, epsilon: float, exponent: float) -> None:
    scores = torch.tensor(np.random.default_rng(seed).uniform(-1, 1, (8, 5)))
    prior = power_law_prior(5, exponent)
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=300, prototype_weight=prior)
    np.testing.assert_allclose(codes.mean(dim=0), prior.numpy(), rtol=0, atol=1e-6)


# Bad input

CODES = torch.zeros(4, 5)
BAD_INPUTS = [
    ({"codes": [[0.0]]}, TypeError, r"codes must be a torch\.Tensor, got list"),
    ({"codes": None}, TypeError, r"codes must be a torch\.Tensor, got NoneType"),
    (
        {"codes": torch.zeros(4, 5, dtype=torch.int64)},
        TypeError,
        r"codes must have a floating-point dtype, got torch\.int64",
    ),
    (
        {"codes": torch.zeros(4, 5, dtype=torch.complex64)},
        TypeError,
        r"codes must have a floating-point dtype, got torch\.complex64",
    ),
    (
        {"codes": torch.zeros(5)},
        ValueError,
        r"codes must have at least 2 dimensions \(\.\.\., samples, prototypes\), got shape \(5,\)",
    ),
    (
        {"codes": torch.zeros(4, 0)},
        ValueError,
        r"codes must have at least 1 of the prototypes in its last dimension, got shape \(4, 0\)",
    ),
    *BAD_SAMPLE_WEIGHTS,
    (
        {"codes": torch.zeros(2, 4, 5), "sample_weight": torch.ones(2)},
        ValueError,
        r"sample_weight must have shape \(2, 4\) or \(4,\), got \(2,\)",
    ),
    (
        {"prototype_weight": torch.ones(4)},
        ValueError,
        r"prototype_weight must have shape \(5,\), got \(4,\)",
    ),
    (
        {"prototype_weight": torch.ones(4, 5)},
        ValueError,
        r"prototype_weight must have shape \(5,\), got \(4, 5\)",
    ),
    (
        {"prototype_weight": torch.ones(5, dtype=torch.int32)},
        TypeError,
        r"prototype_weight must have a bool or floating-point dtype, got torch\.int32",
    ),
    (
        {"prototype_weight": (1.0,) * 5},
        TypeError,
        r"prototype_weight must be a torch\.Tensor, got tuple",
    ),
    (
        {"prototype_weight": torch.ones(5, device="meta")},
        ValueError,
        "prototype_weight must be on device cpu, got meta",
    ),
    ({"synchronize": "always"}, ValueError, "synchronize must be True or False, got 'always'"),
    ({"synchronize": 1}, ValueError, "synchronize must be True or False, got 1"),
]
BAD_PRIORS = [
    ((0,), ValueError, "num_prototypes must be at least 1, got 0"),
    ((-1,), ValueError, "num_prototypes must be at least 1, got -1"),
    ((5.0,), TypeError, "num_prototypes must be an int, got float"),
    ((True,), TypeError, "num_prototypes must be an int, got bool"),
    (("5",), TypeError, "num_prototypes must be an int, got str"),
    ((5, -1), ValueError, "exponent must be at least 0, got -1"),
    ((5, -0.25), ValueError, r"exponent must be at least 0, got -0\.25"),
    ((5, math.nan), ValueError, "exponent must be a finite number, got nan"),
    ((5, math.inf), ValueError, "exponent must be a finite number, got inf"),
    ((5, "0.25"), TypeError, "exponent must be a number, got str"),
    ((5, True), TypeError, "exponent must be a number, got bool"),
    ((5, None), TypeError, "exponent must be a number, got NoneType"),
    ((5, torch.tensor(0.25)), TypeError, "exponent must be a number, got Tensor"),
]


@pytest.mark.parametrize(("inputs", "error", "text"), BAD_INPUTS)
def test_bad_codes_and_weights_are_named(
    inputs: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{text}$"):
        marginal_error(**({"codes": CODES} | inputs))


@pytest.mark.parametrize(("arguments", "error", "text"), BAD_PRIORS)
def test_a_bad_prior_is_named(
    arguments: tuple[Any, ...], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=f"^{text}$"):
        power_law_prior(*arguments)
