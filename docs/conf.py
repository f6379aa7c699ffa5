"""Sphinx settings."""

import swavkit

project = "swavkit"
author = "the swavkit maintainers"
copyright = "2026, the swavkit maintainers"  # noqa: A001
release = swavkit.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"swavkit {release}"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shape", "params_style")]
nitpicky = True
nitpick_ignore_regex = [
    # No inventory of another project is fetched, so that the build needs no network.
    ("py:.*", r"(torch|nn|typing|collections|os)\..*"),
    ("py:.*", r"swavkit\.(.*\.)?_\w+(\..*)?"),  # a private type in an annotation
    (
        "py:.*",
        r"(Tensor|ProcessGroup|StorageReader|Sequence|Callable|Any|Literal|optional|np\..*|Generator)",
    ),
]
