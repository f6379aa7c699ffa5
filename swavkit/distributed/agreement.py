"""Settings compared across processes, before anything whose size depends on them.

It knows no setting by name. One process has nobody to differ from.
"""

from __future__ import annotations

import math
import weakref
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swavkit._tensors import capturing
from swavkit.distributed.collectives import global_ranks, rank_and_size, sum_over_ranks

if TYPE_CHECKING:
    from swavkit.distributed.collectives import ProcessGroup

_RECORD = 32  # numbers in a record of settings, the first of them for their names
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an entry


def require_same(
    record: Mapping[str, Any],
    group: ProcessGroup | None,
    device: torch.device,
    *,
    advice: Mapping[str, str] | None = None,
) -> None:
    """Raise the same error on all processes of the group if a setting differs between them.

    The values travel in one sum of a fixed size, whatever they are and however many, so that it can
    come before collectives that would hang or mix up numbers if their sizes differed. Waits for the
    device.

    Args:
        record: At most 31 settings by name: numbers, bools, ``None``, floating dtypes, or scalar
            tensors of whole numbers up to 2^53, such as a :func:`checksum`.
        group: The processes; ``None`` has nobody to differ from.
        device: Where the group's tensors live.
        advice: For some of the settings what to do about it, said after the values.

    Raises:
        ValueError: If a setting differs; the text names it and all values with their ranks.
    """
    if len(record) >= _RECORD:
        raise ValueError(f"record must have fewer than {_RECORD} settings, got {len(record)}")
    if group is None:
        return
    names = zlib.crc32("\n".join(record).encode())
    numbers = [names, *map(_encoded, record.values())]
    own = torch.zeros(_RECORD, dtype=torch.float64, device=device)
    own[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    for index, value in enumerate(record.values(), start=1):
        if isinstance(value, Tensor):
            own[index] = value
    rank, size = rank_and_size(group)
    table = own.new_zeros(size, _RECORD)
    table[rank] = own
    of_names, *columns = sum_over_ranks(table, group).T.tolist()  # every backend has sums

    ranks = global_ranks(group)
    if len(set(of_names)) > 1:
        raise ValueError(
            "all processes of a group must call the same module of the same version, got "
            + _with_ranks([f"settings no. {int(number):08x}" for number in of_names], ranks)
        )
    breaches = []
    for (name, own_value), column in zip(record.items(), columns, strict=False):
        values = [_decoded(number, own_value) for number in column]
        if len(set(values)) > 1:
            breaches.append(
                f"{name} must be the same on all processes, got {_with_ranks(values, ranks)}"
                + (f"; {advice[name]}" if advice and name in advice else "")
            )
    if breaches:
        raise ValueError("\n".join(breaches))


class Agreement:
    """Whether a module's settings have been compared over its group: at its first eager calls.

    The mark lives here and not in the module, is neither read nor set while torch.compile traces,
    and so is guarded by no compiled graph. A copy, a loaded module and another group compare anew.

    Args:
        repeatedly: Whether to compare at the first eager call only, or at the 2nd, 4th, 8th and so
            on too: for what drifts apart in training, at once, or late because it is frozen first.
    """

    def __init__(self, *, repeatedly: bool = False) -> None:
        self._repeatedly = repeatedly
        self._calls = 0  # those with nothing to complain of
        self._group: Callable[[], ProcessGroup | None] = lambda: None

    def require(
        self,
        record: Callable[[], Mapping[str, Any]],
        group: ProcessGroup | None,
        device: torch.device,
        *,
        advice: Mapping[str, str] | None = None,
        again: bool = False,
    ) -> None:
        """Call :func:`require_same` if it is time to, or in any case if ``again``.

        ``record`` is called only then. Nothing happens in a group of ``None``, and, unless
        ``again``, under torch.compile and while a CUDA graph is captured, which must not wait.
        """
        if group is None or (not again and (torch.compiler.is_compiling() or capturing(device))):
            return
        if self._group() is not group:
            self._group, self._calls = weakref.ref(group), 0
        call = self._calls + 1
        if again or call == 1 or (self._repeatedly and call & (call - 1) == 0):
            require_same(record(), group, device, advice=advice)
        if not again:
            self._calls = call

    def __deepcopy__(self, memo: dict[int, Any]) -> Agreement:
        return Agreement(repeatedly=self._repeatedly)

    def __reduce__(self) -> tuple[Callable[[], Agreement], tuple[()]]:
        return partial(Agreement, repeatedly=self._repeatedly), ()


def checksum(values: Tensor) -> Tensor:
    """Return a whole number below 2^52 made of the bits of (N, M) values and the order of rows.

    It is exact, in whatever order a device sums: equal values give equal numbers everywhere, and
    values that differ anywhere practically never do. Nothing is read from the device.
    """
    bits = values.detach().contiguous().view(_BITS[values.element_size()])
    of_rows = bits.sum(dim=1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(of_rows), 2, device=values.device)
    return (of_rows * odd).sum() % 2**52


def _encoded(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, torch.dtype):
        return float(_DTYPES.index(value))
    return 0.0 if isinstance(value, Tensor) else float(value)


def _decoded(number: float, own: Any) -> str:
    """Return the text of a value; the one of this process says what kind it is."""
    if math.isnan(number):
        return "None"
    if isinstance(own, torch.dtype):
        return str(_DTYPES[int(number)])
    if isinstance(own, bool):
        return str(bool(number))
    return str(int(number)) if number.is_integer() else repr(number)


def _with_ranks(values: Sequence[str], ranks: Sequence[int]) -> str:
    """Say which value is on which ranks: "3 on rank 0 and 5 on ranks 1, 2"."""
    parts = []
    for value in dict.fromkeys(values):
        on = [str(rank) for rank, theirs in zip(ranks, values, strict=True) if theirs == value]
        listed = ", ".join(on[:8]) + f" and {len(on) - 8} more" * (len(on) > 8)
        parts.append(f"{value} on rank{'s' * (len(on) > 1)} {listed}")
    shown = parts[:8] + [f"{len(parts) - 8} more values"] * (len(parts) > 8)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
