"""The pictures of a run, each written into one file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

BLUE, GREY, RED = "#2f6db3", "#8a8a8a", "#c0392b"


def crops(views: list[Tensor], mean: float, std: float, path: Path) -> None:
    """Show the crops of some images as the network sees them: a row an image, a column a crop."""
    columns, rows = len(views), len(views[0])
    figure = Figure(figsize=(columns * 1.1, rows * 1.1 + 0.4), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    largest = views[0].shape[-1]
    for column, view in enumerate(views):
        size = view.shape[-1]
        cells[0, column].set_title(f"{size}×{size}", fontsize=9)
        for row in range(rows):
            show(cells[row, column], (view[row] * std + mean).clamp(0, 1))
            margin = (largest - size) / 2 + 0.5  # the same scale for every crop
            cells[row, column].set(
                xlim=(-margin, size + margin - 1), ylim=(size + margin - 1, -margin)
            )
    figure.savefig(path, dpi=120)


def loss(losses: list[float], chance: float, path: Path) -> None:
    """Show the loss of every step, smoothed over 50, and the line where nothing is learned."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color=BLUE, alpha=0.25, linewidth=0.8)
    window = min(50, len(losses))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    axes.plot(np.arange(len(smooth)) + window / 2, smooth, color=BLUE, label="loss")
    axes.axhline(chance, color=RED, linestyle="--", linewidth=1, label="ln K: all scores equal")
    axes.set(xlabel="step", ylabel="swapped prediction loss")
    axes.legend(frameon=False)
    tidy(axes)
    figure.savefig(path, dpi=120)


def usage(shares: Tensor, perplexity: float, path: Path) -> None:
    """Show how many images each prototype is the nearest of, most used first."""
    figure = Figure(figsize=(6.4, 3.0), layout="constrained")
    axes = figure.subplots()
    ordered = np.sort(shares.numpy())[::-1] * 100
    axes.bar(np.arange(len(ordered)), ordered, width=1.0, color=BLUE)
    axes.axhline(100 / len(ordered), color=RED, linestyle="--", linewidth=1, label="equal use")
    axes.set(
        xlabel="prototype, most used first",
        ylabel="images, %",
        title=f"perplexity {perplexity:.1f} of {len(ordered)}",
        xlim=(-0.5, len(ordered) - 0.5),
    )
    axes.legend(frameon=False)
    tidy(axes)
    figure.savefig(path, dpi=120)


def nearest(images: Tensor, scores: Tensor, path: Path) -> None:
    """Show the images nearest to some prototypes, a row a prototype, from most to least used."""
    rows, columns = min(10, scores.shape[1]), min(12, len(images))
    used = torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1]).argsort(descending=True)
    chosen = used[torch.linspace(0, len(used) - 1, rows).long()]
    figure = Figure(figsize=(columns * 0.6 + 0.6, rows * 0.6), layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for row, prototype in enumerate(chosen):
        best = scores[:, prototype].topk(columns).indices
        for column, index in enumerate(best):
            show(cells[row, column], images[index] / 255)
        cells[row, 0].set_ylabel(
            f"{int(prototype)}", rotation=0, ha="right", va="center", fontsize=8
        )
    figure.savefig(path, dpi=120)


def feature_map(features: Tensor, labels: Tensor | None, path: Path) -> None:
    """Show features in two dimensions (t-SNE), coloured by label if there are any."""
    points = torch.nn.functional.normalize(features).numpy()
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    axes = figure.subplots()
    if len(points) > 3:
        perplexity = min(30.0, (len(points) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    classes = [None] if labels is None or len(labels) == 0 else labels.unique().tolist()
    for label in classes:
        group = points if label is None else points[(labels == label).numpy()]
        axes.scatter(
            group[:, 0],
            group[:, 1],
            s=7,
            color=GREY if label is None else f"C{label % 10}",
            label=str(label) if len(classes) <= 10 else None,
        )
    if 1 < len(classes) <= 10:
        axes.legend(frameon=False, markerscale=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def show(axes: Axes, image: Tensor) -> None:
    """Show one (C, H, W) image in [0, 1], without ticks."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
