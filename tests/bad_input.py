"""Bad input that several parts must refuse in the same words."""

from __future__ import annotations

from typing import Any

import torch

BAD_SAMPLE_WEIGHTS: list[tuple[dict[str, Any], type[Exception], str]] = [  # of 4 samples
    (
        {"sample_weight": torch.ones(3)},
        ValueError,
        r"sample_weight must have shape \(4,\), got \(3,\)",
    ),
    (
        {"sample_weight": torch.ones(5)},
        ValueError,
        r"sample_weight must have shape \(4,\), got \(5,\)",
    ),
    (
        {"sample_weight": torch.ones(3, 4)},
        ValueError,
        r"sample_weight must have shape \(4,\), got \(3, 4\)",
    ),
    (
        {"sample_weight": torch.ones(4, dtype=torch.int64)},
        TypeError,
        r"sample_weight must have a bool or floating-point dtype, got torch\.int64",
    ),
    (
        {"sample_weight": [1.0] * 4},
        TypeError,
        r"sample_weight must be a torch\.Tensor, got list",
    ),
    (
        {"sample_weight": torch.ones(4, device="meta")},
        ValueError,
        "sample_weight must be on device cpu, got meta",
    ),
]
