"""``python -m benchmarks [SUITE ...] [--device cuda] [--quick] [--output DIR]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    bench_device,
    bench_loss,
    bench_multicrop,
    bench_queue,
    bench_ranks,
    bench_sinkhorn,
    kernels,
)
from benchmarks.harness import OURS, Suite, environment, measure

SUITES = {module.SUITE.name: module.SUITE for module in (bench_sinkhorn, bench_loss, bench_queue)}
KERNELS = "kernels"  # counted, not timed
RANKS = "ranks"  # runs in its own processes
NAMES = [*SUITES, bench_multicrop.NAME, KERNELS, RANKS, bench_device.NAME]
HEADER = (
    "contender", "rounds", "median", "quartiles", "× swavkit", "quartiles", "extra memory", "error"
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Verify swavkit against float64, then time it beside the published algorithm.",
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(NAMES)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny problem each, in seconds")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where tensors lie; 'ranks' is for a CPU, 'device' for CUDA (%(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmarks"),
        metavar="DIR",
        help="where to write benchmarks.json and, with matplotlib, benchmarks.png (%(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in NAMES:
            parser.error(f"SUITE must be any of {', '.join(NAMES)}, got {name!r}")

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch finds none")
    report: dict[str, Any] = {"environment": environment(device), "quick": options.quick}
    report["results"] = []
    others = RANKS if device.type == "cuda" else bench_device.NAME
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "benchmarks.json"
    for name in options.suites or [name for name in NAMES if name != others]:
        if name == KERNELS:
            report[KERNELS] = count()
        elif name == bench_multicrop.NAME:
            report[name] = bench_multicrop.run(options.output, quick=options.quick, device=device)
        elif name == bench_device.NAME:
            report[name] = bench_device.run(options.output, quick=options.quick)
        elif name == RANKS:
            report[RANKS] = share(quick=options.quick)
        else:
            report["results"] += run(SUITES[name], quick=options.quick, device=device)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    if report["results"] and importlib.util.find_spec("matplotlib"):
        from benchmarks.plots import plot, plot_against_prototypes

        plot(report["results"], options.output / "benchmarks.png")
        plot_against_prototypes(report["results"], options.output / "prototypes.png")


def run(suite: Suite, *, quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Print the results of a suite, and return them as rows of plain values."""
    for package in suite.missing():
        print(f"{suite.name}: {package} is not installed, and is left out")
    suite.check_reference()
    results: list[dict[str, Any]] = []
    for problem in (suite.quick,) if quick else suite.cases:
        title = f"{suite.name}: {problem}"
        # Times on a device vary less.
        seconds = 0.1 if quick else 4 if device.type == "cpu" else 0.3
        rows = measure(suite, problem, seconds=seconds, device=device)
        print(title, table(rows), sep="\n")
        results += [{"title": title, **row} for row in rows]
    return results


def count() -> dict[str, Any]:
    """Print the number of kernels of each call, and return the numbers as plain values."""
    device = kernels.default_device()
    found = kernels.counts(device)
    title = f"{KERNELS}: {kernels.ITERATIONS} iterations, {kernels.unit(device)}"
    print(title, table_of_counts(found), sep="\n")
    of_crops = kernels.counts_of_crops(device)
    lines = [(f"{c.height} × {c.width}", f"{c.launches}", f"{c.bytes / 1e9:.1f}") for c in of_crops]
    title = f"{KERNELS}: the published crops of {kernels.PHOTOGRAPHS} photographs"
    print(title, _aligned([("size", "launches", "GB moved"), *lines]), sep="\n")
    return {
        "unit": kernels.unit(device),
        "counts": [asdict(one) for one in found],
        "crops": [asdict(one) for one in of_crops],
    }


def share(*, quick: bool) -> list[dict[str, Any]]:
    """Print the results on several ranks, and return them as rows of plain values."""
    rows = bench_ranks.measure(quick=quick)
    for title in dict.fromkeys(row.title for row in rows):
        lines = [bench_ranks.cells(row) for row in rows if row.title == title]
        print(title, _aligned([bench_ranks.HEADER, *lines]), sep="\n")
    return bench_ranks.plain(rows)


def table(rows: list[dict[str, Any]]) -> str:
    """Align the rows of one problem: times in ms, memory in MB, ratios to our time."""
    return _aligned([HEADER, *map(_cells, rows)])


def digest(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of our rows beside the published ones, as in the README."""
    lines = ["| problem | swavkit | published | ratio |", "|---|---|---|---|"]
    titles = dict.fromkeys(row["title"] for row in rows)
    found = {(row["title"], row["contender"]): row for row in rows}
    for title in titles:
        for precision in ("", ", bfloat16 autocast"):
            pair = [found.get((title, name + precision)) for name in (OURS, "published")]
            if all(pair):
                texts = [
                    f"{row['seconds']['median'] * 1e3:.2f} ms, {row['extra_memory'] / 1e6:,.0f} MB"
                    for row in pair
                    if row
                ]
                ratio = pair[1]["ratio"]["median"] / pair[0]["ratio"]["median"]  # type: ignore[index]
                lines.append(f"| {title}{precision} | {texts[0]} | {texts[1]} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


def table_of_counts(counts: list[kernels.Count]) -> str:
    """Align the counts: one line per contender, one column per number of problems."""
    numbers = sorted({one.problems for one in counts})
    launches = {(one.contender, one.problems): f"{one.launches}" for one in counts}
    header = ("contender", *(f"N = {number}" for number in numbers))
    names = dict.fromkeys(one.contender for one in counts)
    return _aligned(
        [header, *((name, *(launches[name, number] for number in numbers)) for name in names)]
    )


def _aligned(cells: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in cells
    ]
    return "\n".join(f"  {line}".rstrip() for line in lines) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    time, ratio = row["seconds"], row["ratio"]
    error, memory = row["error"], row["extra_memory"]
    if memory is None:
        megabytes = "unknown"
    else:  # the allocator hides smaller values
        megabytes = f"{memory / 1e6:,.0f} MB" if memory >= 1e6 else "< 1 MB"
    return (
        row["contender"],
        f"{row['rounds']}",
        f"{time['median'] * 1e3:,.2f} ms",
        f"{time['lower_quartile'] * 1e3:,.2f}–{time['upper_quartile'] * 1e3:,.2f}",
        f"{ratio['median']:.2f}",
        f"{ratio['lower_quartile']:.2f}–{ratio['upper_quartile']:.2f}",
        megabytes,
        "–" if error is None else f"{error:.0e}" + " wrong" * row["wrong"],
    )


if __name__ == "__main__":
    main()
