"""Sphinx settings."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import math_core
from docutils import nodes
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
    ("py:.*", r"(torch|nn|typing|collections|os)\..*"),
    ("py:.*", r"swavkit\.(.*\.)?_\w+(\..*)?"),  # a private type in an annotation
    ("py:.*", r"(Weights|swavkit\.multicrop\.image_input\.PILImage)"),
    (
        "py:.*",
        r"(Tensor|ProcessGroup|StorageReader|Sequence|Callable|Any|Literal|optional|np\..*|Generator|Figure)",
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


def _from_markdown(_app: Sphinx, page: str, source: list[str]) -> None:
    """Fill a page with a Markdown file of the root, of the syntax that these files use."""
    if page not in ("contributing", "changelog"):
        return
    text = (Path(__file__).parent.parent / f"{page.upper()}.md").read_text(encoding="utf-8")

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        return f"`{text} <{target}>`__" if target.startswith("https:") else f"``{target}``"

    def heading(match: re.Match[str]) -> str:
        return match[2] + "\n" + "=-~"[len(match[1]) - 1] * len(match[2])

    blocks = re.split(r"^```(\w+)\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    for index in range(0, len(blocks), 3):  # prose; then a language and code
        prose = re.sub(r"`([^`]+)`", r"``\1``", blocks[index])
        prose = re.sub(r"\[([^]]+)\]\(([^)]+)\)", link, prose)
        blocks[index] = re.sub(r"^(#+) (.*)$", heading, prose, flags=re.MULTILINE)
    for index in range(1, len(blocks), 3):
        blocks[index] = f".. code-block:: {blocks[index]}\n\n"
        blocks[index + 1] = textwrap.indent(blocks[index + 1], "   ")
    source[0] = "".join(blocks)


def setup(app: Sphinx) -> None:
    """Render mathematics at build time, so that a page loads nothing from another site."""
    app.connect("source-read", _from_markdown)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_displayed_math, None))
