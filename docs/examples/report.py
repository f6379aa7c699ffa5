"""The result file, the tables and the plots of evidence.py."""

from __future__ import annotations

import io
import json
import math
import platform
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evaluation
import numpy as np
from matplotlib.figure import Figure
from pictures import BLUE, GREY, RED, tidy
from PIL import Image
from trials import EPOCH_FIGURES, Job

if TYPE_CHECKING:
    from evidence import Claim, Experiment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "evidence.json"
PAGE, README = ROOT / "docs" / "evidence.rst", ROOT / "README.md"
NOT_RUN = "not run"
MEAN_OF = 10  # steps of a stored loss; a reference curve has every step

Results = dict[str, dict[str, Any]]  # by the name of the job
SeedsOf = Callable[[Job], list[Job]]


def accuracy(column: str) -> Callable[[dict[str, Any]], float]:
    return lambda result: result["accuracies"].get(column, math.nan)


COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    **{column: (label, accuracy(column)) for column, label in evaluation.COLUMNS.items()},
    "same_codes": ("codes as of all images at once", lambda result: result["same_codes"]),
    "perplexity": ("perplexity", lambda result: result["epochs"]["perplexity"][-1]),
    "minutes": ("processor minutes", lambda result: result["seconds"]["training, processor"] / 60),
    "diagnoses": ("diagnoses", lambda result: ", ".join(result["diagnoses"]) or "none"),
}


def line(result: dict[str, Any]) -> str:
    """Return the accuracies of one job."""
    shown = [f"{name} {value:.1f}" for name, value in result["accuracies"].items()]
    return ", ".join([*shown, f"{sum(result['seconds'].values()):.0f} s"])


# The result file


def collect(folder: Path, names: Iterable[str], curves: set[str]) -> dict[str, Any]:
    """Return the results of a folder, rounded, those of ``curves`` with the loss of every step.

    Results that the folder lacks are those of the result file.
    """
    gathered: Results = json.loads(RESULTS.read_text("utf-8"))["jobs"]
    jobs: Results = {}
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text("utf-8"))
            losses = result.get("losses", [])
            if name not in curves:
                whole = len(losses) // MEAN_OF * MEAN_OF
                losses = np.reshape(losses[:whole], (-1, MEAN_OF)).mean(axis=1).tolist()
            del result["job"]
            jobs[name] = {**result, "losses": losses}
        elif name in gathered:
            jobs[name] = gathered[name]
    packages = ("swavkit", "torch", "numpy", "scikit-learn", "scikit-image", "mlxtend")
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
        "steps of a loss, except in reference curves": MEAN_OF,
        "jobs": rounded(jobs),
    }


def rounded(value: Any) -> Any:
    """Return nested values with floats of 4 digits."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def dumped(content: dict[str, Any]) -> str:
    """Return JSON with a line for each job."""
    jobs = [f"  {json.dumps(name)}: {json.dumps(job)}" for name, job in content["jobs"].items()]
    above = json.dumps({**content, "jobs": None}, indent=1).removesuffix("null\n}")
    return above + "{\n" + ",\n".join(jobs) + "\n }\n}\n"


# Tables


def of_seeds(results: Results, job: Job, column: str, seeds_of: SeedsOf) -> list[Any]:
    """Return the value of each seed that was run."""
    found = [results.get(each.name) for each in seeds_of(job)]
    return [COLUMNS[column][1](result) for result in found if result is not None]


def cell(values: list[Any], seeds: int) -> str:
    """Return the mean and the standard deviation over seeds, or what else is to be said."""
    if not values:
        return NOT_RUN
    if isinstance(values[0], str):
        return "; ".join(sorted(set(values)))
    if np.isnan(values).any():
        return "–"
    if len(values) == 1:
        return f"{values[0]:.1f}" + (" (1 seed)" if seeds > 1 else "")
    some = f" ({len(values)} seeds)" if len(values) < seeds else ""
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}{some}"


def rows_of(experiment: Experiment, results: Results, seeds_of: SeedsOf) -> list[list[str]]:
    """Return the header and the rows of a table."""
    rows = [["", *(COLUMNS[column][0] for column in experiment.columns)]]
    for label, job in experiment.rows.items():
        cells = []
        for column in experiment.columns:
            try:
                values = of_seeds(results, job, column, seeds_of)
                cells.append(cell(values, len(seeds_of(job))))
            except KeyError:  # a method without this figure
                cells.append("–")
        rows.append([label, *cells])
    return rows


def verdict(claim: Claim, results: Results, seeds_of: SeedsOf) -> list[str]:
    """Return the difference of both jobs, seed by seed, and whether the claim came out.

    It came out, or did not, if all seeds have the same sign and the mean is above twice its
    standard error.
    """
    both = []
    for job in (claim.better, claim.worse):
        values = of_seeds(results, job, claim.column, seeds_of)
        if len(values) < len(seeds_of(job)):
            return [NOT_RUN, NOT_RUN]
        both.append(np.array(values))
    differences = both[0] - both[1]  # pixels have one value for all seeds
    mean, spread = differences.mean(), differences.std(ddof=1)
    shown = f"{mean:+.1f} ± {spread:.1f}"
    if abs(np.sign(differences).sum()) < len(differences) or abs(mean) <= 2 * spread / math.sqrt(
        len(differences)
    ):
        return [shown, "cannot be told at this scale"]
    return [shown, "came out" if mean > 0 else "did not"]


def list_table(rows: list[list[str]]) -> str:
    """Return rows as a table of reStructuredText."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in rows:
        cells = [f"     - {text}".rstrip() for text in row]
        lines += [f"   * - {row[0]}".rstrip(), *cells[1:]]
    return "\n".join(lines)


def readme_table(experiment: Experiment, results: Results, seeds_of: SeedsOf) -> str:
    """Return the table of the README, with the margin over raw pixels."""
    header, *rows = rows_of(experiment, results, seeds_of)
    rows[0][1:] = [f"**{text}**" for text in rows[0][1:]]
    trained, *_, pixels = experiment.rows.values()
    margins = []
    for column in experiment.columns:
        values = of_seeds(results, trained, column, seeds_of)
        least = of_seeds(results, pixels, column, seeds_of)
        margins.append(f"+{cell([value - least[0] for value in values], 3)}" if least else NOT_RUN)
    header = ["", *(text.replace("linear,", "linear probe,") for text in header[1:])]
    lines = [header, *rows, ["margin over raw pixels", *margins]]
    lines = ["|" + "|".join(f" {text} ".replace("  ", " ") for text in row) + "|" for row in lines]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def documents(
    content: dict[str, Any],
    experiments: dict[str, Experiment],
    claims: list[Claim],
    seeds_of: SeedsOf,
) -> dict[Path, str]:
    """Return the page, and the README if its runs are done, with the tables."""
    results: Results = content["jobs"]
    tables = {
        name: list_table(rows_of(experiment, results, seeds_of))
        for name, experiment in experiments.items()
    }
    tables["claims"] = list_table(
        [
            ["Claim", "Published", "Here", "Verdict"],
            *([each.text, each.published, *verdict(each, results, seeds_of)] for each in claims),
        ]
    )
    page = PAGE.read_text("utf-8")
    for name, table in tables.items():
        page, count = re.subn(
            rf"(?s)(\.\. {name} begins\n\n).*?(\.\. {name} ends)",
            lambda match, table=table: f"{match[1]}{table}\n\n{match[2]}",
            page,
        )
        assert count == 1, name
    changed = {PAGE: page}
    table = readme_table(experiments["readme"], results, seeds_of)
    if NOT_RUN not in table:
        before = README.read_text("utf-8")
        changed[README] = re.sub(r"(?m)^\| \| linear probe, .*\n(\|.*\n)+", f"{table}\n", before)
    return changed


# Plots


def curves(results: Results, bases: dict[str, Job], seeds_of: SeedsOf) -> Figure:
    """Show the figures of each epoch, a column for each base and a line for each seed."""
    figure = Figure(figsize=(2.6 * len(bases), 8.5), layout="constrained")
    cells = figure.subplots(len(EPOCH_FIGURES), len(bases), squeeze=False, sharex="col")
    for column, (label, base) in enumerate(bases.items()):
        found = [results[job.name] for job in seeds_of(base) if job.name in results]
        cells[0, column].set_title(label if found else f"{label}: {NOT_RUN}", fontsize=9)
        for result in found:
            for row, name in enumerate(EPOCH_FIGURES):
                values = result["epochs"][name]
                cells[row, column].plot(range(1, len(values) + 1), values, linewidth=1.2)
        cells[-1, column].set_xlabel("epoch", fontsize=8)
    for row, name in enumerate(EPOCH_FIGURES):
        cells[row, 0].set_ylabel(EPOCH_LABELS[name], fontsize=8)
    for axes in cells.flat:
        axes.tick_params(labelsize=7)
        tidy(axes)
    return figure


EPOCH_LABELS = {
    "loss": "loss, nats",
    "code_entropy": "code entropy, nats",
    "perplexity": "perplexity",
    "agreement": "agreement",
    "knn": "5-NN, %",
}


def losses(results: Results, bases: dict[str, Job], seeds_of: SeedsOf) -> Figure:
    """Show the loss of every step."""
    figure = Figure(figsize=(2.6 * len(bases), 2.8), layout="constrained")
    for axes, (label, base) in zip(
        figure.subplots(1, len(bases), squeeze=False)[0], bases.items(), strict=True
    ):
        found = [results[job.name] for job in seeds_of(base) if job.name in results]
        for result in found:
            axes.plot(result["losses"], linewidth=0.5)
        axes.axhline(math.log(base.prototypes), color=RED, linestyle="--", linewidth=1)
        axes.set_title(label if found else f"{label}: {NOT_RUN}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("loss, nats; dashed: ln K", fontsize=8)
        axes.tick_params(labelsize=7)
        tidy(axes)
    return figure


def dots(experiment: Experiment, results: Results, column: str, seeds_of: SeedsOf) -> Figure:
    """Show a column of a table: a line for each seed, and a dot for their mean."""
    figure = Figure(figsize=(6.4, 0.6 + 0.26 * len(experiment.rows)), layout="constrained")
    axes = figure.subplots()
    labels = list(experiment.rows)
    for place, job in enumerate(experiment.rows.values()):
        values = of_seeds(results, job, column, seeds_of)
        if values:
            axes.plot(values, [place] * len(values), "|", color=GREY, markersize=9)
            axes.plot(np.mean(values), place, "o", color=BLUE, markersize=5)
        else:
            labels[place] += f": {NOT_RUN}"
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_xlabel(f"{COLUMNS[column][0]}, %", fontsize=8)
    axes.tick_params(labelsize=8)
    tidy(axes)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a small PNG file."""
    content = io.BytesIO()
    figure.savefig(content, dpi=110)
    Image.open(content).convert("RGB").quantize(64).save(path, optimize=True)


def gather(
    folder: Path,
    experiments: dict[str, Experiment],
    claims: list[Claim],
    bases: dict[str, Job],
    seeds_of: SeedsOf,
) -> None:
    """Write the result file, the tables and the plots."""
    rows = [job for experiment in experiments.values() for job in experiment.rows.values()]
    names = dict.fromkeys(each.name for job in rows for each in seeds_of(job))
    reference = {each.name for job in bases.values() for each in seeds_of(job)}
    content = collect(folder, names, reference)
    RESULTS.write_text(dumped(content), "utf-8")
    for path, text in documents(content, experiments, claims, seeds_of).items():
        path.write_text(text, "utf-8")
    results, pictures = content["jobs"], RESULTS.parent / "images"
    save(curves(results, bases, seeds_of), pictures / "evidence-curves.png")
    save(losses(results, bases, seeds_of), pictures / "evidence-losses.png")
    crops = dots(experiments["crops"], results, "linear_10", seeds_of)
    save(crops, pictures / "evidence-crops.png")
    queues = dots(experiments["batches"], results, "same_codes", seeds_of)
    save(queues, pictures / "evidence-queues.png")
    print(f"{len(results)} of {len(names)} runs are in {RESULTS}")
