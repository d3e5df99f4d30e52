"""The commands of recipes: streams and exit codes."""

import json
import subprocess
import sys

import pytest

from sparsekit.study.schema import read_yaml

TEXT = """
model: {model}
stages:
- prune: {{methods: [wanda, ria], calibration: {rows}, samples: 4, length: 16}}
- eval: {{text: {rows}}}
- pack
"""
NAMES = ("dense", "wanda", "ria", "nowag")


@pytest.fixture
def recipe(family, row_file, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(TEXT.format(model=family("llama"), rows=row_file))
    return file


def test_run_gives_the_last_models_and_keeps_what_is_finished(cli, recipe, tmp_path):
    found = cli("run", recipe, "-o", tmp_path / "out")
    assert found.code == 0
    last = [str(tmp_path / "out" / f"{name}.pack") for name in ("wanda", "ria")]
    assert found.stdout.splitlines() == last
    assert "wanda.pack: made" in found.stderr
    assert "perplexity" in found.stderr
    again = cli("run", recipe, "-o", tmp_path / "out", "--json")
    told = json.loads(again.stdout)
    assert [step["state"] for step in told["steps"]] == ["kept"] * 6
    assert told["out"] == str(tmp_path / "out")


def test_words_are_replaced_on_the_command_line(cli, recipe, tmp_path):
    found = cli("run", recipe, "prune.method=nowag", "-o", tmp_path / "out", "-q")
    assert found.stdout == f"{tmp_path / 'out' / 'nowag.pack'}\n"
    assert found.stderr == ""


def test_the_closing_table_has_the_models_of_this_recipe_only(cli, recipe, tmp_path):
    text = recipe.read_text().replace("eval: {", "eval: {baseline: model, ").replace("- pack\n", "")
    recipe.write_text(text)
    first = cli("run", recipe, "-o", tmp_path / "out").stderr
    assert "3 models" in first
    recipe.write_text(text.replace("[wanda, ria]", "[wanda, nowag]"))
    second = cli("run", recipe, "-o", tmp_path / "out")
    assert second.code == 0
    assert (tmp_path / "out" / "ria").is_dir()
    assert "3 models" in second.stderr
    lines = [line.split() for line in second.stderr.partition("3 models")[2].splitlines()]
    assert [line[0] for line in lines if line and line[0] in NAMES][:3] == [
        "dense",
        "nowag",
        "wanda",
    ]
    assert not any(line and line[0] == "ria" for line in lines)


def test_a_dry_run_writes_nothing(cli, recipe, tmp_path):
    found = cli("run", recipe, "-o", tmp_path / "out", "--dry-run")
    assert (found.code, found.stdout) == (0, "")
    assert found.stderr.count("to do") == 6
    assert "to write" in found.stderr
    assert "these 2 together" in found.stderr
    told = json.loads(cli("run", recipe, "-o", tmp_path / "out", "--dry-run", "--json").stdout)
    makers = [step for step in told["steps"] if step["verb"] != "eval"]
    plans = {step["name"]: step.get("plan") for step in makers}
    assert set(plans) == {"wanda", "ria", "wanda.pack", "ria.pack"}
    # Of what is packed no plan can be told before it is there.
    assert plans["wanda.pack"] is None
    assert plans["wanda"]["bytes_to_write"] > 0
    assert plans["wanda"]["seconds_estimate"] is None
    timed = cli("run", recipe, "-o", tmp_path / "out", "--dry-run", "--time", "--json", "-q")
    steps = json.loads(timed.stdout)["steps"]
    assert all(step["plan"]["seconds_estimate"] > 0 for step in steps if "plan" in step)
    assert not (tmp_path / "out").exists()
    alone = cli("run", recipe, "-o", tmp_path / "out", "--time")
    assert (alone.code, alone.stdout) == (2, "")


def test_a_dry_run_of_a_study_that_is_begun_shows_what_is_left(cli, recipe, tmp_path):
    text, out = recipe.read_text(), tmp_path / "out"
    recipe.write_text(text.partition("- eval")[0])
    assert cli("run", recipe, "prune.method=wanda", "-o", out, "-q").code == 0
    recipe.write_text(text)
    found = cli("run", recipe, "-o", out, "--dry-run", "--time")
    assert found.code == 0, found.stderr
    lines = {line.split()[0]: line for line in found.stderr.splitlines() if "GB" in line}
    assert "these" in lines
    assert lines["ria"].count("GB") == lines["wanda.pack"].count("GB") == 2
    assert lines["wanda.pack"].split()[2:4] == ["to", "do"]
    assert "and more" in lines["these"]  # no time is told of packing
    assert "ria.pack" not in lines


def test_without_out_the_folder_has_the_recipes_name(cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli("run", recipe, "-q").code == 0
    assert (tmp_path / "small" / "wanda").is_dir()


def test_all_errors_of_a_recipe_are_shown(cli, recipe):
    recipe.write_text(recipe.read_text().replace("methods", "metods").replace("text", "txt"))
    found = cli("run", recipe)
    assert (found.code, found.stdout) == (2, "")
    assert "small.yaml: 2 errors:" in found.stderr
    assert "stages[0].prune.metods: unknown; did you mean 'method'?" in found.stderr
    assert "stages[1].eval.txt: unknown; did you mean 'text'?" in found.stderr
    checked = cli("recipe", "validate", recipe).stderr
    assert checked == found.stderr.replace("run: ", "recipe validate: ", 1)


@pytest.mark.parametrize(
    ("word", "told"),
    [("quickstrt", "did you mean 'quickstart'"), ("none.yaml", "no such recipe: none.yaml")],
)
def test_a_recipe_that_is_not_there_is_one_line(cli, word, told):
    found = cli("run", word)
    assert found.code == 2
    assert told in found.stderr
    assert found.stderr.count("\n") == 1


def test_recipes_are_listed_shown_copied_and_valid(cli, tmp_path):
    listed = cli("recipe", "ls")
    names = [line.split("\t")[0] for line in listed.stdout.splitlines()]
    assert "quickstart" in names
    assert json.loads(cli("recipe", "ls", "--json").stdout)["recipes"].keys() == set(names)
    shown = cli("recipe", "show", "quickstart").stdout
    copied = cli("recipe", "cp", "quickstart", tmp_path)
    assert copied.stdout == f"{tmp_path / 'quickstart.yaml'}\n"
    assert (tmp_path / "quickstart.yaml").read_text() == shown
    again = cli("recipe", "cp", "quickstart", tmp_path / "quickstart.yaml")
    assert (again.code, again.stdout) == (2, "")
    assert "exists" in again.stderr
    valid = cli("recipe", "validate", *names)
    assert valid.code == 0
    assert len(valid.stdout.splitlines()) == len(names)
    assert json.loads(cli("recipe", "show", "quickstart", "--json").stdout)["model"] == "demo"


def test_the_schema_is_json_with_every_verb(cli):
    told = json.loads(cli("recipe", "schema").stdout)
    text = json.dumps(told["properties"]["stages"])
    assert all(f'"{verb}"' in text for verb in ("prune", "recover", "quantize", "pack", "eval"))
    assert read_yaml(json.dumps(told)) == told


def test_checking_a_recipe_needs_no_torch():
    code = (
        "import sys; from sparsekit.cli.app import app\n"
        "app(['recipe', 'validate', 'quickstart'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
