"""Pretrain a ResNet-50 with the published recipe of SwAV (Caron et al. 2020).

    pip install "timm>=1.0.31" tqdm
    torchrun --nproc-per-node 8 docs/examples/imagenet.py --data FOLDER
    torchrun --nproc-per-node 4 docs/examples/imagenet.py --data FOLDER --recipe small-batch

The folder has ImageNet's layout: ``train/CLASS/IMAGE.JPEG`` and, for the k-NN accuracy,
``val/CLASS/IMAGE.JPEG``. Classes are used for this accuracy only. If the output folder holds a
checkpoint, the same command continues after its last finished epoch.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from swavkit import ClusterMonitor, MultiCropTransform, SwAVLoss, check_sizes, multi_crop_forward

try:
    import monitoring
    import neighbors
    import processes
    import timm
    from PIL import Image, ImageOps
    from timm.optim import Lars
except ModuleNotFoundError as missing:
    sys.exit(f'imagenet.py: error: {missing}; pip install "timm>=1.0.31" tqdm')

DIM, HIDDEN, PROTOTYPES = 128, 2048, 3000
SHOW_EVERY, EVALUATE_EVERY = 50, 10  # steps, epochs
EVALUATED = 50_000  # images of each folder for the k-NN accuracy, up to a factor of 2
SQUARE = 384  # has about as many pixels as a photograph of ImageNet
ENDINGS = {".jpeg", ".jpg", ".png", ".webp"}
FIXED = ("recipe", "epochs", "batch_size", "network", "crops")  # options that must not change
MEAN, STD = torch.tensor([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]).view(2, 3, 1, 1)


@dataclass(frozen=True)
class Recipe:
    """A column of the paper's settings. Batch and queue are those of all ranks together."""

    batch_size: int
    queue_length: int
    queue_epochs: int  # in which the queue only fills
    freeze_steps: int
    learning_rate: float  # the cosine ends at a thousandth of it
    warmup_epochs: int
    warmup_from: float


RECIPES = {
    "large-batch": Recipe(4096, 0, 0, 313, 4.8, 10, 0.3),
    "small-batch": Recipe(256, 3840, 15, 5005, 0.6, 0, 0.6),
}


def learning_rate(step: int, recipe: Recipe, steps: int, epochs: int) -> float:
    """Return the learning rate of a step, counted from 0, with ``steps`` steps in an epoch."""
    warmup, top = recipe.warmup_epochs * steps, recipe.learning_rate
    if step < warmup:
        return recipe.warmup_from + (top - recipe.warmup_from) * step / max(1, warmup - 1)
    progress = (step - warmup) / (epochs * steps - warmup)
    return top / 1000 + (top - top / 1000) * 0.5 * (1 + math.cos(math.pi * progress))


class Folder(Dataset[tuple[Any, int]]):
    """The images ``folder/CLASS/IMAGE``, each as ``prepare`` returns it, and their labels."""

    def __init__(self, folder: Path, prepare: Callable[[Image.Image], Any]) -> None:
        paths = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in ENDINGS)
        if not paths:
            fail(f"--data: there are no images {str(folder / 'CLASS' / 'IMAGE.JPEG')!r}")
        names = [path.parent.name for path in paths]
        self.classes, self.labels = np.unique(names, return_inverse=True)
        # An array, because each worker would in time copy a list: reading it counts references.
        self.paths, self.prepare = np.array([os.fsencode(path) for path in paths]), prepare

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        with Image.open(os.fsdecode(self.paths[index])) as image:
            return self.prepare(image), self.labels[index]


def square(image: Image.Image) -> Tensor:
    """Return the image as uint8 (3, 384, 384), for crops on the device."""
    return pixels(image.convert("RGB").resize((SQUARE, SQUARE)))


def center(image: Image.Image) -> Tensor:
    """Return the center of the image, (3, 224, 224), normalized for the encoder."""
    cut = ImageOps.crop(ImageOps.fit(image.convert("RGB"), (256, 256)), 16)
    return (pixels(cut) / 255 - MEAN) / STD


def pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def fail(text: str) -> None:
    sys.exit(f"imagenet.py: error: {text}" if processes.RANK == 0 else 1)


class Model(nn.Module):
    """Compute the loss from crops, as one module for DistributedDataParallel."""

    def __init__(self, network: str, criterion: SwAVLoss) -> None:
        super().__init__()
        # The authors' residual blocks do not start as the identity.
        plain = {"zero_init_last": False} if network.startswith("resnet") else {}
        self.encoder = timm.create_model(network, num_classes=0, **plain)
        first, last = nn.Linear(self.encoder.num_features, HIDDEN), nn.Linear(HIDDEN, DIM)
        self.head = nn.Sequential(first, nn.BatchNorm1d(HIDDEN), nn.ReLU(), last)
        self.criterion = criterion

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, Any, Tensor]:
        """Return the loss, its statistics, and the features (V, B, D)."""
        features = multi_crop_forward(lambda images: self.head(self.encoder(images)), crops)
        return *self.criterion(features, return_statistics=True), features.detach()


class Training:
    """The state of the training, and its checkpoint."""

    def __init__(self, options: argparse.Namespace, steps: int, device: torch.device) -> None:
        recipe = RECIPES[options.recipe]
        criterion = SwAVLoss(
            *(DIM, PROTOTYPES),
            queue_length=recipe.queue_length // processes.SIZE,
            queue_start=recipe.queue_epochs * steps,
            freeze_steps=recipe.freeze_steps,
            prototype_gradient="published",
        )
        model = Model(options.network, criterion)
        if processes.SIZE > 1 and device.type == "cuda":  # there is no SyncBatchNorm on a CPU
            model = timm.layers.convert_sync_batchnorm(model)
        self.model = model.to(device, memory_format=torch.channels_last)
        # LARC of the authors' program: biases and BatchNorm are decayed and adapted, too.
        self.optimizer = Lars(model.parameters(), momentum=0.9, weight_decay=1e-6, trust_coeff=1e-3)
        self.optimizer.register_step_post_hook(lambda *_: criterion.prototypes.normalize_())
        self.monitor = ClusterMonitor(PROTOTYPES).to(device)
        self.epoch = 0
        self.path = Path(options.output) / "checkpoint.pt"
        self.settings = {"ranks": processes.SIZE, **{name: vars(options)[name] for name in FIXED}}

    def save(self) -> None:
        """Replace the checkpoint in one step, so that a crash leaves the old or the new one."""
        state = {"criterion": self.model.criterion.state_dict()}  # with the queue of this rank
        state |= {"monitor": self.monitor.state_dict(), "random": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state()
        torch.save(state, own := io.BytesIO())
        ranks = processes.everyones(own.getvalue())
        if processes.RANK == 0:
            content = {"settings": self.settings, "epoch": self.epoch, "ranks": ranks}
            content |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, unfinished := self.path.with_suffix(".unfinished"))
            os.replace(unfinished, self.path)

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        if not self.path.exists():
            return
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["settings"] != self.settings:
            fail(f"{str(self.path)!r} is of {content['settings']}, got {self.settings}")
        own = io.BytesIO(content["ranks"][processes.RANK])
        state = torch.load(own, map_location="cpu", weights_only=True)
        self.model.load_state_dict(content["model"])
        self.model.criterion.load_state_dict(state["criterion"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.monitor.load_state_dict(state["monitor"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(state["random_cuda"])
        self.epoch = content["epoch"]
        processes.say(f"continuing after epoch {self.epoch}")


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train to the last epoch. Print figures, diagnoses and accuracies, and save checkpoints."""
    recipe, transform = RECIPES[options.recipe], MultiCropTransform()
    data = Path(options.data)
    images = Folder(data / "train", transform if options.crops == "loader" else square)
    evaluated = [
        Folder(data / name, center) for name in ("train", "val") if (data / "val").is_dir()
    ]
    if evaluated and not np.array_equal(*(folder.classes for folder in evaluated)):
        fail(f"--data: the classes in train and val of {str(data)!r} must be the same")
    sampler = DistributedSampler(images, processes.SIZE, processes.RANK, drop_last=True)
    of_rank = options.batch_size // processes.SIZE
    loader = load(images, options, of_rank, sampler=sampler, drop_last=True)
    steps = len(loader)
    if not steps:
        fail(f"--batch-size must be at most {len(images)}, the images, got {options.batch_size}")
    torch.manual_seed(0)
    training = Training(options, steps, device)
    criterion, monitor = training.model.criterion, training.monitor
    model = processes.averaged(training.model)
    torch.manual_seed(processes.RANK)  # different crops on each rank
    training.resume()
    told: set[str] = set()
    queue = recipe.queue_length // processes.SIZE
    sizes = check_sizes(of_rank, PROTOTYPES, processes=processes.SIZE, queue_length=queue)
    monitoring.warn(sizes, told)
    # In its first steps, training may look stuck.
    judged = max(recipe.warmup_epochs * steps, recipe.freeze_steps) + monitor.window
    while training.epoch < options.epochs:
        sampler.set_epoch(training.epoch)
        started, shown = time.perf_counter(), training.epoch * steps
        for step, (crops, _) in enumerate(loader, start=shown):
            rate = learning_rate(step, recipe, steps, options.epochs)
            for group in training.optimizer.param_groups:
                group["lr"] = rate * options.batch_size / recipe.batch_size
            if options.crops == "device":
                crops = transform(crops.to(device, non_blocking=True))
            crops = [crop.to(device, non_blocking=True) for crop in crops]
            with torch.autocast(device.type, torch.bfloat16):
                loss, statistics, features = model(crops)
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            prototypes = criterion.prototypes
            monitor.update(statistics, loss=loss, features=features, prototypes=prototypes)
            done = step + 1
            if done % SHOW_EVERY == 0 or done % steps == 0:
                figures = monitoring.figures_of(monitor)  # of all ranks
                if figures["nonfinite"]:
                    fail(f"a loss of the steps up to {done} is not finite")
                speed = (done - shown) * options.batch_size / (time.perf_counter() - started)
                line = f"{monitoring.line(figures, PROTOTYPES)}, {speed:.3g} images/s"
                processes.say(f"epoch {training.epoch + 1}, step {done}: {line}")
                started, shown = time.perf_counter(), done
        if done >= judged:
            monitoring.warn(monitor.diagnose(criterion), told)
        training.epoch += 1
        last = training.epoch == options.epochs
        if evaluated and (last or training.epoch % EVALUATE_EVERY == 0):
            evaluate(training.model.encoder, evaluated, options)
        training.save()  # at last, with the random numbers after the evaluation


def load(images: Dataset, options: argparse.Namespace, batch_size: int, **named: Any) -> DataLoader:
    pinned = torch.cuda.is_available()
    return DataLoader(images, batch_size, num_workers=options.workers, pin_memory=pinned, **named)


def evaluate(encoder: nn.Module, folders: list[Folder], options: argparse.Namespace) -> None:
    """Print the k-NN accuracy of the second folder among the images of the first."""
    batches = []
    for images in folders:
        each = max(1, len(images) // EVALUATED)
        rows = range(processes.RANK * each, len(images), processes.SIZE * each)
        batches.append(load(Subset(images, rows), options, 256))
    processes.say(f"{neighbors.NEIGHBORS}-NN accuracy: {neighbors.accuracy(encoder, *batches):.1%}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="folder with train/CLASS/IMAGE.JPEG, and val")
    add("--recipe", choices=RECIPES, default="large-batch", help="%(default)s")
    add("--epochs", type=int, default=800, help="%(default)s")
    add("--batch-size", type=int, help="on all ranks, by default the recipe's; scales the rates")
    add("--network", default="resnet50", help="a name of timm, %(default)s")
    add("--crops", choices=["loader", "device"], default="loader")
    add("--workers", type=int, default=10, help="of each rank, %(default)s")
    add("--output", default="runs/imagenet", help="%(default)s")
    options = parser.parse_args(arguments)
    options.batch_size = options.batch_size or RECIPES[options.recipe].batch_size
    if options.batch_size % processes.SIZE:
        parser.error(f"--batch-size must be a multiple of {processes.SIZE}, the number of ranks")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    processes.join(device)
    train(options, device)
    processes.leave()


if __name__ == "__main__":
    main()
