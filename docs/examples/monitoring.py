"""The metrics of a training run in one line, and its diagnoses in words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable

import processes
from tqdm import tqdm

from swavkit import ClusterMonitor, Diagnosis

# With these, nothing is learned, and more steps do not help. codes_near_uniform, codes_one_hot and
# views_disagree are causes of a loss at ln K, and come with it; without it, something is learned.
# Dead prototypes, duplicates and the queue make training worse, but do not stop it.
HOPELESS = {"features_of_rank_one", "collapsed", "stuck_at_ln_k"}


def figures_of(monitor: ClusterMonitor) -> dict[str, float]:
    """Return all metrics of the window, over all ranks. All ranks must make the call."""
    return {name: value.item() for name, value in monitor.compute().items()}


def line(figures: dict[str, float], num_prototypes: int) -> str:
    """Return the metrics to watch. The codes' entropy is a perfect loss, ln K a useless one."""
    return (
        f"loss {figures['loss']:.2f} (codes {figures['code_entropy']:.2f}, "
        f"ln K {math.log(num_prototypes):.2f}), used {figures['used']:.0%}, "
        f"agreement {figures['agreement']:.0%}"
    )


def hopeless(diagnoses: Iterable[Diagnosis]) -> bool:
    """Return whether training cannot be expected to recover."""
    return any(each.name in HOPELESS for each in diagnoses)


def in_words(diagnoses: Iterable[Diagnosis]) -> str:
    """Return the name and the text of each diagnosis, and its remedies as a list."""
    parts = []
    for name, text, remedies in diagnoses:
        parts += [f"{name}: {text}", *(f"  - {remedy}" for remedy in remedies)]
    return "\n".join(textwrap.fill(part, 80, subsequent_indent="    ") for part in parts)


def warn(diagnoses: Iterable[Diagnosis], told: set[str]) -> None:
    """Print new diagnoses on rank 0, and add their names to ``told``."""
    for each in diagnoses:
        if each.name not in told and processes.RANK == 0:
            tqdm.write(f"warning: {in_words([each])}")  # does not tear the progress line
        told.add(each.name)
