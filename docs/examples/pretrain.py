"""Pretrain a small convolutional encoder with SwAV on real, unlabelled images, and evaluate it.

    python docs/examples/pretrain.py                        # 4,000 MNIST digits
    python docs/examples/pretrain.py --data digits          # scikit-learn's 8x8 digits
    python docs/examples/pretrain.py --data path/to/images  # your own; subfolders are labels
    torchrun --nproc-per-node 2 docs/examples/pretrain.py   # each batch on two processes

The training loop in ``train`` is of the kind that users of swavkit write themselves: crops,
features, loss, step. Labels serve the evaluation only. Everything is written into one folder:
``metrics.json``, ``checkpoint.pt`` (from which training goes on with ``--resume``) and pictures.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import MultiCropTransform, SwAVLoss, multi_crop_forward

try:
    import evaluation
    import pictures
    import processes
    from encoder import Network, distort_digits
    from images import Images, load_images
    from settings import (
        FREE_TO_CHANGE,
        Settings,
        UserError,
        choose_device,
        crop_groups,
        flag,
        parse,
    )
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(
        f"pretrain.py: error: the package {missing.name!r} is missing; it comes with the extra: "
        f'pip install -e ".[examples]"'
    )

MEAN, STD = 0.5, 0.5  # of the pixels that the network sees


class Model(nn.Module):
    """From crops to the loss, so that the processes of a job share all parameters there are."""

    def __init__(self, network: nn.Module, criterion: SwAVLoss) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Return the loss of one batch."""
        return self.criterion(multi_crop_forward(self.network, crops))


@dataclass
class Training:
    """Everything that a training step changes, so that a checkpoint can hold all of it."""

    network: Network
    criterion: SwAVLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one a step


def prepare(settings: Settings, images: Tensor, code_views: int) -> Training:
    """Return the training before its first step, on the device of the images."""
    criterion = SwAVLoss(
        settings.feature_dim,
        settings.prototypes,
        num_code_views=code_views,
        temperature=settings.temperature,
        epsilon=settings.epsilon,
        iterations=settings.iterations,
        queue_length=-(-settings.queue // processes.SIZE),
        freeze_steps=settings.freeze_steps,
    )
    network = Network(images.shape[1], settings.feature_dim)
    network.to(images.device, memory_format=torch.channels_last)
    criterion.to(images.device)
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *criterion.parameters()],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    total = settings.epochs * (len(images) // settings.batch_size)
    warmup = min(settings.warmup_steps, total // 2)

    def learning_rate_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    return Training(network, criterion, optimizer, schedule)


def train(
    training: Training, settings: Settings, transform: MultiCropTransform, images: Tensor
) -> None:
    """Train to the last epoch, with a checkpoint after each."""
    model: nn.Module = Model(training.network, training.criterion)
    if processes.SIZE > 1:
        model = DistributedDataParallel(model)
    chance = math.log(settings.prototypes)  # the loss of scores that are all equal
    steps = len(images) // settings.batch_size  # in an epoch
    in_epoch = steps * settings.batch_size
    progress = tqdm(
        total=settings.epochs * in_epoch,
        initial=training.epoch * in_epoch,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=processes.RANK > 0,
    )
    while training.epoch < settings.epochs:
        started = time.perf_counter()
        losses = []
        order = processes.of_the_first(torch.randperm(len(images)).to(images.device))
        for batch in order[:in_epoch].split(settings.batch_size):
            rows = batch[processes.RANK :: processes.SIZE]
            loss = model(transform(images[rows]))
            training.optimizer.zero_grad()
            loss.backward()
            training.optimizer.step()
            training.schedule.step()

            losses.append(loss.detach())
            progress.update(settings.batch_size)
            if len(losses) % 10 == 0 or len(losses) == steps:
                mean = float(torch.stack(losses[-10:]).mean())
                progress.set_postfix_str(f"loss {mean:.3f}, ln K {mean - chance:+.3f}", False)
        training.losses += processes.mean(torch.stack(losses)).tolist()
        training.epoch += 1
        training.seconds += time.perf_counter() - started
        save_checkpoint(training, settings, images)
    progress.close()


def save_checkpoint(training: Training, settings: Settings, images: Tensor) -> None:
    """Write the checkpoint so that at any moment either the old or the new one is there, whole."""
    own = {
        "criterion": training.criterion.state_dict(),  # prototypes, queue, steps
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(images.device) if images.is_cuda else None,
    }
    of_processes = processes.everyones(own)
    if processes.RANK > 0:
        return
    state = {
        "settings": dataclasses.asdict(settings),
        "images": len(images),
        "network": training.network.state_dict(),
        "processes": of_processes,
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "epoch": training.epoch,
        "seconds": training.seconds,
        "losses": training.losses,
    }
    path = Path(settings.output) / "checkpoint.pt"
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_checkpoint(training: Training, settings: Settings, images: Tensor) -> None:
    """Go back to where the last checkpoint was written, if there is one."""
    path = Path(settings.output) / "checkpoint.pt"
    if not path.exists():
        say(f"no {path} yet: starting from the beginning")
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = {
            **state["settings"],
            "the number of training images": state["images"],
            "the number of processes": len(state["processes"]),
        }
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{str(path)!r} is no checkpoint of this program: {reason}") from error
    present = {
        **dataclasses.asdict(settings),
        "the number of training images": len(images),
        "the number of processes": processes.SIZE,
    }
    for name, value in present.items():
        if name not in FREE_TO_CHANGE and saved.get(name) != value:
            what = name if " " in name else flag(name)
            raise UserError(
                f"--resume must go on as {str(path)!r} began: {what} was {saved.get(name)!r} "
                f"there, got {value!r}"
            )
    training.network.load_state_dict(state["network"])
    own = state["processes"][processes.RANK]
    training.criterion.load_state_dict(own["criterion"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"])
    torch.set_rng_state(own["random"])
    if images.is_cuda and own["random_cuda"] is not None:
        torch.cuda.set_rng_state(own["random_cuda"], images.device)
    training.epoch, training.seconds = state["epoch"], state["seconds"]
    training.losses = state["losses"]
    say(f"going on after epoch {training.epoch} of {settings.epochs}")


@torch.no_grad()
def features_of(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Return the features of uint8 images, undistorted, on the CPU."""
    return torch.cat([module((batch / 255 - MEAN) / STD).cpu() for batch in images.split(500)])


def pixels_of(images: Tensor) -> Tensor:
    """Return the pixels as features. From 0 for black: centred ones were worse by 2 points."""
    return images.flatten(1).cpu() / 255


def evaluate(
    encoders: dict[str, Callable[[Tensor], Tensor]], images: Images
) -> dict[str, dict[str, float]]:
    """Return the accuracies of encoders and of raw pixels, and show them as a table."""
    if images.train_labels is None or images.held_out_labels is None:
        print("no labels (two subfolders or more, with 5 images each): no evaluation")
        return {}
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        **{name: partial(features_of, encoder) for name, encoder in encoders.items()},
        "raw pixels": pixels_of,
    }
    accuracies = {
        name: evaluation.evaluate(
            represent(images.train).numpy(),
            images.train_labels.numpy(),
            represent(images.held_out).numpy(),
            images.held_out_labels.numpy(),
        )
        for name, represent in representations.items()
    }
    print(f"\n{len(images.held_out)} {images.held_out_name} images")
    print(evaluation.table(accuracies), flush=True)
    return accuracies


def draw(training: Training, transform: MultiCropTransform, images: Images, folder: Path) -> float:
    """Write the pictures, say so if the training failed, and return the prototypes' perplexity."""
    prototypes = training.criterion.prototypes.cpu()
    chance = math.log(prototypes.num_prototypes)
    projected = features_of(training.network, images.train)
    nearest = prototypes.assign(projected)
    usage = torch.bincount(nearest, minlength=prototypes.num_prototypes) / len(nearest)
    perplexity = math.exp(torch.special.entr(usage).sum())
    last = training.losses[-50:]
    if sum(last) / len(last) > 0.99 * chance:
        print("warning: the loss is still at ln K: the training did not start")
    elif perplexity < min(2, prototypes.num_prototypes):
        print(f"warning: the training collapsed: the prototypes' perplexity is {perplexity:.2f}")

    some = torch.linspace(0, len(images.train) - 1, min(8, len(images.train))).long()
    pictures.crops(transform(images.train[some]), MEAN, STD, folder / "crops.png")
    pictures.loss(training.losses, chance, folder / "loss.png")
    pictures.usage(usage, perplexity, folder / "prototypes.png")
    scores = prototypes(projected).detach()
    pictures.nearest(images.train.cpu(), scores, folder / "nearest.png")
    if len(images.held_out):
        shown, labels = images.held_out, images.held_out_labels
    else:
        shown, labels = images.train[:1000], None
    pictures.feature_map(features_of(training.network.encoder, shown), labels, folder / "map.png")
    return perplexity


def run(settings: Settings) -> None:
    """Pretrain, evaluate and write everything into the output folder."""
    started = time.perf_counter()
    device = choose_device(settings.device)
    processes.join(device)
    torch.set_num_threads(settings.threads)
    threadpool_limits(settings.threads)  # of the libraries below scikit-learn
    groups = crop_groups(settings, distort_digits)
    images = load_images(
        settings.data, validation=settings.validation, image_size=settings.image_size
    ).to(device)
    say(f"{images}, on {device}" + f", {processes.SIZE} processes" * (processes.SIZE > 1))
    if settings.batch_size // processes.SIZE < 2:
        raise UserError(
            f"--batch-size must be at least 2 for each of the {processes.SIZE} processes, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size > len(images.train):
        raise UserError(
            f"--batch-size must be at most the {len(images.train)} training images, "
            f"got {settings.batch_size}"
        )
    output = Path(settings.output)
    torch.manual_seed(settings.seed)
    try:
        output.mkdir(parents=True, exist_ok=True)
        transform = MultiCropTransform(groups, mean=MEAN, std=STD)
        training = prepare(settings, images.train, groups[0].count)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    if processes.RANK > 0:  # other crops on each process
        torch.manual_seed(settings.seed + 10**9 * processes.RANK)
    untrained = copy.deepcopy(training.network.encoder)
    if settings.resume:
        load_checkpoint(training, settings, images.train)
    if settings.compile:
        training.network.compile()
    train(training, settings, transform, images.train)
    processes.leave()
    if processes.RANK > 0:
        return
    trained = time.perf_counter()

    training.network.eval()
    encoders = {"trained encoder": training.network.encoder, "random encoder": untrained.eval()}
    accuracies = evaluate(encoders, images)
    evaluated = time.perf_counter()
    perplexity = draw(training, transform, images, output)
    finished = time.perf_counter()
    metrics: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "seed": settings.seed,
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("swavkit", "torch", "numpy", "scikit-learn")},
        },
        "device": str(device),
        "processes": processes.SIZE,
        "threads": torch.get_num_threads(),
        "images": {
            "train": len(images.train),
            images.held_out_name: len(images.held_out),
            "unreadable": images.unreadable,
        },
        "seconds": {
            "training, all runs": round(training.seconds, 2),
            "evaluation": round(evaluated - trained, 2),
            "pictures": round(finished - evaluated, 2),
            "this run": round(finished - started, 2),
        },
        "accuracies": accuracies,
        "prototype_perplexity": perplexity,
        "ln_k": math.log(settings.prototypes),
        "losses": training.losses,
    }
    (output / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    print(f"\n{finished - started:.0f} s; pictures and metrics are in {output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    try:
        run(parse(arguments, __doc__.splitlines()[0]))
    except UserError as error:
        if processes.RANK == 0:
            print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 2
    return 0


def say(text: str) -> None:
    """Print a line, once on all processes together."""
    if processes.RANK == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
