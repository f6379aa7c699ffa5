"""``swavkit.testing``: its laws hold for right functions, and each finds the bug planted for it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from torch import Tensor

import swavkit.testing
from swavkit import CropGroup, MultiCropTransform, sinkhorn_knopp, swapped_prediction_loss
from swavkit.testing import (
    CodesProblem,
    LossProblem,
    assert_codes,
    assert_sinkhorn_laws,
    assert_swapped_loss_laws,
    assert_transform_laws,
    codes_problems,
    loss_problems,
    reals,
    unit_rows,
    weights,
)

SCORES = np.array([[0.9, 0.1, 0.3], [0.8, 0.1, -0.5], [0.2, 0.4, 0.6], [-0.3, 0.5, 0.1]])
CODES_PROBLEM = CodesProblem(SCORES, epsilon=0.5, iterations=2)
WEIGHTED_PROBLEM = replace(
    CODES_PROBLEM,
    sample_weight=np.array([1.0, 0.0, 2.0, 0.5]),
    prototype_weight=np.array([1.0, 2.0, 0.5]),
)
# Three views of four samples. Equal codes, so that no law of entropies finds a missing sample.
CODES = np.broadcast_to(np.array([0.7, 0.2, 0.1]), (1, 4, 3)).copy()
LOSS_PROBLEM = LossProblem(np.stack([SCORES, SCORES[::-1], -SCORES]), CODES, temperature=0.5)


def plain_codes(
    scores: Tensor,
    epsilon: float,
    iterations: int,
    sample_weight: Tensor | None = None,
    prototype_weight: Tensor | None = None,
) -> Tensor:
    """Return codes as a user may write them, without any care for the range of exp."""
    weight = torch.ones(len(scores)) if sample_weight is None else sample_weight
    mass = torch.ones(scores.shape[1]) if prototype_weight is None else prototype_weight
    plan = torch.exp(scores / epsilon)
    for _ in range(iterations):
        plan = plan * (mass / mass.sum() / (weight[:, None] * plan).sum(0))
        plan = plan / plan.sum(1, keepdim=True)
    return plan


def pairs_of(scores: Tensor, codes: Tensor) -> list[tuple[int, int]]:
    """Return the code views, each with the views that predict it."""
    return [(a, v) for a in range(len(codes)) for v in range(len(scores)) if a != v]


def cross_entropies(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """Return those of each pair of views and each sample."""
    logs = torch.log_softmax(scores / temperature, -1)
    return torch.stack([-(codes[a] * logs[v]).sum(-1) for a, v in pairs_of(scores, codes)])


def plain_loss(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    return cross_entropies(scores, codes, temperature).mean()


# The laws hold


@given(codes_problems())
def test_codes_of_the_package_and_plain_ones_obey_every_law(problem: CodesProblem) -> None:
    assert_sinkhorn_laws(sinkhorn_knopp, problem)
    assert_sinkhorn_laws(plain_codes, problem)


@given(codes_problems(weighted=True))
def test_weighted_codes_of_the_package_obey_every_law(problem: CodesProblem) -> None:
    assert_sinkhorn_laws(sinkhorn_knopp, problem)


def test_weighted_plain_codes_obey_every_law() -> None:
    assert_sinkhorn_laws(plain_codes, WEIGHTED_PROBLEM)


@given(loss_problems())
def test_the_loss_of_the_package_and_a_plain_one_obey_every_law(problem: LossProblem) -> None:
    assert_swapped_loss_laws(swapped_prediction_loss, problem)
    assert_swapped_loss_laws(plain_loss, problem)


@pytest.mark.parametrize("shape", [(3, 40, 50), (4, 3, 40, 50)])
def test_the_transform_of_the_package_obeys_every_law(shape: tuple[int, ...]) -> None:
    transform = MultiCropTransform(
        (CropGroup((16, 12), 2, (0.3, 1.0)), CropGroup(8, 3, (0.05, 0.3))), mean=0.0, std=1.0
    )
    sizes = [(16, 12), (16, 12), 8, 8, 8]
    images = torch.rand(shape)
    images[..., :20, :] = 1  # interpolated white may exceed 1 by a rounding error
    assert_transform_laws(transform, images, sizes, value_range=(0, 1))


def test_functions_of_another_dtype_are_tested_at_their_own_tolerance() -> None:
    def codes(scores: Tensor, **settings: Any) -> Tensor:
        return sinkhorn_knopp(scores.float(), **settings)

    def loss(scores: Tensor, codes: Tensor, **settings: Any) -> Tensor:
        return swapped_prediction_loss(scores.float(), codes.float(), **settings)

    assert_sinkhorn_laws(codes, CODES_PROBLEM, atol=1e-5)
    assert_swapped_loss_laws(loss, LOSS_PROBLEM, atol=1e-5)
    with pytest.raises(AssertionError):
        assert_sinkhorn_laws(codes, CODES_PROBLEM, atol=1e-12)


# Each law finds the bug planted for it


def codes_of_halves(scores: Tensor, **settings: Any) -> Tensor:
    return torch.cat([plain_codes(half, **settings) for half in scores.chunk(2)])


def codes_with_a_prior(scores: Tensor, **settings: Any) -> Tensor:
    return plain_codes(scores, prototype_weight=1.0 + torch.arange(scores.shape[1]), **settings)


SINKHORN_MUTANTS: dict[str, Callable[..., Tensor]] = {
    "codes have the shape of the scores": lambda scores, **settings: (
        plain_codes(scores, **settings).T
    ),
    "every code is at least 0": lambda scores, **_: scores + (1 - scores.sum(1, True)) / 3,
    "the code of a sample sums to 1": lambda scores, epsilon, **_: torch.softmax(
        scores / epsilon, 0
    ),
    "permuted samples have permuted codes": codes_of_halves,
    "permuted prototypes have permuted codes": codes_with_a_prior,
    "a constant added to the scores of a prototype changes nothing": (
        lambda scores, epsilon, iterations: torch.softmax(scores / epsilon, 1)
    ),
    "codes are those of the published equations": (
        lambda scores, epsilon, iterations: plain_codes(scores, epsilon, iterations + 1)
    ),
}


@pytest.mark.parametrize("law", SINKHORN_MUTANTS)
def test_a_law_of_sinkhorn_finds_its_bug(law: str) -> None:
    with pytest.raises(AssertionError, match=f"^{law}: .*scores=.*, epsilon=0.5, iterations=2$"):
        assert_sinkhorn_laws(SINKHORN_MUTANTS[law], CODES_PROBLEM)


@pytest.mark.parametrize("name", ["sample_weight", "prototype_weight"])
def test_a_weight_that_is_ignored_is_found(name: str) -> None:
    def forgetful(scores: Tensor, **settings: Any) -> Tensor:
        return plain_codes(scores, **{**settings, name: None})

    with pytest.raises(AssertionError, match=f"^codes are those .*{name}="):
        assert_sinkhorn_laws(forgetful, WEIGHTED_PROBLEM)


CODES_MUTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every code is at least 0": lambda codes: codes - torch.tensor([0.9, 0.0, -0.9]),
    "the code of a sample sums to 1": lambda codes: codes / len(codes),
    "every prototype is used by its mass": lambda codes: codes[:1].expand_as(codes),
}


@pytest.mark.parametrize("law", CODES_MUTANTS)
@pytest.mark.parametrize("form", [torch.tensor, np.array])
def test_a_law_of_codes_finds_its_bug(law: str, form: Callable[..., Any]) -> None:
    codes = sinkhorn_knopp(torch.tensor(SCORES), epsilon=0.5, iterations=100)
    assert_codes(form(codes.tolist()), tolerance=1e-6)
    with pytest.raises(AssertionError, match=f"^{law}: "):
        assert_codes(form(CODES_MUTANTS[law](codes).tolist()), tolerance=1e-6)


def test_codes_of_no_number_obey_no_law() -> None:
    with pytest.raises(AssertionError, match=r"^every code is at least 0: the smallest is nan"):
        assert_codes(torch.full((2, 3), torch.nan))


def test_codes_are_held_to_masses_of_present_samples() -> None:
    masses = {"sample_weight": torch.tensor([1, 0, 2, 0.5]), "prototype_weight": torch.ones(3)}
    codes = sinkhorn_knopp(torch.tensor(SCORES).float(), iterations=300, epsilon=0.5, **masses)
    codes[1] = torch.nan  # of an absent sample
    assert_codes(codes, tolerance=1e-4, **masses)
    with pytest.raises(AssertionError, match=r"^every prototype is used by its mass: "):
        assert_codes(codes[[0, 2, 3]], tolerance=1e-4)


def loss_of_every_pair(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    others = plain_loss(scores, codes, temperature) * len(pairs_of(scores, codes))
    own = -(codes * torch.log_softmax(scores[: len(codes)] / temperature, -1)).sum(-1).mean(1)
    return (others + own.sum()) / (len(scores) * len(codes))


def loss_by_position(scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
    of_pairs = cross_entropies(scores, codes, temperature).mean(1)
    shares = 1.0 + torch.arange(len(of_pairs))
    return (of_pairs * shares / shares.sum()).sum()


LOSS_MUTANTS: dict[str, Callable[..., Tensor]] = {
    "the loss is a scalar": lambda *given, temperature: cross_entropies(*given, temperature),
    "the loss is at least the entropy of the codes": lambda scores, codes, temperature: (
        plain_loss(scores, codes, temperature) + (codes * codes.log()).sum(-1).mean()
    ),
    "the gradient sums to 0 over the prototypes": lambda scores, codes, temperature: (
        plain_loss(scores, codes, temperature) + scores.square().sum()
    ),
    "a view does not predict its own code": loss_of_every_pair,
    "the order of views without codes does not count": loss_by_position,
    "the order of samples does not count": lambda scores, codes, temperature: plain_loss(
        scores[:, :-1], codes[:, :-1], temperature
    ),
    "the loss is that of the published equation": lambda *given, temperature: plain_loss(
        *given, temperature / 2
    ),
    "the gradient is that of the published equation": lambda scores, codes, temperature: (
        plain_loss(scores, codes, temperature) / 2
        + plain_loss(scores.detach(), codes, temperature) / 2
    ),
}


@pytest.mark.parametrize("law", LOSS_MUTANTS)
def test_a_law_of_the_loss_finds_its_bug(law: str) -> None:
    with pytest.raises(AssertionError, match=f"^{law}: .*scores=.*, temperature=0.5$"):
        assert_swapped_loss_laws(LOSS_MUTANTS[law], LOSS_PROBLEM)


def random_crops(images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    """Return two crops of 4×4 and one of 2×2 pixels, each at places of its own."""

    def crop(image: Tensor, size: int) -> Tensor:
        top, left = torch.randint(0, 30, (2,), generator=generator).tolist()
        return image[..., top : top + size, left : left + size]

    if images.dim() == 3:
        return [crop(images, size) for size in (4, 4, 2)]
    return [torch.stack([crop(image, size) for image in images]) for size in (4, 4, 2)]


def changing_crops(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    return random_crops(images.mul_(0.5), generator)


def one_place_for_a_batch(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    crops = random_crops(images.flatten(0, 1), generator)
    return [crop.unflatten(0, images.shape[:2]) for crop in crops]


def one_place_for_two_crops(images: Tensor, generator: torch.Generator) -> list[Tensor]:
    first, _, third = random_crops(images, generator)
    return [first, first, third]


TRANSFORM_MUTANTS: dict[str, Callable[..., Sequence[Tensor]]] = {
    "the transform leaves the images as they are": changing_crops,
    "there is a crop of each size": lambda images, generator: random_crops(images, generator)[:2],
    "crops are floating-point": lambda images, generator: [
        (255 * crop).byte() for crop in random_crops(images, generator)
    ],
    "values are in the range": lambda images, generator: [
        2 * crop - 1 for crop in random_crops(images, generator)
    ],
    "the same generator gives the same crops": lambda images, generator: random_crops(images, None),
    "another generator gives other crops": lambda images, generator: random_crops(
        images, torch.Generator().manual_seed(3)
    ),
    "crops of the same size differ": one_place_for_two_crops,
    "equal images of a batch have crops of their own": one_place_for_a_batch,
}


def test_transforms_of_the_mutants_obey_every_law_without_their_bug() -> None:
    assert_transform_laws(random_crops, torch.rand(2, 3, 40, 40), [4, 4, 2], value_range=(0, 1))


@pytest.mark.parametrize("law", TRANSFORM_MUTANTS)
def test_a_law_of_transforms_finds_its_bug(law: str) -> None:
    images = torch.rand(2, 3, 40, 40)
    with pytest.raises(AssertionError, match=rf"^{law}: .*images of shape \(2, 3, 40, 40\)"):
        assert_transform_laws(TRANSFORM_MUTANTS[law], images, [4, 4, 2], value_range=(0, 1))


# Strategies


CORNERS: list[tuple[Any, Callable[[Any], bool]]] = [
    (codes_problems(), lambda problem: problem.scores.shape == (1, 7)),
    (codes_problems(), lambda problem: problem.scores.shape == (9, 1)),
    (loss_problems(), lambda problem: len(problem.codes) == 1 < len(problem.scores) - 1),
    (loss_problems(), lambda problem: len(problem.codes) == len(problem.scores) == 5),
    (codes_problems(weighted=True), lambda problem: (problem.sample_weight == 0).any()),
    (codes_problems(weighted=True), lambda problem: (problem.prototype_weight == 0).any()),
]


@pytest.mark.parametrize(("strategy", "corner"), CORNERS)
def test_strategies_reach_the_corners(strategy: Any, corner: Callable[[Any], bool]) -> None:
    """Those in which a bug shows: one sample, one prototype, one code view, weights of 0."""
    # Without the search for a simpler example, which takes longer than that for any.
    find(strategy, corner, settings=settings(max_examples=2000, phases=[Phase.generate]))


@given(weights(3), reals(4, 5).map(unit_rows))
def test_weights_are_masses_and_features_unit_rows(weight: np.ndarray, rows: np.ndarray) -> None:
    assert (weight >= 0).all()
    assert weight.sum() > 0
    norms = np.linalg.norm(rows, axis=1)
    assert np.isclose(norms[rows.any(axis=1)], 1).all()


# The package


def test_the_public_names_are_those_of_its_files() -> None:
    files = (swavkit.testing.laws, swavkit.testing.oracle, swavkit.testing.strategies)
    assert sorted(swavkit.testing.__all__) == sorted(
        name for file in files for name in file.__all__
    )
    for name in swavkit.testing.__all__:
        assert getattr(swavkit.testing, name).__doc__, name


WITHOUT_HYPOTHESIS = """
import sys
import swavkit
assert "swavkit.testing" not in sys.modules
sys.modules["hypothesis"] = None  # not installed
import numpy as np
from swavkit import testing
problem = testing.CodesProblem(np.eye(3), 0.1, 3)
testing.assert_sinkhorn_laws(swavkit.sinkhorn_knopp, problem)
for strategy in (testing.codes_problems, testing.loss_problems, testing.reals):
    try:
        strategy()
    except ImportError as error:
        print(error)
"""


def test_only_strategies_require_hypothesis() -> None:
    command = [sys.executable, "-c", WITHOUT_HYPOTHESIS]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    expected = "strategies require Hypothesis; expected pip install 'swavkit[testing]'"
    assert run.stdout.splitlines() == [expected] * 3
