"""The rules of imports: rooms only use the rooms below them, and only the command line talks."""

import ast
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sparsekit

ROOT = Path(sparsekit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# The rooms from the ground up: each imports from itself and from those before it. Files outside
# folders are in the ground floor, but for the doors.
GROUND = "ground"
ROOMS = [
    GROUND,
    "weights",
    "solvers",
    "checkpoint",
    "provenance",
    "model",
    "text",
    "pipeline",
    "packing",
    "inspection",
    "scoring",
    "quantization/methods",
    "quantization",
    "pruning/methods",
    "pruning/refiners",
    "pruning",
    "recovery/methods",
    "recovery",
    "reporting",
    "study",
    "bench",
    "api",
    "cli",
    "doors",
]
DOORS = {"__init__": "doors", "__main__": "doors", "hf": "model"}
# A room has at most this share of all lines.
LARGEST_SHARE = 0.2
# Methods import mathematics, weights and the folder's own interface, and nothing else.
METHODS = ("pruning/methods", "pruning/refiners", "quantization/methods", "recovery/methods")
# These answer a wrong flag, method or pattern, so that they load without torch.
LIGHT = {
    "checkpoint/demo_model",
    "checkpoint/entry",
    "checkpoint/entry_parts",
    "checkpoint/folder",
    "checkpoint/hub",
    "checkpoint/kind",
    "checkpoint/output_folder",
    "checkpoint/resolve",
    "pipeline/options",
    "provenance/entry",
    "provenance/environment",
    "pruning/config",
    "quantization/config",
    "recovery/config",
    "scoring/config",
    "text/cache_file",
    "text/calibration",
    "text/rows",
    "text/sources",
    "text/training_rows",
    "weights/grids",
    "weights/patterns",
}
HEAVY = {"torch", "transformers", "lm_eval", "datasets", "accelerate"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")


NAMES = {name_of(path) for path in FILES}


def room_of(name: str) -> str:
    """The room of a file: the longest folder of the list that it is in."""
    if name in DOORS:
        return DOORS[name]
    inside = [room for room in ROOMS if name == room or name.startswith(room + "/")]
    return max(inside, key=len, default=GROUND)


def imports(tree: ast.AST, *, inside: bool = True) -> set[str]:
    """Names of imported modules; `inside`: also those in functions and type checks."""
    nodes = ast.walk(tree) if inside else ast.iter_child_nodes(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""}
            # `from sparsekit.cli import complete` imports a module, not a name in one.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name for name in inner if own(name) in NAMES}
    return found


def own(name: str) -> str:
    return name.removeprefix("sparsekit").removeprefix(".").replace(".", "/")


def own_imports(tree: ast.AST, *, inside: bool = True) -> set[str]:
    found = {name for name in imports(tree, inside=inside) if name.split(".")[0] == "sparsekit"}
    return {own(name) for name in found} - {""}


def upward(name: str, tree: ast.AST) -> set[str]:
    """What a module imports although it is not below it."""
    found = own_imports(tree)
    room = room_of(name)
    if name == "registry":  # it lists methods without importing any
        return found - {"errors"}
    above = {n for n in found if ROOMS.index(room_of(n)) > ROOMS.index(room)}
    if room in METHODS and name != room:
        allowed = {GROUND, "weights", "solvers"}
        interfaces = {room, "pruning/methods"} if room == "pruning/refiners" else {room}
        above |= {n for n in found if room_of(n) not in allowed} - interfaces
    return above


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_module_imports_only_from_its_own_room_and_those_below(path):
    assert upward(name_of(path), parsed(path)) == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_command_line_prints_exits_and_knows_terminals(path):
    tree, inside = parsed(path), room_of(name_of(path)) in ("cli", "doors")
    talking = {n.split(".")[0] for n in imports(tree)} & {"rich", "typer", "click"}
    calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    talking |= calls & {"print", "input", "exit", "sys.exit", "sys.stdout.write"}
    assert inside or talking == set()


def test_every_folder_is_a_room():
    folders = {name_of(path).rpartition("/")[0] for path in FILES} - {""}
    assert folders == {room for room in ROOMS if (ROOT / room).is_dir()}


def test_no_room_has_more_than_a_fifth_of_the_lines():
    lines = Counter()
    for path in FILES:
        lines[name_of(path).split("/")[0]] += len(path.read_text(encoding="utf-8").splitlines())
    most, count = lines.most_common(1)[0]
    assert count <= LARGEST_SHARE * lines.total(), f"{most}: {count} of {lines.total()} lines"


def test_modules_do_not_import_each_other_in_a_circle():
    """Imports within functions do not close one; those for type checks do."""
    graph = {name_of(path): lasting_imports(parsed(path)) - {name_of(path)} for path in FILES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(FILES)


def lasting_imports(tree: ast.Module) -> set[str]:
    """What a module imports when it is loaded or type-checked."""
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    found = own_imports(tree, inside=False)
    for block in blocks:
        found |= own_imports(block, inside=False)
    return found


def test_registry_needs_only_the_standard_library_and_errors():
    found = imports(parsed(ROOT / "registry.py"))
    assert {n.split(".")[0] for n in found - {"sparsekit.errors"}} <= sys.stdlib_module_names


def test_the_list_of_light_modules_names_files():
    assert LIGHT <= NAMES


@pytest.mark.parametrize(
    "name", sorted(n for n in NAMES if n in LIGHT or room_of(n) in (GROUND, "cli", "api", "doors"))
)
def test_what_answers_a_wrong_flag_loads_without_torch(name):
    path = ROOT / name / "__init__.py" if (ROOT / name).is_dir() else ROOT / f"{name}.py"
    assert {n.split(".")[0] for n in imports(parsed(path), inside=False)} & HEAVY == set()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("solvers/input_stats", "from sparsekit.checkpoint.checkpoint import Checkpoint"),
        ("model/block_stream", "def f():\n    import sparsekit.pruning.prune"),
        ("pruning/prune", "if TYPE_CHECKING:\n    from sparsekit.cli import prune"),
        ("pruning/methods/alps", "from sparsekit.pruning.methods.sparsegpt import Sparsegpt"),
        ("pruning/methods/alps", "from sparsekit.pruning.methods import wanda"),
        ("pruning/methods/alps", "from sparsekit.model.block_stream import BlockStream"),
        ("quantization/prepare", "from sparsekit.pruning.prepare import prepare_prune"),
        ("registry", "from sparsekit.pruning.methods import Pruner"),
        ("errors", "from sparsekit.weights.patterns import Pattern"),
        ("cli/app", "import sparsekit.__main__"),
    ],
)
def test_rule_sees_a_violation(name, text):
    assert upward(name, ast.parse(text)) != set()


def test_rule_sees_a_circle_of_type_checks():
    tree = ast.parse("if TYPE_CHECKING:\n    from sparsekit.model.recording import Recorder")
    assert lasting_imports(tree) == {"model/recording"}
