"""A checkpoint is repeated from its own history: the same bytes come out."""

import json
import shutil
from pathlib import Path

import pytest
from refusals import refused

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.study.recipe import read_recipe


@pytest.fixture
def made(cli, family, row_file, tmp_path):
    """Makes a chain of stages on the command line; gives the folder of the last."""
    rows = ("--calibration", row_file)
    words = {
        "prune": (*("--method", "sparsegpt", *rows, "-O", "damping=0.02"), "--skip", "layers.0"),
        "recover": ("--data", row_file, "--tokens", "192", "--batch", "2", "--length", "16"),
        "quantize": ("--grid", "int4-g16", "--method", "gptq", *rows),
        "refine": (
            *("--refine", "dsnot", "--dense", family("llama"), *rows),
            *("--no-propagate", "--skip", "layers.0"),
        ),
        "pack": (),
        "unpack": (),
    }

    def make(*stages: str) -> Path:
        model = family("llama")
        for stage in stages:
            out = tmp_path / "first" / stage
            out.parent.mkdir(exist_ok=True)
            verb = "prune" if stage == "refine" else stage
            ran = cli(verb, model, "-o", out, *words[stage])
            assert ran.code == 0, ran.stderr
            model = out
        return model

    return make


CHAINS = ["prune", "recover", "quantize", "prune recover quantize", "prune refine", "prune pack"]


@pytest.mark.parametrize("chain", CHAINS)
def test_a_history_run_as_a_recipe_writes_the_same_bytes(cli, made, tmp_path, chain):
    stages = chain.split()
    if stages == ["recover"]:  # of a model without a history
        sparse = made("prune")
        (sparse / "sparsekit.json").unlink()
    folder = made(*stages)
    history = json.loads((folder / "sparsekit.json").read_text())["history"]
    shutil.copy(folder / "sparsekit.json", tmp_path / "kept.json")
    for stage in stages[:-1]:  # nothing of the first run is needed
        shutil.rmtree(tmp_path / "first" / stage)
    ran = cli("run", tmp_path / "kept.json", "-o", tmp_path / "again")
    assert ran.code == 0, ran.stderr
    steps = read_recipe(tmp_path / "kept.json").steps
    assert [step.verb for step in steps] == ["prune" if s == "refine" else s for s in stages]
    again = tmp_path / "again" / steps[-1].name
    assert Checkpoint.open(again).fingerprint == Checkpoint.open(folder).fingerprint
    told = json.loads((again / "sparsekit.json").read_text())["history"]
    assert told[-1]["words"] == history[-1]["words"]


def test_python_repeats_a_checkpoint_too(made, tmp_path):
    folder = made("prune")
    [done] = sparsekit.run(folder / "sparsekit.json", tmp_path / "again")
    assert Checkpoint.open(done.folder).fingerprint == Checkpoint.open(folder).fingerprint


def test_a_card_has_the_command_with_names_in_place_of_this_machines_folders(made, row_file):
    card = (made("prune") / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("sparsekit prune"))
    assert line.startswith("sparsekit prune llama -o OUT ")
    for words in ("--method sparsegpt", f"--calibration {row_file.name}", "--skip layers.0"):
        assert words in line
    assert str(row_file.parent) not in card


def test_a_stage_that_recipes_do_not_have_is_named(made):
    with refused("not-repeatable", "unpack"):
        read_recipe(made("prune", "pack", "unpack") / "sparsekit.json")


def test_a_history_without_stages_is_refused(tmp_path):
    (tmp_path / "sparsekit.json").write_text('{"format": 1, "history": []}')
    with refused("no-history"):
        read_recipe(tmp_path / "sparsekit.json")
