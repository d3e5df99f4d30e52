"""The table of which verb takes which kind of checkpoint, for verbs and recipes."""

import json
import shutil
from pathlib import Path

import pytest

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.kind import TAKES, Kind, refusal
from sparsekit.errors import DataError, UsageError
from sparsekit.packing import convert, pack, pack_plan, unpack
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prepare import prepare_prune
from sparsekit.pruning.prune import prune
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.prepare import prepare_quantize
from sparsekit.quantization.quantize import quantize
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.prepare import prepare_recover
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import evaluate
from sparsekit.study.recipe import parse
from sparsekit.study.schema import VERBS

LEGACY = Path(__file__).parent.parent / "data" / "legacy" / "sparse-24-bitmask"
# The stages of a recipe that make a checkpoint of a kind.
STAGES = {
    Kind.PLAIN: "- prune: {}\n",
    Kind.PRODUCTS: "- prune: {compensate: lowrank}\n",
    Kind.FACTORED: "- prune: {compensate: lowrank, format: factored}\n",
    Kind.QUANTIZED: "- quantize: {grid: int8}\n",
    Kind.PACKED: "- prune: {}\n- pack\n",
}
# A stage of each verb that fits every model.
LATER = {
    "prune": "- prune: {method: magnitude}\n",
    "recover": "- recover: {tokens: 4096}\n",
    "quantize": "- quantize: {method: rtn}\n",
    "pack": "- pack\n",
    "eval": "- eval\n",
}


@pytest.fixture(scope="module")
def folders(family, row_file, tmp_path_factory) -> dict[Kind, Path]:
    """A tiny checkpoint of each kind."""
    root, llama = tmp_path_factory.mktemp("kinds"), family("llama")
    rows = str(row_file)

    def pruned(name: str, **options) -> Path:
        return prune(PruneConfig(calibration=rows, **options), str(llama), root / name).out

    found = {
        Kind.PLAIN: pruned("plain"),
        Kind.PRODUCTS: pruned("products", compensate="lowrank"),
        Kind.FACTORED: pruned("factored", compensate="lowrank", format="factored"),
        Kind.LEGACY: LEGACY,
        Kind.FOREIGN: root / "foreign",
    }
    config = QuantizeConfig(method="rtn", grid="int8")
    found[Kind.QUANTIZED] = quantize(config, str(found[Kind.PLAIN]), root / "quantized").out
    found[Kind.PACKED] = pack.pack(str(found[Kind.PLAIN]), root / "packed").out
    shutil.copytree(llama, root / "foreign")
    file = root / "foreign" / "config.json"
    config_json = json.loads(file.read_text())
    config_json["quantization_config"] = {"quant_method": "gptq"}
    file.write_text(json.dumps(config_json))
    return found


@pytest.fixture
def read(row_file, tmp_path):
    """Runs the preparation of a verb."""
    out, rows = tmp_path / "out", str(row_file)
    train = RecoverConfig(method="fixed", tokens=96, batch=2, length=16, lr=1e-3, data=rows)
    runs = {
        "prune": lambda m: prepare_prune(PruneConfig(method="magnitude"), m, out),
        "recover": lambda m: prepare_recover(train, m, out),
        "quantize": lambda m: prepare_quantize(QuantizeConfig(method="rtn", grid="int8"), m, out),
        "pack": lambda m: pack_plan.prepare(m, out),
        "unpack": lambda m: unpack.prepare(m, out),
        "convert": lambda m: convert.prepare(m, out),
        "eval": lambda m: evaluate(EvalConfig(text=rows), [m]),
    }
    return lambda verb, model: runs[verb](str(model))


def refusal_of(verb: str, source: Checkpoint) -> str:
    """The error of the table; empty when the verb takes the checkpoint."""
    try:
        source.require(verb)
    except DataError as error:
        return str(error)
    return ""


def test_the_table_has_every_verb_and_every_kind():
    assert TAKES.keys() >= VERBS.keys() | {"unpack", "convert"}
    assert all(row.keys() == set(Kind) for row in TAKES.values())


def test_a_folder_has_its_kind(folders):
    assert {kind: Checkpoint.open(folder).kind for kind, folder in folders.items()} == {
        kind: kind for kind in Kind
    }


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("verb", [*LATER, "unpack", "convert"])
def test_a_verb_refuses_what_the_table_says_and_nothing_else(folders, read, verb, kind):
    source = Checkpoint.open(folders[kind])
    wanted = refusal_of(verb, source)
    assert bool(wanted) == bool(TAKES[verb][kind])
    if wanted:
        with pytest.raises(DataError) as error:
            read(verb, source.path)
        assert error.value.code == "kind-not-taken"
        assert str(error.value) == wanted
        assert str(source.path) in wanted
        return
    read(verb, source.path)


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("verb", LATER)
def test_a_recipe_refuses_what_the_verb_refuses(verb, kind):
    text = f"model: demo\nstages:\n{STAGES[kind]}"
    made = parse(text).steps[-1].name
    wanted = refusal(verb, kind, made)
    if wanted is None:
        parse(text + LATER[verb])
        return
    with pytest.raises(UsageError) as error:
        parse(text + LATER[verb])
    assert str(wanted) in error.value.message
