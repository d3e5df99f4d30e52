"""The import rules: floors are only ever looked down from, and only the command line talks."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparsekit

ROOT = Path(sparsekit.__file__).parent
METHODS = ("pruners", "refiners", "recoverers", "quantizers")
FLOORS = ["", "tensors", "models", *METHODS, "stages", "cli"]
FILES = sorted(ROOT.rglob("*.py"))
# These answer a wrong flag, method or pattern, so they load without torch.
LIGHT = {
    "stages/config",
    "stages/environment",
    "stages/quantconfig",
    "stages/report",
    "stages/trainconfig",
    "tensors/grids",
    "tensors/patterns",
    "models/calibration",
    "models/configuration",
    "models/corpus",
    "models/demo",
    "models/folder",
    "models/hub",
    "models/output",
    "models/reference",
    "models/rows",
    "models/texts",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")


def floor_of(name: str) -> int:
    if name in ("__main__", "__init__"):  # the doors: they import what they open when it is used
        return len(FLOORS)
    return FLOORS.index(name.split("/")[0] if (ROOT / name.split("/")[0]).is_dir() else "")


def imports(tree: ast.AST, *, inside: bool = True) -> set[str]:
    """Absolute names of imported modules; `inside`: also those in functions and type checks."""
    nodes = ast.walk(tree) if inside else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""}
            # `from sparsekit.cli import show` imports a module, not a name in one.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in inner if own(name) in map(name_of, FILES)}
    return found


def own(name: str) -> str:
    return name.removeprefix("sparsekit").removeprefix(".").replace(".", "/")


def own_imports(tree: ast.AST, *, inside: bool = True) -> set[str]:
    found = {name for name in imports(tree, inside=inside) if name.split(".")[0] == "sparsekit"}
    return {own(name) for name in found} - {""}


def upward(name: str, tree: ast.AST) -> set[str]:
    """What a module imports although it is not below it."""
    found = own_imports(tree)
    kind = name.partition("/")[0]
    if kind in ("pruners", "refiners") and kind != name:  # methods never import each other
        return {n for n in found if floor_of(n) >= floor_of("pruners")} - {"pruners", kind}
    if name == "methods":  # it lists methods without importing any
        return found - {"errors"}
    return {n for n in found if floor_of(n) > floor_of(name)}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_imports_only_from_its_own_floor_and_below(path):
    assert upward(name_of(path), parsed(path)) == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints_exits_and_knows_terminals(path):
    tree, inside = parsed(path), name_of(path).split("/")[0] in ("cli", "__main__")
    talking = {n.split(".")[0] for n in imports(tree)} & {"rich", "typer", "click"}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    talking |= calls & {"print", "input", "exit", "sys.exit", "sys.stdout.write"}
    assert inside or talking == set()


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name_of(path): own_imports(parsed(path), inside=False) for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def test_registry_needs_only_the_standard_library_and_errors():
    found = imports(parsed(ROOT / "methods.py"))
    assert {n.split(".")[0] for n in found - {"sparsekit.errors"}} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_what_answers_a_wrong_flag_loads_without_torch(path):
    name = name_of(path)
    if floor_of(name) == 0 or name.startswith("cli") or name in LIGHT:
        heavy = {"torch", "transformers", "lm_eval", "datasets", "accelerate"}
        assert {n.split(".")[0] for n in imports(parsed(path), inside=False)} & heavy == set()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tensors/sums", "from sparsekit.models.checkpoint import Checkpoint"),
        ("models/blocks", "def f():\n    import sparsekit.stages.prune"),
        ("stages/prune", "if TYPE_CHECKING:\n    from sparsekit.cli import show"),
        ("pruners/alps", "from sparsekit.pruners.sparsegpt import Sparsegpt"),
        ("pruners/alps", "from sparsekit.pruners import wanda"),
        ("methods", "from sparsekit.pruners import Pruner"),
        ("errors", "from sparsekit.tensors.patterns import Pattern"),
    ],
)
def test_rule_sees_a_violation(name, text):
    assert upward(name, ast.parse(text)) != set()
