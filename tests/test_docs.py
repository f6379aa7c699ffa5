"""The documents say what is true: their code runs, and no public name is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import swavkit
from tests.matrix import FORWARD_ONLY

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(swavkit.__all__)


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


# The pages as a browser gets them


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each built page under the name of its source."""
    for package in ("sphinx", "furo", "math_core", "sphinx_copybutton"):
        pytest.importorskip(package, reason="the docs extra is not installed")
    built = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(tmp_path_factory.mktemp("doctrees")), str(ROOT / "docs"), str(built)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {path.stem: path.read_text(encoding="utf-8") for path in built.glob("*.html")}


def test_pages_load_nothing_from_another_site(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)
        assert loaded
        assert not [tag for tag in loaded if re.search(r"=\"(?:https?:)?//", tag)], name


def test_mathematics_is_rendered_when_the_pages_are_built(pages: dict[str, str]) -> None:
    source = (ROOT / "docs" / "method.rst").read_text(encoding="utf-8")
    formulas = len(re.findall(r":math:`|^\.\. math::", source, flags=re.MULTILINE))
    assert pages["method"].count("<math") == pages["method"].count("</math>") == formulas > 50
    for name, page in pages.items():
        assert "\\(" not in page, name
        assert "<merror" not in page, name


def test_sections_of_prose_are_paragraphs(pages: dict[str, str]) -> None:
    public = [getattr(swavkit, name) for name in swavkit.__all__]
    described = sum("    Shape:\n" in (value.__doc__ or "") for value in public)
    shapes = re.findall(r"<p class=\"rubric\">Shape</p>\n<(\w+)", pages["api"])
    assert shapes == ["p"] * described
    assert described >= 5


def test_the_table_of_the_matrix_is_in_the_page(pages: dict[str, str]) -> None:
    cells = re.findall(r"<td><p>(.+?)</p></td>", pages["start"])
    for component in json.loads((ROOT / "docs" / "matrix.json").read_text("utf-8"))["cells"]:
        modes = "4 of 4" if component in FORWARD_ONLY else "11 of 11"
        row = cells[cells.index(component) :][:9]
        assert row[1:5] == [modes] * 4
        assert set(row[5:]) <= {modes, "not run"}


def test_code_can_be_copied_and_the_source_read(pages: dict[str, str]) -> None:
    assert "copybutton.js" in pages["start"]
    for name in swavkit.__all__:
        assert re.search(rf"href=\"_modules/[\w/]+\.html#{name}\"", pages["api"]), name
