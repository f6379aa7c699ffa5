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


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [swavkit.__version__]


# The pages as a browser gets them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages."""
    for package in ("sphinx", "furo", "math_core", "sphinx_copybutton"):
        pytest.importorskip(package, reason="the docs extra is not installed")
    built = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(tmp_path_factory.mktemp("doctrees")), str(ROOT / "docs"), str(built)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return built


@pytest.fixture(scope="module")
def pages(built: Path) -> dict[str, str]:
    """Each built page under the name of its source."""
    return {path.stem: path.read_text(encoding="utf-8") for path in built.glob("*.html")}


def test_every_page_has_a_place_in_the_navigation(pages: dict[str, str]) -> None:
    sources = {path.stem for path in (ROOT / "docs").glob("*.rst")} - {"index"}
    _, _, sidebar = pages["index"].partition('<div class="sidebar-tree">')
    linked = re.findall(r"href=\"([\w-]+)\.html\"", sidebar.partition("</aside>")[0])
    assert sorted(linked) == sorted(sources)


@pytest.mark.parametrize("query", ["timm", "Lightning", "lightly", "NaN", "ln K"])
def test_the_search_finds_what_users_ask_for(built: Path, query: str) -> None:
    language = pytest.importorskip("sphinx.search.en").SearchEnglish({})
    index = (built / "searchindex.js").read_text(encoding="utf-8")
    data = json.loads(index[index.index("(") + 1 : index.rindex(")")])
    for word in map(language.stem, query.lower().split()):
        assert word in data["terms"] or word in data["titleterms"], word


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


def test_code_can_be_copied_and_the_source_read(pages: dict[str, str]) -> None:
    assert "copybutton.js" in pages["start"]
    for name in swavkit.__all__:
        assert re.search(rf"href=\"_modules/[\w/]+\.html#{name}\"", pages["api"]), name
