"""The number of kernels that a call launches on an accelerator, and the bytes they move.

Launches dominate the time of small problems. On a CUDA device, the profiler counts the kernels.
Otherwise, the ``meta`` device takes the code path of an accelerator without values, and the
computing operations are counted. Each of them launches at least one kernel. The bytes moved are
those of all tensors that these operations take and return.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.bench_sinkhorn import ITERATIONS
from benchmarks.published import published_codes
from swavkit import MultiCropTransform, sinkhorn_knopp

SAMPLES, PROTOTYPES = 256, 3000
PHOTOGRAPHS, SIZES = 256, ((375, 500), (256, 256))  # of multi-crop; heights and widths


@dataclass(frozen=True)
class Count:
    """The launches of one contender, for 3 iterations on N problems at once."""

    contender: str
    problems: int
    launches: int


@dataclass(frozen=True)
class CropCount:
    """The launches and bytes of the published crops of a batch of photographs of one size."""

    height: int
    width: int
    launches: int
    bytes: int


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "meta")


def unit(device: torch.device) -> str:
    if device.type == "cuda":
        return f"kernels on {torch.cuda.get_device_name(device)}"
    return "operations on the meta device"


def counts(device: torch.device) -> list[Count]:
    """Return the counts of every contender, for one problem and for two."""
    launches = kernels if device.type == "cuda" else operations
    return [
        Count(name, problems, launches(call))
        for problems in (1, 2)
        for name, call in contenders(problems, device).items()
    ]


def counts_of_crops(device: torch.device) -> list[CropCount]:
    """Return the counts of the published multi-crop transform of 8-bit photographs."""
    transform = MultiCropTransform()
    found = []
    for height, width in SIZES:
        shape = (PHOTOGRAPHS, 3, height, width)
        images = torch.zeros(shape, dtype=torch.uint8, device=device)

        def call(images: torch.Tensor = images) -> object:
            return transform(images, seed=0)

        with _Operations() as recorded:
            call()
        launches = kernels(call) if device.type == "cuda" else recorded.number
        found.append(CropCount(height, width, launches, recorded.bytes))
    return found


def contenders(problems: int, device: torch.device) -> dict[str, Callable[[], object]]:
    scores = torch.zeros(problems, SAMPLES, PROTOTYPES, device=device)
    of_samples = {"sample_weight": torch.ones(problems, SAMPLES, device=device)}
    of_both = of_samples | {"prototype_weight": torch.ones(PROTOTYPES, device=device)}
    return {
        "swavkit": lambda: sinkhorn_knopp(scores, iterations=ITERATIONS),
        "swavkit, weighted samples": lambda: sinkhorn_knopp(
            scores, iterations=ITERATIONS, **of_samples
        ),
        "swavkit, both weighted": lambda: sinkhorn_knopp(scores, iterations=ITERATIONS, **of_both),
        "published": lambda: [published_codes(view, iterations=ITERATIONS) for view in scores],
    }


def kernels(call: Callable[[], object]) -> int:
    """Return the number of kernels of one call on a CUDA device, without copies and fills."""
    from torch.profiler import ProfilerActivity, profile

    call()  # the first call loads libraries and selects kernels
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(
        event.device_type == torch.autograd.DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        for event in recorded.events()
    )


def operations(call: Callable[[], object], *, on_cpu: bool = False) -> int:
    """Return the number of computing operations of one call, those on the CPU only if asked."""
    with _Operations(on_cpu) as recorded:
        call()
    return recorded.number


class _Operations(TorchDispatchMode):
    """Counts operations that return tensors, except views and uninitialized memory."""

    def __init__(self, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.number = 0
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        free = func.is_view or func.overloadpacket in _FREE
        if isinstance(result, (torch.Tensor, tuple, list)) and not free:
            leaves = tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            if self.on_cpu or any(tensor.device.type != "cpu" for tensor in tensors):
                self.number += 1
                self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in tensors)
        return result


_FREE = {
    torch.ops.aten._unsafe_view,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_empty_strided,
}
