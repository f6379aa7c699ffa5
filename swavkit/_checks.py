"""Argument checks and their error messages.

Each check takes the name of the argument. Its error states the expected and the actual value:
``TypeError`` for a wrong type, ``ValueError`` for a wrong value or shape. Checks use only Python
numbers, shapes, dtypes and devices, never tensor values, so none synchronizes with the device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Kind = TypeVar("Kind")

# Narrower ones, such as float8, have no arithmetic in torch.
FLOATING_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def any_float(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a number, NaN included."""
    if isinstance(value, float):  # or a symbolic float, which does not support float()
        return value
    several = getattr(value, "ndim", 0) > 0  # a NumPy array
    if isinstance(value, (bool, Tensor)) or several or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def finite_float(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is a finite number."""
    number = any_float(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def positive_float(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and above 0."""
    number = finite_float(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return number


def positive_setting(name: str, value: Any) -> float | Tensor:
    """Return ``value`` if it is a finite number above 0, or a floating 0-dim tensor.

    The value of a tensor is not checked.
    """
    if not isinstance(value, Tensor):
        return positive_float(name, value)
    floating_tensor(name, value)
    if value.dim() > 0:
        raise ValueError(
            f"{name} must be 0-dimensional as a tensor, got shape {tuple(value.shape)}"
        )
    _constant(name, value)
    return value


def known_setting(name: str, value: float | Tensor, device: torch.device) -> None:
    """Check that a setting has values that can be moved to ``device``."""
    if isinstance(value, Tensor) and value.is_meta and device.type != "meta":
        raise ValueError(
            f"{name} must have values, got a tensor on the meta device; expected one made with "
            f"device='cpu', which is moved to the device of a call"
        )


def non_negative_float(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is finite and at least 0."""
    number = finite_float(name, value)
    if number < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return number


def positive_or_infinite(name: str, value: Any) -> float:
    """Return ``value`` as a float if it is above 0, including infinity."""
    number = any_float(name, value)
    if not number > 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")
    return number


def float_between(name: str, value: Any, least: float, most: float) -> float:
    """Return ``value`` as a float if it is in [``least``, ``most``]."""
    number = finite_float(name, value)
    if not least <= number <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], got {value!r}")
    return number


def positive_range(name: str, value: Any, most: float = math.inf) -> tuple[float, float]:
    """Return ``value`` as a pair if it is (low, high) with 0 < low <= high <= ``most``."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be two numbers (low, high), got {type(value).__name__}")
    limits = tuple(finite_float(f"{name}[{index}]", limit) for index, limit in enumerate(value))
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= most:
        upper = "" if most == math.inf else f" <= {most}"
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high{upper}, got {value!r}")
    return limits


def positive_int(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is an integer of at least 1."""
    return _int_from(name, value, 1)


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """Return ``value`` if it is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    return value


def positive_ints(name: str, values: Sequence[Any]) -> list[int]:
    """Return ``values`` as ints if there is at least one and all are integers above 0."""
    if not values:
        raise ValueError(f"{name} as a sequence must hold at least 1 number, got none")
    return [positive_int(f"{name}[{index}]", value) for index, value in enumerate(values)]


def non_negative_int(name: str, value: Any) -> int:
    """Return ``value`` as an int if it is an integer of at least 0."""
    return _int_from(name, value, 0)


def boolean(name: str, value: Any) -> None:
    """Check that ``value`` is ``True`` or ``False``."""
    if value is not True and value is not False:
        choice(name, value, (True, False))


def choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Check that ``value`` is one of ``allowed``."""
    if not any(type(value) is type(option) and value == option for option in allowed):
        listed = " or ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be {listed}, got {value!r}")


def tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    return value


def floating_tensor(name: str, value: Any) -> Tensor:
    """Return ``value`` if it is a tensor of one of ``FLOATING_DTYPES``."""
    floating = tensor(name, value)
    if floating.dtype not in FLOATING_DTYPES:
        raise TypeError(f"{name} must have a floating-point dtype{_got(floating.dtype)}")
    return floating


def floating_dtype(name: str, value: Any) -> None:
    """Check that ``value`` is one of ``FLOATING_DTYPES``."""
    if not isinstance(value, torch.dtype) or value not in FLOATING_DTYPES:
        raise TypeError(f"{name} must be a floating-point torch.dtype{_got(value)}")


def min_dimensions(name: str, value: Tensor, least: int, shape: str) -> None:
    """Check that a tensor has at least ``least`` dimensions; ``shape`` names them."""
    if value.dim() < least:
        raise ValueError(
            f"{name} must have at least {least} dimension{'s' if least > 1 else ''} {shape}, "
            f"got shape {tuple(value.shape)}"
        )


def last_dimension(name: str, value: Tensor, expected: int, meaning: str) -> None:
    """Check that the last dimension of a tensor is ``expected``."""
    min_dimensions(name, value, 1, f"(..., {meaning})")
    if value.shape[-1] != expected:
        raise ValueError(
            f"{name} must have {expected} {meaning} in its last dimension, "
            f"got shape {tuple(value.shape)}"
        )


def no_empty_last_dimension(name: str, value: Tensor, meaning: str) -> None:
    """Check that the last dimension of a tensor is not empty; ``meaning`` names its entries."""
    if value.shape[-1] == 0:
        raise ValueError(
            f"{name} must have at least 1 of the {meaning} in its last dimension, "
            f"got shape {tuple(value.shape)}"
        )


def of_samples_and_prototypes(name: str, value: Any) -> None:
    """Check scores or codes: a floating-point tensor (..., B, K) with K > 0."""
    floating_tensor(name, value)
    unbatched(name, value)
    min_dimensions(name, value, 2, "(..., samples, prototypes)")
    no_empty_last_dimension(name, value, "prototypes")


def weights(
    sample_weight: Tensor | None, prototype_weight: Tensor | None, like: Tensor, index: str = ""
) -> None:
    """Check optional weights of the samples and prototypes of ``like``, (..., B, K)."""
    if sample_weight is not None:
        weight("sample_weight" + index, sample_weight, (like.shape[:-1], like.shape[-2:-1]), like)
    if prototype_weight is not None:
        weight("prototype_weight" + index, prototype_weight, (like.shape[-1:],), like)


def weight(name: str, value: Any, shapes: Sequence[tuple[int, ...]], like: Tensor) -> None:
    """Check a bool or floating-point tensor of one of ``shapes`` on the device of ``like``."""
    tensor(name, value)
    if value.dtype not in (*FLOATING_DTYPES, torch.bool):
        raise TypeError(f"{name} must have a bool or floating-point dtype{_got(value.dtype)}")
    if not any(same_shape(value.shape, shape) for shape in shapes):
        listed = " or ".join(dict.fromkeys(str(tuple(shape)) for shape in shapes))
        raise ValueError(f"{name} must have shape {listed}, got {tuple(value.shape)}")
    same_device(name, value, like)


def one_for_each(name: str, value: Any, count: int, meaning: str) -> list[Any]:
    """Return ``value``, a sequence with an entry or ``None`` for each of ``count``, as a list.

    ``None`` stands for as many. ``meaning`` names what is counted.
    """
    if value is None:
        return [None] * count
    sequence = isinstance(value, (list, tuple))
    if not sequence or len(value) != count:
        raise ValueError(
            f"{name} must be None or a list with an entry or None for each of {meaning}, got "
            f"{len(value) if sequence else type(value).__name__}"
        )
    return list(value)


def prototype_weights(
    value: Any, sizes: Sequence[int], several: bool, device: torch.device
) -> list[Tensor | None]:
    """Return relative masses of prototypes for each head of ``sizes``, or ``None``.

    ``several`` tells whether ``value`` is a sequence, with an entry or ``None`` for each head.
    """
    given = [value]
    if several:
        given = one_for_each("prototype_weight", value, len(sizes), f"{len(sizes)} heads")
    for index, (each, size) in enumerate(zip(given, sizes, strict=True)):
        if each is not None:
            name = f"prototype_weight[{index}]" if several else "prototype_weight"
            weight(name, each, ((size,),), each)
            _constant(name, each)
            known_setting(name, each, device)
    return given


def mask(name: str, value: Any, shape: tuple[int, ...], like: Tensor) -> None:
    """Check a bool tensor of ``shape`` on the device of ``like``."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool:
        actual = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a bool torch.Tensor, got {actual}")
    weight(name, value, (shape,), like)


def same_shape(shape: Sequence[int], other: Sequence[int]) -> bool:
    """Compare shapes size by size, which torch.compile can trace for dynamic sizes."""
    if len(shape) != len(other):
        return False
    return all(size == expected for size, expected in zip(shape, other, strict=True))


def same_device(name: str, value: Tensor, like: Tensor, module: object = None) -> None:
    """Check that a tensor is on the device of ``like``, a parameter of ``module`` if given."""
    if value.device != like.device:
        text = f"{name} must be on device {like.device}, got {value.device}"
        if module is not None:
            text += f"; or move the {type(module).__name__} there, with .to({str(value.device)!r})"
        raise ValueError(text)


def untransformed(name: str, value: Tensor) -> None:
    """Check that a tensor has no ``torch.func`` transform and no forward-mode tangent."""
    if torch.compiler.is_compiling():
        return
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(value)
    if not transformed and forward_ad._current_level >= 0:
        dual = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
        transformed = dual.tangent is not None
    if transformed:
        raise RuntimeError(
            f"{name} must be outside torch.func transforms and forward-mode differentiation, which "
            f"a loss that is computed along with its gradient does not support; expected a call "
            f"with all samples, then backward() or torch.autograd.grad"
        )


def unbatched(name: str, value: Tensor) -> None:
    """Check that a tensor is outside ``torch.vmap``; leading dimensions serve for batches."""
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(value):
        raise RuntimeError(
            f"{name} must be outside torch.vmap; expected a tensor (..., samples, prototypes) "
            f"whose leading dimensions are independent problems"
        )


def refuse_scripting(module: object) -> NoReturn:
    """Raise an error under ``torch.jit.script``; set as ``__prepare_scriptable__`` of a module."""
    raise RuntimeError(
        f"{type(module).__name__} cannot be compiled by torch.jit.script; expected torch.compile"
    )


def callers_stacklevel() -> int:
    """Return the ``stacklevel`` of a warning that is to name a line outside torch and swavkit."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and _package(frame) in ("torch", "swavkit"):
        frame, level = frame.f_back, level + 1
    return level


def is_plainly(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether a submodule is a plain ``kind``: no subclass, hooks or own ``forward``."""
    hooks = (
        part._forward_pre_hooks
        or part._forward_hooks
        or part._backward_pre_hooks
        or part._backward_hooks
    )
    return type(part) is kind and not ("forward" in vars(part) or hooks)


def views(
    name: str, value: Any, meaning: str, *, least: int, last: int | None = None
) -> list[Tensor]:
    """Return the views as a list of floating-point tensors of equal shape.

    ``value`` is a sequence of (B, N) tensors or one (V, B, N) tensor with at least ``least`` views.
    If ``last`` is given, N must be ``last``. ``meaning`` names the entries that N counts.
    """
    if isinstance(value, Tensor):
        if value.dim() != 3:
            raise ValueError(
                f"{name} as one tensor must have 3 dimensions (views, samples, {meaning}), "
                f"got shape {tuple(value.shape)}"
            )
        floating_tensor(name, value)
        members = list(value.unbind(0))
    elif isinstance(value, (list, tuple)):
        members = list(value)
    else:
        raise TypeError(
            f"{name} must be a torch.Tensor or a sequence of torch.Tensor, "
            f"got {type(value).__name__}"
        )
    if len(members) < least:
        raise ValueError(
            f"{name} must hold at least {least} view{'s' if least > 1 else ''}, got {len(members)}"
        )
    for index, member in enumerate(members):
        item = f"{name}[{index}]"
        floating_tensor(item, member)
        if member.dim() != 2:
            raise ValueError(
                f"{item} must have 2 dimensions (samples, {meaning}), "
                f"got shape {tuple(member.shape)}"
            )
        if last is not None:
            last_dimension(item, member, last, meaning)
        if not same_shape(member.shape, members[0].shape):
            raise ValueError(
                f"{item} must have the shape of {name}[0], {tuple(members[0].shape)}, "
                f"got {tuple(member.shape)}"
            )
        if member.dtype != members[0].dtype:
            raise TypeError(
                f"{item} must have the dtype of {name}[0], {members[0].dtype}, got {member.dtype}"
            )
        same_device(item, member, members[0])
    return members


def _package(frame: FrameType) -> str:
    """Return the name of the package in whose code a frame is."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


def _constant(name: str, value: Tensor) -> None:
    """Check that a setting is nothing that a module would register and an optimizer change."""
    if value.requires_grad:
        raise ValueError(
            f"{name} must not require a gradient, which it would not get, got one that does"
        )
    if isinstance(value, (nn.Parameter, nn.Buffer)):
        kind = "Parameter" if isinstance(value, nn.Parameter) else "Buffer"
        raise TypeError(
            f"{name} must be a plain torch.Tensor, which is in no state dict, got a {kind}; "
            f"expected its detach()"
        )


def _got(dtype: object) -> str:
    """Return the end of a message about a dtype that is none of ``FLOATING_DTYPES``."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return f" of 16 to 64 bits, got {dtype}"
    return f", got {dtype!r}"


def _int_from(name: str, value: Any, least: int) -> int:
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number: int = value.__index__()
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number
