"""Checks that settings, of any kind, are the same on all ranks; a no-op on one rank."""

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

_RECORD_SIZE = 32  # numbers in a record; the first is a checksum of the names
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by item size in bytes


def require_same(
    record: Mapping[str, Any],
    group: ProcessGroup | None,
    device: torch.device,
    *,
    advice: Mapping[str, str] | None = None,
) -> None:
    """Raise the same error on all ranks of the group if a setting differs between them.

    All settings are sent in one all-reduce of fixed size. It is therefore safe before collectives
    that would hang or mix up values if their sizes differed. Synchronizes with the device.

    Args:
        record: At most 31 settings by name: numbers, bools, ``None``, floating dtypes, or scalar
            tensors of integers up to 2^53, such as a :func:`checksum`.
        group: The process group; nothing is compared if ``None``.
        device: The device of the group's tensors.
        advice: Hints by setting name, appended to the error message.

    Raises:
        ValueError: If a setting differs. The message has its name, and all values with their ranks.
    """
    if len(record) >= _RECORD_SIZE:
        raise ValueError(f"record must have fewer than {_RECORD_SIZE} settings, got {len(record)}")
    if group is None:
        return
    names = zlib.crc32("\n".join(record).encode())
    numbers = [names, *map(_encoded, record.values())]
    own = torch.zeros(_RECORD_SIZE, dtype=torch.float64, device=device)
    own[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    for index, value in enumerate(record.values(), start=1):
        if isinstance(value, Tensor):
            own[index] = value
    rank, size = rank_and_size(group)
    table = own.new_zeros(size, _RECORD_SIZE)
    table[rank] = own
    name_checksums, *columns = sum_over_ranks(table, group).T.tolist()  # every backend can sum

    ranks = global_ranks(group)
    if len(set(name_checksums)) > 1:
        raise ValueError(
            "all ranks of a group must call the same module of the same version, got "
            + _with_ranks([f"settings no. {int(number):08x}" for number in name_checksums], ranks)
        )
    differences = []
    for (name, own_value), column in zip(record.items(), columns, strict=False):
        values = [_decoded(number, own_value) for number in column]
        if len(set(values)) > 1:
            differences.append(
                f"{name} must be the same on all ranks, got {_with_ranks(values, ranks)}"
                + (f"; {advice[name]}" if advice and name in advice else "")
            )
    if differences:
        raise ValueError("\n".join(differences))


class Agreement:
    """Compares a module's settings over its process group at its first eager calls.

    The call count is kept here rather than in the module. It is not accessed while torch.compile
    traces, so no compiled graph guards on it. A copied or loaded module, or one with another group,
    compares again.

    Args:
        repeatedly: Whether to compare again at the 2nd, 4th, 8th, ... eager call, for values that
            can drift apart in training, possibly late because they are frozen first.
    """

    def __init__(self, *, repeatedly: bool = False) -> None:
        self._repeatedly = repeatedly
        self._calls = 0  # eager calls without an error
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
        """Call :func:`require_same` if a comparison is due, or always if ``again``.

        ``record`` is called only for a comparison. A group of ``None`` compares nothing. Unless
        ``again``, comparisons are skipped under torch.compile and during CUDA graph capture, which
        does not allow synchronization.
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
    """Return an integer below 2^52 computed from the bits and the row order of (N, M) values.

    The arithmetic is exact, so equal values give equal checksums in any order of summation.
    Different values almost never do, unless entries only trade places within a row. Does not
    synchronize with the device.
    """
    bits = values.detach().contiguous().view(_BITS[values.element_size()])
    if values.element_size() == 8:  # the modulus below would drop sign and exponent
        bits = bits ^ (bits >> 32)
    of_rows = bits.sum(dim=1, dtype=torch.int64)
    odd = torch.arange(1, 2 * len(of_rows), 2, device=values.device)
    return (of_rows * odd).sum() % 2**52


def checksum_of_all(matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Return one checksum of several matrices and of the places without one; ``None`` of none."""
    checksums = [None if matrix is None else checksum(matrix) for matrix in matrices]
    known = [each for each in checksums if each is not None]
    if not known:
        return None
    absent = torch.full_like(known[0], 2**52)  # above every checksum
    return checksum(
        torch.stack([absent if each is None else each for each in checksums]).unsqueeze(1)
    )


def _encoded(value: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, torch.dtype):
        return float(_DTYPES.index(value))
    return 0.0 if isinstance(value, Tensor) else float(value)


def _decoded(number: float, own: Any) -> str:
    """Format a received value, using the type of this rank's ``own`` value."""
    if math.isnan(number):
        return "None"
    if isinstance(own, torch.dtype):
        return str(_DTYPES[int(number)])
    if isinstance(own, bool):
        return str(bool(number))
    return str(int(number)) if number.is_integer() else repr(number)


def _with_ranks(values: Sequence[str], ranks: Sequence[int]) -> str:
    """List the values with their ranks: "3 on rank 0 and 5 on ranks 1, 2"."""
    parts = []
    for value in dict.fromkeys(values):
        on = [str(rank) for rank, theirs in zip(ranks, values, strict=True) if theirs == value]
        listed = ", ".join(on[:8]) + f" and {len(on) - 8} more" * (len(on) > 8)
        parts.append(f"{value} on rank{'s' * (len(on) > 1)} {listed}")
    shown = parts[:8] + [f"{len(parts) - 8} more values"] * (len(parts) > 8)
    return " and ".join([", ".join(shown[:-1]), shown[-1]] if len(shown) > 1 else shown)
