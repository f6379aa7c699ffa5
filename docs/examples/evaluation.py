"""Evaluate frozen features by k-NN and linear probes, with all labels and with few."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from images import Images
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize
from torch import Tensor
from tqdm import tqdm

FEW = 10  # labels per class
DRAWS = 5  # random draws of the few labels, the same for every representation
STRENGTHS = (1.0, 10.0, 100.0)  # inverse regularization of the probe, cross-validated
COLUMNS = {
    "linear_10": f"linear, {FEW} labels a class",
    "knn_10": f"1-NN, {FEW} labels a class",
    "linear": "linear, all labels",
    "knn": "5-NN, all labels",
}


def compare(
    representations: dict[str, Callable[[Tensor], Tensor]], images: Images
) -> dict[str, dict[str, float]]:
    """Return the accuracies of each representation of the images, and print them as a table."""
    if images.train_labels is None or images.held_out_labels is None:
        print("no labels (two subfolders or more, with 5 images each): no evaluation")
        return {}
    accuracies = {}
    progress = tqdm(representations.items(), unit="representation")
    for name, represent in progress:
        progress.set_description(f"evaluating {name}")
        accuracies[name] = evaluate(
            represent(images.train).numpy(),
            images.train_labels.numpy(),
            represent(images.held_out).numpy(),
            images.held_out_labels.numpy(),
        )
    print(f"\n{len(images.held_out)} {images.held_out_name} images")
    print(table(accuracies), flush=True)
    return accuracies


def evaluate(
    train: np.ndarray, train_labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray
) -> dict[str, float]:
    """Return the held-out accuracy, in percent, for each of ``COLUMNS`` that the data permit.

    The protocol is the same for every representation. Rows have unit length, so k-NN uses cosines.
    The regularization of the logistic regression is chosen on its training labels.

    Args:
        train: (N, D) features.
        train_labels: (N,) labels.
        held_out: (M, D) features.
        held_out_labels: (M,) labels.
    """
    train, held_out = normalize(train.astype(np.float64)), normalize(held_out.astype(np.float64))

    def accuracy(model: object, rows: np.ndarray) -> float:
        fitted = model.fit(train[rows], train_labels[rows])  # type: ignore[attr-defined]
        return 100 * float(fitted.score(held_out, held_out_labels))

    def linear() -> GridSearchCV:
        return GridSearchCV(LogisticRegression(max_iter=10_000), {"C": STRENGTHS}, cv=3)

    everything = np.arange(len(train))
    results = {"linear": accuracy(linear(), everything)}
    if len(train) >= 5:
        results["knn"] = accuracy(KNeighborsClassifier(5), everything)
    if np.unique(train_labels, return_counts=True)[1].min() >= FEW:
        draws = [few_of_each_class(train_labels, draw) for draw in range(DRAWS)]
        results["linear_10"] = float(np.mean([accuracy(linear(), rows) for rows in draws]))
        results["knn_10"] = float(
            np.mean([accuracy(KNeighborsClassifier(1), rows) for rows in draws])
        )
    return {column: results[column] for column in COLUMNS if column in results}


def few_of_each_class(labels: np.ndarray, draw: int) -> np.ndarray:
    """Return the indices of ``FEW`` samples of each class."""
    generator = np.random.default_rng(draw)
    return np.concatenate(
        [
            generator.choice(np.flatnonzero(labels == label), FEW, replace=False)
            for label in np.unique(labels)
        ]
    )


def table(accuracies: dict[str, dict[str, float]]) -> str:
    """Return the accuracies as an aligned table, one row per representation."""
    columns = [column for column in COLUMNS if column in next(iter(accuracies.values()))]
    header = ["accuracy, %", *(COLUMNS[column] for column in columns)]
    rows = [
        [name, *(f"{results[column]:.1f}" for column in columns)]
        for name, results in accuracies.items()
    ]
    widths = [max(map(len, cells)) for cells in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        for cells in [header, *rows]
    ]
    return "\n".join(lines)
