"""What a CUDA device must show: the marked tests, and training steps in every way to run them.

A step is a linear network, the loss with a queue and frozen prototypes, and an optimizer.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bench_loss import FEATURE_DIM
from benchmarks.harness import clock_of, summary, time_interleaved
from swavkit import MultiCropTransform, SwAVLoss, swapped_prediction
from tests.ranks import Ranks

NAME = "device"
ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda")
SAMPLES, VIEWS, PROTOTYPES, QUEUE, FROZEN_STEPS = 64, 8, 3000, 3840, 4
INPUT_DIM = 256
WARM_UP = 3  # steps before a graph is captured
TOLERANCE = 1e-4  # of parameters after some steps, and of pixels

Row = dict[str, Any]


def run(output: Path, *, quick: bool) -> dict[str, Any]:
    """Run and print everything, and return the results as plain values.

    The outcomes of the matrix of tests are written to ``matrix.json`` in the folder ``output``.
    """
    if not torch.cuda.is_available():
        print(f"{NAME}: there is no CUDA device: left out")
        return {}
    tests = {} if quick else marked_tests(output)
    checks = {name: outcome(check) for name, check in CHECKS.items()}
    print(f"{NAME}: {tests.get('summary', 'tests not run')}")
    for name, result in checks.items():
        print(f"  {name}: {result}")
    steps = [] if quick else training_steps()
    for row in steps:
        print(f"  {row['contender']}: {row['seconds']['median'] * 1e3:.2f} ms a step")
    print()
    return {"tests": tests, "checks": checks, "steps": steps}


def marked_tests(output: Path) -> Row:
    """Run the tests that need a device and the matrix, in a process per core, up to 14."""
    processes = min(os.cpu_count() or 1, 14)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda or matrix"]
    command += [f"--numprocesses={processes}", "--matrix", str(output.resolve() / "matrix.json")]
    command += ["-p", "no:benchmark", "-p", "no:cacheprovider", "tests"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["COLUMNS"] = "300"  # for the errors of the summary
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    closing = [line for line in lines if re.search(r"\d+ (passed|failed)", line)]
    print("\n".join(failed))
    return {"passed": run.returncode == 0, "summary": (closing or ["?"])[-1], "failed": failed}


def outcome(check: Callable[[], str]) -> str:
    """Return what a check says, or its error in one line."""
    try:
        result = check()
        torch.cuda.synchronize()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return result


class Step(nn.Module):
    """The loss of a batch of samples (V, B, 256)."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.network = nn.Linear(INPUT_DIM, FEATURE_DIM)
        self.criterion = SwAVLoss(FEATURE_DIM, PROTOTYPES, **settings)

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.network(images))
        return loss


class Training:
    """A training whose steps depend on nothing but their number."""

    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        settings = {"queue_length": QUEUE, "freeze_steps": FROZEN_STEPS} | settings
        self.model = Step(**settings).to(DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.images = torch.randn(VIEWS, SAMPLES, INPUT_DIM, device=DEVICE)
        self.compute: Callable[[Tensor], Tensor] = self.model

    def step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.compute(self.images)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self, steps: int) -> Tensor:
        for _ in range(steps):
            self.step()
        return self.parameters()

    def parameters(self) -> Tensor:
        return torch.cat([values.detach().flatten() for values in self.model.parameters()])


def captured(training: Training) -> torch.cuda.CUDAGraph:
    """Make the warm-up steps, and return a graph of one step."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        training.run(WARM_UP)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        training.step()
    return graph


def compiled(training: Training, mode: str) -> Training:
    """Let a training run through Inductor."""
    torch._dynamo.reset()
    training.compute = torch.compile(training.model, mode=mode, fullgraph=True)
    return training


def same(found: Tensor, expected: Tensor) -> str:
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE:
        raise ValueError(f"values must be within {TOLERANCE:g}, got {difference:g}")
    return f"OK, within {difference:.0e}"


def graph_capture() -> str:
    """Compare a captured step, replayed while freezing ends, with eager steps."""
    training, steps = Training(), 5
    graph = captured(training)
    for _ in range(steps):
        graph.replay()
    return same(training.parameters(), Training().run(WARM_UP + steps))


def compiled_like_eager(mode: str) -> str:
    training = compiled(Training(), mode)
    return same(training.run(8), Training().run(8))


def compiled_crops() -> str:
    """Compare crops by Inductor with those of the same traced operations, from the same draws."""
    images, crops = torch.rand(4, 3, 60, 50, device=DEVICE), []
    for backend in ("inductor", "eager"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        transform = torch.compile(MultiCropTransform(), backend=backend, fullgraph=True)
        with torch._inductor.config.patch(fallback_random=True):
            crops.append(torch.cat([crop.flatten() for crop in transform(images)]))
    return same(*crops)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let torch raise an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def nothing_waits() -> str:
    for settings in ({}, {"memory": "streamed"}):
        training = Training(**settings)
        training.run(WARM_UP)
        with no_waiting():
            training.run(3)
    images = torch.rand(4, 3, 60, 50, device=DEVICE)
    transform = MultiCropTransform()
    transform(images)
    with no_waiting():
        transform(images)
    return "OK"


def repeatable() -> str:
    torch.use_deterministic_algorithms(True)
    try:
        runs = [Training().run(6) for _ in range(2)]
        images = torch.rand(4, 3, 60, 50, device=DEVICE)
        crops = [MultiCropTransform()(images, seed=0) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    if not torch.equal(*runs) or not all(map(torch.equal, *crops)):
        raise ValueError("two runs must be equal bit by bit under deterministic algorithms")
    return "OK, bit by bit"


def float16_scaling() -> str:
    """Train in float16 with the scaler's default scale."""
    training, scaler, losses = Training(), torch.amp.GradScaler("cuda"), []
    for _ in range(200):
        training.optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = training.model(training.images)
        scaler.scale(loss).backward()
        scaler.step(training.optimizer)
        scaler.update()
        losses.append(loss.detach())
    first, last = losses[0].item(), losses[-1].item()
    if not torch.stack(losses).isfinite().all() or scaler.get_scale() < 1:
        raise ValueError(f"losses must be finite, got a scale of {scaler.get_scale()}")
    return f"OK, loss {first:.2f} to {last:.2f}, scale {scaler.get_scale():g}"


def distributed_steps(_: int = 0) -> str:
    """Take steps of each kind on the ranks of the default group, with tensors on the device."""
    forms: dict[str, dict[str, Any]] = {
        "full": {"memory": "full"},
        "streamed": {"memory": "streamed"},
        "global mean": {"reduction": "global_mean"},
        "sharded": {"shard_prototypes": True},
    }
    for name, settings in forms.items():
        torch.manual_seed(0)
        model = Step(queue_length=256, **settings).to(DEVICE)
        wrapped = model if name == "sharded" else DistributedDataParallel(model)
        samples = 8 + dist.get_rank()  # uneven
        for _ in range(4):
            loss = wrapped(torch.randn(VIEWS, samples, INPUT_DIM, device=DEVICE))
            loss.backward()
        if not loss.isfinite():
            raise ValueError(f"{name}: the loss must be finite, got {loss.item()}")
    return f"OK: {', '.join(forms)}"


def nccl() -> str:
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        dist.init_process_group("nccl", init_method=meeting, rank=0, world_size=1)
        try:
            return distributed_steps()
        finally:
            dist.destroy_process_group()


def gloo() -> str:
    ranks = Ranks(2)
    try:
        return str(ranks.run(distributed_steps)[0])
    finally:
        ranks.close()


CHECKS: dict[str, Callable[[], str]] = {
    "a step as a CUDA graph": graph_capture,
    "a compiled step": lambda: compiled_like_eager("default"),
    "a compiled step, reduce-overhead": lambda: compiled_like_eager("reduce-overhead"),
    "compiled crops": compiled_crops,
    "no wait for the device": nothing_waits,
    "deterministic algorithms": repeatable,
    "float16 with a gradient scaler, 200 steps": float16_scaling,
    "NCCL, 1 process": nccl,
    "gloo, 2 processes on the device": gloo,
}


def training_steps() -> list[Row]:
    """Time a whole training step in eager mode, compiled, and as a graph, with the queue."""
    graph = captured(Training())
    rows = [_timed("eager", Training().step), _timed("CUDA graph", graph.replay)]
    for mode in ("default", "reduce-overhead"):
        rows.append(_timed(f"compiled, {mode}", compiled(Training(), mode).step))
    with patch.object(swapped_prediction, "BACKEND", "triton"):
        rows.append(_timed("eager, Triton's loss", Training().step))
        rows.append(_timed("CUDA graph, Triton's loss", captured(Training()).replay))
    return rows


def _timed(name: str, call: Callable[[], object]) -> Row:
    rounds = time_interleaved({name: call}, seconds=0.5, least=20, clock=clock_of(DEVICE))
    return {"contender": name, "seconds": summary(list(rounds[name].values()))}
