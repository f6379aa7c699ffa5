"""Checkpoints of every layout, written here under the names that their authors use."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swavkit import LoadReport, PrototypeLayer, SwAVLoss, load_pretrained, pretrained_state_dict
from tests.states import same, snapshot

ROOT = Path(__file__).resolve().parent.parent
FIRST_CHECKPOINT = ROOT / "tests" / "data" / "swav_loss_v1.pt"
D, K = 6, 5
PARTS = ("network", "projection_head", "prototypes")
State = dict[str, Tensor]


class Bottleneck(nn.Module):
    """A block with the names of torchvision's."""

    def __init__(self, channels_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or channels_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, 4 * width, 1, stride, bias=False),
                nn.BatchNorm2d(4 * width),
            )

    def forward(self, images: Tensor) -> Tensor:
        around = images if self.downsample is None else self.downsample(images)
        inner = self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(images))))))
        return self.relu(self.bn3(self.conv3(inner)) + around)


class ResNet(nn.Module):
    """A ResNet with the names and the order of torchvision's; (3, 4, 6, 3) of 64 is ResNet-50."""

    def __init__(
        self, blocks: tuple[int, ...] = (1, 1, 1, 1), width: int = 2, classes: int = 10
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, count in enumerate(blocks):
            layer = nn.Sequential()
            for index in range(count):
                stride = 2 if stage and not index else 1
                layer.append(Bottleneck(channels, width * 2**stage, stride))
                channels = 4 * width * 2**stage
            setattr(self, f"layer{stage + 1}", layer)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc: nn.Module = nn.Linear(channels, classes) if classes else nn.Identity()
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        found = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        found = self.layer4(self.layer3(self.layer2(self.layer1(found))))
        return self.fc(self.avgpool(found).flatten(1))


def head_of(channels: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels, 8, bias=bias), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, D)
    )


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fill all entries with values, also those that a new module has as zeros or ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif "num_batches" in name:
            value.fill_(7 + seed)
    return module


def named(prefix: str, module: nn.Module) -> State:
    return {f"{prefix}{name}": value.clone() for name, value in module.state_dict().items()}


class Theirs:
    """Somebody's model: a ResNet without classifier, a head and weights of prototypes."""

    def __init__(self, heads: tuple[int, ...] = (K,), bias: bool = True) -> None:
        self.network = randomized(ResNet(classes=0), seed=1)
        self.head = randomized(head_of(self.network.channels, bias), seed=2)
        self.weights = [torch.randn(size, D) for size in heads]


class Ours:
    """The modules to be loaded into."""

    def __init__(self, heads: int | tuple[int, ...] = K, bias: bool = True) -> None:
        self.network = randomized(ResNet(), seed=3)
        self.projection_head = randomized(head_of(self.network.channels, bias), seed=4)
        self.prototypes = SwAVLoss(D, heads, queue_length=4)

    def load(self, source: Any, *parts: str) -> LoadReport:
        return load_pretrained(source, **{part: getattr(self, part) for part in parts or PARTS})

    def state(self) -> list[Tensor]:
        modules = (self.network, self.projection_head, self.prototypes)
        return [value.clone() for module in modules for value in module.state_dict().values()]

    def weights(self) -> list[Tensor]:
        layers = self.prototypes.prototypes
        several = isinstance(layers, nn.ModuleList)
        return [layer.weight for layer in (layers if several else [layers])]


def published(theirs: Theirs, prefix: str = "module.") -> State:
    state = named(prefix, theirs.network) | named(f"{prefix}projection_head.", theirs.head)
    if len(theirs.weights) == 1:
        return state | {f"{prefix}prototypes.weight": theirs.weights[0].clone()}
    return state | {
        f"{prefix}prototypes.prototypes{index}.weight": weight.clone()
        for index, weight in enumerate(theirs.weights)
    }


def vissl(theirs: Theirs) -> dict[str, Any]:
    heads = named("0.projection_head.", theirs.head)
    for index, weight in enumerate(theirs.weights):
        heads[f"0.prototypes{index}.weight"] = weight.clone()
    trunk = named("_feature_blocks.", theirs.network)
    model = {"model": {"trunk": trunk, "heads": heads}, "meters": {}}
    return {"phase_idx": 3, "classy_state_dict": {"base_model": model, "optimizer": {}}}


def lightly(theirs: Theirs, sequential: bool = False) -> State:
    backbone: nn.Module = theirs.network
    if sequential:
        backbone = nn.Sequential(*list(theirs.network.children())[:-1])
    state = named("backbone.", backbone) | named("projection_head.layers.", theirs.head)
    for index, weight in enumerate(theirs.weights):
        state[f"prototypes.heads.{index}.weight"] = weight.clone()
        state[f"prototypes.heads.{index}.bias"] = torch.randn(len(weight))
    return state


def solo_learn(theirs: Theirs) -> dict[str, Any]:
    [weight] = theirs.weights
    state = named("backbone.", theirs.network) | named("projector.", theirs.head)
    state["classifier.weight"] = torch.randn(10, theirs.network.channels)
    state["prototypes.weight_g"] = torch.ones(len(weight), 1)
    state["prototypes.weight_v"] = weight.clone()
    return {"epoch": 9, "global_step": 90, "state_dict": state, "optimizer_states": [{}]}


def swavkit_state(theirs: Theirs) -> dict[str, Any]:
    heads = [len(weight) for weight in theirs.weights]
    criterion = SwAVLoss(D, heads if len(heads) > 1 else heads[0], queue_length=3)
    layers = criterion.prototypes
    for layer, weight in zip(layers if len(heads) > 1 else [layers], theirs.weights, strict=True):
        layer.weight.data.copy_(weight)
    model = nn.Module()
    model.network, model.criterion = nn.Module(), criterion
    model.network.encoder, model.network.projection_head = theirs.network, theirs.head
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"params": [0]}]}
    return {"model": named("module.", model), "optimizer": optimizer}


LAYOUTS: dict[str, tuple[str, Callable[[Theirs], Any]]] = {
    "published": ("published", published),
    "published, no prefix": ("published", lambda theirs: published(theirs, "")),
    "published, nested": (
        "published",
        lambda theirs: {"epoch": 800, "state_dict": published(theirs), "optimizer": {"state": {}}},
    ),
    "vissl": ("vissl", vissl),
    "lightly": ("lightly", lightly),
    "lightly, sequential": ("lightly", lambda theirs: lightly(theirs, sequential=True)),
    "solo-learn": ("solo-learn", solo_learn),
    "swavkit": ("swavkit", swavkit_state),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def assert_loaded(ours: Ours, theirs: Theirs, weights: list[Tensor] | None = None) -> None:
    found = ours.network.state_dict()
    for name, value in theirs.network.state_dict().items():
        assert torch.equal(found[name], value), name
    for name, value in theirs.head.state_dict().items():
        assert torch.equal(ours.projection_head.state_dict()[name], value), name
    for found_weight, weight in zip(ours.weights(), weights or theirs.weights, strict=True):
        assert torch.equal(found_weight, weight)


# What is loaded


@each_layout
@pytest.mark.parametrize("legacy", [None, False, True])
def test_all_parts_of_every_layout(layout: str, legacy: bool | None, tmp_path: Path) -> None:
    name, written = LAYOUTS[layout]
    theirs, ours = Theirs(), Ours()
    classifier = ours.network.fc.weight.clone()
    source = written(theirs)
    if legacy is not None:
        torch.save(source, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
        source = tmp_path / "file" if legacy else str(tmp_path / "file")
    report = ours.load(source)
    expected = theirs.weights
    if layout == "solo-learn":
        expected = [weight / weight.norm(dim=1, keepdim=True) for weight in theirs.weights]
        torch.testing.assert_close(ours.weights(), expected)
        expected = ours.weights()
    assert_loaded(ours, theirs, expected)
    assert report.layout == name
    assert report.missing == ("network.fc.weight", "network.fc.bias")
    assert torch.equal(ours.network.fc.weight, classifier)
    entries = [len(module.state_dict()) for module in (theirs.network, theirs.head)]
    assert len(report.loaded) == sum(entries) + 1
    assert set(report.renamed.values()) == set(report.loaded)
    assert "network.layer1.0.downsample.1.running_var" in report.loaded
    unused = {
        "lightly": {"a cosine has no bias"},
        "solo-learn": {"a classifier"},
        "swavkit": {"the state of a training"},
    }
    assert set(report.unused.values()) == unused.get(name, set())


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "solo-learn"])
def test_several_heads(layout: str) -> None:
    theirs, ours = Theirs(heads=(K, 3, 2, *[2] * 9)), Ours(heads=(K, 3, 2, *[2] * 9))
    report = ours.load(LAYOUTS[layout][1](theirs))
    assert_loaded(ours, theirs)
    assert {f"prototypes.{head}.weight" for head in range(12)} <= {*report.loaded}


@each_layout
@pytest.mark.parametrize("part", PARTS)
def test_one_part_alone(layout: str, part: str) -> None:
    theirs, ours = Theirs(), Ours()
    before = {other: getattr(ours, other).state_dict() for other in PARTS if other != part}
    before = {other: {k: v.clone() for k, v in state.items()} for other, state in before.items()}
    report = ours.load(LAYOUTS[layout][1](theirs), part)
    assert all(name.startswith(f"{part}.") for name in report.loaded)
    for other, state in before.items():
        assert f"{other} is not given" in report.unused.values()
        for name, value in getattr(ours, other).state_dict().items():
            assert torch.equal(value, state[name])


def test_names_of_the_report() -> None:
    theirs, ours = Theirs(), Ours()
    report = ours.load(published(theirs))
    assert report.renamed["module.conv1.weight"] == "network.conv1.weight"
    assert report.renamed["module.projection_head.3.bias"] == "projection_head.3.bias"
    assert report.renamed["module.prototypes.weight"] == "prototypes.weight"
    report = ours.load(vissl(theirs))
    assert report.renamed["trunk._feature_blocks.bn1.bias"] == "network.bn1.bias"
    assert report.renamed["heads.0.prototypes0.weight"] == "prototypes.weight"
    report = ours.load(lightly(theirs, sequential=True))
    assert report.renamed["backbone.4.0.conv1.weight"] == "network.layer1.0.conv1.weight"
    assert report.unused == {"prototypes.heads.0.bias": "a cosine has no bias"}


def test_the_report_is_a_table() -> None:
    source = {
        "prototypes.heads.0.weight": torch.ones(K, D),
        "prototypes.heads.0.bias": torch.ones(K),
    }
    source |= named("projection_head.layers.", nn.Linear(4, D))
    report = load_pretrained(
        source, prototypes=PrototypeLayer(D, K), projection_head=nn.Linear(4, D)
    )
    assert str(report).splitlines() == [
        "layout lightly: 3 entries loaded, 0 missing, 1 unused",
        "checkpoint                     module                  result",
        "projection_head.layers.weight  projection_head.weight  loaded",
        "projection_head.layers.bias    projection_head.bias    loaded",
        "prototypes.heads.0.weight      prototypes.weight       loaded",
        "prototypes.heads.0.bias                                unused: a cosine has no bias",
    ]


def test_torchvision() -> None:
    theirs, network = randomized(ResNet(classes=1000), seed=1), randomized(ResNet(), seed=3)
    classifier = network.fc.weight.clone()
    report = load_pretrained(named("", theirs), network=network)
    assert report.layout == "torchvision"
    assert report.unused == dict.fromkeys(("fc.weight", "fc.bias"), "a classifier")
    assert torch.equal(network.layer4[0].bn3.running_mean, theirs.layer4[0].bn3.running_mean)
    assert torch.equal(network.fc.weight, classifier)


@each_layout
def test_into_children_and_wrappers_of_a_resnet(layout: str) -> None:
    theirs, (_, written) = Theirs(), LAYOUTS[layout]
    images = torch.rand(2, 3, 32, 32)
    expected = theirs.network.eval()(images)
    sequential = nn.Sequential(*list(ResNet().children())[:-1])
    wrapper = nn.Sequential(ResNet(classes=0), nn.Linear(64, D))
    for network, called in [(sequential, sequential), (wrapper, wrapper[0])]:
        report = load_pretrained(written(theirs), network=network)
        assert torch.equal(called.eval()(images).flatten(1), expected)
    assert report.missing == ("network.1.weight", "network.1.bias")


def test_a_network_without_the_last_stages() -> None:
    theirs = Theirs()
    network = ResNet()
    del network.layer4, network.layer3
    report = load_pretrained(published(theirs), network=network)
    assert "network.layer2.0.conv3.weight" in report.loaded
    assert "module.layer4.0.conv3.weight" in report.unused


def test_files_without_counters_of_batches() -> None:
    theirs, ours = Theirs(), Ours()
    old = {name: value for name, value in published(theirs).items() if "num_batches" not in name}
    report = ours.load(old)
    assert "network.bn1.running_mean" in report.loaded
    assert "network.bn1.num_batches_tracked" in report.missing
    assert ours.network.bn1.num_batches_tracked == 10


def test_layers_of_a_head_are_matched_in_order() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, D)

    theirs, head = Theirs(), Head()
    report = load_pretrained(published(theirs), projection_head=head)
    assert torch.equal(head.last.weight, theirs.head[3].weight)
    assert torch.equal(head.norm.running_var, theirs.head[1].running_var)
    assert report.renamed["module.projection_head.1.running_var"] == (
        "projection_head.norm.running_var"
    )
    single = {"module.projection_head.weight": torch.ones(D, 64)}
    for linear in (nn.Linear(64, D, bias=False), nn.Sequential(nn.Linear(64, D, bias=False))):
        load_pretrained(single, projection_head=linear)
        assert torch.equal(*linear.state_dict().values(), torch.ones(D, 64))


def test_numbered_layers_are_matched_by_their_numbers() -> None:
    theirs = randomized(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), 8)
    state = {f"projection_head.{name}": value for name, value in theirs.state_dict().items()}
    head = nn.ModuleDict({"first": nn.Linear(8, 8), "last": nn.Linear(8, 8)})
    load_pretrained(dict(reversed(state.items())), projection_head=head)
    assert torch.equal(head["first"].weight, theirs[0].weight)
    assert torch.equal(head["last"].bias, theirs[2].bias)


def test_equal_names_count_more_than_the_order() -> None:
    theirs, head = (randomized(head_of(8), seed) for seed in (8, 9))
    state = snapshot(theirs)
    source = {f"projection_head.{name}": state[name] for name in reversed(state)}
    load_pretrained(source, projection_head=head)
    assert same(head.state_dict(), state)


def test_a_head_without_the_bias_of_a_batch_norm() -> None:
    theirs, ours = Theirs(bias=False), Ours(bias=False)
    ours.load(lightly(theirs))
    assert_loaded(ours, theirs)


def test_other_kinds_of_prototypes() -> None:
    theirs = Theirs(heads=(K, 3))
    layers = nn.ModuleList([PrototypeLayer(D, K), PrototypeLayer(D, 3)])
    load_pretrained(published(theirs), prototypes=layers)
    assert torch.equal(layers[1].weight, theirs.weights[1])
    scores = layers[0](torch.randn(4, D))
    assert scores.abs().max() <= 1 + 1e-6  # for weights of any norm


def test_the_state_of_a_training_stays() -> None:
    ours = Ours()
    ours.prototypes(torch.randn(2, 3, D))
    before = {name: value.clone() for name, value in ours.prototypes.state_dict().items()}
    ours.load(swavkit_state(Theirs()))
    for name, value in ours.prototypes.state_dict().items():
        assert torch.equal(value, before[name]) == (name != "prototypes.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_get_dtype_and_device_of_the_module(dtype: torch.dtype, device: Any) -> None:
    theirs, ours = Theirs(), Ours()
    modules = [module.to(device, dtype) for module in (ours.network, ours.projection_head)]
    ours.prototypes.to(device).to(dtype)
    before = [value for module in modules for value in module.parameters()]
    ours.load(published(theirs))
    for name, value in theirs.network.state_dict().items():
        found = ours.network.state_dict()[name]
        assert found.device.type == device.type
        assert found.dtype == (dtype if value.is_floating_point() else torch.int64)
        assert torch.equal(found.cpu(), value.to(found.dtype))
    assert torch.equal(ours.weights()[0].cpu(), theirs.weights[0].to(dtype))
    after = [value for module in modules for value in module.parameters()]
    assert all(old is new for old, new in zip(before, after, strict=True))
    assert all(value.requires_grad for value in after)


def test_a_half_precision_file() -> None:
    theirs, ours = Theirs(), Ours()
    source = {
        name: v.half() if v.is_floating_point() else v for name, v in published(theirs).items()
    }
    ours.load(source)
    assert ours.network.conv1.weight.dtype == torch.float32
    assert torch.equal(ours.network.conv1.weight, theirs.network.conv1.weight.half().float())


def test_the_file_is_mapped_and_not_changed(tmp_path: Path, monkeypatch: Any) -> None:
    theirs, ours = Theirs(), Ours()
    torch.save(published(theirs), tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    calls: list[dict[str, Any]] = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (calls.append(k), load(*a, **k))[1])
    ours.load(tmp_path / "file")
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]
    with torch.no_grad():
        ours.network.conv1.weight.zero_()
    assert (tmp_path / "file").read_bytes() == content


def test_full_size(tmp_path: Path) -> None:
    """ResNet-50 with the head and prototypes of the published run, in a file of 110 MB."""
    network, head = ResNet((3, 4, 6, 3), 64, classes=0), nn.Sequential()
    for layer in (nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(), nn.Linear(2048, 128)):
        head.append(layer)
    state = named("module.", network) | named("module.projection_head.", head)
    state["module.prototypes.weight"] = torch.randn(3000, 128)
    torch.save(state, tmp_path / "swav_800ep_pretrain.pth.tar")
    ours, criterion = ResNet((3, 4, 6, 3), 64, classes=1000), SwAVLoss(128, 3000)
    file = tmp_path / "swav_800ep_pretrain.pth.tar"
    report = load_pretrained(file, network=ours, prototypes=criterion)
    assert len(report.loaded) == 318 + 1  # torchvision's 320 entries but for fc, and prototypes
    assert report.missing == ("network.fc.weight", "network.fc.bias")
    assert len(report.unused) == len(head.state_dict())
    assert all(
        torch.equal(ours.state_dict()[name], value) for name, value in network.state_dict().items()
    )
    again = pretrained_state_dict(ours, head, criterion)
    assert again.keys() == {name.removeprefix("module.") for name in state}
    assert all(torch.equal(again[name.removeprefix("module.")], state[name]) for name in state)


# Our own runs


def test_the_first_checkpoint_of_ours() -> None:
    saved = torch.load(FIRST_CHECKPOINT, weights_only=True)
    prototypes = PrototypeLayer(6, 5)
    report = load_pretrained(FIRST_CHECKPOINT, prototypes=prototypes)
    assert report.layout == "swavkit"
    assert report.renamed == {"prototypes.weight": "prototypes.weight"}
    assert torch.equal(prototypes.weight, saved["state_dict"]["prototypes.weight"])
    assert set(report.unused.values()) == {"the state of a training"}


def test_a_checkpoint_of_the_example(tmp_path: Path) -> None:
    """With the entries of docs/examples/checkpoint.py; test_pretrain.py loads a real one."""

    def network_of() -> nn.Module:
        network = nn.Module()
        network.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        network.head = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, D))
        return randomized(network)

    network, criterion = network_of(), SwAVLoss(D, K, queue_length=2)
    own = {
        "criterion": criterion.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": None,
    }
    optimizer = torch.optim.AdamW(network.parameters())
    state = {"network": network.state_dict(), "processes": [own, own], "epoch": 3, "losses": [1.0]}
    torch.save(state | {"optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    for part in ("encoder", "head"):
        new = randomized(network_of(), seed=5)
        module = getattr(new, part)
        argument = "projection_head" if part == "head" else "network"
        report = load_pretrained(tmp_path / "checkpoint.pt", **{argument: module})
        assert report.layout == "swavkit"
        assert not report.missing
        for name, value in getattr(network, part).state_dict().items():
            assert torch.equal(module.state_dict()[name], value)
            assert report.renamed[f"network.{part}.{name}"] == f"{argument}.{name}"
    whole, loss = randomized(network_of(), seed=5), SwAVLoss(D, K)
    load_pretrained(tmp_path / "checkpoint.pt", network=whole, prototypes=loss)
    assert all(map(torch.equal, whole.state_dict().values(), network.state_dict().values()))
    assert torch.equal(loss.prototypes.weight, criterion.prototypes.weight)


# What is refused, with nothing changed


def without(state: State, pattern: str) -> State:
    return {name: value for name, value in state.items() if not re.search(pattern, name)}


def replaced(state: State, name: str, value: Tensor) -> State:
    assert name in state
    return {**state, name: value}


BAD_SOURCES: dict[str, tuple[Callable[[State], Any], str]] = {
    "no prototypes": (
        lambda state: without(state, "prototypes"),
        r"prototypes must have as many heads as the checkpoint, 0, got 1; the checkpoint holds",
    ),
    "other K": (
        lambda state: replaced(state, "module.prototypes.weight", torch.ones(K + 1, D)),
        r"num_prototypes and feature_dim of the checkpoint, \(6, 6\) in "
        r"module\.prototypes\.weight, got \(5, 6\) in prototypes\.weight",
    ),
    "other D": (
        lambda state: replaced(state, "module.prototypes.weight", torch.ones(K, D + 1)),
        r"\(5, 7\) in module\.prototypes\.weight, got \(5, 6\)",
    ),
    "more heads": (
        lambda state: {
            **without(state, "prototypes"),
            **{f"module.prototypes.prototypes{head}.weight": torch.ones(K, D) for head in (0, 1)},
        },
        "prototypes must have as many heads as the checkpoint, 2, got 1",
    ),
    "no head": (
        lambda state: without(state, "projection_head"),
        r"projection_head has no counterpart in the checkpoint, of layout published, which holds "
        r"conv1\.weight, .* and \d+ more; expected entries such as 0\.weight",
    ),
    "a smaller head": (
        lambda state: without(state, r"projection_head\.[13]"),
        r"projection_head must have the layers of the checkpoint; only projection_head has "
        r"1\.weight",
    ),
    "a head without bias": (
        lambda state: without(state, r"projection_head\.0\.bias"),
        r"only projection_head has 0\.bias, only the checkpoint has none",
    ),
    "another width of the head": (
        lambda state: replaced(state, "module.projection_head.3.weight", torch.ones(D, 9)),
        r"projection_head\.3\.weight must have the shape of module\.projection_head\.3\.weight in "
        r"the checkpoint, \(6, 9\), got \(6, 8\)",
    ),
    "no network": (
        lambda state: without(state, r"module\.(conv1|bn1|layer)"),
        "network has no counterpart in the checkpoint",
    ),
    "another width": (
        lambda state: state | named("module.", ResNet(width=3, classes=0)),
        r"network\.conv1\.weight must have the shape of module\.conv1\.weight in the checkpoint, "
        r"\(3, 3, 7, 7\), got \(2, 3, 7, 7\)",
    ),
    "a deeper network": (
        lambda state: state | named("module.", ResNet((1, 1, 2, 1), classes=0)),
        r"network must have the layers of the checkpoint; only network has none, only the "
        r"checkpoint has module\.layer3\.1\.conv1\.weight",
    ),
    "a shallower network": (
        lambda state: without(state, r"layer4\.0\.downsample"),
        r"only network has layer4\.0\.downsample\.0\.weight",
    ),
    "two networks": (
        lambda state: state | named("momentum.", ResNet(classes=0)),
        "network must have one counterpart, got several, whose names begin with '', 'momentum.'",
    ),
    "twice the same name": (
        lambda state: state | {"conv1.weight": torch.ones(2, 3, 7, 7)},
        r"one value of conv1\.weight, got module\.conv1\.weight and conv1\.weight",
    ),
    "integers": (
        lambda state: replaced(state, "module.bn1.bias", torch.ones(2, dtype=torch.int64)),
        r"network\.bn1\.bias has dtype torch\.float32, which cannot hold module\.bn1\.bias",
    ),
    "too large": (
        lambda state: replaced(
            state, "module.bn1.bias", torch.full((2,), 1e300, dtype=torch.float64)
        ),
        r"network\.bn1\.bias has dtype torch\.float32, which cannot hold module\.bn1\.bias of the "
        r"checkpoint, with values up to 1e\+300",
    ),
    "no values": (
        lambda state: replaced(state, "module.bn1.bias", torch.ones(2, device="meta")),
        r"module\.bn1\.bias of source must be a dense tensor with values, got .* on device meta",
    ),
    "another model": (
        lambda state: {"transformer.0.weight": torch.ones(2), "transformer.0.bias": torch.ones(2)},
        r"layout of SwAV's .*, got entries transformer\.0\.weight, transformer\.0\.bias",
    ),
    "nothing": (lambda state: {"epoch": 3, "name": "x"}, "got none in a mapping of epoch, name"),
    "half of a weight normalization": (
        lambda state: {
            **without(state, "prototypes"),
            "module.prototypes.weight_v": torch.ones(K, D),
        },
        r"weight_v \(K, D\) and weight_g \(K, 1\) of the prototypes",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_what_does_not_fit_is_refused_with_nothing_changed(case: str) -> None:
    change, message = BAD_SOURCES[case]
    ours = Ours()
    before = ours.state()
    with pytest.raises(ValueError, match=message):
        ours.load(change(published(Theirs())))
    assert all(map(torch.equal, ours.state(), before))


class Code:
    """An object whose loading would run a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused(tmp_path: Path, legacy: bool) -> None:
    state = published(Theirs()) | {"config": Code(tmp_path / "ran")}
    torch.save(state, tmp_path / "file", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"Python objects \(posix\.system\), whose loading runs"):
        Ours().load(tmp_path / "file")
    assert not (tmp_path / "ran").exists()


def test_a_file_of_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"\(torch\.nn\.modules\.linear\.Linear\)"):
        Ours().load(tmp_path / "file")


def written(path: Path, kind: str) -> None:
    torch.save(published(Theirs()), path, _use_new_zipfile_serialization=kind != "torn legacy")
    content = path.read_bytes()
    if kind in ("torn", "torn legacy"):
        path.write_bytes(content[: len(content) // 2])
    elif kind == "torn at its beginning":
        path.write_bytes(content[:30])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "random":
        path.write_bytes(bytes(torch.randint(256, (1000,)).tolist()))
    elif kind == "text":
        path.write_text("no checkpoint\n")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": 1}, protocol=4))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/notes.txt", "no checkpoint")


@pytest.mark.parametrize(
    "kind",
    ["torn", "torn legacy", "torn at its beginning", "empty", "random", "text", "pickle", "zip"],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "file", kind)
    ours = Ours()
    before = ours.state()
    with pytest.raises(ValueError, match=r"damaged or not a checkpoint|none in a mapping of a"):
        ours.load(tmp_path / "file")
    assert all(map(torch.equal, ours.state(), before))


def test_other_sources_are_refused(tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "list")
    with pytest.raises(ValueError, match=r"a file that holds a mapping, got '.*list' with a list"):
        Ours().load(tmp_path / "list")
    with pytest.raises(FileNotFoundError):
        Ours().load(tmp_path / "none")
    with pytest.raises(TypeError, match="source must be a path or a mapping, got int"):
        Ours().load(3)


def test_bad_arguments() -> None:
    source = published(Theirs())
    with pytest.raises(ValueError, match="network, projection_head and prototypes must be given"):
        load_pretrained(source)
    with pytest.raises(TypeError, match="network must be a Module, got dict"):
        load_pretrained(source, network={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"PrototypeLayer, a ModuleList .* SwAVLoss, got Linear"):
        load_pretrained(source, prototypes=nn.Linear(D, K))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a ModuleList with Linear"):
        load_pretrained(source, prototypes=nn.ModuleList([nn.Linear(D, K)]))
    with pytest.raises(ValueError, match=r"entries of a ResNet, .*, got 0\.weight, 0\.bias"):
        load_pretrained(source, network=nn.Sequential(nn.Linear(2, 2)))
    layer = nn.utils.parametrizations.weight_norm(PrototypeLayer(D, K))
    with pytest.raises(RuntimeError, match="computed from others"):
        load_pretrained(source, prototypes=layer)


def test_targets_without_values_are_refused_by_name() -> None:
    source, network = published(Theirs()), ResNet()
    network.bn1.to("meta")
    before = network.conv1.weight.clone()
    with pytest.raises(ValueError, match=r"network\.bn1\.weight must be .*, got .* device meta"):
        load_pretrained(source, network=network)
    assert torch.equal(network.conv1.weight, before)
    with torch.device("meta"):
        prototypes = PrototypeLayer(D, K)
    with pytest.raises(ValueError, match=r"prototypes\.weight must be a dense tensor with values"):
        load_pretrained(source, prototypes=prototypes)


# And out again


@pytest.mark.parametrize("heads", [K, (K,), (K, 3)])
def test_the_published_layout_key_by_key(heads: Any) -> None:
    ours = Ours(heads)
    state = pretrained_state_dict(ours.network, ours.projection_head, ours.prototypes)
    several = isinstance(heads, tuple)
    theirs = Theirs(heads if several else (heads,))
    expected = published(theirs, "")
    if heads == (K,):
        expected["prototypes.prototypes0.weight"] = expected.pop("prototypes.weight")
    assert list(state) == list(expected)
    network, head = ours.network.state_dict(), ours.projection_head.state_dict()
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part == "prototypes":
            value_here = ours.weights()[int(re.sub(r"\D", "", rest) or 0)]
        else:
            value_here = head[rest] if part == "projection_head" else network[name]
        assert torch.equal(value, value_here), name
        assert not value.requires_grad
        assert value.device.type == "cpu"
        assert value.untyped_storage().data_ptr() != value_here.untyped_storage().data_ptr()


@pytest.mark.parametrize("heads", [K, (K, 3)])
def test_a_round_trip_changes_no_bit(heads: Any, tmp_path: Path) -> None:
    first, second = Ours(heads), Ours(heads)
    randomized(second.network, seed=8)
    state = pretrained_state_dict(first.network, first.projection_head, first.prototypes)
    torch.save(state, tmp_path / "file")
    report = second.load(tmp_path / "file")
    assert report.layout == "published"
    assert not report.unused
    second.network.fc = first.network.fc
    again = pretrained_state_dict(second.network, second.projection_head, second.prototypes)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_out_of_children_of_a_resnet_and_wrappers() -> None:
    network = ResNet()
    expected = pretrained_state_dict(network)
    incompatible = ResNet().load_state_dict(expected, strict=False)
    assert incompatible.missing_keys == ["fc.weight", "fc.bias"]
    assert incompatible.unexpected_keys == []
    wrapper = nn.Module()
    wrapper.module = network
    for module in (nn.Sequential(*list(network.children())[:-1]), wrapper):
        state = pretrained_state_dict(module)
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_out_of_other_heads() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = ResNet(classes=0)
            self.head = nn.Linear(self.encoder.channels, D)

    model = Model()
    state = pretrained_state_dict(model, projection_head=model.head)
    assert list(state)[-2:] == ["projection_head.weight", "projection_head.bias"]
    with pytest.raises(ValueError, match=r"a ResNet alone, .*, got head\.weight, head\.bias"):
        pretrained_state_dict(model)
    with pytest.raises(ValueError, match=r"1 or 3 layers with entries .*, got 2"):
        pretrained_state_dict(
            model.encoder, nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, D))
        )
    with pytest.raises(ValueError, match="network must have the entries of a ResNet"):
        pretrained_state_dict(nn.Linear(2, 2))


def test_in_other_memory_formats() -> None:
    network = ResNet().to(memory_format=torch.channels_last)
    state = pretrained_state_dict(network)
    assert all(value.is_contiguous() for value in state.values())
    new = ResNet().to(memory_format=torch.channels_last)
    load_pretrained(state, network=new)
    assert new.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(new.conv1.weight, network.conv1.weight)


# With the libraries themselves, where they are


def test_torchvision_itself() -> None:
    models = pytest.importorskip("torchvision", reason="torchvision is not installed").models
    network = randomized(models.resnet50(), seed=1)
    images = torch.rand(1, 3, 64, 64)
    ours = ResNet((3, 4, 6, 3), 64, classes=0)
    load_pretrained(network.state_dict(), network=ours)
    network.fc = nn.Identity()
    torch.testing.assert_close(ours.eval()(images), network.eval()(images))
    new = models.resnet50()
    incompatible = new.load_state_dict(pretrained_state_dict(ours), strict=False)
    assert incompatible.missing_keys == ["fc.weight", "fc.bias"]
    assert incompatible.unexpected_keys == []
    for name, value in network.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)


def test_timm_itself() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = randomized(ResNet((3, 4, 6, 3), 64, classes=0), seed=1)
    network = timm.create_model("resnet50", num_classes=0)
    report = load_pretrained(named("module.", theirs), network=network)
    assert not report.missing
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(network.eval()(images), theirs.eval()(images))
