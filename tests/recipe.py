"""Runs the published recipe in this process, with a small network, on images that are made here."""

from __future__ import annotations

import dataclasses
import importlib
import io
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"
CLASSES = ("n01", "n02")


def write_images(folder: Path, train: int = 16, val: int = 2) -> None:
    """Write JPEG images of ``CLASSES``, which differ in color; the numbers are of a class."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        for part, count in ("train", train), ("val", val):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                values = generator.integers(0, 200, (12, 16, 3), dtype=np.uint8)
                values[..., label] = 255
                image = Image.fromarray(values).resize((160, 120))
                image.save(folder / part / name / f"{index}.JPEG")


class Small(nn.Sequential):
    """A network with the interface of timm's."""

    def __init__(self) -> None:
        convolution = nn.Conv2d(3, 6, 8, stride=8, bias=False)
        pooled = nn.AdaptiveAvgPool2d(2), nn.Flatten()
        super().__init__(convolution, nn.BatchNorm2d(6), nn.ReLU(), *pooled)
        self.num_features = 24


class SGD(torch.optim.SGD):
    """Takes what timm's Lars takes; ``test_lars_is_the_authors`` shows what Lars does."""

    def __init__(self, params: Any, *, trust_coeff: float, **settings: float) -> None:
        assert trust_coeff == 0.001
        super().__init__(params, **settings)


@contextmanager
def imported(rank: int = 0, size: int = 1) -> Iterator[types.ModuleType]:
    """Import the recipe with stand-ins for timm, as one of the ranks of a group that exists."""
    timm, optimizers = types.ModuleType("timm"), types.ModuleType("timm.optim")
    timm.create_model = lambda name, num_classes: Small()  # type: ignore[attr-defined]
    optimizers.Lars = SGD  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        for name, module in {"timm": timm, "timm.optim": optimizers}.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "imagenet", raising=False)
        processes = importlib.import_module("processes")
        patch.setattr(processes, "RANK", rank)
        patch.setattr(processes, "SIZE", size)
        if size > 1:
            patch.setattr(processes, "join", lambda device: None)
            patch.setattr(processes, "leave", lambda: None)
        recipe = importlib.import_module("imagenet")
        # 3,840 slots take most of the time.
        small = dataclasses.replace(recipe.RECIPES["small-batch"], queue_length=64, queue_epochs=1)
        patch.setitem(recipe.RECIPES, "small-batch", small)
        yield recipe
    sys.modules.pop("imagenet", None)


def train(recipe: types.ModuleType, data: Path, output: Path, *options: str) -> None:
    """Run two epochs with batches of 16 images."""
    settings = ["--epochs", "2", "--batch-size", "16", "--workers", "0", "--network", "small"]
    recipe.main(["--data", str(data), "--output", str(output), *settings, *options])


class Crash(BaseException):
    """Stands for a program that is killed."""


def interrupted(
    recipe: types.ModuleType, data: Path, output: Path, *options: str, module: Any, name: str
) -> None:
    """Train, be killed by the first call of a function in the second epoch, and continue."""
    function = getattr(module, name)

    def crash(*arguments: Any) -> Any:
        if (output / "checkpoint.pt").exists():
            raise Crash
        return function(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, crash)
        with pytest.raises(Crash):
            train(recipe, data, output, *options)
    train(recipe, data, output, *options)


def checkpoint(output: Path) -> dict[str, Any]:
    """Return what the checkpoint holds."""
    content: dict[str, Any] = torch.load(output / "checkpoint.pt", weights_only=True)
    content["ranks"] = [torch.load(io.BytesIO(own), weights_only=True) for own in content["ranks"]]
    return content


def assert_same(first: Any, second: Any) -> None:
    """Compare nested values to the last bit."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        first, second = list(first.values()), list(second.values())
    if isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    else:
        assert first == second
