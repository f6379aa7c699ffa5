"""Checkpoints into prototypes that lie in parts on the ranks, and out of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from swavkit import PrototypeLayer, SwAVLoss, load_pretrained, pretrained_state_dict
from tests.ranks import Ranks, refusal

pytestmark = pytest.mark.distributed

D = 4


class Network(nn.Module):
    """The names of a ResNet, as far as they are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, block = nn.Conv2d(3, 6, 7, bias=False), nn.Module()
        block.conv1 = nn.Conv2d(6, 6, 3, bias=False)
        self.layer1 = nn.Sequential(block)


def through_shards(rank: int, size: int) -> bool:
    torch.manual_seed(0)  # the same file on all ranks
    weights = [torch.randn(size, D), torch.randn(2, D)]
    source = {f"prototypes.prototypes{head}.weight": w for head, w in enumerate(weights)}
    torch.manual_seed(rank)
    criterion = SwAVLoss(D, (size, 2), shard_prototypes=True)
    report = load_pretrained(source, prototypes=criterion)
    assert report.loaded == ("prototypes.0.weight", "prototypes.1.weight")
    wrong = {**source, "prototypes.prototypes1.weight": torch.ones(3, D)}
    with pytest.raises(
        ValueError, match=r"\(3, 4\) in prototypes\.prototypes1\.weight, got \(2, 4"
    ):
        load_pretrained(wrong, prototypes=criterion)
    found = pretrained_state_dict(Network(), prototypes=criterion)
    return all(torch.equal(found[name], value) for name, value in source.items())


@pytest.mark.parametrize("size", [7, 2])  # uneven, and a rank without prototypes
def test_each_rank_loads_its_part_and_all_come_out_again(ranks: Ranks, size: int) -> None:
    assert ranks.run(through_shards, [size] * ranks.size) == [True] * ranks.size


def under_fsdp(rank: int, _: Any) -> list[str]:
    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(0)
    network, prototypes = Network(), PrototypeLayer(D, 5)
    source = pretrained_state_dict(network, prototypes=prototypes)
    modules = {"network": network, "prototypes": prototypes}
    for module in modules.values():
        fully_shard(module, mesh=mesh)
    out = pretrained_state_dict(network, prototypes=prototypes)
    assert out.keys() == source.keys()
    assert all(torch.equal(out[name], value) for name, value in source.items())
    return [
        refusal(lambda name=name, module=module: load_pretrained(source, **{name: module}))
        for name, module in modules.items()
    ]


def test_shards_of_fsdp_are_refused_by_name(ranks: Ranks) -> None:
    for network, prototypes in ranks.run(under_fsdp, [None] * ranks.size):
        assert "network.conv1.weight must be a whole tensor, got a sharded DTensor" in network
        assert "prototypes.weight must be a whole tensor" in prototypes
        assert "before fully_shard" in prototypes
