"""Plots of the results: time and memory relative to swavkit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import OURS


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the ratios of times, with quartiles, and the ratios of memory."""
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    labels = [row["title"] if row["contender"] == OURS else "" for row in rows]
    colours = [f"C{contenders.index(row['contender'])}" for row in rows]
    figure = Figure(figsize=(11, 1.2 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    of_time, of_memory = figure.subplots(1, 2, sharey=True)

    medians = [row["ratio"]["median"] for row in rows]
    spread = [
        [abs(row["ratio"][edge] - row["ratio"]["median"]) for row in rows]
        for edge in ("lower_quartile", "upper_quartile")
    ]
    bars = of_time.barh(range(len(rows)), medians, xerr=spread, color=colours)
    of_time.bar_label(bars, ["wrong answer" * row["wrong"] for row in rows], padding=4)
    of_time.set_xscale("log")
    of_time.set_xlabel("time / swavkit's, median and quartiles")
    of_time.set_yticks(range(len(rows)), labels)
    of_time.invert_yaxis()

    our_memory = {row["title"]: row["extra_memory"] for row in rows if row["contender"] == OURS}
    of_memory.barh(
        range(len(rows)),
        # Less than 1 MB is not resolved and leaves a gap.
        [
            row["extra_memory"] / our_memory[row["title"]]
            if (our_memory[row["title"]] or 0) >= 1e6
            else 0
            for row in rows
        ],
        color=colours,
    )
    of_memory.set_xlabel("peak of the extra memory / swavkit's")

    for axes in (of_time, of_memory):
        axes.axvline(1, color="black", linewidth=0.8)
    for number, contender in enumerate(contenders):
        of_memory.barh([0], [0], color=f"C{number}", label=contender)
    figure.legend(loc="outside upper center", ncols=min(len(contenders), 5))
    figure.savefig(path, dpi=120)


def plot_against_prototypes(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time and memory of the loss against the number of prototypes, at one batch size.

    Fewer than two problems give no plot.
    """
    rows = [row for row in rows if row["suite"] == "loss"]
    samples = min((row["problem"]["samples"] for row in rows), default=0)
    rows = [row for row in rows if row["problem"]["samples"] == samples]
    if len({row["title"] for row in rows}) < 2:
        return
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    of_time, of_memory = figure.subplots(1, 2)
    for contender in dict.fromkeys(row["contender"] for row in rows):
        own = [row for row in rows if row["contender"] == contender]
        prototypes = [row["problem"]["prototypes"] for row in own]
        style: dict[str, Any] = {"marker": "o", "label": contender, "alpha": 0.8}
        of_time.plot(prototypes, [row["seconds"]["median"] for row in own], **style)
        memory = [max(row["extra_memory"] or 0, 1e6) / 2**20 for row in own]
        of_memory.plot(prototypes, memory, **style)
    for axes, text in ((of_time, "seconds, median"), (of_memory, "peak of the extra memory, MiB")):
        axes.set(xscale="log", yscale="log", xlabel="prototypes", ylabel=text)
        axes.grid(alpha=0.3)
    of_time.set_title(f"forward and backward, {samples} images")
    of_time.legend()
    figure.savefig(path, dpi=120)
