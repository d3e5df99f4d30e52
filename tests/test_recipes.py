"""Every recipe that is shipped: well-formed, what it says, and run in shrunken form."""

from pathlib import Path

import pytest
import yaml

from sparsekit.errors import UsageError
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.stages.inspect import verify
from sparsekit.stages.recipe import parse, read_recipe
from sparsekit.stages.recipeform import VERBS, read_yaml, schema
from sparsekit.stages.run import run
from sparsekit.stages.scores import read_scores
from sparsekit.stages.shipped import shipped

NAMES = sorted(shipped())
WANTED = {
    *("quickstart", "magnitude", "wanda", "ria", "nowag", "sparsegpt", "alps", "fixed", "quantize"),
    *("wanda-dsnot-60", "sparsegpt-ast", "sparsegpt-cast-int4", "armor-2x4"),
    *("compare-oneshot-2x4", "llama-7b-2x4", "ast-paper", "cast-paper"),
}


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


@pytest.mark.parametrize("name", NAMES)
def test_it_has_only_words_of_the_schema(name):
    """The schema is what editors go by; the words are checked against it by hand."""
    told = read_yaml(shipped()[name].read_text())
    known = {}
    for one in schema()["properties"]["stages"]["items"]["anyOf"]:
        if "properties" in one:
            verb = next(key for key in one["properties"] if key in VERBS)
            known[verb] = one["properties"][verb]["anyOf"][0]["properties"]
    for stage in told["stages"]:
        for verb, words in ({stage: {}} if isinstance(stage, str) else stage).items():
            for given in words if isinstance(words, list) else [words or {}]:
                assert set(given) <= set(known[verb])


def shrunken(name: str, model: Path, rows: Path) -> str:
    """A recipe for a tiny model: its rows, few steps, a grid that divides it."""
    told = read_yaml(shipped()[name].read_text().replace("int4-g64", "int4-g16"))
    told |= {"model": str(model)}
    for number, stage in enumerate(told["stages"]):
        told["stages"][number] = {stage: {}} if isinstance(stage, str) else stage
        for verb, words in told["stages"][number].items():
            for given in words if isinstance(words, list) else [words]:
                shrink(verb, given, str(rows))
    return yaml.safe_dump(told)


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
        given.pop("option", None)
        if given["method"] == "cast":  # settles in a few hundred steps
            given |= {"tokens": 9600, "lr": 4e-3, "option": {"decay": 1e-2}}
    elif "samples" in given:  # else it reads none
        given |= {"samples": 4, "length": 16, "calibration": rows}
        given.pop("budget", None)
        if given.get("method") == "armor":
            given["option"] = {"sweeps": 1}


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_on_a_tiny_model(family, row_file, tmp_path, name):
    recipe = parse(shrunken(name, family("llama"), row_file))
    done = run(recipe, tmp_path / "run")
    assert [one.state for one in done] == ["made"] * len(recipe.steps)
    made = [one for one in done if one.step.verb != "eval"]
    for one in made:
        assert Checkpoint.open(one.folder).provenance()["history"][-1]["stage"] == one.step.verb
        verify(str(one.folder))
    measured = [one for one in done if one.step.verb == "eval"]
    assert measured
    for one in measured:
        entries = read_scores(one.folder)
        assert all(entry["perplexity"]["windows"] == 2 for entry in entries)
        assert all("log_perplexity" in entry["difference"] for entry in entries)
    (dense,) = read_scores(tmp_path / "run" / "dense")
    assert dense["difference"] == {}


def test_a_recipe_says_each_trap_of_yaml_as_it_is_meant():
    told = read_yaml("{a: 2:4, b: 50%, c: 1e-4, d: 12, e: 0x1f, f: 1.5, g: .5, h: 1:30, i: 5m}")
    assert told == {
        **{"a": "2:4", "b": "50%", "c": 1e-4, "d": 12, "e": "0x1f", "f": 1.5, "g": 0.5},
        **{"h": "1:30", "i": "5m"},
    }
    with pytest.raises(UsageError, match="line 2: 'a' is there twice"):
        read_yaml("a: 1\na: 2")
