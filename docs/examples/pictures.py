"""The pictures of a run."""

from __future__ import annotations

import math
import textwrap

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

BLUE, GREY, RED = "#2f6db3", "#8a8a8a", "#c0392b"
MARKERS = "os^Dv*Pp<>"  # one for ten classes, which differ in color
MOST_CLASSES = 10 * len(MARKERS)  # in a legend


def crops(views: list[Tensor], mean: float, std: float) -> Figure:
    """Show the crops of some images, the input of the network."""
    columns, rows = len(views), len(views[0])
    figure = Figure(figsize=(max(4.0, columns * 1.1), rows * 1.1 + 1.2), layout="constrained")
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
    return explain(
        figure,
        "What the network sees",
        "Each row holds the random crops of one training image, each column one crop, with its "
        "size in pixels.",
    )


def loss(losses: list[float], chance: float) -> Figure:
    """Show the loss of every step, its moving average, and the loss of equal scores."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    window = max(1, min(50, len(losses) // 10))
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    steps = np.arange(1, len(losses) + 1)
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=0.8)
    axes.plot(
        np.arange(len(smooth)) + (window + 1) / 2,
        smooth,
        color=BLUE,
        marker="o" if len(smooth) < 20 else None,
        label="loss" if window == 1 else f"loss, mean of {window} steps",
    )
    axes.axhline(chance, color=RED, linestyle="--", linewidth=1, label="ln K")
    axes.set(
        xlabel="training step",
        ylabel="swapped prediction loss, nats",
        xlim=(0.5, len(losses) + 0.5),
    )
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    tidy(axes)
    return explain(
        figure,
        "Training loss",
        "ln K is the loss if all scores are equal; a run that works falls clearly below it.",
    )


def usage(shares: Tensor, perplexity: float) -> Figure:
    """Show the share of images whose nearest prototype is each prototype."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    ordered = np.sort(shares.numpy())[::-1] * 100
    ranks = np.arange(1, len(ordered) + 1)
    axes.bar(ranks, ordered, width=1.0, color=BLUE, label="nearest to the prototype")
    axes.axhline(100 / len(ordered), color=RED, linestyle="--", linewidth=1, label="equal use")
    axes.set(
        xlabel="rank of the prototype, most used first",
        ylabel="training images, %",
        xlim=(0.5, len(ordered) + 0.5),
    )
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(frameon=False)
    tidy(axes)
    return explain(
        figure,
        "Use of the prototypes",
        f"Each bar is the share of the images that are nearest to one prototype. The perplexity of "
        f"the shares is {perplexity:.1f}; it is {len(ordered)} with equal use and 1 if all images "
        f"are nearest to the same prototype.",
    )


def nearest(images: Tensor, scores: Tensor) -> Figure:
    """Show the images nearest to some prototypes, from most to least used."""
    rows, columns = min(10, scores.shape[1]), min(12, len(images))
    counts = torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1])
    used = counts.argsort(descending=True)
    chosen = used[torch.linspace(0, len(used) - 1, rows).long()]
    size = (max(4.0, columns * 0.6 + 1.2), rows * 0.6 + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False)
    for row, prototype in enumerate(chosen):
        best = scores[:, prototype].topk(columns).indices
        for column, index in enumerate(best):
            show(cells[row, column], images[index] / 255)
        cells[row, 0].set_ylabel(
            f"no. {int(prototype)}\n{100 * counts[prototype] / len(images):.1f} %",
            rotation=0,
            ha="right",
            va="center",
            fontsize=8,
        )
    return explain(
        figure,
        f"Training images nearest to {rows} of {scores.shape[1]} prototypes",
        f"Each row holds the {columns} images of largest cosine with one prototype, largest first. "
        f"The labels give its number and the share of all images that are nearest to it. Rows go "
        f"from the most used prototype to the least used.",
    )


def feature_map(features: Tensor, labels: Tensor | None, classes: list[str], what: str) -> Figure:
    """Show the features of ``what`` in two dimensions (t-SNE), colored by class if known."""
    points = torch.nn.functional.normalize(features).numpy()
    if len(points) > 3:
        perplexity = min(30.0, (len(points) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points)
    shown = [] if labels is None else labels.unique().tolist()
    legend_columns = math.ceil(len(shown) / 25) if 1 < len(shown) <= MOST_CLASSES else 0
    figure = Figure(figsize=(5.6 + 1.6 * legend_columns, 6.0), layout="constrained")
    axes = figure.subplots()
    for label in shown or [None]:
        group = points if label is None else points[(labels == label).numpy()]
        axes.scatter(
            group[:, 0],
            group[:, 1],
            s=9,
            color=GREY if label is None else f"C{label % 10}",
            marker="o" if label is None else MARKERS[label // 10 % len(MARKERS)],
            label=None if label is None else legend_text(classes[label]),
        )
    if legend_columns:
        axes.legend(
            title="class",
            frameon=False,
            markerscale=2,
            fontsize=8,
            ncols=legend_columns,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    axes.set(xticks=[], yticks=[], xlabel="t-SNE, first axis", ylabel="t-SNE, second axis")
    color = "Color and marker show the class, which the training did not see. " if shown else ""
    unnamed = "Several classes share a color and marker. " if len(shown) > MOST_CLASSES else ""
    return explain(
        figure,
        "Map of the encoder's features",
        f"Each point is one of the {len(points)} {what} images; near points have similar features. "
        f"{color}{unnamed}Distances between far groups mean nothing, and the axes have no unit.",
    )


def legend_text(name: str) -> str:
    """Return a class name for a legend: shortened, not parsed as mathematics, never hidden."""
    name = name if len(name) <= 24 else name[:23] + "…"
    return " " * name.startswith("_") + name.replace("$", r"\$")


def explain(figure: Figure, title: str, sentence: str) -> Figure:
    """Add a title above a figure and a description below it."""
    figure.suptitle(title, fontsize=11)
    width = int(figure.get_figwidth() * 15)
    figure.supxlabel(textwrap.fill(sentence, width), fontsize=8, color="#444444")
    return figure


def show(axes: Axes, image: Tensor) -> None:
    """Show one (C, H, W) image in [0, 1], without ticks."""
    pixels = image.cpu().permute(1, 2, 0).squeeze(-1).numpy()
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
