"""What torch lets a test see while code runs: synchronisation, collectives, compiled graphs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RefuseSynchronisation(TorchDispatchMode):
    """Raises an error where the host waits for a device: it reads a value, or a copy blocks."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor:  # a mask has to be counted, integers have not
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if func is torch.ops.aten._to_copy.default and "device" in kwargs:
            crosses = torch.device(kwargs["device"]) != args[0].device
            waits = waits or (crosses and not kwargs.get("non_blocking"))
        if waits:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **kwargs)


class RefuseSoftmaxOverRows(TorchDispatchMode):
    """Raises an error at a softmax over another dimension than the last.

    An accelerator spreads it badly, where other reductions over rows are spread well.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "softmax" in func.name() and args[1] not in (-1, args[0].dim() - 1):
            raise RuntimeError(f"{func} over dimension {args[1]}")
        return func(*args, **(kwargs or {}))


class CountingBackend:
    """Counts the graphs that torch.compile makes from now on, and runs them as they are."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


class Collectives(TorchDispatchMode):
    """Notes the number of entries in the tensors of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.numels.append(sum(tensor.numel() for tensor in tree_leaves(args[0])))
        return func(*args, **(kwargs or {}))


class LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor of a dtype that an operation returns."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == self.dtype:
            self.numel = max(self.numel, result.numel())
        return result


class LiveStorage(TorchDispatchMode):
    """Adds up the bytes of all storages that operations make, and notes the largest sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(storage) for storage in storages_of((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in storages_of(result):
            key = id(storage)  # of an object that lives as long as the memory
            if key not in given and key not in self.sizes:
                self.sizes[key] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def storages_of(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [tensor.untyped_storage() for tensor in tensors]


class RoundedProducts(TorchDispatchMode):
    """Rounds the float32 factors of matrix products to 11 bits, as TF32 does, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            self.count += 1
            args = [rounded_to_tf32(factor) for factor in args]
        return func(*args, **(kwargs or {}))


def rounded_to_tf32(factor: Any) -> Any:
    """Return a float32 tensor rounded to the nearest number of 11 bits."""
    if not isinstance(factor, torch.Tensor) or factor.dtype != torch.float32:
        return factor
    return ((factor.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)
