"""``python -m benchmarks [SUITE ...] [--quick] [--output DIR]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import bench_loss, bench_sinkhorn
from benchmarks.harness import environment, measure

SUITES = {module.SUITE.name: module.SUITE for module in (bench_sinkhorn, bench_loss)}
HEADER = ("contender", "median", "quartiles", "× swavkit", "quartiles", "extra memory", "error")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Verify swavkit against float64, then time it beside the published algorithm.",
    )
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"any of {', '.join(SUITES)}; all by default"
    )
    parser.add_argument("--quick", action="store_true", help="one tiny problem each, in seconds")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/benchmarks"),
        metavar="DIR",
        help="where to write benchmarks.json and, with matplotlib, benchmarks.png (%(default)s)",
    )
    options = parser.parse_args(arguments)
    for name in options.suites:
        if name not in SUITES:
            parser.error(f"SUITE must be any of {', '.join(SUITES)}, got {name!r}")

    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": []}
    for name in options.suites or SUITES:
        suite = SUITES[name]
        suite.check_reference()
        for problem in (suite.quick,) if options.quick else suite.cases:
            rows = measure(suite, problem, seconds=0.2 if options.quick else 8)
            print(f"{name}: {problem}, {len(rows[0]['samples'])} rounds", table(rows), sep="\n")
            report["results"] += [{"title": f"{name}: {problem}", **row} for row in rows]

    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "benchmarks.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
    if importlib.util.find_spec("matplotlib"):
        from benchmarks.plots import plot

        plot(report["results"], options.output / "benchmarks.png")


def table(rows: list[dict[str, Any]]) -> str:
    """Align the rows of one problem; times in milliseconds, memory in MB, ratios to our time."""
    cells = [HEADER, *map(_cells, rows)]
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
    else:  # the allocator hides what is smaller
        megabytes = f"{memory / 1e6:,.0f} MB" if memory >= 1e6 else "< 1 MB"
    return (
        row["contender"],
        f"{time['median'] * 1e3:,.2f} ms",
        f"{time['lower_quartile'] * 1e3:,.2f}–{time['upper_quartile'] * 1e3:,.2f}",
        f"{ratio['median']:.2f}",
        f"{ratio['lower_quartile']:.2f}–{ratio['upper_quartile']:.2f}",
        megabytes,
        "–" if error is None else f"{error:.0e}" + " wrong" * row["wrong"],
    )


if __name__ == "__main__":
    main()
