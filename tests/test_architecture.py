"""Who may import whom: the import statements, held to the table of docs/design.rst."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "swavkit"
FILES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.parent == PACKAGE or path.stem != "__init__"
)
FOLDERS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
EACH_FILE = pytest.mark.parametrize("file", FILES)

# The rows of the table: a file, and the last column, which says from whom it may import.
ROW = re.compile(r"^   \* - ``([\w/]+)\.py``\n     - .+\n     - (.+)$", flags=re.MULTILINE)
TABLE: dict[str, str] = dict(ROW.findall((ROOT / "docs" / "design.rst").read_text("utf-8")))
ORDER = list(TABLE)


def files_of(name: str) -> set[str]:
    """Return a file, or all files of a folder and the folder itself, which re-exports them."""
    if name in FOLDERS:
        return {name, *(file for file in FILES if file.startswith(f"{name}/"))}
    return {name}


def permitted(file: str) -> set[str]:
    """Return the files and folders that this one may import from, by its row."""
    allowed = TABLE[file]
    if allowed == "all":
        return {*ORDER[ORDER.index(file) + 1 :], *FOLDERS}
    names = set(re.findall(r"``([\w/]+)``", allowed))
    assert names or allowed == "–", f"the row of {file} says {allowed!r}"
    return set().union(*map(files_of, names)) - {file}


def syntax_of(file: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{file}.py").read_text("utf-8"))


def imports(tree: ast.Module) -> set[str]:
    """Return what is imported anywhere in a file, for type checkers alone too, by its full name.

    ``from package import name`` gives ``package`` and ``package.name``: the statement does not say
    which of the two is the module.
    """
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_files(tree: ast.Module) -> set[str]:
    """Return the files of the package that a file imports from, and folders that re-export."""
    found = set()
    for name in imports(tree):
        package, *parts = name.split(".")
        if package != "swavkit" or not parts:
            continue
        for end in (2, 1):  # the longest name that is a file or a folder
            path = "/".join(parts[:end])
            if path in FILES or path in FOLDERS:
                found.add(path)
                break
    # "from swavkit.multicrop import box_ops" names the folder along with the file.
    reached = {path.partition("/")[0] for path in found if "/" in path}
    re_exported = {
        folder
        for folder in FOLDERS
        for name in imports(tree)
        if name.startswith(f"swavkit.{folder}.") and f"{folder}/{name.split('.')[2]}" not in FILES
    }
    return {path for path in found if path not in reached or path in re_exported}


def dotted_names(tree: ast.Module) -> set[str]:
    """Return each expression of the form ``a.b.c``, and its beginnings."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_table_lists_every_file_once() -> None:
    assert sorted(ORDER) == FILES


@EACH_FILE
def test_a_file_imports_only_from_those_that_its_row_names(file: str) -> None:
    assert imported_files(syntax_of(file)) <= permitted(file)


@EACH_FILE
def test_a_file_imports_only_from_files_further_down(file: str) -> None:
    below = {*ORDER[ORDER.index(file) + 1 :]}
    imported = set().union(
        *(files_of(name) - {name} or {name} for name in imported_files(syntax_of(file)))
    )
    assert imported <= below


def test_components_know_few_others() -> None:
    """A component is a folder, or a public file of its own."""
    components = {file.partition("/")[0] for file in FILES} - {"__init__", "swav", "distributed"}
    between = set()
    for file in FILES:
        own = file.partition("/")[0]
        others = {name.partition("/")[0] for name in imported_files(syntax_of(file))}
        between |= {(own, other) for other in others if not other.startswith("_")}
    assert {pair for pair in between if pair[0] in components and pair[1] in components} - {
        (component, component) for component in components
    } == {
        ("_head_losses", "fused"),
        ("_head_losses", "prototypes"),
        ("_head_losses", "sinkhorn"),
        ("_head_losses", "swapped_prediction"),
        ("_head_losses", "swav_statistics"),
        ("checkpoints", "feature_queue"),
        ("fused", "sinkhorn"),
        ("fused", "swapped_prediction"),
        ("fused", "swav_statistics"),
        ("monitor", "swav_statistics"),
        ("monitor", "prototypes"),
        ("pretrained", "prototypes"),
        ("sharded", "prototypes"),
        ("sharded", "sinkhorn"),
        ("sharded", "swapped_prediction"),
        ("sharded", "swav_statistics"),
        ("swav_statistics", "swapped_prediction"),
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_only_re_exports(folder: str) -> None:
    for statement in syntax_of(f"{folder}/__init__").body:
        assert isinstance(statement, (ast.ImportFrom, ast.Assign, ast.Expr))


@EACH_FILE
def test_one_file_talks_to_other_processes(file: str) -> None:
    tree = syntax_of(file)
    used = imports(tree) | dotted_names(tree)
    talks = {name for name in used if re.match(r"torch\.(distributed|_C\._distributed)", name)}
    assert bool(talks) == (file == "distributed/collectives")


@EACH_FILE
def test_a_file_imports_no_more_than_the_core_dependencies(file: str) -> None:
    roots = {name.split(".")[0] for name in imports(syntax_of(file))}
    if file == "_triton":  # torch for CUDA requires triton; others need no such file
        roots -= {"triton"}
    if file == "monitor/plot":  # of the extra "plot"
        roots -= {"matplotlib"}
    if file == "testing/strategies":  # of the extra "testing"
        roots -= {"hypothesis"}
    assert roots <= {"swavkit", "torch", "numpy", *sys.stdlib_module_names}


def test_the_oracle_shares_nothing_with_the_package() -> None:
    assert imports(syntax_of("testing/oracle")) <= {
        "__future__",
        "__future__.annotations",
        "math",
        "numpy",
        "typing",
        "typing.Any",
    }


@EACH_FILE
def test_no_file_has_ambient_settings_or_names_a_device(file: str) -> None:
    tree = syntax_of(file)
    # A generator made from a seed is no ambient setting; whether a graph is captured is asked once.
    names = dotted_names(tree) - {"torch.Generator().manual_seed"}
    if "torch.cuda.is_current_stream_capturing" in names:
        assert file == "_tensors"
        names -= {"torch.cuda"}
    methods = {name.rsplit(".", 1)[-1] for name in names}
    assert not methods & {"cuda", "environ", "getenv", "manual_seed", "set_rng_state"}
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree))


def test_the_front_door_has_no_logic() -> None:
    for statement in syntax_of("__init__").body:
        assert isinstance(statement, (ast.ImportFrom, ast.Assign, ast.Expr))
        if not isinstance(statement, ast.ImportFrom):
            ast.literal_eval(statement.value)  # a docstring, a list of names, a version


@EACH_FILE
def test_a_file_is_short_enough_to_read_in_one_sitting(file: str) -> None:
    assert len((PACKAGE / f"{file}.py").read_text("utf-8").splitlines()) <= 500


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import swavkit.swav", {"swav"}),
        ("import swavkit.sinkhorn.kernel as kernel", {"sinkhorn/kernel"}),
        ("from swavkit import _checks", {"_checks"}),
        ("from swavkit.multicrop import box_ops", {"multicrop/box_ops"}),
        ("from swavkit.sinkhorn import SinkhornKnopp", {"sinkhorn"}),
        ("from swavkit.prototypes import unit_rows", {"prototypes"}),
        (
            "if TYPE_CHECKING:\n    from swavkit.distributed.collectives import ProcessGroup",
            {"distributed/collectives"},
        ),
        ("def late():\n    from swavkit.swav import SwAVLoss", {"swav"}),
        ("import torch", set()),
    ],
)
def test_every_form_of_an_import_is_seen(code: str, files: set[str]) -> None:
    assert imported_files(ast.parse(code)) == files
