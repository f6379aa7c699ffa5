"""The command line of pretrain.py, with one option per field."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from swavkit import CropGroup, PhotometricDistortion

DIGIT_DATA = {  # data: crops, range of their area
    "mnist": ("2x28,2x20", "0.7-1,0.5-0.9"),
    "digits": ("2x8,2x6", "0.7-1,0.5-0.9"),
}
FOLDER_CROPS = ("2x48,4x24", "0.3-1,0.1-0.4")


class UserError(Exception):
    """An error that the user can correct; it is shown in one line."""

    exit_status = 2


class TrainingError(UserError):
    """An error of the training."""

    exit_status = 3


def option(default: Any, explanation: str) -> Any:
    """Declare a field with the help text of its option."""
    return field(default=default, metadata={"help": explanation})


@dataclass(frozen=True)
class Settings:
    """The options. Defaults were chosen on the validation split (``--validation``)."""

    data: str = option(
        "mnist",
        "mnist, digits, or a folder of images; subfolders are labels. Gray images of more than 8 "
        "bits hold 0 to 65535, or 0 to 1 in floats; transparent pixels become white",
    )
    output: str = option("runs/pretrain", "folder for metrics, checkpoint and pictures")
    resume: bool = option(False, "continue from the checkpoint in the output folder, if any")
    overwrite: bool = option(False, "replace the run that the output folder holds")
    keep_going: bool = option(
        False, "continue if a diagnosis says that training is stuck or collapsed"
    )
    validation: bool = option(
        False,
        "hold out a part of the training images, and evaluate on it and not on the test split",
    )
    epochs: int = option(30, "passes over the training images")
    batch_size: int = option(64, "images in a step")
    crops: str = option("auto", "count x size of each resolution, such as 2x28,2x20")
    scales: str = option("auto", "range of the crops' area for each resolution: 0.7-1,0.5-0.9")
    prototypes: int = option(100, "number of prototypes, K")
    feature_dim: int = option(64, "number of features that are compared with the prototypes")
    temperature: float = option(0.1, "softmax temperature of the predictions")
    epsilon: float = option(0.02, "entropy temperature of the codes")
    iterations: int = option(3, "Sinkhorn-Knopp iterations")
    queue: int = option(0, "slots of the feature queue, over all ranks; 0 for none")
    freeze_steps: int = option(50, "steps before the prototypes start to move")
    learning_rate: float = option(2e-3, "largest learning rate of AdamW")
    warmup_steps: int = option(300, "steps of linear warm-up before the cosine decay")
    weight_decay: float = option(1e-4, "weight decay of AdamW")
    image_size: int = option(64, "images of a folder are scaled and cut to squares of this size")
    seed: int = option(0, "seed of initialization, batches and crops; the data split is fixed")
    device: str = option("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    threads: int = option(1, "threads on the CPU; the default network is too small for many")
    compile: bool = option(False, "compile the network with torch.compile")


# Settings that may differ between the run that wrote a checkpoint and the run that resumes it.
FREE_TO_CHANGE = {"output", "resume", "overwrite", "keep_going", "device", "threads", "compile"}

LEAST = {
    "epochs": 1,
    "batch_size": 2,  # BatchNorm
    "queue": 0,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "image_size": 1,
    "seed": 0,
    "threads": 1,
}


def parse(arguments: list[str] | None, description: str) -> Settings:
    """Return the settings of a command line.

    Raises:
        UserError: If an argument is wrong.
    """
    parser = Parser(
        prog="pretrain.py",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field_ in dataclasses.fields(Settings):
        name, explanation = flag(field_.name), field_.metadata["help"]
        if isinstance(field_.default, bool):
            parser.add_argument(name, action="store_true", help=explanation)
        else:
            kind = type(field_.default)
            parser.add_argument(name, type=kind, default=field_.default, help=explanation)
    settings = Settings(**vars(parser.parse_args(arguments)))
    for name, least in LEAST.items():
        value = getattr(settings, name)
        if not least <= value < math.inf:
            raise UserError(f"{flag(name)} must be at least {least}, got {value}")
    if settings.resume and settings.overwrite:
        raise UserError("--resume and --overwrite cannot be combined")
    return settings


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def flag(name: str) -> str:
    """Return the option of a field."""
    return "--" + name.replace("_", "-")


def crop_groups(settings: Settings, distort_digits: Any) -> list[CropGroup]:
    """Return the crops given by ``--crops`` and ``--scales``."""
    digits = settings.data in DIGIT_DATA
    crops, scales = DIGIT_DATA[settings.data] if digits else FOLDER_CROPS
    crops = crops if settings.crops == "auto" else settings.crops
    scales = scales if settings.scales == "auto" else settings.scales
    numbers = resolutions("--crops", crops, r"(\d+)x(\d+)", "2x28,2x20")
    areas = resolutions("--scales", scales, r"(\d*\.?\d+)-(\d*\.?\d+)", "0.7-1,0.5-0.9")
    if len(numbers) != len(areas):
        raise UserError(
            f"--crops and --scales must hold as many resolutions, got {len(numbers)} ({crops}) "
            f"and {len(areas)} ({scales})"
        )
    try:
        groups = [
            CropGroup(
                int(size),
                int(count),
                (float(least), float(most)),
                flip=0.0 if digits else 0.5,  # a mirrored digit is not a digit
                photometric=distort_digits if digits else PhotometricDistortion(),
            )
            for (count, size), (least, most) in zip(numbers, areas, strict=True)
        ]
    except ValueError as error:
        raise UserError(f"--crops {crops} --scales {scales}: {error}") from error
    if sum(group.count for group in groups) < 2:
        raise UserError(f"--crops must describe at least 2 crops of an image, got {crops!r}")
    return groups


def resolutions(name: str, text: str, pattern: str, example: str) -> list[tuple[str, ...]]:
    """Return the numbers of an option for each resolution."""
    matches = [re.fullmatch(pattern, part) for part in text.split(",")]
    if not all(matches):
        raise UserError(f"{name} must be like {example}, got {text!r}")
    return [match.groups() for match in matches if match]


def choose_device(name: str) -> torch.device:
    """Return the device of ``--device``, after a test tensor was created on it."""
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK")  # set by torchrun
        cuda = "cuda" if rank is None else f"cuda:{rank}"
        return torch.device(cuda if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros((), device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name!r} cannot be used: {reason}") from error
    return torch.device(name)
