"""Multi-crop in images per second, compared with torchvision, and the time of each step."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import crop_pipelines
from benchmarks.crop_pipelines import STEPS, Pipeline
from benchmarks.harness import Calls, clock_of, paired_ratios, summary, time_interleaved
from benchmarks.inputs import CPU
from swavkit import MultiCropTransform
from tests import image_oracles

NAME = "multicrop"
BATCH = 16
WORKERS = 2
BATCH_ON_DEVICE = 128
TOLERANCE, TOLERANCE_ON_DEVICE = 1e-4, 2e-4  # of pixels in [0, 1]

Row = dict[str, Any]


def run(folder: Path, *, quick: bool, device: torch.device = CPU) -> dict[str, Any]:
    """Verify, measure, print and plot, and return the results as plain values."""
    if not importlib.util.find_spec("skimage"):
        print(f"{NAME}: scikit-image, which has the photographs, is not installed: left out")
        return {}
    for package in crop_pipelines.missing():
        print(f"{NAME}: {package} is not installed, and is left out")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the figures are per core
    try:
        images = crop_pipelines.photographs()[: 1 if quick else None]
        if device.type != "cpu":
            return on_device(images, device)
        error = largest_error(crop_pipelines.tensors(images)[0])
        if not error <= TOLERANCE:
            raise ValueError(f"crops must be within {TOLERANCE:g} of the oracle, got {error:g}")
        seconds = 0.1 if quick else 8
        alone = measure(contenders(images), len(images), seconds=seconds)
        show(f"{NAME}: one process, one thread, {len(images)} photographs", alone)
        loaders = measure_loaders(images, repetitions=2 if quick else 5, epoch=8 if quick else 200)
        show(f"{NAME}: a data loader with {WORKERS} workers", loaders)
        steps = measure_steps(images, seconds=seconds)
    finally:
        torch.set_num_threads(threads)
    if importlib.util.find_spec("matplotlib"):
        plot(steps, folder / "multicrop.png")
    return {"error": error, "alone": alone, "loaders": loaders, "steps": steps}


def largest_error(image: Tensor) -> float:
    """Compare small crops of a photograph with the oracle, and our two implementations.

    The oracle of a crop is two loops, too slow for large crops. The photometric step has one
    implementation for single crops and one for batches, which a gradient selects.
    """
    plain, distorted = (
        MultiCropTransform(groups, mean=0.0, std=1.0)
        for groups in (image_oracles.PLAIN, crop_pipelines.ours().crops)
    )
    errors = []
    for crop, box, flip in zip(*plain(image, seed=0, return_boxes=True), strict=True):
        left, top, right, bottom = box.tolist()
        row = (top, left, bottom - top, right - left, bool(flip))
        expected = image_oracles.resized_box(image.numpy() / 255, row, crop.shape[-1])
        errors.append(float(np.abs(expected - crop.numpy()).max()))
    together = distorted((image / 255).requires_grad_(), seed=0)
    for one, other in zip(distorted(image, seed=0), together, strict=True):
        errors.append(float((one - other.detach()).abs().max()))
    return max(errors)


def on_device(images: Sequence[Any], device: torch.device) -> dict[str, Any]:
    """Make the crops of a batch of images on a device, and compare them with those of a CPU."""
    batch = crop_pipelines.tensors(images)
    batch = (batch * (BATCH_ON_DEVICE // len(batch) + 1))[:BATCH_ON_DEVICE]
    there = [image.to(device) for image in batch]
    transform, plain = crop_pipelines.ours(), crop_pipelines.ours(1)
    pixels = MultiCropTransform(transform.crops, mean=0.0, std=1.0)  # crops in [0, 1]
    differences = zip(pixels(batch[:16], seed=0), pixels(there[:16], seed=0), strict=True)
    error = max((one - other.cpu()).abs().max().item() for one, other in differences)
    if not error <= TOLERANCE_ON_DEVICE:
        raise ValueError(
            f"crops must be within {TOLERANCE_ON_DEVICE:g} of those of a CPU, got {error:g}"
        )
    calls: dict[str, Callable[[], object]] = {
        "swavkit": lambda: transform(there),
        "swavkit, no photometric step": lambda: plain(there),
    }
    if "torchvision" not in crop_pipelines.missing():
        theirs = crop_pipelines.torchvision_pipeline()
        calls["torchvision"] = lambda: [theirs(image) for image in there]
    rows = measure(calls, len(there), seconds=1, least=2, clock=clock_of(device))
    show(f"{NAME}: {len(there)} photographs on {torch.cuda.get_device_name(device)}", rows)
    return {"error": error, "alone": rows}


def contenders(images: Sequence[Any]) -> Calls:
    """Return calls that make the crops of all images once."""
    tensors = crop_pipelines.tensors(images)
    exact, rounded = crop_pipelines.ours(), crop_pipelines.ours(eight_bit=True)
    calls: dict[str, Callable[[], object]] = {
        "swavkit, PIL": lambda: [exact(image) for image in images],
        "swavkit, uint8 tensors": lambda: [exact(tensor) for tensor in tensors],
        "swavkit, a list as one batch": lambda: exact(tensors),
        "swavkit, PIL, eight_bit": lambda: [rounded(image) for image in images],
    }
    peers: dict[str, tuple[Pipeline, Sequence[Any]]] = {}
    if "torchvision" not in crop_pipelines.missing():
        peers["torchvision, PIL"] = crop_pipelines.torchvision_pipeline(), images
        peers["torchvision, uint8 tensors"] = crop_pipelines.torchvision_pipeline(), tensors
        blurred = crop_pipelines.torchvision_pipeline(blur=crop_pipelines.PILBlur())
        peers["torchvision, PIL, PIL's blur"] = blurred, images
        if "OpenCV" not in crop_pipelines.missing():
            blurred = crop_pipelines.torchvision_pipeline(blur=crop_pipelines.OpenCVBlur())
            peers["torchvision, PIL, OpenCV blur"] = blurred, images
    for name, (pipeline, inputs) in peers.items():
        calls[name] = lambda pipeline=pipeline, inputs=inputs: [pipeline(one) for one in inputs]
    return calls


def measure(
    calls: Calls,
    images: int,
    *,
    seconds: float,
    least: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time the calls in turn. Times are per image, ratios are to the time of the first call."""
    rounds = time_interleaved(calls, seconds=seconds, least=least, clock=clock)
    first = rounds[next(iter(calls))]
    return [
        {
            "contender": name,
            "rounds": len(samples),
            "seconds": summary([duration / images for duration in samples.values()]),
            "ratio": summary(paired_ratios(samples, first)),
        }
        for name, samples in rounds.items()
    ]


class Photographs(Dataset[list[Tensor]]):
    """A dataset that repeats the same photographs."""

    def __init__(self, images: Sequence[Any], pipeline: Pipeline, length: int) -> None:
        self.images, self.pipeline, self.length = images, pipeline, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.pipeline(self.images[index % len(self.images)])


def measure_loaders(images: Sequence[Any], *, repetitions: int, epoch: int) -> list[Row]:
    """Time whole epochs through data loaders with persistent workers, in turn."""
    pipelines: dict[str, tuple[Pipeline, Sequence[Any]]] = {
        "swavkit, PIL": (crop_pipelines.ours(), images),
        "swavkit, PIL, eight_bit": (crop_pipelines.ours(eight_bit=True), images),
    }
    if "torchvision" not in crop_pipelines.missing():
        theirs = crop_pipelines.torchvision_pipeline()
        pipelines["torchvision, PIL"] = theirs, images
        pipelines["torchvision, uint8 tensors"] = theirs, crop_pipelines.tensors(images)
    calls: dict[str, Callable[[], object]] = {}
    for name, (pipeline, inputs) in pipelines.items():
        loader = DataLoader(
            Photographs(inputs, pipeline, epoch),
            batch_size=min(BATCH, epoch),
            num_workers=WORKERS,
            persistent_workers=True,
        )
        calls[name] = lambda loader=loader: [None for _ in loader]
    return measure(calls, epoch, seconds=0, least=repetitions)


def measure_steps(images: Sequence[Any], *, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each step per image: the time with it minus the time without it."""
    tensors = crop_pipelines.tensors(images)
    makers: dict[str, tuple[Callable[[int], Pipeline], Sequence[Any]]] = {
        "swavkit, PIL": (crop_pipelines.ours, images)
    }
    if "torchvision" not in crop_pipelines.missing():
        makers["torchvision, PIL"] = crop_pipelines.torchvision_pipeline, images
        makers["torchvision, tensors"] = crop_pipelines.torchvision_pipeline, tensors
    found = {}
    for name, (make, inputs) in makers.items():
        calls: dict[str, Callable[[], object]] = {}
        for count in range(1, len(STEPS) + 1):
            pipeline = make(count)
            calls[STEPS[count - 1]] = lambda pipeline=pipeline, inputs=inputs: [
                pipeline(one) for one in inputs
            ]
        rows = measure(calls, len(images), seconds=seconds / len(STEPS))
        whole = [row["seconds"]["median"] for row in rows]
        found[name] = [
            time - before for time, before in zip(whole, [0.0, *whole[:-1]], strict=True)
        ]
    return found


def show(title: str, rows: list[Row]) -> None:
    """Print a table."""
    width = max(len(row["contender"]) for row in rows)
    print(title)
    print(f"  {'contender':{width}}  rounds  ms an image     quartiles  images/s  x swavkit's time")
    for row in rows:
        times, ratio = row["seconds"], row["ratio"]["median"]
        quartiles = f"{times['lower_quartile'] * 1e3:.2f}–{times['upper_quartile'] * 1e3:.2f}"
        print(
            f"  {row['contender']:{width}}  {row['rounds']:6}  {times['median'] * 1e3:11.2f}  "
            f"{quartiles:>12}  {1 / times['median']:8.1f}  {ratio:16.2f}"
        )
    print()


def plot(steps: dict[str, list[float]], path: Path) -> None:
    """Plot the time of each step for one image, one bar per pipeline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.6 * len(steps)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(steps)
    left, widest = np.zeros(len(names)), 1e3 * max(map(sum, steps.values()))
    for index, step in enumerate(STEPS):
        width = np.array([max(0.0, steps[name][index]) * 1e3 for name in names])
        bars = axes.barh(names, width, left=left, label=step)
        labels = [f"{one:.1f}" if one >= 0.02 * widest else "" for one in width]  # that fit
        axes.bar_label(bars, labels, label_type="center", color="white", fontsize=8)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("ms for the 8 crops of one photograph, one thread")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(STEPS), frameon=False, fontsize=8)
    figure.savefig(path, dpi=100)
