"""The gate of skips."""

from __future__ import annotations

import pytest

from tests.skips import checked, is_allowed


@pytest.mark.parametrize(
    ("test", "reason", "allowed"),
    [
        ("tests/test_swav.py::test_a[cuda]", "there is no CUDA device", True),
        ("tests/test_swav.py", "torchvision is not installed", True),
        ("tests/test_swav.py::test_a", "the computer is not installed", False),
        ("tests/test_swav.py::test_a", "could not import 'scipy': No module named 'scipy'", False),
        ("tests/test_swav.py::test_a", "there is no CUDA device, or it is slow", False),
        ("tests/test_swav.py::test_a", "", False),
        ("tests/test_matrix.py::test_a[cuda-SwAVLoss]", "there is no CUDA device", True),
        ("tests/test_matrix.py::test_a[cpu-SwAVLoss]", "there is no CUDA device", False),
    ],
)
def test_a_reason_is_one_of_a_list_and_no_cell_of_the_cpu_has_one(
    test: str, reason: str, allowed: bool
) -> None:
    assert is_allowed(test, reason) is is_allowed(test, f"Skipped: {reason}") is allowed
    report = pytest.CollectReport(test, "skipped", (test, 1, f"Skipped: {reason}"), None)
    assert checked(report).outcome == ("skipped" if allowed else "failed")
    assert allowed or reason in report.longrepr


def test_the_gate_is_on(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.pluginmanager.has_plugin("skips")
