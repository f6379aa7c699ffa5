"""SimCLR with multi-crop learns, its loss is NT-Xent, and the sheet of crops is drawn."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import bench_multicrop, crop_pipelines
from swavkit.multicrop import box_ops

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"


@pytest.fixture
def simclr(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("simclr")


def nt_xent_oracle(one: np.ndarray, other: np.ndarray, temperature: float) -> float:
    """Chen et al. 2020, equation 1, over both directions, in loops."""
    features = [*one, *other]
    losses = []
    for i, anchor in enumerate(features):
        partner = (i + len(one)) % len(features)
        similarities = [
            np.exp(anchor @ f / np.linalg.norm(anchor) / np.linalg.norm(f) / temperature)
            for f in features
        ]
        others = sum(value for k, value in enumerate(similarities) if k != i)
        losses.append(-np.log(similarities[partner] / others))
    return float(np.mean(losses))


def test_the_loss_contrasts_every_crop_with_both_full_ones(simclr):
    features = torch.randn(4, 5, 3, dtype=torch.float64)
    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    expected = np.mean(
        [nt_xent_oracle(features[a].numpy(), features[b].numpy(), 0.2) for a, b in pairs]
    )
    assert simclr.multi_crop_nt_xent(features).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_simclr_learns_with_multi_crop(simclr, capsys):
    results = simclr.main(["--data", "digits", "--epochs", "3", "--batch-size", "128"])
    # 14 points were seen; a training that does not start gains nothing.
    assert results["SimCLR"]["linear_10"] > results["random encoder"]["linear_10"] + 5
    assert "epoch 3 of 3" in capsys.readouterr().out


def test_the_sheet_of_crops(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("crop_sheet").main(["--output", str(tmp_path / "new" / "crops.png")])
    with Image.open(tmp_path / "new" / "crops.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 24)) > 1000  # not blank


def test_the_benchmark_refuses_wrong_crops(monkeypatch):
    photograph = crop_pipelines.tensors(crop_pipelines.photographs()[2:3])[0]
    assert bench_multicrop.largest_error(photograph) <= bench_multicrop.TOLERANCE
    cut = box_ops.cut
    monkeypatch.setattr(box_ops, "cut", lambda *arguments: cut(*arguments).roll(1, -1))
    assert bench_multicrop.largest_error(photograph) > bench_multicrop.TOLERANCE
