"""One training of evidence.py: its data, its method, its accuracies."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepclusterv2
import monitoring
import numpy as np
import pretrain
import selav2
import simclr
import torch
import torch.nn.functional as F
from checkpoint import write
from encoder import (
    MEAN,
    STD,
    Network,
    PlainNetwork,
    distort_digits,
    features_of,
    pixels_of,
    plain_head,
)
from evaluation import evaluate, few_of_each_class
from images import Images, load_images, read_folder
from settings import Settings
from skimage import color, data
from torch import Tensor, nn

from swavkit import (
    CropGroup,
    MultiCropTransform,
    PhotometricDistortion,
    multi_crop_forward,
    power_law_prior,
)

CROPS = {  # size and area of the full crops, and of the small ones
    "digits": (28, (0.7, 1.0), 20, (0.5, 0.9)),
    "drawings": (32, (0.5, 1.0), 20, (0.3, 0.7)),
    "patches": (32, (0.3, 1.0), 20, (0.1, 0.4)),
}
PHOTOGRAPHS = ["astronaut", "brick", "camera", "cat", "coffee", "coins", "grass", "gravel"]
PHOTOGRAPHS += ["hubble_deep_field", "moon", "retina", "rocket"]
LEAST = 100  # drawings of a class; other drawings have no label
NO_CLASS = "unsorted"  # a folder of drawings of any class


@dataclass(frozen=True)
class Job:
    """The settings of one training. The defaults are those of the digits."""

    data: str = "digits"
    method: str = "swav"
    epochs: int = 12
    small_crops: int = 2
    batch_size: int = 64
    queue: int = 0
    prototypes: int = 100
    epsilon: float = 0.02
    iterations: int = 3
    codes: str = "soft"  # "hard", "softmax", "prior 0.5" (exponent), "relaxed 0.1" (strength)
    network: str = "plain"  # or of fixed size: "residual", that of pretrain.py; "resnet18" of timm
    width: int = 16
    depth: int = 1
    seed: int = 0
    target: str = ""  # other images on which its trained encoder is evaluated

    @property
    def name(self) -> str:
        """The name of its files: the data, method and seed, and settings that are not defaults."""
        parts = [self.data, self.method, f"seed{self.seed}"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in ("data", "method", "seed") and value != field.default:
                parts.append(f"{field.name}{value}".replace(" ", ""))
        return "-".join(parts)


# The images


def load(name: str, drawings: Path, cache_folder: Path, validation: bool) -> Images:
    """Return the images of one of ``CROPS``. A label of -1 stands for none."""
    if name == "digits":
        return load_images("mnist", validation=validation, image_size=28)
    if name == "patches":
        return patches_of(validation)
    return drawings_of(drawings, cache_folder, validation)


def patches_of(validation: bool) -> Images:
    """Return gray patches of photographs, whose number in ``PHOTOGRAPHS`` is their label.

    Training patches come from the left 55 % of a photograph, validation patches from the next
    20 %, and test patches from the rest.
    """
    generator = np.random.default_rng(0)
    parts: dict[str, tuple[float, float, int]] = {
        "train": (0.0, 0.55, 350),
        "validation": (0.55, 0.75, 80),
        "test": (0.75, 1.0, 80),
    }
    pixels: dict[str, list[np.ndarray]] = {part: [] for part in parts}
    for name in PHOTOGRAPHS:
        photograph = getattr(data, name)()
        if photograph.ndim == 3:
            photograph = (255 * color.rgb2gray(photograph)).round().astype(np.uint8)
        height, width = photograph.shape
        for part, (left, right, count) in parts.items():
            rows = generator.integers(0, height - 32, count)
            columns = generator.integers(int(left * width), int(right * width) - 32, count)
            pixels[part] += [
                photograph[row : row + 32, column : column + 32]
                for row, column in zip(rows, columns, strict=True)
            ]
    held_out = "validation" if validation else "test"
    tensors = {part: torch.from_numpy(np.stack(pixels[part]))[:, None] for part in parts}
    labels = {
        part: torch.arange(len(PHOTOGRAPHS)).repeat_interleave(parts[part][2]) for part in parts
    }
    return Images(
        tensors["train"],
        labels["train"],
        tensors[held_out],
        labels[held_out],
        held_out,
        PHOTOGRAPHS,
    )


def drawings_of(folder: Path, cache_folder: Path, validation: bool) -> Images:
    """Return drawings, whose folder is their label.

    Copies of a drawing count once; a drawing with copies in several folders has no label. Equally
    many drawings of each class are held out: 40 for the test, 15 for validation. None of them has
    the same coarse shape as another drawing.
    """
    cached = cache_folder / "drawings.npz"
    if not cached.exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of some very large drawings
            pixels, names, _ = read_folder(folder, CROPS["drawings"][0])
        content = io.BytesIO()
        np.savez_compressed(content, pixels=pixels, names=np.array(names))
        write(Settings(output=str(cache_folder)), cached.name, content.getvalue())
    with np.load(cached) as arrays:
        pixels, names = arrays["pixels"], arrays["names"]
    _, first, copies = np.unique(
        pixels.reshape(len(pixels), -1), axis=0, return_index=True, return_inverse=True
    )
    folders = [set(names[copies == number]) for number in range(len(first))]
    pixels = torch.from_numpy(pixels[first])
    name_of = np.array([each.pop() if len(each) == 1 else "" for each in folders])
    classes, counts = np.unique(name_of, return_counts=True)
    classes = classes[(counts >= LEAST) & (classes != "") & (classes != NO_CLASS)].tolist()
    labels = torch.tensor([classes.index(name) if name in classes else -1 for name in name_of])

    small = F.adaptive_avg_pool2d(pixels.float().mean(dim=1), 8).flatten(1)
    shape = small > small.mean(dim=1, keepdim=True)
    _, of_shape, counts = torch.unique(shape, dim=0, return_inverse=True, return_counts=True)
    own_shape = counts[of_shape] == 1
    generator = np.random.default_rng(0)
    test, others = [], []
    for label in range(len(classes)):
        rows = generator.permutation(np.flatnonzero((labels == label) & own_shape))
        test += rows[:40].tolist()
        others += rows[40:55].tolist()
    held_out = others if validation else test
    in_training = torch.ones(len(pixels), dtype=torch.bool)
    in_training[test + others] = False
    return Images(
        pixels[in_training],
        labels[in_training],
        pixels[held_out],
        labels[held_out],
        "validation" if validation else "test",
        classes,
    )


def colors_of(images: Tensor) -> Tensor:
    """Return the square roots of a histogram of 8 x 8 x 8 colors."""
    bins = (images // 32).long()
    index = (bins[:, 0] * 64 + bins[:, 1] * 8 + bins[:, 2]).flatten(1)
    counts = torch.zeros(len(images), 512).scatter_add_(1, index, torch.ones(index.shape))
    return (counts / index.shape[1]).sqrt()


# The methods


class SoftmaxCodes(nn.Module):
    """Codes without equal use of the prototypes, in place of ``SinkhornKnopp``."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, scores: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.softmax(scores.detach() / self.epsilon, dim=-1)


def transform_of(job: Job) -> MultiCropTransform:
    """Return the crops of a job: two full ones, and the small ones."""
    size, area, small, small_area = CROPS[job.data]
    digits = job.data == "digits"
    distort: Callable[[Tensor], Tensor] = distort_digits
    if not digits:  # images this small are blurred already, and drawings are told by their colors
        distort = PhotometricDistortion(
            0.4, 0.4, 0.4, 0.1, blur_probability=0.0, other_channels="skip"
        )
    group = partial(CropGroup, flip=0.0 if digits else 0.5, photometric=distort)
    groups = [group(size, 2, area)]
    if job.small_crops:
        groups.append(group(small, job.small_crops, small_area))
    return MultiCropTransform(groups, mean=MEAN, std=STD)


class ResNet18(nn.Module):
    """timm's ResNet-18 without the pooling after its first convolution, and the head of minimal.py.

    ``timm`` needs torchvision, so it is not among the requirements of the examples.
    """

    def __init__(self, channels: int, feature_dim: int) -> None:
        super().__init__()
        import timm

        model = timm.create_model("resnet18", in_chans=channels, num_classes=0)
        model.maxpool = nn.Identity()
        self.encoder = nn.Sequential(*model.children())
        self.head = plain_head(model.num_features, feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def network_of(job: Job) -> Callable[[int, int], nn.Module]:
    """Return what makes the network from its channels and features."""
    if job.network == "residual":
        return Network
    if job.network == "resnet18":
        return ResNet18
    return partial(PlainNetwork, width=job.width, depth=job.depth)


def training_of(job: Job, images: Tensor) -> pretrain.Training:
    """Return the initial state, with the codes of the job."""
    settings = Settings(
        epochs=job.epochs,
        batch_size=job.batch_size,
        queue=job.queue,
        prototypes=job.prototypes,
        epsilon=job.epsilon,
        iterations=job.iterations,
    )
    training = pretrain.prepare(settings, images, 2, network_of(job))
    criterion = training.criterion
    kind, _, strength = job.codes.partition(" ")
    if kind == "softmax":
        criterion.sinkhorn = SoftmaxCodes(job.epsilon)
    criterion.sinkhorn.hard = kind == "hard"
    if kind == "relaxed":
        criterion.sinkhorn.relaxation = float(strength)
    if kind == "prior":
        criterion.prototype_weight = power_law_prior(job.prototypes, float(strength))
    return training


def train_swav(job: Job, images: Images) -> tuple[nn.Module, dict[str, Any]]:
    """Train with ``SwAVLoss``, and record each epoch."""
    training, transform = training_of(job, images.train), transform_of(job)
    network, criterion, monitor = training.network, training.criterion, training.monitor
    losses: list[Tensor] = []
    epochs: list[dict[str, float]] = []
    in_epoch = len(images.train) // job.batch_size * job.batch_size
    for _ in range(job.epochs):
        bank, nearest = [], []
        order = torch.randperm(len(images.train))[:in_epoch]
        for rows in order.split(job.batch_size):
            features = multi_crop_forward(network, transform(images.train[rows]))
            loss, details, statistics = criterion(
                features, return_details=True, return_statistics=True
            )
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            training.schedule.step()
            features = features.detach()
            monitor.update(
                statistics, loss=loss, features=features, prototypes=criterion.prototypes
            )
            losses.append(loss.detach())
            bank.append(features[0])
            nearest.append(details.codes[0].argmax(dim=1))
        figures = monitoring.figures_of(monitor)
        epochs.append({**figures, "knn": neighbors_in_training(network, images)})
    with torch.no_grad():  # the codes of the last epoch's features all at once
        scores = criterion.prototypes(torch.cat(bank))
        whole = criterion.sinkhorn(scores, prototype_weight=criterion.prototype_weight)
    same = whole.argmax(dim=1) == torch.cat(nearest)
    return network, {
        "losses": torch.stack(losses).tolist(),
        "epochs": {name: [each[name] for each in epochs] for name in EPOCH_FIGURES},
        "same_codes": 100 * same.float().mean().item(),
        "diagnoses": [each.name for each in monitor.diagnose(criterion)],
    }


EPOCH_FIGURES = ("loss", "code_entropy", "perplexity", "agreement", "knn")


@torch.no_grad()
def neighbors_in_training(network: nn.Module, images: Images) -> float:
    """Return the share of 1,000 training images of the class that most of 5 neighbors have."""
    rows = torch.nonzero(images.train_labels >= 0).flatten()
    rows = rows[torch.linspace(0, len(rows) - 1, min(1000, len(rows))).long()]
    features = F.normalize(features_of(network.encoder.eval(), images.train[rows]))
    network.train()
    nearest = (features @ features.T).fill_diagonal_(-2).topk(5).indices
    labels = images.train_labels[rows]
    votes = F.one_hot(labels[nearest], len(images.classes)).sum(dim=1)
    return 100 * (votes.argmax(dim=1) == labels).float().mean().item()


def train_other(job: Job, images: Images) -> tuple[nn.Module, dict[str, Any]]:
    """Train with one of the other methods, by the loop of its example."""
    transform, channels = transform_of(job), images.train.shape[1]
    network = network_of(job)(channels, 64)
    options = argparse.Namespace(epochs=job.epochs, batch_size=job.batch_size)
    if job.method == "simclr":
        losses = simclr.train(network, transform, images.train, **vars(options))
    else:
        model = deepclusterv2.Model(channels, job.prototypes)
        model.network = network
        model.heads.requires_grad_(job.method == "selav2")
        targets = selav2.spread if job.method == "selav2" else deepclusterv2.cluster
        losses = deepclusterv2.train(model, transform, images.train, options, targets)
        losses = torch.stack(losses).tolist()
    return network, {"losses": losses}


def train_supervised(job: Job, images: Images) -> tuple[nn.Module, dict[str, Any]]:
    """Train on labels, all or 10 of each class, with one full crop and the steps of the others."""
    rows = torch.nonzero(images.train_labels >= 0).flatten()
    if job.method == "supervised10":
        rows = rows[few_of_each_class(images.train_labels[rows].numpy(), job.seed)]
    transform = transform_of(dataclasses.replace(job, small_crops=0))
    network = network_of(job)(images.train.shape[1], len(images.classes))
    steps = job.epochs * (len(images.train) // job.batch_size)
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    losses = []
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (job.batch_size,))]
        loss = F.cross_entropy(
            network(transform(images.train[batch])[0]), images.train_labels[batch]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    found = features_of(network.eval(), images.held_out).argmax(dim=1)
    accuracy = 100 * (found == images.held_out_labels).float().mean().item()
    column = "linear" if job.method == "supervised" else "linear_10"
    return network, {"losses": losses, "accuracies": {column: accuracy}}


# One job


def run(job: Job, folder: Path, load_: Callable[[str], Images]) -> dict[str, Any]:
    """Train and evaluate; keep the encoder and the results in ``folder``; return the results."""
    images = load_(job.data)
    started, used = time.perf_counter(), time.process_time()
    torch.manual_seed(job.seed)
    results: dict[str, Any] = {}
    represent: Callable[[Tensor], Tensor]
    if job.method in ("pixels", "colors"):
        represent = pixels_of if job.method == "pixels" else colors_of
    else:
        network, results = trained_network(job, images, folder)
        encoder = network.encoder.eval()
        represent = partial(features_of, lambda batch: encoder(in_channels(batch, encoder)))
    trained, training_used = time.perf_counter(), time.process_time()
    if not job.method.startswith("supervised"):
        images = load_(job.target or job.data)
        labeled = images.train_labels >= 0
        results["accuracies"] = evaluate(
            represent(images.train[labeled]).numpy(),
            images.train_labels[labeled].numpy(),
            represent(images.held_out).numpy(),
            images.held_out_labels.numpy(),
        )
    results = {
        "job": dataclasses.asdict(job),
        "held_out": images.held_out_name,
        "seconds": {
            "training": trained - started,
            "training, processor": training_used - used,
            "evaluation": time.perf_counter() - trained,
        },
        **results,
    }
    output = Settings(output=str(folder))
    if job.method not in ("pixels", "colors"):
        state = io.BytesIO()
        torch.save(network.encoder.state_dict(), state)
        write(output, f"{job.name}.pt", state.getvalue())
    write(output, f"{job.name}.json", (json.dumps(results) + "\n").encode())
    return results


def trained_network(job: Job, images: Images, folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the network of a job, and the records of its training."""
    if job.target:
        network = network_of(job)(images.train.shape[1], 64)
        source = dataclasses.replace(job, target="")
        network.encoder.load_state_dict(torch.load(folder / f"{source.name}.pt"))
        return network, {}
    if job.method == "random":
        return training_of(job, images.train).network, {}
    own = {"swav": train_swav, "supervised": train_supervised}
    return own.get(job.method.removesuffix("10"), train_other)(job, images)


def in_channels(batch: Tensor, encoder: nn.Sequential) -> Tensor:
    """Return a batch in the number of channels that the encoder takes."""
    channels = encoder[0].in_channels
    if batch.shape[1] == channels:
        return batch
    return batch.expand(-1, channels, -1, -1) if channels == 3 else batch.mean(dim=1, keepdim=True)
