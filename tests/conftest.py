"""Settings of the whole suite."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
import torch

from tests import matrix_file, skips

# The same draws in every run, so that a failure is always of the change at hand.
# Their speed is that of the machine, which may be busy.
hypothesis.settings.register_profile(
    "swavkit",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("swavkit")

torch.set_num_threads(1)  # the suite runs in as many processes as there are cores


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix", type=Path, metavar="FILE", help="write the outcomes of tests/test_matrix.py"
    )


def pytest_configure(config: pytest.Config) -> None:
    # As plugins, and not here, they also see what is outside this folder, such as the docs.
    config.pluginmanager.register(skips, "skips")
    path = config.getoption("--matrix")
    if path and config.option.markexpr == "not slow":  # that of pyproject.toml: the file is of all
        config.option.markexpr = ""
    if path and not hasattr(config, "workerinput"):  # only in the process that gets all reports
        config.pluginmanager.register(matrix_file.Writer(path.resolve()), "matrix")


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
