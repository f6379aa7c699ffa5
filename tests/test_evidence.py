"""The evidence: its program resumes, its data are apart, and its tables are of its result file."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("evidence")


@pytest.fixture
def trials(evidence) -> ModuleType:
    return importlib.import_module("trials")


@pytest.fixture
def report(evidence) -> ModuleType:
    return importlib.import_module("report")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of 110 images and one of few, copies within and between them, a broken file."""
    root = tmp_path_factory.mktemp("drawings")
    generator = np.random.default_rng(0)
    for folder, count in {"cats": 110, "dogs": 110, "few": 3}.items():
        (root / folder).mkdir()
        for number in range(count):
            pixels = generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((40, 40), 0).save(root / folder / f"{number}.png")
    for link, of in {"cats/copy": "cats/0", "dogs/cat": "cats/1", "few/cat": "cats/1"}.items():
        (root / f"{link}.png").symlink_to(root / f"{of}.png")
    for number in range(10, 20):  # other drawings of the same shape
        with Image.open(root / "cats" / f"{number}.png") as image:
            image.point(lambda value: value // 2).save(root / "few" / f"darker{number}.png")
    (root / "dogs" / "broken.png").write_bytes(b"")
    return root


# The data


@pytest.mark.parametrize("validation", [False, True])
def test_copies_of_drawings_count_once_and_no_shape_is_on_both_sides(
    trials, drawings: Path, tmp_path: Path, validation: bool
) -> None:
    images = trials.drawings_of(drawings, tmp_path, validation)
    assert images.classes == ["cats", "dogs"]
    each = 15 if validation else 40
    assert images.held_out_labels.tolist() == [0] * each + [1] * each
    assert len(images.train) == 223 + 10 - 2 * 55  # a darker one is another drawing
    # Cat 1 is in three folders, and those of "few" are not enough for a class.
    assert (images.train_labels == -1).sum() == 1 + 3 + 10
    sides = []
    for side in (images.train, images.held_out):
        coarse = side.numpy().astype(float).mean(axis=1).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4))
        sides.append([tuple((image > image.mean()).flatten()) for image in coarse])
    assert not set(sides[0]) & set(sides[1])
    assert len(set(sides[1])) == len(sides[1])
    again = trials.drawings_of(drawings / "nowhere", tmp_path, validation)  # from the cache
    assert torch.equal(again.held_out, images.held_out)


def test_patches_of_test_and_validation_come_from_other_regions(trials, monkeypatch) -> None:
    """Photographs whose pixels are their own columns show where a patch comes from."""
    columns = np.tile(np.arange(250, dtype=np.uint8), (40, 1))
    for name in trials.PHOTOGRAPHS:
        monkeypatch.setattr(trials.data, name, lambda: columns, raising=False)
    test, validation = trials.patches_of(False), trials.patches_of(True)
    assert torch.equal(test.train, validation.train)
    assert test.train.max() < 0.55 * 250
    assert validation.held_out.min() >= 0.55 * 250 - 1
    assert validation.held_out.max() < 0.75 * 250
    assert test.held_out.min() >= 0.75 * 250 - 1


def test_the_histogram_of_colors(trials) -> None:
    images = torch.tensor([[0, 255, 31, 32], [64, 64, 0, 0], [255, 0, 0, 0]], dtype=torch.uint8)
    histogram = trials.colors_of(images.view(1, 3, 2, 2))
    expected = torch.zeros(512)
    expected[[0 + 2 * 8 + 7, 7 * 64 + 2 * 8, 0, 64]] = 0.5  # the root of a quarter
    torch.testing.assert_close(histogram, expected[None])


# The program


KINDS = [
    "digits-swav-seed0-epochs2-prototypes30",
    "digits-swav-seed0-epochs2-batch_size16-queue128-prototypes30",
    "digits-swav-seed0-epochs2-prototypes30-codessoftmax",
    "digits-simclr-seed0-epochs2-prototypes30",
    "digits-deepclusterv2-seed0-epochs2-prototypes30",
    "digits-selav2-seed0-epochs2-small_crops0-prototypes30",
    "digits-supervised10-*",
    "patches-random-*",
    "drawings-swav-*-codesprior0.5",
    "drawings-swav-*-codesrelaxed0.1",
    "drawings-colors-*",
    "digits-swav-*-targetdrawings",
]


@pytest.mark.slow
def test_a_job_of_each_kind_is_interrupted_and_resumed(
    evidence, trials, report, drawings, tmp_path, monkeypatch, capsys
) -> None:
    arguments = ["--quick", "--output", str(tmp_path), "--drawings", str(drawings), "--only"]
    monkeypatch.setattr(importlib.import_module("evaluation"), "STRENGTHS", (10.0,))
    monkeypatch.setattr(importlib.import_module("evaluation"), "DRAWS", 1)
    run, count = evidence.run, 0

    def interrupted(*parts):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return run(*parts)

    monkeypatch.setattr(evidence, "run", interrupted)
    assert evidence.main([*arguments, *KINDS]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.json"))) == 3
    assert evidence.main([*arguments, *KINDS]) == 0
    names = {path.stem for path in tmp_path.glob("*.json")}
    assert count == len(names) + 1
    assert evidence.main([*arguments, *KINDS]) == 0
    assert count == len(names) + 1  # nothing is trained again

    for pattern in KINDS:
        assert any(Path(name).match(pattern) for name in names), pattern
    content = report.collect(tmp_path, names, {KINDS[0]})
    results = json.loads(report.dumped(content))["jobs"]
    assert results.keys() == names
    for name, result in results.items():
        assert all(0 <= value <= 100 for value in result["accuracies"].values()), name
        assert result["held_out"] == "test"
    reference = results[KINDS[0]]
    assert len(reference["losses"]) == 2 * 4  # of 256 images in batches of 64
    assert all(len(values) == 2 for values in reference["epochs"].values())
    for figure in (report.curves, report.losses):
        base = trials.Job(epochs=2, prototypes=30)
        assert figure(results, {"digits": base}, evidence.seeds_of).axes


def test_without_drawings_the_others_are_trained(evidence, tmp_path, capsys) -> None:
    arguments = ["--quick", "--output", str(tmp_path), "--drawings", str(tmp_path / "none")]
    assert evidence.main([*arguments, "--only", "drawings-*", "*-targetdrawings"]) == 0
    assert "runs on drawings are left out" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_without_timm_the_others_are_trained(evidence, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evidence, "find_spec", lambda name: None)
    arguments = ["--quick", "--output", str(tmp_path), "--drawings", str(tmp_path)]
    assert evidence.main([*arguments, "--only", "*-networkresnet18*"]) == 0
    assert "runs of ResNet-18 are left out" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_resnet_18_of_timm(evidence, trials, drawings, tmp_path) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    images = evidence.few(trials.drawings_of(drawings, tmp_path, True))
    encoder = trials.ResNet18(3, 16).encoder.eval()
    features = trials.features_of(encoder, images.held_out)
    assert features.shape == (len(images.held_out), 512)
    assert encoder[:4](torch.zeros(1, 3, 32, 32)).shape == (1, 64, 16, 16)  # not pooled
    job = replace(evidence.RESNET, epochs=1, prototypes=30)
    assert len(trials.train_swav(job, images)[1]["losses"]) == len(images.train) // 64


def test_results_that_a_folder_lacks_are_those_of_the_result_file(
    evidence, trials, report, tmp_path, monkeypatch
) -> None:
    old, new = (replace(trials.Job(), seed=seed).name for seed in (0, 1))
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results.json")
    kept = {"losses": [0.5, 0.25]}
    gathered = {old: kept, new: {"losses": [1.0]}, "removed": {}}
    report.RESULTS.write_text(json.dumps({"jobs": gathered}))
    (tmp_path / f"{new}.json").write_text(json.dumps({"job": {}, "losses": [2.0] * 20}))
    jobs = report.collect(tmp_path, [old, new, "not run"], set())["jobs"]
    assert jobs == {old: kept, new: {"losses": [2.0, 2.0]}}


def test_the_quick_images_have_enough_labels_of_rare_classes(evidence, trials) -> None:
    labels = torch.full((4000,), -1)
    labels[:3000], labels[-20:] = 0, 1
    pixels = torch.zeros(4000, 1, 2, 2, dtype=torch.uint8)
    images = trials.Images(pixels, labels, pixels[:300], labels[:300], "test", ["a", "b"])
    few = evidence.few(images)
    assert (len(few.train), len(few.held_out)) == (256, 100)
    assert all((few.train_labels == label).sum() >= 10 for label in (0, 1))
    assert (few.train_labels == -1).sum() > 50


def test_codes_of_a_batch_with_all_images_are_those_of_all_images(evidence, trials) -> None:
    images = evidence.few(trials.load("digits", Path(), Path(), True))
    job = trials.Job(epochs=1, batch_size=256, prototypes=30)
    torch.manual_seed(0)
    assert trials.train_swav(job, images)[1]["same_codes"] == 100
    torch.manual_seed(0)
    job = trials.Job(epochs=1, batch_size=16, prototypes=30)
    assert trials.train_swav(job, images)[1]["same_codes"] < 60


# The page


def test_the_tables_are_those_of_the_result_file(evidence, report) -> None:
    content = json.loads(report.RESULTS.read_text("utf-8"))
    documents = report.documents(content, evidence.EXPERIMENTS, evidence.CLAIMS, evidence.seeds_of)
    assert report.PAGE in documents
    for path, text in documents.items():
        assert path.read_text("utf-8") == text, f"evidence.py --gather writes {path.name}"
    assert report.RESULTS.stat().st_size < 2**20


def results_of(job, values: list[float]) -> dict:
    return {
        replace(job, seed=seed).name: {"accuracies": {"linear_10": value}}
        for seed, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [
        ([95.0, 96.0, 97.0], [90.0, 92.0, 92.5], ["+4.5 ± 0.5", "came out"]),
        ([90.0, 92.0, 92.5], [95.0, 96.0, 97.0], ["-4.5 ± 0.5", "did not"]),
        ([95.0, 96.0, 97.0], [94.0, 97.0, 96.0], ["+0.3 ± 1.2", "cannot be told at this scale"]),
        ([95.0, 96.0], [94.0, 97.0, 96.0], ["not run", "not run"]),
    ],
)
def test_a_verdict_needs_all_seeds_and_a_difference_above_its_error(
    evidence, trials, report, better, worse, expected
) -> None:
    jobs = trials.Job(), trials.Job(epochs=3)
    claim = evidence.Claim("", "", *jobs)
    results = results_of(jobs[0], better) | results_of(jobs[1], worse)
    assert report.verdict(claim, results, evidence.seeds_of) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "not run"),
        ([90.0], "90.0 (1 seed)"),
        ([90.0, 92.0], "91.0 ± 1.4 (2 seeds)"),
        ([90.0, 92.0, 94.0], "92.0 ± 2.0"),
        ([math.nan] * 3, "–"),
        (["b", "a", "b"], "a; b"),
    ],
)
def test_a_cell_says_how_many_seeds_it_is_of(report, values, expected) -> None:
    assert report.cell(values, 3) == expected
