"""The prototypes: cosines and their gradients, freezing, assignment, state, arguments."""

from __future__ import annotations

import copy
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
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import remove_parametrizations

from swavkit import PrototypeLayer, SwAVLoss
from tests import oracles, tolerances
from tests.modes import CountingBackend, RefuseSynchronisation
from tests.optimizers import Lars, adam, adam_with_coupled_decay, adamw, sgd
from tests.states import same, snapshot
from tests.strategies import reals

ANY_DTYPE = pytest.mark.parametrize("dtype", tolerances.DTYPES, ids=str)
GRADIENTS = pytest.mark.parametrize("gradient", ["tangent", "published"])


def layer_of(weight: Tensor, **settings: Any) -> PrototypeLayer:
    """Return a layer with a copy of this (K, D) weight, in its dtype and on its device."""
    layer = PrototypeLayer(weight.shape[1], weight.shape[0], **settings)
    layer.to(weight.device, weight.dtype).load_state_dict({"weight": weight})
    return layer


def as_array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def assert_cosines(scores: Tensor, features: Tensor, weight: Tensor) -> None:
    """Compare scores with the oracle's, for features and weight as their dtypes hold them."""
    expected = oracles.cosines(
        as_array(features).reshape(-1, features.shape[-1]), as_array(weight)
    ).reshape(scores.shape)
    # Both factors are rounded to the dtype of the product, and so is the result. Before that each
    # is normalised in float32, or in float64 if it comes in that.
    normalised = (torch.promote_types(rows.dtype, torch.float32) for rows in (features, weight))
    coarsest = max(tolerances.ATOL[dtype] for dtype in (scores.dtype, *normalised))
    np.testing.assert_allclose(as_array(scores), expected, rtol=0, atol=3 * coarsest)


# Scores


@pytest.mark.parametrize("weight_dtype", tolerances.DTYPES, ids=str)
@pytest.mark.parametrize("features_dtype", tolerances.DTYPES, ids=str)
def test_scores_are_cosines_in_the_promoted_dtype(
    device: torch.device, features_dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    features = torch.randn(6, 16, device=device).to(features_dtype)
    weight = torch.randn(5, 16, device=device).to(weight_dtype)
    scores = layer_of(weight)(features)
    assert scores.dtype == torch.promote_types(features_dtype, weight_dtype)
    assert_cosines(scores, features, weight)


@given(reals(4, 3, low=-8.0, high=8.0), reals(5, 3, low=-8.0, high=8.0))
def test_any_rows_have_their_cosines(features: np.ndarray, weight: np.ndarray) -> None:
    layer = layer_of(torch.tensor(weight))
    scores = layer(torch.tensor(features))
    assert_cosines(scores, torch.tensor(features), layer.weight)
    assert scores.abs().max() <= 1 + 1e-15


@pytest.mark.parametrize(
    ("dtype", "norm"),
    [
        (torch.float64, 1e-300),
        (torch.float64, 1e300),
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.bfloat16, 1e-30),
        (torch.bfloat16, 1e30),
        (torch.float16, 2e-5),  # of which float16 holds a few digits
        (torch.float16, 3e4),
    ],
    ids=str,
)
def test_no_norm_is_too_small_or_too_large(
    device: torch.device, dtype: torch.dtype, norm: float
) -> None:
    features, weight = torch.randn(6, 16, device=device), torch.randn(5, 16, device=device)
    plain = [F.normalize(rows.double(), dim=1) for rows in (features, weight)]
    features, weight = ((norm * rows).to(dtype) for rows in plain)
    as_held = [rows.double() / norm for rows in (features, weight)]  # float64 squares no 1e-300
    assert_cosines(layer_of(weight)(features), *as_held)
    assert_cosines(layer_of(plain[1].to(dtype))(features), as_held[0], plain[1].to(dtype))


@given(reals(4, 3), reals(5, 3), st.integers(-100, 100), st.integers(-100, 100))
def test_a_power_of_two_changes_no_digit(
    features: np.ndarray, weight: np.ndarray, feature_scale: int, weight_scale: int
) -> None:
    scaled = layer_of(torch.tensor(weight) * 2.0**weight_scale)
    scores = scaled(torch.tensor(features) * 2.0**feature_scale)
    assert torch.equal(scores, layer_of(torch.tensor(weight))(torch.tensor(features)))


@ANY_DTYPE
def test_scores_stay_between_minus_one_and_one(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.randn(5, 16, device=device, dtype=dtype)
    scores = layer_of(weight)(torch.cat([weight, -weight]))
    assert scores.abs().max() <= 1 + 3 * tolerances.ATOL[dtype]
    ones = torch.ones(5, device=device, dtype=dtype)
    for sign, own in ((1, scores[:5]), (-1, scores[5:])):
        torch.testing.assert_close(
            own.diagonal(), sign * ones, rtol=0, atol=3 * tolerances.ATOL[dtype]
        )


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_kept(device: torch.device, leading: tuple[int, ...]) -> None:
    weight = torch.randn(5, 4, dtype=torch.float64, device=device)
    features = torch.randn(*leading, 4, dtype=torch.float64, device=device)
    layer = layer_of(weight)
    scores = layer(features)
    assert scores.shape == (*leading, 5)
    assert_cosines(scores, features, weight)
    index = layer.assign(features)
    assert index.shape == leading
    assert torch.equal(index, scores.argmax(dim=-1))


@ANY_DTYPE
@GRADIENTS
def test_a_zero_row_has_cosine_and_gradient_zero(
    device: torch.device, dtype: torch.dtype, gradient: str
) -> None:
    weight = torch.randn(5, 4, device=device, dtype=dtype)
    weight[2] = 0
    features = torch.randn(3, 4, device=device, dtype=dtype)
    features[1] = 0
    features.requires_grad_()
    layer = layer_of(weight, gradient=gradient)
    scores = layer(features)
    assert not scores[1].any()
    assert not scores[:, 2].any()
    (scores * torch.randn_like(scores)).sum().backward()
    assert features.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    assert features.grad[0].any()
    assert not features.grad[1].any()
    assert layer.weight.grad[0].any()
    assert not layer.weight.grad[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_multiplies_like_a_linear_layer_and_normalises_in_float32(
    device: torch.device, dtype: torch.dtype
) -> None:
    features = torch.randn(6, 16, device=device).to(dtype) / 64  # short in bfloat16's digits
    layer = layer_of(torch.randn(5, 16, device=device))
    linear = torch.nn.Linear(16, 5, bias=False, device=device)
    unit = F.normalize(features.float(), dim=1)
    with torch.no_grad():
        linear.weight.copy_(layer.directions)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        scores, expected = layer(features), linear(unit)
        index = layer.assign(features)
    assert scores.dtype == expected.dtype == torch.bfloat16
    # Factors that are normalised in float32 differ in its last digit, hence rarely in bfloat16's.
    assert (scores == expected).float().mean() > 0.9
    assert_cosines(scores, features, layer.weight)
    assert torch.equal(index, scores.argmax(dim=1))


# Gradients


@ANY_DTYPE
def test_the_tangent_gradient_is_orthogonal_to_its_row(
    device: torch.device, dtype: torch.dtype
) -> None:
    layer = layer_of(3 * torch.randn(5, 16, device=device, dtype=dtype))
    features = torch.randn(6, 16, device=device, dtype=dtype, requires_grad=True)
    (layer(features) * torch.randn(6, 5, device=device, dtype=dtype)).sum().backward()
    for leaf in (layer.weight, features):
        along = F.cosine_similarity(leaf.detach().double(), leaf.grad.double(), dim=1)
        # A gradient at a right angle whose entries are rounded turns by as much as they.
        assert along.abs().max() < 4 * tolerances.ATOL[dtype]


def test_the_tangent_gradient_is_that_of_the_value() -> None:
    layer = PrototypeLayer(4, 3).double()
    features = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)

    def scores(features: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, features)

    weight = (2 * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(scores, (features, weight))
    assert torch.autograd.gradgradcheck(scores, (features, weight))


@GRADIENTS
def test_derivatives_of_any_order_and_kind_agree(gradient: str) -> None:
    layer = layer_of(2 * torch.randn(3, 4, dtype=torch.float64), gradient=gradient)
    weight = layer.weight.detach().clone()
    features = torch.randn(5, 4, dtype=torch.float64)

    def loss(weight: Tensor, features: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, features).sin().sum()

    layer(features).sin().sum().backward()
    found = torch.func.grad(loss)(weight, features)
    torch.testing.assert_close(found, layer.weight.grad, rtol=0, atol=1e-12)
    of_samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight, features)
    torch.testing.assert_close(of_samples.sum(dim=0), found, rtol=0, atol=1e-12)


def test_the_published_gradient_takes_the_norm_as_a_constant(device: torch.device) -> None:
    weight = 3 * torch.randn(5, 4, dtype=torch.float64, device=device)
    features = torch.randn(6, 4, dtype=torch.float64, device=device, requires_grad=True)
    upstream = torch.randn(6, 5, dtype=torch.float64, device=device)
    layer = layer_of(weight, gradient="published")
    layer(features).backward(upstream)
    expected = upstream.T @ F.normalize(features.detach(), dim=1) / weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-12)
    # The features' own gradient is the whole one.
    assert (features * features.grad).sum(dim=1).abs().max() < 1e-12


def test_the_published_gradient_with_renormalisation_follows_the_published_procedure() -> None:
    start = F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1)
    batches = torch.randn(20, 6, 4, dtype=torch.float64)
    targets = torch.randn(20, 6, 5, dtype=torch.float64).softmax(dim=-1)

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return -(target * (scores / 0.1).log_softmax(dim=-1)).sum(dim=-1).mean()

    published = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([published], lr=0.1, momentum=0.9)
    layers = {name: layer_of(start, gradient=name) for name in ("published", "tangent")}
    optimizers = {
        name: torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
        for name, layer in layers.items()
    }
    for batch, target in zip(batches, targets, strict=True):
        with torch.no_grad():
            published.copy_(published / published.norm(dim=1, keepdim=True))
        optimizer.zero_grad()
        loss(F.normalize(batch, dim=1) @ published.T, target).backward()
        optimizer.step()
        for name, layer in layers.items():
            optimizers[name].zero_grad()
            loss(layer(batch), target).backward()
            optimizers[name].step()
            layer.normalize_()
    expected = F.normalize(published.detach(), dim=1)
    torch.testing.assert_close(layers["published"].directions, expected, rtol=0, atol=1e-10)
    assert (layers["tangent"].directions - expected).abs().max() > 0.01


@GRADIENTS
def test_two_forwards_may_come_before_a_backward(device: torch.device, gradient: str) -> None:
    layer = layer_of(2 * torch.randn(5, 4, dtype=torch.float64, device=device), gradient=gradient)
    batches = torch.randn(2, 6, 4, dtype=torch.float64, device=device)
    separate = []
    for batch in batches:
        (separately,) = torch.autograd.grad(layer(batch).sin().sum(), layer.weight)
        separate.append(separately)
    first, second = (layer(batch).sin().sum() for batch in batches)
    (first + second).backward()
    torch.testing.assert_close(layer.weight.grad, sum(separate), rtol=0, atol=1e-12)


# Freezing


@GRADIENTS
@pytest.mark.parametrize("bad", [1.0, math.inf, math.nan])
def test_frozen_prototypes_get_a_gradient_of_zeros(
    device: torch.device, gradient: str, bad: float
) -> None:
    layer = layer_of(torch.randn(5, 4, device=device), gradient=gradient)
    features = torch.randn(6, 4, device=device)
    scores = layer(features, frozen=torch.tensor(True, device=device))
    assert torch.equal(scores, layer(features))
    scores.backward(torch.full_like(scores, bad))
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@GRADIENTS
def test_features_of_frozen_prototypes_keep_their_gradient(
    device: torch.device, gradient: str
) -> None:
    layer = layer_of(torch.randn(5, 4, device=device), gradient=gradient)
    features = torch.randn(6, 4, device=device, requires_grad=True)
    frozen = torch.tensor(True, device=device)
    (expected,) = torch.autograd.grad(layer(features).sin().sum(), features)
    (found,) = torch.autograd.grad(layer(features, frozen=frozen).sin().sum(), features)
    assert torch.equal(found, expected)


@GRADIENTS
def test_not_frozen_is_as_if_nothing_was_said(device: torch.device, gradient: str) -> None:
    layer = layer_of(torch.randn(5, 4, device=device), gradient=gradient)
    features = torch.randn(6, 4, device=device)
    (expected,) = torch.autograd.grad(layer(features).sin().sum(), layer.weight)
    frozen = torch.tensor(False, device=device)
    (found,) = torch.autograd.grad(layer(features, frozen=frozen).sin().sum(), layer.weight)
    assert expected.any()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("optimizer_of", "turns"),
    [(sgd, False), (adam, False), (adamw, False), (Lars, False), (adam_with_coupled_decay, True)],
)
def test_only_coupled_decay_of_adam_turns_frozen_prototypes(
    optimizer_of: Callable[[Any], torch.optim.Optimizer], turns: bool
) -> None:
    layer = PrototypeLayer(8, 5).double()
    start = layer.directions
    optimizer = optimizer_of(layer.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        features = torch.randn(6, 8, dtype=torch.float64)
        layer(features, frozen=torch.tensor(True)).sin().sum().backward()
        optimizer.step()
    cosine = (start * layer.directions).sum(dim=1)
    if turns:
        assert cosine.max() < 0.999
    else:
        torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("decay", "reversed_at"), [(0.0, None), (0.001, None), (0.0026, None), (0.003, 142), (0.01, 24)]
)
def test_decay_with_momentum_reverses_frozen_prototypes_above_a_threshold(
    decay: float, reversed_at: int | None
) -> None:
    assert (reversed_at is None) == (decay <= (1 - math.sqrt(0.9)) ** 2)
    layer = PrototypeLayer(8, 5).double()
    layer.normalize_()  # in float64
    start = layer.directions
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9, weight_decay=decay)
    factor, velocity = 1.0, 0.0  # of every entry
    for step in range(1, 200):
        optimizer.zero_grad()
        layer(torch.ones(8).double(), frozen=torch.tensor(True)).sum().backward()
        optimizer.step()
        velocity = 0.9 * velocity + decay * factor
        factor -= velocity
        norms = layer.weight.norm(dim=1)
        torch.testing.assert_close(norms, norms.new_full((5,), abs(factor)), rtol=1e-9, atol=1e-12)
        cosine = (start * layer.directions).sum(dim=1)
        expected = cosine.new_full((5,), math.copysign(1, factor))
        torch.testing.assert_close(cosine, expected, rtol=0, atol=1e-9)
        if factor < 0:
            assert step == reversed_at
            return
    assert reversed_at is None


# The weight


@ANY_DTYPE
@pytest.mark.parametrize("norm", [1e-4, 1.0, 1e4])
def test_directions_are_the_unit_rows_of_the_weight(
    device: torch.device, dtype: torch.dtype, norm: float
) -> None:
    weight = (norm * torch.randn(5, 4, device=device)).to(dtype)
    layer = layer_of(weight)
    directions = layer.directions
    assert directions.dtype == dtype
    assert not directions.requires_grad
    np.testing.assert_allclose(
        as_array(directions),
        oracles.unit_rows(as_array(weight)),
        rtol=0,
        atol=tolerances.ATOL[dtype],
    )
    assert torch.equal(layer.weight, weight)


def test_directions_cannot_be_set() -> None:
    layer = PrototypeLayer(4, 5)
    with pytest.raises(AttributeError, match="directions"):
        layer.directions = torch.zeros(5, 4)


@ANY_DTYPE
def test_normalising_the_weight_changes_no_score(device: torch.device, dtype: torch.dtype) -> None:
    layer = layer_of(100 * torch.randn(5, 4, device=device, dtype=dtype))
    features = torch.randn(6, 4, device=device, dtype=dtype)
    parameter, before, directions = layer.weight, layer(features), layer.directions
    assert layer.normalize_() is None
    assert layer.weight is parameter
    assert layer.weight.requires_grad
    assert torch.equal(layer.weight, directions)
    torch.testing.assert_close(layer(features), before, rtol=0, atol=3 * tolerances.ATOL[dtype])


def test_prototypes_start_on_the_unit_sphere_in_every_direction() -> None:
    weight = PrototypeLayer(3, 4000).weight.detach().double()
    assert (weight.norm(dim=1) - 1).abs().max() < 1e-6
    # A uniform direction has mean 0 and covariance 1/D, here within five standard errors.
    assert weight.mean(dim=0).abs().max() < 5 / math.sqrt(3 * 4000)
    covariance = weight.T @ weight / len(weight)
    assert (covariance - torch.eye(3, dtype=torch.float64) / 3).abs().max() < 5 / math.sqrt(4000)


def test_parameters_are_drawn_anew_in_place_from_the_global_generator() -> None:
    torch.manual_seed(3)
    layer = PrototypeLayer(4, 5)
    parameter, start = layer.weight, layer.weight.detach().clone()
    layer.reset_parameters()
    assert layer.weight is parameter
    assert not torch.equal(layer.weight, start)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert torch.equal(layer.weight, start)


def test_as_many_features_as_prototypes_become_them_in_their_order(device: torch.device) -> None:
    layer = PrototypeLayer(4, 5).to(device)
    parameter = layer.weight
    centres = torch.randn(5, 4, device=device, requires_grad=True)
    assert layer.initialize_(7 * centres) is None
    assert layer.weight is parameter
    assert layer.weight.requires_grad
    assert not layer.directions.requires_grad
    expected = F.normalize(centres.detach(), dim=-1)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)
    assert layer.assign(centres).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(40, 4), (2, 20, 4)], ids=str)
def test_of_more_features_different_ones_are_drawn(
    device: torch.device, shape: tuple[int, ...]
) -> None:
    features = torch.randn(shape, device=device)
    layer, twin = (PrototypeLayer(4, 30).to(device) for _ in range(2))
    state = torch.get_rng_state()
    for each in (layer, twin):
        each.initialize_(features, generator=torch.Generator(device).manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(layer.weight, twin.weight)
    cosines = F.normalize(features.flatten(0, -2), dim=-1) @ layer.directions.T
    assert torch.allclose(cosines.amax(dim=0), torch.ones(30, device=device), atol=1e-6)
    assert len(cosines.argmax(dim=0).unique()) == 30
    twin.initialize_(features, generator=torch.Generator(device).manual_seed(4))
    assert not torch.equal(layer.weight, twin.weight)
    torch.manual_seed(5)
    layer.initialize_(features)
    torch.manual_seed(5)
    twin.initialize_(features)
    assert torch.equal(layer.weight, twin.weight)


@pytest.mark.parametrize("samples", [5, 8])
def test_features_without_a_direction_make_no_prototype(device: torch.device, samples: int) -> None:
    layer = PrototypeLayer(4, 5).to(device)
    start = layer.weight.detach().clone()
    features = torch.randn(samples, 4, device=device)
    features[0], features[2, 1], features[3, 3] = 0, math.nan, math.inf
    with RefuseSynchronisation():
        layer.initialize_(features)
    norms = layer.weight.norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=1e-6)
    kept = (layer.weight == start).all(dim=-1)
    assert kept.sum() == (3 if samples == 5 else 0)
    if samples == 5:
        assert kept.tolist() == [True, False, True, True, False]
    cosines = F.normalize(features[[1, 4, *range(5, samples)]], dim=-1) @ layer.directions.T
    assert (cosines > 1 - 1e-6).sum() == samples - 3


def test_prototypes_start_from_features_of_any_dtype(device: torch.device) -> None:
    for dtype in tolerances.DTYPES:
        layer = PrototypeLayer(4, 5).to(device)
        features = torch.randn(9, 4, device=device).to(dtype)
        layer.initialize_(features)
        assert layer.weight.dtype == torch.float32
        cosines = F.normalize(features.double(), dim=-1) @ layer.directions.double().T
        assert (cosines.amax(dim=0) > 1 - 1e-6).all()


@pytest.mark.parametrize("samples", [0, 4])
def test_too_few_features_to_start_from_are_named(samples: int) -> None:
    layer = PrototypeLayer(4, 5)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=f"features must hold at least 5 samples.*got {samples}"):
        layer.initialize_(torch.randn(samples, 4))
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_start_from_features_compiles_for_any_number(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    layer, eager = (PrototypeLayer(4, 5) for _ in range(2))
    compiled = torch.compile(layer.initialize_, fullgraph=True, dynamic=dynamic, backend="eager")
    for samples in (7, 9, 30, 5):
        features = torch.randn(samples, 4)
        for seeded in (compiled, eager.initialize_):
            torch.manual_seed(3)
            seeded(features)
        torch.testing.assert_close(layer.weight, eager.weight, rtol=0, atol=1e-6)


def test_a_default_device_does_not_reach_what_is_drawn() -> None:
    layer, expected = (PrototypeLayer(4, 5) for _ in range(2))
    features = torch.randn(9, 4)
    expected.initialize_(features, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        layer.initialize_(features, generator=generator)
        layer.normalize_()
        index = layer.assign(features)
    torch.testing.assert_close(layer.weight, expected.weight)
    assert torch.equal(index, expected.assign(features))


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("register", COMPUTED.values(), ids=COMPUTED)
@pytest.mark.parametrize("inside", ["a layer", "a list of heads"])
def test_a_weight_that_is_computed_is_not_written_to_in_silence(
    register: Callable[[nn.Module], Any], inside: str
) -> None:
    criterion = SwAVLoss(4, 5 if inside == "a layer" else [6, 5], queue_length=4).eval()
    layer = criterion.prototypes if inside == "a layer" else criterion.prototypes[1]
    layer.initialize_(torch.randn(9, 4))
    register(layer)
    before, features = snapshot(criterion), torch.randn(9, 4)
    for write in (
        lambda: layer.initialize_(features),
        layer.normalize_,
        layer.reset_parameters,
        criterion.reset_parameters,
    ):
        with pytest.raises(RuntimeError, match=r"weight must be a parameter .*, got one that is"):
            write()
    assert same(snapshot(criterion), before)
    assert layer(features).shape == (9, 5)


def test_a_weight_under_weight_norm_starts_from_features_before_or_after() -> None:
    layer = PrototypeLayer(4, 5)
    centres = torch.randn(5, 4)
    layer.initialize_(centres)
    parametrizations.weight_norm(layer)
    assert layer.assign(centres).tolist() == [0, 1, 2, 3, 4]
    remove_parametrizations(layer, "weight")
    layer.initialize_(-centres)
    assert layer.assign(-centres).tolist() == [0, 1, 2, 3, 4]


def test_prototypes_that_are_a_buffer_can_be_written_to() -> None:
    layer = PrototypeLayer(4, 5)
    weight = layer.weight.detach()
    del layer.weight
    layer.register_buffer("weight", 3 * weight)
    layer.normalize_()
    torch.testing.assert_close(layer.weight, weight)


def test_assignment_is_the_nearest_prototype(device: torch.device) -> None:
    layer = layer_of(torch.randn(5, 16, device=device))
    index = layer.assign(100 * layer.directions[[3, 0, 4, 4]] + 1e-3)
    assert index.dtype == torch.int64
    assert index.tolist() == [3, 0, 4, 4]
    assert not index.requires_grad


# State


def test_the_state_is_the_weight_alone() -> None:
    layer = PrototypeLayer(4, 5)
    assert list(layer.state_dict()) == ["weight"]
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    assert layer.weight.shape == (5, 4)
    twin = PrototypeLayer(4, 5)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        PrototypeLayer(4, 6).load_state_dict(layer.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_is_equal_and_its_own(
    duplicate: Callable[[PrototypeLayer], PrototypeLayer],
) -> None:
    layer = PrototypeLayer(4, 5, gradient="published")
    features = torch.randn(6, 4)
    before = layer(features)
    twin = duplicate(layer)
    assert repr(twin) == repr(layer)
    assert torch.equal(twin(features), before)
    twin.reset_parameters()
    assert torch.equal(layer(features), before)


def test_the_layer_shows_its_settings() -> None:
    assert repr(PrototypeLayer(4, 5)) == (
        "PrototypeLayer(feature_dim=4, num_prototypes=5, gradient='tangent')"
    )


# Where it runs


@GRADIENTS
def test_compiles_once_for_frozen_and_free_prototypes(device: torch.device, gradient: str) -> None:
    backend = CountingBackend()
    layer = layer_of(torch.randn(5, 4, device=device), gradient=gradient)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for frozen in torch.tensor([True, False, True], device=device):
        features = torch.randn(6, 4, device=device)
        found, expected = compiled(features, frozen=frozen), layer(features, frozen=frozen)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        (gradient_found,) = torch.autograd.grad(found.sin().sum(), layer.weight)
        (gradient_expected,) = torch.autograd.grad(expected.sin().sum(), layer.weight)
        torch.testing.assert_close(gradient_found, gradient_expected, rtol=0, atol=1e-6)
        assert gradient_found.any() == ~frozen
    assert backend.graphs == 1


# Bad input

BAD_SIZES = [
    (0, ValueError, "{} must be at least 1, got 0"),
    (-1, ValueError, "{} must be at least 1, got -1"),
    (2.5, TypeError, "{} must be an int, got float"),
    (True, TypeError, "{} must be an int, got bool"),
    ("4", TypeError, "{} must be an int, got str"),
    (None, TypeError, "{} must be an int, got NoneType"),
]
BAD_FEATURES = [
    ([[0.0] * 4], TypeError, r"features must be a torch\.Tensor, got list"),
    (None, TypeError, r"features must be a torch\.Tensor, got NoneType"),
    (
        torch.zeros(6, 4, dtype=torch.int64),
        TypeError,
        r"features must have a floating-point dtype, got torch\.int64",
    ),
    (
        torch.zeros(6, 4, dtype=torch.complex64),
        TypeError,
        r"features must have a floating-point dtype, got torch\.complex64",
    ),
    (
        torch.zeros(6, 3),
        ValueError,
        r"features must have 4 features in its last dimension, got shape \(6, 3\)",
    ),
    (
        torch.zeros(()),
        ValueError,
        r"features must have at least 1 dimension \(\.\.\., features\), got shape \(\)",
    ),
    (torch.zeros(6, 4, device="meta"), ValueError, "features must be on device cpu, got meta"),
]


@pytest.mark.parametrize("name", ["feature_dim", "num_prototypes"])
@pytest.mark.parametrize(("value", "error", "text"), BAD_SIZES)
def test_a_bad_size_is_named(name: str, value: Any, error: type[Exception], text: str) -> None:
    sizes = {"feature_dim": 4, "num_prototypes": 5, name: value}
    with pytest.raises(error, match=text.format(name)):
        PrototypeLayer(**sizes)


@pytest.mark.parametrize("value", ["other", None, True])
def test_a_bad_gradient_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="gradient must be 'tangent' or 'published', got "):
        PrototypeLayer(4, 5, gradient=value)


@pytest.mark.parametrize(("value", "error", "text"), BAD_FEATURES)
def test_bad_features_are_named(value: Any, error: type[Exception], text: str) -> None:
    layer = PrototypeLayer(4, 5)
    before = layer.weight.detach().clone()
    with pytest.raises(error, match=text):
        layer(value)
    with pytest.raises(error, match=text):
        layer.assign(value)
    with pytest.raises(error, match=text):
        layer.initialize_(value)
    assert torch.equal(layer.weight, before)
