"""The documents say what is true: their code runs, and no public name is missing."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

import swavkit

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(swavkit.__all__)


def test_every_file_of_the_package_is_in_the_table_of_rooms() -> None:
    page = (ROOT / "docs" / "design.rst").read_text(encoding="utf-8")
    rooms = re.findall(r"^   \* - ``(\w+\.py)``$", page, flags=re.MULTILINE)
    assert sorted(rooms) == sorted(path.name for path in (ROOT / "swavkit").glob("*.py"))


def test_the_training_loop_of_the_readme_runs_in_12_lines() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    loops = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    assert len(loops) == 1
    assert len(loops[0].splitlines()) == 12
    users = {
        "network": nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 128), nn.BatchNorm1d(128)
        ),
        "loader": [torch.rand(2, 3, 240, 320), torch.rand(3, 3, 256, 256)],
    }
    exec(compile(loops[0], "README.md", "exec"), users)
    assert users["criterion"].steps == 2
    assert users["loss"].isfinite()
