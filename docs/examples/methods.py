"""Code shared by the examples of other methods: options, images, ranks and evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import processes
import torch
from encoder import MEAN, STD, distort_digits, features_of
from images import Images, load_images
from settings import DIGIT_DATA, Settings, choose_device, crop_groups, flag
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from torch import Tensor

from swavkit import MultiCropTransform


def begin(
    arguments: list[str] | None, description: str, **defaults: int
) -> tuple[argparse.Namespace, Images]:
    """Parse the options, join the other ranks, seed, and load the images onto the device.

    Args:
        arguments: The command line, or ``None`` for that of the program.
        description: The text whose first line the help shows.
        defaults: Those of ``epochs``, ``batch_size`` and ``prototypes``.
    """
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", choices=list(DIGIT_DATA), default="mnist", help="the images")
    add("--epochs", type=int, default=defaults["epochs"], help="passes over the images")
    add("--batch-size", type=int, default=defaults["batch_size"], help="images in a step")
    add("--prototypes", type=int, default=defaults["prototypes"], help="prototypes of each head, K")
    add("--seed", type=int, default=0, help="seed of every random number")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    options = parser.parse_args(arguments)
    images = load_images(options.data, validation=False, image_size=28)
    each = len(images.train) // processes.SIZE
    limits = {
        "epochs": (1, None),
        "batch_size": (2 * processes.SIZE, len(images.train)),  # BatchNorm
        "prototypes": (1, each),  # k-means starts from as many features
    }
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if value < least or (most is not None and value > most):
            bound = f"at least {least}" + ("" if most is None else f" and at most {most}")
            parser.error(f"{flag(name)} must be {bound}, got {value}")
    device = choose_device(options.device)
    processes.join(device)
    torch.manual_seed(options.seed)
    return options, images.to(device)


def crops_of(data: str) -> MultiCropTransform:
    """Return the crops of the digits that are called ``data``."""
    return MultiCropTransform(crop_groups(Settings(data=data), distort_digits), mean=MEAN, std=STD)


def say_loss(losses: list[Tensor], epoch: int, options: argparse.Namespace) -> None:
    """Print the mean loss of an epoch, over all ranks."""
    mean = processes.mean(torch.stack(losses).mean())
    processes.say(f"epoch {epoch + 1} of {options.epochs}: loss {mean:.3f}")


def end(encoders: dict[str, Callable[[Tensor], Tensor]], images: Images) -> dict[str, float]:
    """Leave the process group; on rank 0, return and print the 5-NN accuracies in percent."""
    processes.leave()
    if processes.RANK > 0:
        return {}
    accuracies = {}
    for name, encoder in encoders.items():
        represent = partial(features_of, encoder)
        rows = [normalize(represent(part).numpy()) for part in (images.train, images.held_out)]
        neighbors = KNeighborsClassifier(5).fit(rows[0], images.train_labels)
        accuracies[name] = 100 * float(neighbors.score(rows[1], images.held_out_labels))
        print(f"5-NN accuracy of {name}: {accuracies[name]:.1f} %", flush=True)
    return accuracies
