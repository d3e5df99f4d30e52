"""The commands `compare` and `report`: streams and exit codes."""

import csv
import io
import json

import pytest
from scorings import checkpoint, pruned_entry, run_directory, score, scored, windows


@pytest.fixture
def run(tmp_path):
    return run_directory(tmp_path / "run")


def test_compare_writes_paths_to_stdout_and_the_table_to_stderr(cli, run):
    found = cli("compare", run)
    assert found.code == 0
    names = ("wanda", "wanda.ast", "wanda.ast.int4")
    assert found.stdout == "".join(f"{run / name}\n" for name in names)
    told = " ".join(found.stderr.split())
    for text in ("4 models", "148.41", "perplexity: wikitext2", "*: no other model", "4.25"):
        assert text in told
    assert cli("compare", run, "-q").stderr == ""


def test_paths_of_compare_are_models_for_the_next_command(cli, run, tmp_path):
    paths = cli("compare", run, "-q").stdout
    found = cli("report", "-", "-o", tmp_path / "r.html", stdin=paths)
    assert (found.code, found.stdout) == (0, f"{tmp_path / 'r.html'}\n")
    assert "wanda.ast.int4" in (tmp_path / "r.html").read_text()
    empty = cli("compare", "-", stdin="\n")
    assert (empty.code, empty.stdout) == (2, "")


def test_compare_as_json_csv_and_markdown_tells_the_same(cli, run):
    told = json.loads(cli("compare", run, "--json", "-q").stdout)
    rows = list(csv.DictReader(io.StringIO(cli("compare", run, "--csv", "-q").stdout)))
    lines = cli("compare", run, "--markdown", "-q").stdout.splitlines()
    names = [model["name"] for model in told["models"]]
    assert [row["model"] for row in rows] == names
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:6]] == names
    logs = [model["perplexity"][0]["log_perplexity"] for model in told["models"]]
    assert [float(row["log_perplexity"]) for row in rows] == logs == [3.0, 5.0, 4.0, 4.2]
    means = [model["zero_shot"][0]["value"] for model in told["models"]]
    assert means == pytest.approx([0.7, 0.5, 0.6, 0.55])  # the tasks are 0.2 apart


def test_cells_and_titles_of_the_table_stay_in_one_piece(cli, tmp_path):
    paired = {"log_perplexity": {"value": 1.2, "stderr": 0.01, "n": 16}}
    for name in ("first", "second"):
        entry = score(windows(3.0), difference=paired, baseline="org/w[b]")
        scored(checkpoint(tmp_path / "run" / name, pruned_entry()), entry)
    found = cli("compare", tmp_path / "run")
    assert found.code == 0
    assert found.stderr.count("+1.2000 ± 0.0100") == 2
    for words in ("log difference", "to w[b]", "perplexity", "pattern"):
        assert words in found.stderr


def test_one_form_at_a_time(cli, run):
    found = cli("compare", run, "--csv", "--json")
    assert (found.code, found.stdout) == (2, "")
    assert "one of --json, --csv and --markdown" in found.stderr


def test_notes_of_what_does_not_compare_come_with_the_table(cli, tmp_path):
    for name, length in (("a", 512), ("b", 1024)):
        entry = score(windows(3.0, length=length))
        scored(checkpoint(tmp_path / "run" / name, pruned_entry()), entry)
    found = cli("compare", tmp_path / "run")
    assert found.code == 0
    assert "note: perplexity was not measured on the same data for all models" in found.stderr
    for text in ("perplexity (1)", "perplexity (2): wikitext2, 16 × 1024 tokens"):
        assert text in " ".join(found.stderr.split())
    page = cli("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert "note: perplexity was not measured on the same data for all models" in page.stderr


@pytest.mark.parametrize("verb", ["compare", "report"])
def test_what_cannot_be_read_is_one_line_that_names_it(cli, run, tmp_path, verb, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    found = cli(verb, run, tmp_path / "empty")
    assert (found.code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"{verb}: error: {tmp_path / 'empty'} is ")
    (run / "wanda/sparsekit-scores.json").write_text("{")
    found = cli(verb, run)
    assert (found.code, found.stdout) == (2, "")
    assert f"{run / 'wanda/sparsekit-scores.json'} is not valid JSON" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_report_of_a_real_checkpoint_tells_its_path(cli, pruned, tmp_path):
    found = cli("report", pruned, "-o", tmp_path / "r.html", "--json")
    assert found.code == 0
    told = json.loads(found.stdout)
    assert told["out"] == str(tmp_path / "r.html")
    assert told["models"][0]["method"] == "wanda"
    assert "Output error of pruning" in (tmp_path / "r.html").read_text()
