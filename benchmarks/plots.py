"""One picture of all results: time and memory in multiples of swavkit's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.harness import OURS


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratios of the times, with their quartiles, and those of the memory."""
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
        # Less than 1 MB is not resolved, and leaves a gap.
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
