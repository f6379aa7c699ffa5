"""Who may import whom: the import statements, held to the table of docs/design.rst."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "swavkit"
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))
EACH_FILE = pytest.mark.parametrize("file", FILES)

# The rows of the table: a file, and the last column, which says from whom it may import.
ROW = re.compile(r"^   \* - ``(\w+)\.py``\n     - .+\n     - (.+)$", flags=re.MULTILINE)
ROOMS: dict[str, str] = dict(ROW.findall((ROOT / "docs" / "design.rst").read_text("utf-8")))
ORDER = list(ROOMS)


def permitted(file: str) -> set[str]:
    """Return the files that this one may import from, by its row."""
    allowed = ROOMS[file]
    if allowed in ("all", "every component"):
        return set(ORDER[ORDER.index(file) + 1 :])
    names = set(re.findall(r"``(\w+)``", allowed))
    assert names or allowed == "–", f"the row of {file} says {allowed!r}"
    return names


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
    """Return the files of the package that a file imports from."""
    inside = [name.split(".") for name in imports(tree) if name.startswith("swavkit.")]
    return {parts[1] for parts in inside}


def dotted_names(tree: ast.Module) -> set[str]:
    """Return each expression of the form ``a.b.c``, and its beginnings."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_the_table_lists_every_file_once() -> None:
    assert sorted(ORDER) == FILES


@EACH_FILE
def test_a_file_imports_only_from_those_that_its_row_names(file: str) -> None:
    assert imported_files(syntax_of(file)) <= permitted(file)


def test_the_table_names_only_files_further_down() -> None:
    for position, file in enumerate(ORDER):
        assert permitted(file) <= set(ORDER[position + 1 :]), file


def test_components_know_no_other_but_groups_a_default_step_and_masses() -> None:
    between = {
        (file, other)
        for file in set(ORDER) - {"__init__", "swav", "_heads"}
        for other in permitted(file)
        if not other.startswith("_")
    }
    assert between == {
        ("multicrop", "crop_group"),
        ("multicrop", "photometric"),
        ("crop_group", "photometric"),
        ("sinkhorn", "marginals"),
        ("checkpoints", "feature_queue"),
        ("sharded_prototypes", "prototypes"),
        ("sharded_prototypes", "sharded"),
        ("sharded_prototypes", "sinkhorn"),
        ("sharded_prototypes", "swapped_prediction"),
        ("_block_scores", "marginals"),
        ("streaming", "sinkhorn"),
        ("streaming", "swapped_prediction"),
    }


def test_only_the_loss_looks_into_the_room_of_its_heads() -> None:
    assert [file for file in FILES if "_heads" in imported_files(syntax_of(file))] == ["swav"]


@EACH_FILE
def test_one_file_talks_to_other_processes(file: str) -> None:
    tree = syntax_of(file)
    used = imports(tree) | dotted_names(tree)
    talks = {name for name in used if re.match(r"torch\.(distributed|_C\._distributed)", name)}
    assert bool(talks) == (file == "_distributed")


@EACH_FILE
def test_a_file_imports_no_more_than_the_core_dependencies(file: str) -> None:
    roots = {name.split(".")[0] for name in imports(syntax_of(file))}
    assert roots <= {"swavkit", "torch", "numpy", *sys.stdlib_module_names}


@EACH_FILE
def test_no_file_has_ambient_settings_or_names_a_device(file: str) -> None:
    tree = syntax_of(file)
    # A generator made from a seed is no ambient setting; whether a graph is captured is asked once.
    names = dotted_names(tree) - {"torch.Generator().manual_seed"}
    if "torch.cuda.is_current_stream_capturing" in names:
        assert file == "_device"
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
    assert len((PACKAGE / f"{file}.py").read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import swavkit.swav", {"swav"}),
        ("import swavkit.sinkhorn as codes", {"sinkhorn"}),
        ("from swavkit import _checks", {"_checks"}),
        ("from swavkit.prototypes import unit_rows", {"prototypes"}),
        ("if TYPE_CHECKING:\n    from swavkit._distributed import ProcessGroup", {"_distributed"}),
        ("def late():\n    from swavkit.swav import SwAVLoss", {"swav"}),
        ("import torch", set()),
    ],
)
def test_every_form_of_an_import_is_seen(code: str, files: set[str]) -> None:
    assert imported_files(ast.parse(code)) == files
