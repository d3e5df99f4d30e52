"""The verbs from Python do what the commands do."""

import importlib.resources
import inspect
import json
import shutil

import pytest
from refusals import refused

import sparsekit
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import UsageError
from sparsekit.pruning.config import PruneConfig
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.recovery.config import RecoverConfig
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.saved_scores import SCORES

CONFIGS = {
    "prune": PruneConfig,
    "recover": RecoverConfig,
    "quantize": QuantizeConfig,
    "evaluate": EvalConfig,
}
SHORT = {"tokens": 96, "batch": 2, "length": 16, "lr": 1e-3}


def prints(*folders):
    return [Checkpoint.open(folder).scan() for folder in folders]


@pytest.mark.parametrize("verb", CONFIGS)
def test_the_keywords_are_the_options_with_types_and_defaults(verb):
    function, config = getattr(sparsekit, verb), CONFIGS[verb]
    keywords = inspect.signature(function).parameters
    for name, field in config.model_fields.items():
        assert keywords[name].default == field.default
        assert keywords[name].annotation is not inspect.Parameter.empty
        assert keywords[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{name}: " in function.__doc__
    assert keywords["progress"].default is not None


def test_each_verb_gives_the_bytes_of_its_command(cli, family, row_file, tmp_path):
    model = family("llama")
    rows = ("--calibration", row_file, "--samples", "4", "--length", "16")
    trained = [word for key, value in SHORT.items() for word in (f"--{key}", str(value))]
    command = [
        cli("prune", model, "-o", tmp_path / "a1", "--method", "ria", *rows),
        cli("recover", tmp_path / "a1", "-o", tmp_path / "b1", "--data", row_file, *trained),
        cli("quantize", tmp_path / "a1", "-o", tmp_path / "c1", "--grid", "int4-g16", *rows),
    ]
    assert [one.code for one in command] == [0, 0, 0]
    read = {"calibration": str(row_file), "samples": 4, "length": 16}
    first = sparsekit.prune(model, tmp_path / "a2", method="ria", **read)
    assert first.out == tmp_path / "a2"
    sparsekit.recover(first.out, tmp_path / "b2", data=str(row_file), **SHORT)
    sparsekit.quantize(first.out, tmp_path / "c2", grid="int4-g16", **read)
    for name in "abc":
        ours, theirs = prints(tmp_path / f"{name}1", tmp_path / f"{name}2")
        assert ours == theirs, name


def test_evaluate_gives_the_figures_of_the_command(cli, family, pruned, row_file):
    found = cli("eval", pruned, "--text", row_file, "--baseline", family("llama"), "--json")
    scores = sparsekit.evaluate(pruned, baseline=family("llama"), text=str(row_file))
    ours = [score.to_json()["perplexity"] for score in scores]
    assert ours == [one["perplexity"] for one in json.loads(found.stdout)["models"]]


def test_evaluate_saves_the_scores_that_the_command_saves(cli, family, pruned, row_file, tmp_path):
    model, rows = shutil.copytree(pruned, tmp_path / "model"), str(row_file)
    words = ("eval", model, "--text", rows, "--baseline", family("llama"))
    assert cli(*words).code == 0
    sparsekit.evaluate(model, baseline=family("llama"), text=rows)
    assert not (model / SCORES).exists()
    assert cli(*words, "--save").code == 0
    theirs = (model / SCORES).read_bytes()
    (model / SCORES).unlink()
    sparsekit.evaluate(model, baseline=family("llama"), text=rows, save=True)
    assert (model / SCORES).read_bytes() == theirs
    with refused("not-by-sparsekit", str(family("llama")), kind=UsageError):
        sparsekit.evaluate([model, family("llama")], text=rows, save=True)


def test_run_takes_a_file_or_what_one_would_hold(cli, family, row_file, tmp_path):
    told = {
        "model": str(family("llama")),
        "stages": [{"prune": {"pattern": "2:4", "calibration": str(row_file)}}, "pack"],
    }
    (tmp_path / "r.yaml").write_text(
        f"model: {told['model']}\nstages:\n- prune: {{pattern: 2:4, calibration: {row_file}}}\n"
        "- pack\n"
    )
    sparsekit.run(told, tmp_path / "one")
    sparsekit.run(tmp_path / "r.yaml", tmp_path / "two")
    assert cli("run", tmp_path / "r.yaml", "-o", tmp_path / "three").code == 0
    found = [
        prints(tmp_path / run / "wanda", tmp_path / run / "wanda.pack")
        for run in ("one", "two", "three")
    ]
    assert found[0] == found[1] == found[2]


def test_a_dry_run_tells_the_time_where_it_is_asked_to(family, row_file, tmp_path):
    told = {
        "model": str(family("llama")),
        "stages": [{"prune": {"calibration": str(row_file)}}],
    }
    (plain,) = sparsekit.run(told, tmp_path / "out", dry=True)
    (timed,) = sparsekit.run(told, tmp_path / "out", dry=True, timed=True)
    assert plain.plan["seconds_estimate"] is None
    assert timed.plan["seconds_estimate"] > 0
    with refused("no-effect", "timed", "dry", kind=UsageError):
        sparsekit.run(told, tmp_path / "out", timed=True)
    assert not (tmp_path / "out").exists()


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("sparsekit").joinpath("py.typed").is_file()


def test_a_wrong_word_is_an_error_with_its_reason(family, tmp_path):
    with refused("no-method", "'wnada'", kind=UsageError):
        sparsekit.prune(family("llama"), tmp_path / "out", method="wnada")
    for wrong in (UsageError, TypeError):
        with refused("no-option", "metod", kind=wrong) as error:
            sparsekit.prune(family("llama"), tmp_path / "out", metod="wanda")
        assert error.value.hint == "did you mean 'method'?"
    with refused("no-option", "sparsity", "pattern 50%", kind=UsageError):
        sparsekit.prune(family("llama"), tmp_path / "out", sparsity=0.5)
    with refused("wrong-type", "samples", "8", kind=UsageError):
        sparsekit.prune(family("llama"), tmp_path / "out", samples="8")
    with refused("no-effect", "rank ", "compensate lowrank", kind=UsageError):
        sparsekit.prune(family("llama"), tmp_path / "out", rank="5%")
    with refused("output-exists", " overwrite", kind=UsageError):
        sparsekit.prune(family("llama"), tmp_path, pattern="2:4", method="magnitude")


def test_every_public_name_is_there_and_documented():
    assert set(dir(sparsekit)) == {*sparsekit.__all__, "__version__"}
    for name in sparsekit.__all__:
        assert getattr(sparsekit, name).__doc__
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = sparsekit.nothing
