"""The method of measurement: verify, then time; memory in processes of their own."""

from __future__ import annotations

import ctypes
import importlib.metadata
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import swavkit

Calls = Mapping[str, Callable[[], object]]

OURS = "swavkit"  # the first contender of every suite
SIZES = ("samples", "prototypes", "length")  # of a problem, those that its work grows with
PEAK_RESET = Path("/proc/self/clear_refs")  # writing 5 resets the peak of a process's memory
_SECONDS_IN_A_ROW = 0.005  # for a call that is shorter, the mean of so many seconds is its time
_M_MMAP_THRESHOLD = -3  # of glibc: from which size on memory is given back as soon as it is freed


@dataclass(frozen=True)
class Suite:
    """A question, asked at several sizes of the problem.

    Attributes:
        name: What the command line calls it.
        cases: The problems of the default run: dataclasses of plain values, ``samples`` among
            them, with a text for the table and the ``tolerance`` within which an answer is right.
        quick: The problem of ``--quick``.
        prepare: Makes the inputs of a problem and returns a call for each contender. At the top of
            a module, so that another process can find it.
        check_reference: Raises unless the float64 form that ``errors`` uses agrees with the oracle
            of the tests.
        errors: Takes a problem and its calls; returns the error of each contender that gives an
            answer.
        missing: Returns the packages that are not installed and would have been compared.
    """

    name: str
    cases: tuple[Any, ...]
    quick: Any
    prepare: Callable[[Any], Calls]
    check_reference: Callable[[], None]
    errors: Callable[[Any, Calls], dict[str, float]]
    missing: Callable[[], list[str]] = list


def measure(suite: Suite, problem: Any, *, seconds: float) -> list[dict[str, Any]]:
    """Verify and time every contender; one row of plain values for each.

    Raises:
        ValueError: If our own answer is wrong. A wrong answer of another contender is a finding,
            and stands in its row.
    """
    calls = suite.prepare(problem)
    errors = suite.errors(problem, calls)
    if not errors[OURS] <= problem.tolerance:
        raise ValueError(
            f"{OURS} must be within {problem.tolerance:g} of the reference on {problem}, "
            f"got {errors[OURS]:g}"
        )
    rounds = time_interleaved(calls, seconds=seconds)
    samples = {name: list(durations.values()) for name, durations in rounds.items()}
    return [
        {
            "suite": suite.name,
            "problem": asdict(problem),
            "contender": name,
            "error": errors.get(name),
            "tolerance": problem.tolerance,
            "wrong": name in errors and not errors[name] <= problem.tolerance,
            "seconds": summary(samples[name]),
            "ratio": summary(paired_ratios(rounds[name], rounds[OURS])),
            "samples": samples[name],
            "extra_memory": extra_memory(suite.prepare, problem, name),
        }
        for name in calls
    ]


def time_interleaved(
    calls: Calls,
    *,
    seconds: float,
    least: int = 5,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[int, float]]:
    """Time the calls in turn, so that whatever disturbs the machine disturbs all of them.

    Each call is timed for about ``seconds``, at least ``least`` times (but a call that takes long
    only twice) and at most ``most`` times. The first one takes part in every round; a slower one in
    one of two, of three, and so on, so that it does not cost the others their repetitions. A
    different call begins each round. Returned is, for each call, its time in each of its rounds.

    A training loop makes one and the same call, so none is to pay for what the others did to the
    caches and to free memory, which a virtual machine may have to ask its host for again: before it
    is timed it is made once more, and a short one is made several times in a row. Two rounds of
    warm-up tell how long each of them takes.
    """

    def timed(name: str, calls_in_a_row: int = 1) -> float:
        calls[name]()
        begin = clock()
        for _ in range(calls_in_a_row):
            calls[name]()
        return (clock() - begin) / calls_in_a_row

    order = list(calls)
    warm_up = [{name: timed(name) for name in order} for _ in range(2)]
    quickest = {name: min(times[name] for times in warm_up) for name in order}
    in_a_row = {name: max(1, int(_SECONDS_IN_A_ROW / quickest[name])) for name in order}
    wanted = {
        name: min(max(_least(least, quickest[name]), int(seconds / quickest[name])), most)
        for name in order
    }
    rounds = wanted[order[0]]
    every = {name: max(1, rounds // number) for name, number in wanted.items()}
    samples: dict[str, dict[int, float]] = {name: {} for name in calls}
    for number in range(rounds):
        for name in order:
            if number % every[name] == 0:
                samples[name][number] = timed(name, in_a_row[name])
        order.append(order.pop(0))
    return samples


def _least(least: int, seconds: float) -> int:
    """Return how often a call must be timed that takes so long: not for minutes."""
    return max(2, min(least, int(20 / seconds)))


def paired_ratios(samples: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Divide round by round, so that a slow minute of the machine cancels."""
    return [duration / baseline[number] for number, duration in samples.items()]


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def extra_memory(prepare: Callable[[Any], Calls], problem: Any, name: str) -> int | None:
    """Return the bytes that one call needs beyond its inputs, its result included.

    It runs alone in a new process, which gives everything back to the system that it frees: what an
    allocator keeps would hide what this call takes, and varies from run to run. ``None`` where the
    system does not count it (Linux does).
    """
    if not PEAK_RESET.exists():
        return None
    # Forked from a server that has torch loaded and has never computed anything.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "swavkit"])
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        return alone.submit(_peak_of_call, prepare, problem, name).result()


def _peak_of_call(prepare: Callable[[Any], Calls], problem: Any, name: str) -> int:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    call = prepare(problem)[name]
    # Load code and start threads, on a problem too small to leave memory behind.
    tiny = {field.name: 8 for field in fields(problem) if field.name in SIZES}
    prepare(replace(problem, **tiny))[name]()
    PEAK_RESET.write_text("5")  # from here on
    before = _process_memory("VmRSS")
    call()
    return _process_memory("VmHWM") - before


def _process_memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{key}:\s+(\d+) kB", status, flags=re.MULTILINE)[0]) * 1024


def environment() -> dict[str, Any]:
    """Return the versions, the hardware and how busy it is."""
    return {
        "swavkit": swavkit.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: _version(name) for name in ("POT", "geomloss")},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    models = (
        re.findall(r"^model name\s*: (.+)$", information.read_text(), flags=re.MULTILINE)
        if information.exists()
        else []
    )
    return models[0] if models else platform.processor()
