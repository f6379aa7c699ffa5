"""The input pipeline of ``docs/examples/imagenet.py``: images per second, and where its time goes.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_input             # photographs of scikit-image
    OMP_NUM_THREADS=1 python -m benchmarks.bench_input FOLDER      # FOLDER/CLASS/IMAGE

Without a folder, JPEG files of 500 x 375 pixels are written. Steps are enabled one after the other,
and the time of a step is the difference, as in ``bench_multicrop``. It is CPU time of one thread,
which other programs affect little. Data loaders are timed by the clock on the wall.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from benchmarks import bench_multicrop, crop_pipelines
from benchmarks.crop_pipelines import STEPS

MOST, QUALITY, SECONDS, BATCH = 48, 90, 4.0, 16
SQUARE = 384  # of --crops device

Prepare = Callable[[Image.Image], Any]


class Files(Dataset[Any]):
    """Reads the files again and again."""

    def __init__(self, paths: list[Path], prepare: Prepare, length: int) -> None:
        self.paths, self.prepare, self.length = paths, prepare, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.paths[index % len(self.paths)]) as image:
            return self.prepare(image)


def write_photographs(folder: Path) -> list[Path]:
    """Write photographs as JPEG files of 500 x 375 pixels."""
    paths = []
    for index, image in enumerate(crop_pipelines.photographs()[::3]):
        paths.append(folder / f"{index}.jpg")
        ImageOps.fit(image, (500, 375)).save(paths[-1], quality=QUALITY)
    return paths


def decoded(image: Image.Image) -> Image.Image:
    image.load()
    return image


def square(image: Image.Image) -> torch.Tensor:
    pixels = np.array(image.convert("RGB").resize((SQUARE, SQUARE)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def measure(paths: list[Path], seconds: float = SECONDS) -> None:
    """Print the milliseconds of CPU time of each step for an image, in one process."""
    pipelines: dict[str, Prepare] = {"decode": decoded}
    pipelines |= {name: crop_pipelines.ours(n) for n, name in enumerate(STEPS, start=1)}
    pipelines["--crops device: decode and resize"] = square
    files = {name: Files(paths, prepare, len(paths)) for name, prepare in pipelines.items()}
    calls = {name: lambda one=one: [one[i] for i in range(len(one))] for name, one in files.items()}
    rows = bench_multicrop.measure(
        calls, len(paths), seconds=seconds, least=3, clock=time.process_time
    )
    medians = {row["contender"]: row["seconds"]["median"] for row in rows}
    whole, before = medians[STEPS[-1]], 0.0
    for name in ("decode", *STEPS):
        step, before = medians[name] - before, medians[name]
        print(f"  {name:34}{step * 1e3:8.2f} ms  {step / whole:5.0%}")
    print(f"  {'together':34}{whole * 1e3:8.2f} ms  {1 / whole:.1f} images/s")
    name, alone = list(medians.items())[-1]
    print(f"  {name:34}{alone * 1e3:8.2f} ms  {1 / alone:.1f} images/s")


def measure_loader(paths: list[Path], prepare: Prepare, images: int = 320) -> float:
    """Return the images per second of a data loader with one worker, without its start."""
    loader = DataLoader(Files(paths, prepare, images + BATCH), BATCH, num_workers=1)
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    for _ in batches:
        pass
    return images / (time.perf_counter() - start)


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        if arguments:
            paths = list(islice(sorted(Path(arguments[0]).glob("*/*")), MOST))
        else:
            paths = write_photographs(Path(temporary))
        size = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
        print(f"{len(paths)} files of {size:.0f} kB, one process, one thread")
        measure(paths)
        for name, prepare in ("loader", crop_pipelines.ours()), ("device", square):
            speed = measure_loader(paths, prepare)
            print(f"a data loader with one worker, --crops {name}: {speed:.1f} images/s")


if __name__ == "__main__":
    main(sys.argv[1:])
