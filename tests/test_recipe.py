"""The published recipe trains, goes on after a kill, and has the published numbers."""

from __future__ import annotations

import ast
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import swavkit
from swavkit import load_pretrained
from tests import recipe as runner

PROGRAM = runner.EXAMPLES / "imagenet.py"
SHORT = sorted((runner.EXAMPLES / "recipes").glob("*.py"))


def test_it_has_less_than_300_lines() -> None:
    assert len(PROGRAM.read_text("utf-8").splitlines()) < 300


@pytest.mark.parametrize("path", SHORT, ids=lambda path: path.stem)
def test_short_recipes_have_at_most_60_lines_and_use_public_names(path: Path) -> None:
    """``fsdp2`` is run by a test. The others need packages that the tests do not have."""
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= 60
    tree = ast.parse(source)
    compile(tree, path, "exec")
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules = [node.module for node in imports if str(node.module).startswith("swavkit")]
    assert modules == ["swavkit"]
    names = {alias.name for node in imports if node.module == "swavkit" for alias in node.names}
    assert {"SwAVLoss", "MultiCropTransform"} <= names <= set(swavkit.__all__)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    runner.write_images(folder)
    return folder


@pytest.mark.slow
def test_it_trains_and_a_killed_run_ends_like_an_uninterrupted_one(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--recipe", "small-batch"]
    with runner.imported() as recipe:
        runner.train(recipe, data, tmp_path / "whole", *options)
        shown = capsys.readouterr().out
        killed = tmp_path / "killed"
        runner.interrupted(recipe, data, killed, *options, module=recipe.os, name="replace")
        after = capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"'recipe': 'small-batch'.*got .*'large-batch'"):
            runner.train(recipe, data, tmp_path / "whole")
    lines = re.findall(r"^epoch (\d), step (\d): loss (\S+) \(codes .* ln K 8\.01\)", shown, re.M)
    assert [(epoch, step) for epoch, step, _ in lines] == [("1", "2"), ("2", "4")]
    assert all(5 < float(loss) < math.log(3000) + 20 for *_, loss in lines)
    assert re.search(r"^20-NN accuracy: (\d+\.\d)%$", shown, re.M)
    assert "continuing after epoch 1" in after
    whole = runner.checkpoint(tmp_path / "whole")
    assert whole["epoch"] == 2
    assert whole["ranks"][0]["criterion"]["queue.valid"].sum() == 64
    runner.assert_same(whole, runner.checkpoint(killed))
    encoder = runner.Small()
    assert not load_pretrained(tmp_path / "whole" / "checkpoint.pt", network=encoder).missing


def test_learning_rates_are_those_of_the_table() -> None:
    steps, epochs = 5, 40
    with runner.imported() as recipe:
        found = {
            name: [recipe.learning_rate(step, one, steps, epochs) for step in range(steps * epochs)]
            for name, one in recipe.RECIPES.items()
        }
    for name, first, top, warmup in ("large-batch", 0.3, 4.8, 10), ("small-batch", 0.6, 0.6, 0):
        expected = list(np.linspace(first, top, warmup * steps))
        rest = (epochs - warmup) * steps
        for step in range(rest):
            cosine = (1 + math.cos(math.pi * step / rest)) / 2
            expected.append(0.001 * top + 0.999 * top * cosine)
        np.testing.assert_allclose(found[name], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "--data: there are no images 'nowhere/train/CLASS/IMAGE.JPEG'"),
        (["--batch-size", "64"], "--batch-size must be at most 32, the images, got 64"),
    ],
)
def test_mistakes_are_named(data: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with runner.imported() as recipe, pytest.raises(SystemExit, match=re.escape(message)):
        runner.train(recipe, data, tmp_path, *options)


def test_different_classes_are_found_before_training(tmp_path: Path) -> None:
    runner.write_images(tmp_path, train=8, val=1)
    (tmp_path / "val" / "n02").rename(tmp_path / "val" / "n03")
    with runner.imported() as recipe, pytest.raises(SystemExit, match="must be the same"):
        runner.train(recipe, tmp_path, tmp_path)


def test_a_missing_package_is_named() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(runner.EXAMPLES))
        patch.setitem(sys.modules, "timm", None)
        patch.delitem(sys.modules, "imagenet", raising=False)
        with pytest.raises(SystemExit, match=r"timm.*pip install \"timm>=1\.0\.31\" tqdm"):
            __import__("imagenet")


def test_neighbors_vote_with_their_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(runner.EXAMPLES))
    import neighbors

    features = nn.functional.normalize(torch.randn(40, 5, dtype=torch.float64))
    rows = nn.functional.normalize(torch.randn(9, 5, dtype=torch.float64))
    labels = torch.randint(0, 4, (40,))
    expected = []
    for row in rows.numpy():
        similarity = [
            (float(row @ other), int(label))
            for other, label in zip(features.numpy(), labels, strict=True)
        ]
        votes = [0.0] * 4
        for cosine, label in sorted(similarity, reverse=True)[:20]:
            votes[label] += math.exp(cosine / 0.07)
        expected.append(votes.index(max(votes)))
    assert neighbors.vote(rows, features, labels).tolist() == expected
    assert neighbors.vote(features[:3], features[:5], labels[:5]).tolist() == labels[:3].tolist()


def test_lars_is_the_authors() -> None:
    """LARC without clipping around SGD with momentum: all parameters are decayed and adapted.

    A gradient of zeros, that of frozen prototypes, is the exception: timm decays the parameter,
    which only rescales it.
    """
    optimizers = pytest.importorskip("timm.optim", reason="timm is not installed")
    start = [
        torch.randn(4, 3, dtype=torch.float64),
        torch.zeros(3).double(),
        torch.randn(5).double(),
    ]
    parameters = [nn.Parameter(value.clone()) for value in start]
    decay, momentum = 1e-2, 0.9
    optimizer = optimizers.Lars(
        parameters, lr=1.0, momentum=momentum, weight_decay=decay, trust_coeff=0.001
    )
    expected = [value.numpy().copy() for value in start]
    buffers = [np.zeros_like(value) for value in expected]
    for step in range(4):
        rate = 0.5 + step
        optimizer.param_groups[0]["lr"] = rate
        for index, parameter in enumerate(parameters):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            value, direction = expected[index], gradient.numpy().copy()
            length, size = np.linalg.norm(value), np.linalg.norm(direction)
            if length > 0 and size > 0:
                trust = 0.001 * length / (size + decay * length + 1e-8)
                direction = trust * (direction + decay * value)
            buffers[index] = momentum * buffers[index] + direction
            expected[index] = value - rate * buffers[index]
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-10)
    frozen = nn.Parameter(start[0].clone())
    frozen.grad = torch.zeros_like(frozen)
    optimizers.Lars([frozen], lr=1.0, weight_decay=decay, trust_coeff=0.001).step()
    torch.testing.assert_close(frozen.detach(), (1 - decay) * start[0])
