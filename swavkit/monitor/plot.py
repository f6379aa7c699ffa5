"""The plot of ``ClusterMonitor``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # re-exported for annotations in other modules
    from matplotlib.figure import Figure as Figure

Array = np.ndarray[Any, np.dtype[np.float64]]

_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#707070"  # safe for color-blind


def monitor_figure(
    *,
    assigned: Array,
    code_usage: Array,
    steps: Mapping[str, Array],
    last_step: int,
    figures: Mapping[str, float],
) -> Figure:
    """Draw a window of steps.

    Args:
        assigned: (K,) sums over the window.
        code_usage: (K,) sums over the window.
        steps: The sums of each step, oldest first; those without updates are not drawn.
        last_step: The number of the last step.
        figures: The figures of the window.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot() requires matplotlib; expected pip install 'swavkit[plot]'"
        ) from error
    # No pyplot, whose figures stay in memory and may open a window.
    figure = Figure(figsize=(10, 7), dpi=100, layout="constrained")
    (usage, entropy), (agreement, text) = figure.subplots(2, 2)
    held = steps["updates"] > 0
    steps = {name: values[held] for name, values in steps.items()}
    numbers = np.arange(last_step - len(steps["updates"]) + 1.0, last_step + 1.0)

    _draw_usage(usage, assigned, code_usage)
    _draw_entropies(entropy, numbers, steps, len(assigned))
    _draw_agreement(agreement, numbers, steps)
    _write_figures(text, figures, len(assigned))
    count = len(numbers)
    steps_text = f"step {last_step}" if count == 1 else f"steps {numbers[0]:.0f} to {last_step}"
    figure.suptitle(f"{len(assigned)} prototypes, {steps_text}", fontsize=13)
    return figure


def _draw_usage(axes: Any, assigned: Array, code_usage: Array) -> None:
    uniform = 1 / len(assigned)
    lowest, highest = uniform / 10, min(10 * uniform, 1.0)
    for counts, label, color in (
        (assigned, "nearest prototype", _BLUE),
        (code_usage, "mean code", _ORANGE),
    ):
        share = np.sort(_ratio(counts, counts.sum()))[::-1]
        share = share[share > 0]  # a log axis has no zero
        marker = "." if len(share) <= 100 else None  # one prototype alone is a point
        places = np.arange(1, len(share) + 1)
        axes.plot(places, share, color=color, label=label, marker=marker)
        lowest, highest = min([lowest, *share[-1:]]), max([highest, *share[:1]])
    axes.axhline(uniform, color=_GREY, linestyle="--", label="1/K: equal use")
    axes.set_yscale("log")
    axes.set_ylim(max(lowest, uniform * 1e-4) / 1.2, highest * 1.2)  # a tail of any length is cut
    axes.set_xlim(1 - 0.03 * len(assigned), len(assigned) * 1.03)
    axes.locator_params(axis="x", integer=True)
    axes.set_title("Use of the prototypes")
    axes.set_xlabel("prototypes, most used first; unused ones are not drawn")
    axes.set_ylabel("share of rows")
    axes.legend(loc="upper right")  # where curves that fall leave room


def _draw_entropies(axes: Any, numbers: Array, steps: Mapping[str, Array], prototypes: int) -> None:
    lines = [
        ("loss", "loss", "loss_samples", _GREEN),
        ("prediction entropy", "prediction_entropy", "prediction_rows", _BLUE),
        ("code entropy", "code_entropy", "code_rows", _ORANGE),
    ]
    for label, name, rows, color in lines:
        if name != "loss" or steps["losses"].any():
            _draw_line(axes, numbers, _ratio(steps[name], steps[rows]), label, color)
    axes.axhline(math.log(prototypes), color=_GREY, linestyle="--", label="ln K: uniform")
    axes.axhline(0, color=_GREY, linestyle=":", label="0: one-hot")
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.04 * top, 1.3 * top)  # with room for the legend
    axes.set_title("Loss and mean entropies")
    axes.set_ylabel("nats")
    axes.set_xlabel("step")
    axes.legend(loc="upper center", ncols=3, fontsize=8.5)


def _draw_agreement(axes: Any, numbers: Array, steps: Mapping[str, Array]) -> None:
    _draw_line(axes, numbers, _ratio(steps["agreeing"], steps["pairs"]), "agreement", _BLUE)
    axes.set_ylim(-0.02, 1.02)
    axes.set_title("Agreement of views on the nearest prototype")
    axes.set_ylabel("share of pairs of views")
    axes.set_xlabel("step")


def _draw_line(axes: Any, numbers: Array, values: Array, label: str, color: str) -> None:
    marker = "." if len(numbers) <= 30 else None  # one step alone is a point
    axes.plot(numbers, values, color=color, label=label, marker=marker)
    axes.locator_params(axis="x", integer=True)


def _write_figures(axes: Any, figures: Mapping[str, float], prototypes: int) -> None:
    """Write the figures as a table of two columns."""
    rows = [
        ("perplexity", "perplexity of nearest prototypes", f"of {prototypes}"),
        ("code_perplexity", "perplexity of codes", f"of {prototypes}"),
        ("used", "prototypes used", f"of {prototypes}"),
        ("duplicates", "duplicates (cosine > 0.99)", f"of {prototypes}"),
        ("marginal_error", "marginal error", "relative"),
        ("agreement", "agreement", "share"),
        ("loss", "loss", "nats"),
        ("below_ln_k", "ln K − loss", "nats"),
        ("above_code_entropy", "loss − code entropy", "nats"),
        ("feature_std", "feature std", "1: uniform"),
        ("effective_rank", "effective rank of features", ""),
        ("nonfinite", "steps that are not finite", "count"),
    ]
    axes.set_axis_off()
    axes.set_title("Over the window")
    shown = [row for row in rows if row[0] in figures]
    for line, (name, label, unit) in enumerate(shown):
        height = 0.96 - line * 0.083
        number = figures[name] * prototypes if name == "used" else figures[name]
        whole = name in ("used", "duplicates", "nonfinite")
        value = f"{number:.0f}" if whole else f"{number:.4g}"
        axes.text(0.02, height, label, transform=axes.transAxes, va="top")
        axes.text(0.78, height, value, transform=axes.transAxes, va="top", ha="right")
        axes.text(0.81, height, unit, transform=axes.transAxes, va="top", color=_GREY)


def _ratio(sums: Array, counts: Any) -> Array:
    """Return sums / counts, NaN where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = np.true_divide(sums, counts)
    return ratio
