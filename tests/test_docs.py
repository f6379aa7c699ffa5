"""The documents say what is true: their code runs, and no public name is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import swavkit
from benchmarks.published import published_codes
from tests import oracles
from tests.matrix import FORWARD_ONLY

ROOT = Path(__file__).resolve().parent.parent


def test_every_public_name_is_in_the_api_page() -> None:
    page = (ROOT / "docs" / "api.rst").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:class|function):: (\w+)$", page, flags=re.MULTILINE)
    assert sorted(documented) == sorted(swavkit.__all__)


def test_the_training_loop_of_the_readme_runs_as_it_stands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    for size, tiny in [("rand(512", "rand(5"), ("batch_size=256", "batch_size=2"), ("200", "1")]:
        assert loop.count(size) == 1
        loop = loop.replace(size, tiny)
    names: dict[str, Any] = {}
    exec(compile(loop, "README.md", "exec"), names)
    assert names["criterion"].steps == 2
    assert names["loss"].isfinite()


def test_the_published_algorithm_fails_where_the_readme_says_so() -> None:
    scores = torch.eye(8, 6)  # cosines of samples that lie on prototypes
    absent = torch.cat([torch.full((1, 6), torch.nan), scores[1:]])
    for given, epsilon in [(scores, 0.01), (scores.half(), 0.05), (absent, 0.05)]:
        assert published_codes(given, epsilon).isnan().all()
        codes = swavkit.sinkhorn_knopp(given, epsilon=epsilon)
        expected = oracles.sinkhorn(given[1:].double().numpy(), epsilon, 3)
        if given is absent:
            np.testing.assert_allclose(codes[1:].numpy(), expected, atol=1e-7)
        else:
            assert codes.isfinite().all()


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.MULTILINE) == [swavkit.__version__]


# The pages as a browser gets them


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built pages."""
    for package in ("sphinx", "furo", "math_core", "myst_parser", "sphinx_copybutton"):
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
    sources = {page.stem for page in (ROOT / "docs").glob("*.*") if page.suffix in (".rst", ".md")}
    _, _, sidebar = pages["index"].partition('<div class="sidebar-tree">')
    linked = re.findall(r"href=\"([\w-]+)\.html\"", sidebar.partition("</aside>")[0])
    assert sorted(linked) == sorted(sources - {"index"})


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


def test_the_table_of_the_matrix_is_in_the_page(pages: dict[str, str]) -> None:
    cells = re.findall(r"<td><p>(.+?)</p></td>", pages["precision"])
    for component in json.loads((ROOT / "docs" / "matrix.json").read_text("utf-8"))["cells"]:
        modes = "4 of 4" if component in FORWARD_ONLY else "11 of 11"
        row = cells[cells.index(component) :][:9]
        assert row[1:5] == [modes] * 4
        assert set(row[5:]) <= {modes, "not run"}


def test_code_can_be_copied_and_the_source_read(pages: dict[str, str]) -> None:
    assert "copybutton.js" in pages["start"]
    for name in swavkit.__all__:
        assert re.search(rf"href=\"_modules/[\w/]+\.html#{name}\"", pages["api"]), name
