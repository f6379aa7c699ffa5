"""The examples of other methods: each equation against an oracle, and each program at a tiny size.

``tests/distributed/test_method_examples.py`` runs them on several ranks.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swavkit import PrototypeLayer, sinkhorn_knopp
from tests import method_oracles as oracles

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
METHODS = ["dino", "capi", "deepclusterv2", "selav2"]
A, V, B, P, K = 2, 4, 5, 6, 7


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def scores_of(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def close(value: Tensor, expected: np.ndarray | float, atol: float = 1e-10) -> None:
    np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=atol)


# DINOv2


@pytest.fixture
def dino(example) -> ModuleType:
    return example("dino")


MASK = torch.tensor([[1, 0, 1, 1, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 0]]).bool()
SIZES = [6, 9, 24]  # of the buffer: as many as are masked, more, and all tokens


@pytest.mark.parametrize("size", SIZES)
def test_the_buffer_holds_each_masked_token_once_and_weighs_it_by_its_image(dino, size) -> None:
    buffer, weight = dino.masked_tokens(MASK, size)
    assert len(buffer) == len(weight) == size
    assert len(set(buffer.tolist())) == size
    weights = dict(zip(buffer.tolist(), weight.tolist(), strict=True))
    present = {token: w for token, w in weights.items() if w > 0}
    expected = {}
    for image, place in MASK.nonzero().tolist():
        expected[image * P + place] = 1 / int(MASK[image].sum())
    assert present == pytest.approx(expected)


@pytest.mark.parametrize("size", SIZES)
def test_dino_codes_are_those_of_all_class_tokens_and_of_the_masked_patches_alone(
    dino, size
) -> None:
    classes, patches = scores_of(A, B, K), scores_of(len(MASK), P, K)
    buffer, weight = dino.masked_tokens(MASK, size)
    codes = dino.teacher_codes(classes, patches.flatten(0, 1)[buffer], weight, 0.05)
    close(codes[0], oracles.class_codes(classes.numpy(), 0.05))
    expected = oracles.patch_codes(patches.numpy(), MASK.numpy(), 0.05)
    for token, present, code in zip(buffer.tolist(), weight > 0, codes[1], strict=True):
        if present:
            close(code, expected[divmod(token, P)])


def test_the_dino_loss_is_the_mean_over_pairs_of_different_crops(dino) -> None:
    student, codes = scores_of(V, B, K), scores_of(A, B, K).softmax(dim=-1)
    close(dino.dino_loss(student, codes), oracles.dino_loss(student.numpy(), codes.numpy(), 0.1))


@pytest.mark.parametrize("size", SIZES)
def test_the_patch_loss_is_the_mean_over_images_of_their_masked_patches(dino, size) -> None:
    student, teacher = scores_of(len(MASK), P, K), scores_of(len(MASK), P, K)
    buffer, weight = dino.masked_tokens(MASK, size)
    _, codes = dino.teacher_codes(
        scores_of(A, B, K), teacher.flatten(0, 1)[buffer], weight, epsilon=0.05
    )
    loss = dino.patch_loss(student.flatten(0, 1)[buffer], codes, weight, len(MASK))
    of_places = oracles.patch_codes(teacher.numpy(), MASK.numpy(), 0.05)
    # The weights of the tokens are in float32.
    close(loss, oracles.patch_loss(student.numpy(), of_places, 0.1), atol=1e-6)


def test_as_many_patches_are_masked_as_asked_for_and_others_each_time(example) -> None:
    mask_patches = example("encoder").mask_patches
    count = torch.arange(17)
    mask = mask_patches(count, 16)
    assert mask.sum(dim=1).tolist() == count.tolist()
    assert not torch.equal(mask, mask_patches(count, 16))


def test_epsilon_follows_the_temperature_of_the_teacher(dino) -> None:
    temperatures = [dino.teacher_temperature(progress) for progress in (0, 0.15, 0.3, 1)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_the_teacher_is_a_moving_average_of_the_student(example) -> None:
    encoder = example("encoder")
    student = nn.Sequential(nn.Linear(3, 2), PrototypeLayer(2, 4))
    teacher = copy.deepcopy(student)
    expected = [parameter.detach().double().numpy().copy() for parameter in teacher.parameters()]
    for momentum in (0.9, 0.5):
        for parameter in student.parameters():
            nn.init.normal_(parameter)
        encoder.follow(teacher, student, momentum)
        for index, parameter in enumerate(student.parameters()):
            new = parameter.detach().double().numpy()
            expected[index] = momentum * expected[index] + (1 - momentum) * new
    for parameter, average in zip(teacher.parameters(), expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), average, rtol=0, atol=1e-6)


def test_the_encoder_does_not_see_masked_patches(example) -> None:
    encoder = example("encoder").PatchEncoder(1, 8, dim=8)
    mask = torch.arange(16) % 3 == 0
    images = torch.rand(1, 1, 8, 8)
    hidden = F.interpolate(mask.view(1, 1, 4, 4).double(), scale_factor=2) > 0
    others = torch.where(hidden, torch.rand_like(images), images)
    torch.testing.assert_close(encoder(images, mask[None]), encoder(others, mask[None]))
    assert not torch.allclose(encoder(images), encoder(others))
    assert encoder(images).shape == (1, 17, 8)
    assert encoder(torch.rand(1, 1, 6, 6)).shape == (1, 10, 8)  # smaller crops, fewer patches


# CAPI


def test_capi_codes_are_one_problem_for_each_position(example) -> None:
    scores = scores_of(B, P, K)
    codes = example("capi").codes_by_position(scores)
    close(codes, oracles.codes_by_position(scores.numpy(), 0.06))


def test_capi_losses_compare_at_the_same_place(example) -> None:
    capi = example("capi")
    scores, codes = scores_of(4, P, K), scores_of(4, P, K).softmax(dim=-1)
    given = scores.numpy(), codes.numpy()
    everywhere = np.ones((4, P), bool)
    close(capi.clustering_loss(scores, codes), oracles.same_place_loss(*given, everywhere, 0.12))
    expected = oracles.same_place_loss(*given, MASK.numpy(), 0.12)
    close(capi.prediction_loss(scores, codes, MASK), expected)


# DeepCluster-v2 and SeLa-v2


@pytest.fixture
def deepcluster(example) -> ModuleType:
    return example("deepclusterv2")


def test_kmeans_moves_centroids_on_the_sphere_and_keeps_those_of_empty_clusters(
    deepcluster,
) -> None:
    features = F.normalize(torch.rand(30, 4, dtype=torch.float64), dim=1)
    start = torch.cat([features[:3], -features[:1]])  # nothing is near the last one
    for iterations in (1, 2, 10):
        centroids, index = deepcluster.spherical_kmeans(features, start, iterations)
        expected = oracles.spherical_kmeans(features.numpy(), start.numpy(), iterations)
        close(centroids, expected[0])
        assert index.tolist() == expected[1]
        assert torch.equal(centroids[3], start[3])
        assert not torch.allclose(centroids[:3], start[:3])


def heads_and_bank(number: int) -> tuple[list[PrototypeLayer], Tensor]:
    return [PrototypeLayer(4, 3) for _ in range(number)], F.normalize(torch.rand(A, 30, 4), dim=-1)


def test_each_head_is_clustered_on_the_bank_of_another_code_view_in_turn(deepcluster) -> None:
    heads, bank = heads_and_bank(3)
    indices = deepcluster.cluster(bank, heads)
    for number, (head, index) in enumerate(zip(heads, indices, strict=True)):
        features = bank[number % A].double().numpy()
        # After 10 iterations these few features have found their clusters: nothing moves.
        centroids = head.weight.detach().double().numpy()
        again, nearest = oracles.spherical_kmeans(features, centroids, 1)
        np.testing.assert_allclose(centroids, again, rtol=0, atol=1e-6)
        assert index.tolist() == nearest


def test_every_crop_predicts_the_index_of_its_image(deepcluster) -> None:
    scores = [scores_of(V, B, K) for _ in range(3)]
    indices = [torch.randint(K, (B,)) for _ in range(3)]
    expected = [
        oracles.hard_target_loss(of_head.numpy(), index.numpy(), 0.1)
        for of_head, index in zip(scores, indices, strict=True)
    ]
    close(deepcluster.hard_target_loss(scores, indices), np.mean(expected))


def test_sela_spreads_the_whole_bank_over_the_prototypes(example) -> None:
    heads, bank = heads_and_bank(3)
    indices = example("selav2").spread(bank, heads)
    for number, (head, index) in enumerate(zip(heads, indices, strict=True)):
        scores = head(bank[number % A]).detach().double().numpy()
        codes = oracles.class_codes(scores[None], 0.05)[0]
        assert index.tolist() == codes.argmax(axis=1).tolist()


# MSN, of which the documentation says how it is done


def test_targets_of_msn_are_codes_of_the_logarithm_of_sharpened_predictions() -> None:
    scores = scores_of(B, K)
    codes = sinkhorn_knopp(F.log_softmax(scores / (0.1 * 0.25), dim=-1), epsilon=1.0)
    close(codes, oracles.msn_targets(oracles.sharpened(scores.numpy(), 0.1, 0.25)))


# The programs


@pytest.fixture
def few_images(example, monkeypatch: pytest.MonkeyPatch) -> None:
    methods = example("methods")
    load = methods.load_images

    def load_few(*arguments: str, **settings: int):
        images = load(*arguments, **settings)
        return dataclasses.replace(
            images, train=images.train[:300], train_labels=images.train_labels[:300]
        )

    monkeypatch.setattr(methods, "load_images", load_few)


@pytest.mark.slow
@pytest.mark.usefixtures("few_images")
@pytest.mark.parametrize("name", METHODS)
def test_each_runs_at_a_tiny_size(example, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "digits", "--epochs", "3", "--prototypes", "8", "--batch-size", "32"]
    accuracies = example(name).main([*arguments, "--device", "cpu"])
    shown = capsys.readouterr().out
    losses = re.findall(r"^epoch \d of 3: loss ([^,\n]+)", shown, flags=re.MULTILINE)
    assert len(losses) == 3
    assert all(math.isfinite(float(loss)) for loss in losses)
    assert float(losses[-1]) < float(losses[0])
    assert len(accuracies) == 2
    assert all(10 < accuracy <= 100 for accuracy in accuracies.values())
    for encoder, accuracy in accuracies.items():
        assert f"5-NN accuracy of {encoder}: {accuracy:.1f} %" in shown


@pytest.mark.parametrize("name", METHODS)
def test_each_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()) < 150


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--batch-size", "1"], "--batch-size must be at least 2 and at most 1437, got 1"),
        (["--batch-size", "2000"], "--batch-size must be at least 2 and at most 1437, got 2000"),
        (["--prototypes", "1438"], "--prototypes must be at least 1 and at most 1437, got 1438"),
    ],
    ids=str,
)
def test_a_bad_number_is_named(example, arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        example("dino").main(["--data", "digits", *arguments])
    assert message in capsys.readouterr().err
