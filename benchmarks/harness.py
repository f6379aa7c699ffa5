"""Measurement: verify, then time; memory is measured in separate processes."""

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
from benchmarks.inputs import CPU

Calls = Mapping[str, Callable[[], object]]

OURS = "swavkit"  # the first contender of every suite
SIZES = ("samples", "prototypes", "length")  # fields of a problem that determine its work
PEAK_RESET = Path("/proc/self/clear_refs")  # writing 5 resets the peak of a process's memory
_SECONDS_IN_A_ROW = 0.005  # shorter calls are repeated for this long and averaged
_M_MMAP_THRESHOLD = -3  # of glibc: larger blocks are returned to the system when freed


@dataclass(frozen=True)
class Suite:
    """A benchmark at several problem sizes.

    Attributes:
        name: The name on the command line.
        cases: The problems of the default run: dataclasses of plain values, including ``samples``,
            with a string for the table and the ``tolerance`` of a correct answer.
        quick: The problem of ``--quick``.
        prepare: Makes the inputs of a problem on a device and returns a call for each contender. It
            must be at module level, so that another process can import it.
        check_reference: Raises an error unless the float64 reference of ``errors`` agrees with the
            oracle of the tests.
        errors: Takes a problem, its calls and the device, and returns the error of each contender
            with an answer.
        missing: Returns the compared packages that are not installed.
    """

    name: str
    cases: tuple[Any, ...]
    quick: Any
    prepare: Callable[[Any, torch.device], Calls]
    check_reference: Callable[[], None]
    errors: Callable[[Any, Calls, torch.device], dict[str, float]]
    missing: Callable[[], list[str]] = list


def measure(
    suite: Suite, problem: Any, *, seconds: float, device: torch.device = CPU
) -> list[dict[str, Any]]:
    """Verify and time every contender, and return one row of plain values for each.

    Raises:
        ValueError: If our own answer is wrong. A wrong answer of another contender is marked in its
            row.
    """
    calls = suite.prepare(problem, device)
    errors = suite.errors(problem, calls, device)
    if not errors[OURS] <= problem.tolerance:
        raise ValueError(
            f"{OURS} must be within {problem.tolerance:g} of the reference on {problem}, "
            f"got {errors[OURS]:g}"
        )
    rounds = time_interleaved(calls, seconds=seconds, clock=clock_of(device))
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
            "rounds": len(samples[name]),
            "samples": samples[name],
            "extra_memory": (
                extra_memory(suite.prepare, problem, name)
                if device.type == "cpu"
                else extra_memory_of_device(calls[name], device)
            ),
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
    """Time the calls in turn, so that disturbances of the machine affect all of them.

    Each call is timed for about ``seconds``, at least ``least`` times and at most ``most`` times. A
    call of many seconds may be timed only twice. The first call takes part in every round. A slower
    call takes part in every second round, every third, and so on, and does not reduce the
    repetitions of the others. Each round starts with a different call.

    A training loop repeats the same call. A call should therefore not be affected by cache contents
    of the others, nor by free memory that a virtual machine has returned to its host. Each call is
    made once untimed before it is timed, and a short call is timed several times in a row. Two
    warm-up rounds estimate the durations.

    Returns:
        The time of each call in each of its rounds.
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
    """Return the least number of times of a call of ``seconds``, to avoid minutes of timing."""
    return max(2, min(least, int(20 / seconds)))


def paired_ratios(samples: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Divide the times of each round, so that slow phases of the machine cancel."""
    return [duration / baseline[number] for number, duration in samples.items()]


def summary(samples: list[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": median, "lower_quartile": lower, "upper_quartile": upper}


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return a clock of seconds; that of a CUDA device reads events of the device."""
    if device.type != "cuda":
        return time.perf_counter
    begin = torch.cuda.Event(enable_timing=True)
    begin.record()

    def clock() -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return begin.elapsed_time(now) / 1000  # of milliseconds in float32

    return clock


def extra_memory_of_device(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that one call needs in addition to what is allocated, with its result."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def extra_memory(
    prepare: Callable[[Any, torch.device], Calls], problem: Any, name: str
) -> int | None:
    """Return the bytes that one call needs in addition to its inputs, including its result.

    The call runs alone in a new process that returns all freed memory to the system. Memory kept by
    an allocator would hide the need of the call, and varies from run to run. Returns ``None`` if
    the system does not report the peak (Linux does).
    """
    if not PEAK_RESET.exists():
        return None
    # Fork from a server that has imported torch but computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "swavkit"])
    with ProcessPoolExecutor(1, mp_context=context) as alone:
        return alone.submit(_peak_of_call, prepare, problem, name).result()


def _peak_of_call(prepare: Callable[[Any, torch.device], Calls], problem: Any, name: str) -> int:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)
    call = prepare(problem, CPU)[name]
    # Load code and start threads on a problem too small to leave memory behind.
    tiny = {field.name: 8 for field in fields(problem) if field.name in SIZES}
    prepare(replace(problem, **tiny), CPU)[name]()
    PEAK_RESET.write_text("5")  # the peak counts from here
    before = _process_memory("VmRSS")
    call()
    return _process_memory("VmHWM") - before


def _process_memory(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(rf"^{key}:\s+(\d+) kB", status, flags=re.MULTILINE)[0]) * 1024


def environment(device: torch.device = CPU) -> dict[str, Any]:
    """Return the versions, the hardware and its load."""
    return {
        "swavkit": swavkit.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: _version(name) for name in ("POT", "geomloss")},
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
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
