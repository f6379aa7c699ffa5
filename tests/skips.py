"""A plugin of pytest: a test that skips for a reason that is not listed here fails.

A test that is for some of its parameters only is not made for the others.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import Any

import pytest

OPTIONAL = (
    "geomloss|kornia|matplotlib|mlxtend|POT|resource|SciPy|setuptools 77|timm|torchvision|triton"
    "|the docs extra"
)
ALLOWED = re.compile(
    "there is no CUDA device"
    f"|({OPTIONAL}) is not installed"
    # of Triton's interpreter, which takes a process of its own
    "|TRITON_INTERPRET=1 runs the kernels on the CPU, and only there"
    "|random problems are for the interpreter"
    "|this is the process under the interpreter"
    "|the interpreter of this version of Triton does not go with this NumPy"
    "|this system counts no peak of memory"
    "|this torch traces no gradient inside a graph"
)


def is_allowed(test: str, reason: str) -> bool:
    """Return whether a test, a name such as ``tests/test_x.py::test_y[cpu]``, may skip."""
    if "test_matrix.py" in test and "[cpu" in test:
        return False
    return ALLOWED.fullmatch(reason.removeprefix("Skipped: ")) is not None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return report if hasattr(report, "wasxfail") else checked(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return checked((yield))


def checked(report: Any) -> Any:
    """Return the report of a test or a file, as one of a failure if it may not skip."""
    if report.skipped and not is_allowed(report.nodeid, report.longrepr[2]):
        report.outcome = "failed"
        report.longrepr = f"tests/skips.py lists no such reason: {report.longrepr[2]}"
    return report
