"""One table of tolerances by dtype, and the rounding floors that come on top of it."""

from __future__ import annotations

import torch

# The largest error of a result of order 1 that is computed by a few sums and exponentials of inputs
# which the dtype holds exactly. Half-precision results are computed in float32, then rounded.
ATOL = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.float16: 6e-4,
    torch.bfloat16: 4e-3,
}
DTYPES = list(ATOL)


def of_codes(dtype: torch.dtype, *, epsilon: float, largest: float) -> float:
    """Return the tolerance of an entry of the codes, for scores of at most ``largest``.

    S/ε is rounded in the dtype of the arithmetic, and codes are exponentials of it.
    """
    arithmetic = torch.promote_types(dtype, torch.float32)
    return ATOL[dtype] + 2 * torch.finfo(arithmetic).eps * largest / epsilon
