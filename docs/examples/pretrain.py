"""Pretrain a small convolutional encoder with SwAV on real, unlabeled images, and evaluate it.

    python docs/examples/pretrain.py                        # 4,000 MNIST digits
    python docs/examples/pretrain.py --data digits          # scikit-learn's 8x8 digits
    python docs/examples/pretrain.py --data path/to/images  # your own; subfolders are labels
    torchrun --nproc-per-node 2 docs/examples/pretrain.py   # each batch on two ranks

``torchrun`` is in the same folder as ``python``: ``.venv/bin/torchrun`` for ``.venv/bin/python``.

``train`` contains the training loop: crops, features, loss, step. Labels are used for evaluation
only. The output folder holds ``metrics.json``, ``checkpoint.pt`` and pictures. ``--resume``
continues from the checkpoint. The progress line shows the loss, its bounds, the share of prototypes
that are used, and how often two crops of an image have the same nearest prototype. A run that is
stuck or collapsed is stopped with a diagnosis, unless ``--keep-going`` is given.

The exit status is 0 for a finished run, 2 for an error that the user can correct, 3 if training
diverges or is stopped by a diagnosis, and 130 for Ctrl-C. Under ``torchrun``, 2 and 3 become 1.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swavkit import (
    ClusterMonitor,
    Diagnosis,
    MultiCropTransform,
    SwAVLoss,
    SwAVStatistics,
    check_sizes,
    multi_crop_forward,
)

try:
    import evaluation
    import monitoring
    import pictures
    import processes
    from checkpoint import (
        CHECKPOINT,
        METRICS,
        Training,
        check_output,
        checkpoint,
        make_room,
        resume,
        write,
    )
    from encoder import MEAN, STD, Network, distort_digits, features_of, pixels_of
    from images import Images, load_images
    from matplotlib.figure import Figure
    from settings import Settings, TrainingError, UserError, choose_device, crop_groups, parse
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm
except ModuleNotFoundError as missing:
    sys.exit(
        f"pretrain.py: error: the package {missing.name!r} is missing; it comes with the extra: "
        f'pip install -e ".[examples]"'
    )


class Model(nn.Module):
    """Compute the loss from crops, as one module for DistributedDataParallel.

    It contains all parameters. The passes of ``multi_crop_forward`` are then one forward of the
    wrapper. If the network alone is wrapped and called once per resolution, the backward pass can
    fail, because the wrapper synchronizes BatchNorm's buffers in place before every call.
    """

    def __init__(self, network: nn.Module, criterion: SwAVLoss) -> None:
        super().__init__()
        self.network, self.criterion = network, criterion

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, SwAVStatistics, Tensor]:
        """Return the loss of one batch, its statistics, and the features (V, B, D)."""
        features = multi_crop_forward(self.network, crops)
        return *self.criterion(features, return_statistics=True), features.detach()


def prepare(
    settings: Settings, images: Tensor, code_views: int, network_of: Callable = Network
) -> Training:
    """Return the initial training state, on the device of the images.

    ``network_of`` makes the network from the channels of the images and the number of features.
    """
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
    network = network_of(images.shape[1], settings.feature_dim)
    network.to(images.device, memory_format=torch.channels_last)
    criterion.to(images.device)
    optimizer = torch.optim.AdamW(
        [*network.parameters(), *criterion.parameters()],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    total = settings.epochs * (len(images) // settings.batch_size)
    warmup = warmup_of(settings, total)

    def learning_rate_factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    monitor = ClusterMonitor(settings.prototypes)
    return Training(network, criterion, optimizer, schedule, monitor)


def warmup_of(settings: Settings, total: int) -> int:
    """Return the steps of warm-up in a run of ``total`` steps."""
    return min(settings.warmup_steps, total // 2)


def train(
    training: Training, settings: Settings, transform: MultiCropTransform, images: Tensor
) -> list[Diagnosis]:
    """Train to the last epoch, and write a checkpoint after each epoch.

    Returns:
        The diagnoses that stopped the training, the same on all ranks; an empty list if none did.
    """
    model: nn.Module = Model(training.network, training.criterion)
    if processes.SIZE > 1:
        model = DistributedDataParallel(model)
    criterion, monitor = training.criterion, training.monitor
    steps = len(images) // settings.batch_size  # in an epoch
    in_epoch = steps * settings.batch_size
    # The steps before the training is judged: the warm-up has left the window, and diagnose()
    # itself waits for 200.
    warmup = warmup_of(settings, settings.epochs * steps)
    judged = max(200, max(warmup, settings.freeze_steps) + monitor.window)
    sizes = check_sizes(
        settings.batch_size // processes.SIZE,
        settings.prototypes,
        processes=processes.SIZE,
        queue_length=criterion.queue.length if criterion.queue else 0,
    )
    told: set[str] = set()  # names of diagnoses
    monitoring.warn(sizes, told)
    progress = tqdm(
        total=settings.epochs * in_epoch,
        initial=training.epoch * in_epoch,
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=processes.RANK > 0,
        bar_format="{percentage:3.0f}%, {remaining} left{postfix}, {rate_fmt} {bar}",
    )
    with progress:
        while training.epoch < settings.epochs:
            started = time.perf_counter()
            unread: list[Tensor] = []  # losses on the device
            order = processes.of_the_first(torch.randperm(len(images)).to(images.device))
            for step, batch in enumerate(order[:in_epoch].split(settings.batch_size), start=1):
                rows = batch[processes.RANK :: processes.SIZE]
                loss, statistics, features = model(transform(images[rows]))
                training.optimizer.zero_grad()
                loss.backward()
                training.optimizer.step()
                training.schedule.step()
                monitor.update(
                    statistics, loss=loss, features=features, prototypes=criterion.prototypes
                )

                unread.append(loss.detach())
                progress.update(settings.batch_size)
                if step % 10 == 0 or step == steps:
                    read_losses(training, unread)
                    figures = monitoring.figures_of(monitor)
                    progress.set_postfix_str(monitoring.line(figures, settings.prototypes), False)
            if not all(state.isfinite().all() for state in [*model.parameters(), *model.buffers()]):
                raise diverged(
                    training, f"the weights after step {len(training.losses)} are not finite"
                )
            training.epoch += 1
            training.seconds += time.perf_counter() - started
            training.figures.append({"epoch": training.epoch, **figures})
            write(settings, CHECKPOINT, checkpoint(training, settings, images))
            if len(training.losses) >= judged:
                # Queues differ between ranks, and all ranks must stop together.
                found = processes.everyones(monitor.diagnose(criterion))[0]
                if monitoring.hopeless(found) and not settings.keep_going:
                    return found
                monitoring.warn(found, told)
    if len(training.losses) < judged:
        processes.say(f"{len(training.losses)} steps are too few to tell whether training works")
    return []


def read_losses(training: Training, unread: list[Tensor]) -> None:
    """Move losses to ``training.losses``. All ranks raise if a loss is not finite on any rank."""
    for loss in processes.mean(torch.stack(unread)).tolist():
        if not math.isfinite(loss):
            raise diverged(training, f"the loss is {loss} at step {len(training.losses) + 1}")
        training.losses.append(loss)
    unread.clear()


def diverged(training: Training, what: str) -> TrainingError:
    """Return the error for a training whose values are not finite."""
    kept = f"the checkpoint of epoch {training.epoch} stays" if training.epoch else "no checkpoint"
    return TrainingError(f"{what}: training stopped ({kept}); try a smaller --learning-rate")


def draw(
    training: Training,
    settings: Settings,
    transform: MultiCropTransform,
    images: Images,
    clusters: Figure | None,
) -> float:
    """Write the pictures, and return the prototypes' perplexity."""
    prototypes = training.criterion.prototypes.cpu()
    chance = math.log(prototypes.num_prototypes)
    projected = features_of(training.network, images.train)
    scores = prototypes(projected).detach()
    nearest = prototypes.assign(projected)
    usage = torch.bincount(nearest, minlength=prototypes.num_prototypes) / len(nearest)
    perplexity = math.exp(torch.special.entr(usage).sum())

    some = torch.linspace(0, len(images.train) - 1, min(8, len(images.train))).long()
    if len(images.held_out):
        shown, labels, what = images.held_out, images.held_out_labels, images.held_out_name
    else:
        shown, labels, what = images.train[:1000], None, "training"
    figures = {
        "crops.png": lambda: pictures.crops(transform(images.train[some]), MEAN, STD),
        "loss.png": lambda: pictures.loss(training.losses, chance),
        "prototypes.png": lambda: pictures.usage(usage, perplexity),
        "nearest.png": lambda: pictures.nearest(images.train.cpu(), scores),
        "clusters.png": lambda: clusters,
        "map.png": lambda: pictures.feature_map(
            features_of(training.network.encoder, shown), labels, images.classes, what
        ),
    }
    if clusters is None:
        del figures["clusters.png"]
    progress = tqdm(figures.items(), unit="picture")
    for name, figure in progress:
        progress.set_description(f"drawing {name}")
        content = io.BytesIO()
        figure().savefig(content, format="png", dpi=120)
        write(settings, name, content.getvalue())
    return perplexity


def run(settings: Settings) -> None:
    """Pretrain, evaluate, and write the results into the output folder."""
    started = time.perf_counter()
    check_output(settings)
    device = choose_device(settings.device)
    processes.join(device)
    # The probes consist of many short products. With two threads, the libraries below scikit-learn
    # mostly wait for each other, especially on a busy machine.
    threadpool_limits(1)
    torch.set_num_threads(settings.threads)
    groups = crop_groups(settings, distort_digits)
    images = load_images(
        settings.data, validation=settings.validation, image_size=settings.image_size
    ).to(device)
    processes.say(f"{images}, on {device}" + f", {processes.SIZE} ranks" * (processes.SIZE > 1))
    if settings.batch_size // processes.SIZE < 2:
        raise UserError(
            f"--batch-size must be at least 2 for each of the {processes.SIZE} ranks, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size > len(images.train):
        raise UserError(
            f"--batch-size must be at most the {len(images.train)} training images, "
            f"got {settings.batch_size}"
        )
    torch.manual_seed(settings.seed)
    try:
        transform = MultiCropTransform(groups, mean=MEAN, std=STD)
        training = prepare(settings, images.train, groups[0].count)
    except ValueError as error:
        raise UserError(str(error)) from error
    make_room(settings, checkpoint(training, settings, images.train))
    if processes.RANK > 0:  # different crops on each rank
        torch.manual_seed(settings.seed + 10**9 * processes.RANK)
    untrained = copy.deepcopy(training.network.encoder)
    if settings.resume:
        resume(training, settings, images.train)
    if settings.compile:
        training.network.compile()
    stopped = train(training, settings, transform, images.train)
    # None if an old checkpoint, without figures, held the last epoch already.
    clusters = training.monitor.plot() if training.figures else None
    processes.leave()
    if processes.RANK > 0:
        return
    trained = time.perf_counter()
    if stopped:
        print(monitoring.in_words(stopped), flush=True)

    training.network.eval()
    representations: dict[str, Callable[[Tensor], Tensor]] = {
        "trained encoder": partial(features_of, training.network.encoder),
        "random encoder": partial(features_of, untrained.eval()),
        "raw pixels": pixels_of,
    }
    accuracies = {} if stopped else evaluation.compare(representations, images)
    evaluated = time.perf_counter()
    perplexity = draw(training, settings, transform, images, clusters)
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
            "classes": images.classes,
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
        "figures": training.figures,
        "stopped_by": [each.name for each in stopped],
    }
    write(settings, METRICS, (json.dumps(metrics, indent=1) + "\n").encode())
    print(f"\n{finished - started:.0f} s; pictures and metrics are in {settings.output}")
    if stopped:
        raise TrainingError(
            f"training stopped after epoch {training.epoch} of {settings.epochs} "
            f"({stopped[0].name}): change what the diagnosis names and start anew with "
            f"--overwrite, or train on with --resume --keep-going"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    try:
        run(parse(arguments, __doc__.splitlines()[0]))
    except UserError as error:
        if processes.RANK == 0:
            print(f"pretrain.py: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        if processes.RANK == 0:
            line = "pretrain.py: interrupted; --resume goes on after the last finished epoch"
            print(line, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
