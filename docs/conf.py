"""Sphinx settings."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import math_core
from docutils import nodes
from docutils.parsers.rst.directives.tables import CSVTable
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import swavkit

project = "swavkit"
author = "the swavkit maintainers"
copyright = "2026, the swavkit maintainers"  # noqa: A001
release = swavkit.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_parser",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"swavkit {release}"
html_static_path = ["_static"]
html_css_files = ["swavkit.css"]
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape"]  # prose, so no style of a list of parameters
# Copies the input of an interactive example only.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
nitpicky = True
nitpick_ignore_regex = [
    # No inventory of another project is fetched, so that the build needs no network.
    ("py:.*", r"(torch|nn|numpy|typing|collections|os)\..*"),
    ("py:.*", r"swavkit\.(.*\.)?_\w+(\..*)?"),  # a private type in an annotation
    ("py:.*", r"(Weights|swavkit\.multicrop\.image_input\.PILImage)"),
    (
        "py:.*",
        r"(Tensor|ProcessGroup|StorageReader|Sequence|Callable|Any|Literal|optional|np\..*|Generator|Figure|Array|SearchStrategy)",
    ),
]


_MATHML = math_core.LatexToMathML()


def _inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    writer.body.append(_MATHML.convert_with_local_state(node.astext(), displaystyle=False))
    raise nodes.SkipNode


def _displayed_math(writer: HTML5Translator, node: nodes.math_block) -> None:
    formula = _MATHML.convert_with_local_state(node.astext(), displaystyle=True)
    writer.body.append(f'<div class="math-wrapper">{formula}</div>')
    raise nodes.SkipNode


class MatrixTable(CSVTable):
    """How many modes of each component, device and dtype passed, by ``matrix.json``."""

    def run(self) -> list[nodes.Node]:
        path = Path(__file__).with_name("matrix.json")
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        dtypes = ("float16", "bfloat16", "float32", "float64")
        lines = ["Component," + ",".join(f"{d} {t}" for d in ("CPU", "CUDA") for t in dtypes)]
        for component, of_devices in cells.items():
            shown = [
                _outcome(of_devices.get(device, {}).get(dtype, {}))
                for device in ("cpu", "cuda")
                for dtype in dtypes
            ]
            lines.append(",".join([component, *shown]))
        self.options["header-rows"] = 1
        self.content = StringList(lines, source=str(path))
        self.state.document.settings.record_dependencies.add(str(path))
        return super().run()


def _outcome(modes: dict[str, str]) -> str:
    count = Counter(outcome.partition(":")[0] for outcome in modes.values())
    run = count["passed"] + count["failed"]
    return f"{count['passed']} of {len(modes)}" if run else "not run"


def setup(app: Sphinx) -> None:
    """Render mathematics at build time, so that a page loads nothing from another site."""
    app.add_directive("matrix", MatrixTable)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_displayed_math, None))
