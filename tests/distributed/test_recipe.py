"""The published recipe on two ranks: it trains, and goes on after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import recipe as runner
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

OPTIONS = ["--recipe", "small-batch", "--crops", "device"]


def trainings(rank: int, folder: Path) -> None:
    with runner.imported(rank, 2) as recipe:
        runner.train(recipe, folder, folder / "whole", *OPTIONS)
        killed = folder / "killed"
        runner.interrupted(recipe, folder, killed, *OPTIONS, module=recipe, name="evaluate")


def test_a_killed_run_ends_like_an_uninterrupted_one(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    runner.write_images(tmp_path)
    start_ranks(2).run(trainings, [tmp_path] * 2)
    whole = runner.checkpoint(tmp_path / "whole")
    assert whole["epoch"] == 2
    first, second = whole["ranks"]
    weights = [own["criterion"]["prototypes.weight"] for own in (first, second)]
    assert torch.equal(*weights)
    queues = [own["criterion"]["queue.features"] for own in (first, second)]
    assert not torch.equal(*queues)  # of different images
    assert [own["criterion"]["queue.valid"].sum() for own in (first, second)] == [32, 32]
    runner.assert_same(whole, runner.checkpoint(tmp_path / "killed"))
