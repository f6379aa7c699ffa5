"""Settings of the whole suite."""

from __future__ import annotations

import hypothesis
import pytest
import torch

# The same draws in every run, so that a failure is always of the change at hand.
hypothesis.settings.register_profile("swavkit", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("swavkit")

torch.set_num_threads(1)  # the suite runs in as many processes as there are cores


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
