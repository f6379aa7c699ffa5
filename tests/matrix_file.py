"""A plugin of pytest: writes the outcome of each cell of the matrix."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import swavkit

CELL = re.compile(r".*test_matrix\.py::.*\[(cpu|cuda)-(.+)-torch\.(\w+)-(.+)\]")


class Writer:
    """Collects the reports of cells, and writes them at the end of the run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[str, Any] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        cell = CELL.fullmatch(report.nodeid)
        if cell is None or (report.passed and report.when != "call"):
            return
        outcome = report.outcome
        if report.skipped:
            outcome += report.longrepr[2].removeprefix("Skipped")  # ": ", and the reason
        device, component, dtype, mode = cell.groups()
        of_device = self.cells.setdefault(component, {}).setdefault(device, {})
        of_device.setdefault(dtype, {})[mode] = outcome

    def pytest_sessionfinish(self) -> None:
        cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        written = {
            "swavkit": swavkit.__version__,
            "torch": torch.__version__,
            "devices": {"cpu": platform.machine(), "cuda": cuda},
            "cells": self.cells,
        }
        self.path.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
