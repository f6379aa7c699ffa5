"""Files in the output folder of pretrain.py, and resuming from a checkpoint."""

from __future__ import annotations

import dataclasses
import io
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import processes
import torch
from encoder import Network
from images import reason
from settings import FREE_TO_CHANGE, Settings, UserError, flag
from torch import Tensor

from swavkit import ClusterMonitor, SwAVLoss

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.json"


@dataclass
class Training:
    """The state that a training step changes, and that a checkpoint holds."""

    network: Network
    criterion: SwAVLoss
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    monitor: ClusterMonitor
    epoch: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one per step
    figures: list[dict[str, float]] = field(default_factory=list)  # one per epoch


def check_output(settings: Settings) -> None:
    """Raise an error if the folder holds a run, unless the options resume or replace it."""
    held = [name for name in (CHECKPOINT, METRICS) if (Path(settings.output) / name).exists()]
    if held and not (settings.resume or settings.overwrite):
        raise UserError(
            f"--output {settings.output!r} holds a run already ({', '.join(held)}): give --resume "
            f"to go on from it, --overwrite to replace it, or another folder"
        )


def make_room(settings: Settings, content: bytes) -> None:
    """Create the output folder, and check that two checkpoints and the pictures fit into it."""
    output = Path(settings.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        write(settings, CHECKPOINT, 2 * content + bytes(2**21), rehearse=True)
        if settings.overwrite and processes.RANK == 0:
            for name in (CHECKPOINT, METRICS):
                (output / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--output {settings.output!r}: {reason(error)}") from error


def write(settings: Settings, name: str, content: bytes, *, rehearse: bool = False) -> None:
    """Write a file of the output folder atomically.

    Only rank 0 writes. A rehearsal leaves no file behind.
    """
    if processes.RANK > 0:
        return
    path = Path(settings.output) / name
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not rehearse:
            os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {reason(error)}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def checkpoint(training: Training, settings: Settings, images: Tensor) -> bytes:
    """Return the content of the checkpoint file."""
    own = {
        "criterion": training.criterion.state_dict(),  # prototypes, queue, steps
        "monitor": training.monitor.state_dict(),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state(images.device) if images.is_cuda else None,
    }
    state = {
        "settings": dataclasses.asdict(settings),
        "images": len(images),
        "network": training.network.state_dict(),
        "processes": processes.everyones(own),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "epoch": training.epoch,
        "seconds": training.seconds,
        "losses": training.losses,
        "figures": training.figures,
    }
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def resume(training: Training, settings: Settings, images: Tensor) -> None:
    """Load the last checkpoint, if there is one."""
    path = Path(settings.output) / CHECKPOINT
    if not path.exists():
        processes.say(f"no {path} yet: starting from the beginning")
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {reason(error)}") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        saved = {
            **state["settings"],
            "the number of training images": state["images"],
            "the number of ranks": len(state["processes"]),
        }
    except Exception as error:  # torch.load raises many types
        raise UserError(
            f"{str(path)!r} ({len(content)} bytes) is damaged or no checkpoint of this program; "
            f"--overwrite starts anew"
        ) from error
    present = {
        **dataclasses.asdict(settings),
        "the number of training images": len(images),
        "the number of ranks": processes.SIZE,
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
    if "figures" in state:  # older checkpoints have none
        training.figures = state["figures"]
        training.monitor.load_state_dict(own["monitor"])
    processes.say(f"continuing after epoch {training.epoch} of {settings.epochs}")
