"""Every recipe that is shipped: well-formed, what it says, and run in shrunken form."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from verbs import replace

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import SparsekitError, UsageError
from sparsekit.inspection.verify import verify
from sparsekit.pruning.dry_run import plan
from sparsekit.recovery.methods import Scale
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.saved_scores import read_scores
from sparsekit.study.recipe import parse, read_recipe, shipped
from sparsekit.study.run import run
from sparsekit.study.schema import read_yaml, schema, write_yaml
from sparsekit.text.calibration import Calibration

ROOT = Path(__file__).parents[1]
NAMES = sorted(shipped())
WANTED = {
    *("quickstart", "magnitude", "wanda", "ria", "nowag", "sparsegpt", "alps", "fixed", "quantize"),
    *("wanda-dsnot-60", "sparsegpt-ast", "sparsegpt-cast-int4", "armor-2x4"),
    *("compare-oneshot-2x4", "llama-7b-2x4", "ast-paper", "cast-paper"),
}


# Options of a training that its recipe names.
OPTIONS = {"ast-paper": {"decay", "ramp"}, "cast-paper": {"decay", "spans"}}


def test_the_recipes_that_were_promised_are_there():
    assert set(NAMES) == WANTED


@pytest.mark.parametrize("name", NAMES)
def test_it_is_well_formed_and_opens_with_what_it_is_for(name):
    file = shipped()[name]
    text = file.read_text()
    assert text.startswith("# ")
    assert text.partition("\n")[0].endswith((".", "?"))
    assert "version: 1\n" in text
    assert read_recipe(file).steps


def test_an_installed_package_has_them_wherever_it_lies(tmp_path):
    """As pip leaves it with --target: nothing but the packages in one folder."""
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        pytest.skip("needs the setuptools of pyproject.toml")
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("sparsekit", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import setup; setup()"
    python(build, "build_py", "--build-lib", installed, cwd=source)
    modules = [
        sorted(file.relative_to(root) for file in (root / "sparsekit").rglob("*.py"))
        for root in (source, installed)
    ]
    assert modules[0] == modules[1]
    names = "from sparsekit.study import recipe; print(recipe.__file__, *recipe.shipped())"
    file, *found = python(names, cwd=installed).split()
    assert file == str(installed / "sparsekit" / "study" / "recipe.py")
    assert sorted(found) == NAMES


def python(code: str, *words: object, cwd: Path) -> str:
    """What Python prints of some code that is run in a folder, whose modules it finds first."""
    command = [sys.executable, "-c", code, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(cwd)}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TYPES = {
    **{"object": dict, "array": list, "string": str, "integer": int, "number": int | float},
    **{"boolean": bool, "null": type(None)},
}
NOTES = {"$schema", "title", "description", "default", "format"}  # which check nothing


def fits(value: object, asked: dict) -> bool:
    """Whether a value is what a JSON schema asks for; a keyword that this does not know fails."""
    listed = value if isinstance(value, list) else []
    mapped = value if isinstance(value, dict) else {}
    known = asked.get("properties", {})
    checks = {
        "type": lambda name: (
            isinstance(value, TYPES[name]) and isinstance(value, bool) == (name == "boolean")
        ),
        "const": lambda wanted: value == wanted,
        "enum": lambda choices: value in choices,
        "minimum": lambda least: not isinstance(value, int | float) or value >= least,
        "minItems": lambda least: not isinstance(value, list) or len(value) >= least,
        "items": lambda each: all(fits(one, each) for one in listed),
        "anyOf": lambda choices: any(fits(value, choice) for choice in choices),
        "required": lambda keys: not isinstance(value, dict) or set(keys) <= set(value),
        "properties": lambda _: all(fits(mapped[key], known[key]) for key in {*mapped} & {*known}),
        "additionalProperties": lambda more: more is True or set(mapped) <= set(known),
    }
    return all(checks[key](told) for key, told in asked.items() if key not in NOTES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_the_schema_asks_for(name):
    assert fits(read_yaml(shipped()[name].read_text()), schema())


@pytest.mark.parametrize(
    "text",
    [
        "{model: demo, stages: [{prune: {metod: wanda}}]}",
        "{model: demo, stages: [{prune: [{method: wanda}, {metod: x}]}]}",
        "{model: demo, stages: [{prune: {samples: many}}]}",
        "{model: demo, stages: [{prune: {methods: []}}]}",
        "{model: demo, stages: [{prune: {methods: wanda}}]}",
        "{model: demo, stages: [{prun: {method: wanda}}]}",
        "{model: demo, stages: [{prune: {method: wanda}, eval: {}}]}",
        "{model: demo, stages: [prun]}",
        "{model: demo, stages: [{pack: {format: dense}}]}",
        "{model: demo, stages: []}",
        "{model: demo, seed: -1, stages: [pack]}",
        "{model: demo, version: 2, stages: [pack]}",
        "{stages: [pack]}",
    ],
)
def test_what_is_wrong_is_so_by_the_schema_as_by_us(text):
    assert not fits(read_yaml(text), schema())
    with pytest.raises(SparsekitError):
        parse(text)


@pytest.mark.parametrize("name", ["ast", "cast"])
def test_recipes_of_papers_have_the_share_of_the_specification(name):
    """Published for LLaMA: a third of the loss is KL (section 1.4), as is ours for such models."""
    [step] = [s for s in read_recipe(shipped()[f"{name}-paper"]).steps if s.verb == "recover"]
    own = methods.load("recoverers", name, {}).default_kl_weight(Scale(parameters=7_000_000_000))
    assert step.config.kl_weight == pytest.approx(1 / 3, abs=1e-3) == pytest.approx(own, abs=1e-3)


def test_quickstart_prunes_three_ways_and_scores_each_beside_the_dense_model():
    """Small enough for two cores in a few minutes; the two parts of `builtin` do not overlap."""
    steps = read_recipe(shipped()["quickstart"]).steps
    made = [step.config for step in steps if step.verb == "prune"]
    assert [config.method for config in made] == ["magnitude", "wanda", "sparsegpt"]
    assert {str(config.pattern) for config in made} == {"2:4"}
    rows = Calibration(source="builtin", samples=16, length=512)
    assert [config.rows for config in made] == [None, rows, rows]
    measured = [step for step in steps if step.verb == "eval"]
    assert [step.parent for step in measured] == [config.method for config in made]
    for step in measured:
        wanted = EvalConfig(text="builtin", length=512, limit=16)
        assert replace(step.config, tasks="", baseline=None) == wanted
        assert step.words["baseline"] == "demo"


def shrunken(name: str, model: Path, rows: Path) -> str:
    """A recipe for a tiny model: its rows, few steps, a grid that divides it."""
    told = read_yaml(shipped()[name].read_text().replace("int4-g64", "int4-g16"))
    told |= {"model": str(model)}
    for number, stage in enumerate(told["stages"]):
        told["stages"][number] = {stage: {}} if isinstance(stage, str) else stage
        for verb, words in told["stages"][number].items():
            for given in words if isinstance(words, list) else [words]:
                shrink(verb, given, str(rows))
    return write_yaml(told)


def shrink(verb: str, given: dict, rows: str) -> None:
    """Leave of the words of a stage what is quick."""
    if verb == "eval":
        given |= {"text": rows, "length": 16, "limit": 2}
    elif verb == "recover":
        given |= {
            "data": rows,
            "tokens": 128,
            "batch": 2,
            "length": 16,
            "accumulate": 1,
            "lr": 1e-3,
        }
        if given["method"] == "cast":  # settles in a few hundred steps, with a larger decay
            option = given.get("option", {}) | {"decay": 1e-2}
            given |= {"tokens": 9600, "lr": 4e-3, "option": option}
    elif "samples" in given:  # else it reads none
        given |= {"samples": 4, "length": 16, "calibration": rows}
        given.pop("budget", None)
        if given.get("method") == "armor":
            given["option"] = {"sweeps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_tiny_model(family, row_file, tmp_path, name):
    recipe = parse(shrunken(name, family("llama"), row_file))
    done = run(recipe, tmp_path / "run")
    assert [one.state for one in done] == ["made"] * len(recipe.steps)
    made = [one for one in done if one.step.verb != "eval"]
    for one in made:
        assert Checkpoint.open(one.folder).provenance().history[-1].stage == one.step.verb
        verify(str(one.folder))
        if one.step.verb == "recover":
            used = Checkpoint.open(one.folder).provenance().history[-1].settings.options
            asked = dict(one.step.words["option"])
            assert used.items() >= asked.items()
            assert set(asked) >= OPTIONS.get(name, set())
    measured = [one for one in done if one.step.verb == "eval"]
    assert measured
    for one in measured:
        entries = read_scores(one.folder)
        assert all(entry.perplexity.windows == 2 for entry in entries)
        assert all("log_perplexity" in entry.difference for entry in entries)
    (dense,) = read_scores(tmp_path / "run" / "dense")
    assert dense.difference == {}


def test_a_recipe_says_each_trap_of_yaml_as_it_is_meant():
    told = read_yaml("{a: 2:4, b: 50%, c: 1e-4, d: 12, e: no, f: 1.5, g: .5, h: 1:30, i: 5m}")
    assert told == {
        **{"a": "2:4", "b": "50%", "c": 1e-4, "d": 12, "e": "no", "f": 1.5, "g": 0.5},
        **{"h": "1:30", "i": "5m"},
    }
    with refused("invalid-yaml", "line 2", '"a"', kind=UsageError):
        read_yaml("a: 1\na: 2")


def hollow(folder: Path) -> Path:
    """A checkpoint with the shapes of LLaMA-2-7B, whose weights take no room on the disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    config = LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        tensors = LlamaForCausalLM(config).state_dict()
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def test_the_recipe_for_7b_fits_into_the_memory_that_it_names(tmp_path, monkeypatch):
    """24 GB, by the estimate that `test_real_forecast.py` compares with real runs; libraries and
    what else runs there come on top.
    """
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    recipe = read_recipe(shipped()["llama-7b-2x4"])
    model = hollow(tmp_path / "model")
    steps = [step for step in recipe.steps if step.verb == "prune"]
    assert [step.config.method for step in steps] == ["sparsegpt", "armor"]
    rows = tmp_path / "rows.safetensors"
    save_file({"tokens": torch.zeros(128, 2048, dtype=torch.int32)}, rows)
    for step in steps:
        config = replace(step.config, calibration=str(rows))
        found = plan(config, str(model), tmp_path / "out")
        assert found["bytes_to_write"] > 13e9
        assert 5e9 < found["peak_memory_estimate_bytes"] < 20e9
