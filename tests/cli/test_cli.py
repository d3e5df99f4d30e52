"""Every command as a user meets it: exit codes, the one result on stdout, tables on stderr."""

import contextlib
import io
import json
import math
import os
import pty
import re
import shutil
from pathlib import Path

import pytest
import torch
import typer
from refusals import assert_refused
from rich.console import Console
from safetensors.torch import load_file, save_file
from verbs import commands

from sparsekit import registry as methods
from sparsekit.cli.console import Terminal
from sparsekit.files import sha256_file
from sparsekit.pruning.config import PruneConfig
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.recovery.config import RecoverConfig
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.saved_scores import read_scores

WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: [" yes", " no, never"]
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.5}}
"""


def strict_json(text: str):
    """The one JSON value in a text; NaN and Infinity are not JSON."""
    assert text.count("\n") == 1
    assert text.endswith("\n")

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_one_line_error(result, code: int, *named: object) -> None:
    """A command ended with one line of error that names each of these values."""
    assert result.code == code, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"[a-z]+( [a-z]+)?: error: [^\n]+\n", result.stderr), result.stderr
    for value in named:
        assert str(value) in result.stderr, f"{value!r} is not in: {result.stderr}"


def edit(folder: Path, change, file: str = WEIGHTS) -> Path:
    """Change the tensors of a folder; without a history, so that the change itself is found."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / "sparsekit.json").unlink(missing_ok=True)
    return folder


# prune


def test_prune_writes_the_path_to_stdout_and_the_table_to_stderr(cli, family, row_file, tmp_path):
    found = cli("prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file)
    assert found.code == 0
    assert found.stdout == f"{tmp_path / 'out'}\n"
    assert "wanda 2:4" in found.stderr
    for word in ("output error", "q_proj", "down_proj", "50.00%"):
        assert word in found.stderr
    assert "wanda 2:4: 2/2 model.layers.1" in found.stderr  # progress as plain lines


@pytest.mark.slow
def test_on_a_terminal_progress_is_a_bar_and_stdout_stays_clean(start, family, row_file, tmp_path):
    terminal, slave = pty.openpty()
    arguments = ("prune", family("llama_deep"), "-o", tmp_path / "out", "--calibration", row_file)
    process = start(*arguments, stderr=slave)
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # a terminal without writers
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    os.close(terminal)
    stdout, _ = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (0, f"{tmp_path / 'out'}\n")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "\x1b[" in shown.decode()  # drawn, not lines
    assert re.search(r"wanda 2:4 .*0/6 .*\d+ MB peak", text)
    assert "output error" in text  # the table comes after it


def test_square_brackets_are_shown_as_they_are(cli, family, row_file, tmp_path):
    model = tmp_path / "w[/b]"
    shutil.copytree(family("llama"), model)
    found = cli("eval", model, "--text", row_file)
    assert (found.code, found.stdout) == (0, f"{model}\n")
    assert "w[/b]" in found.stderr
    found = cli(
        "prune", model, "-o", tmp_path / "o", "--method", "magnitude",
        "--skip", "[qk]_proj", "--dry-run",
    )  # fmt: skip
    assert "--skip [qk]_proj" in found.stderr


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried …")]
)
def test_memory_that_runs_out_is_told_with_a_way_out(capsys, error):
    with pytest.raises(typer.Exit) as caught, Terminal().working():
        raise error
    assert caught.value.exit_code == 1
    assert re.fullmatch(r"error: out of memory; fewer --samples [^\n]+\n", capsys.readouterr().err)


def test_columns_of_numbers_are_right_aligned_and_names_that_begin_with_a_digit_are_not():
    shown, terminal = io.StringIO(), Terminal()
    terminal.stderr = Console(file=shown, width=120)
    rows = [
        ("7b-pruned", "2:4", "1,234.5", "+0.1355 ± 0.0795", "50.00%", "12 s", "1e-05", "-"),
        ("70b", "16", "8", None, "5%", "1 s", "1", "0.25"),
    ]
    terminal.table("title", ("model", "ab", "cd", "ef", "gh", "ij", "kl", "mn"), rows)
    assert [line.rstrip() for line in shown.getvalue().splitlines()[1:]] == [
        "model       ab       cd                ef      gh    ij     kl    mn",
        "7b-pruned  2:4  1,234.5  +0.1355 ± 0.0795  50.00%  12 s  1e-05     -",
        "70b         16        8                        5%   1 s      1  0.25",
    ]


def test_prune_as_json_writes_the_report_and_nothing_else(cli, family, row_file, tmp_path):
    found = cli(
        "prune", family("llama"), "-o", tmp_path / "out", "--method", "sparsegpt",
        "-O", "block=64", "--option", "damping=0.05", "--pattern", "4:8", "--skip", "o_proj",
        "--calibration", row_file, "--samples", 3, "--length", 20, "--no-propagate",
        "--dtype", "bfloat16", "--device", "cpu", "--reconstruct", "cg", "--json",
    )  # fmt: skip
    report = strict_json(found.stdout)
    assert report["out"] == str(tmp_path / "out")
    assert report["settings"]["options"] == {"block": "64", "damping": "0.05"}
    assert report["settings"]["pattern"] == "4:8"
    assert report["settings"]["skip"] == ["o_proj"]
    assert report["settings"]["propagate"] is False
    assert report["settings"]["dtype"] == "bfloat16"
    assert report["settings"]["reconstruct"] == "cg"
    assert (report["calibration"]["samples"], report["calibration"]["length"]) == (3, 20)
    assert report["totals"]["weights"] == 12
    history = json.loads((tmp_path / "out" / "sparsekit.json").read_text())["history"]
    assert history == [
        {key: value for key, value in report.items() if key not in ("schema", "out")}
    ]


def test_quiet_leaves_stderr_empty(cli, family, pruned, row_file, tmp_path):
    for command in (
        ("prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file),
        ("eval", pruned, "--text", row_file),
        ("inspect", pruned),
        ("verify", pruned),
    ):
        found = cli(*command, "--quiet")
        assert (found.code, found.stderr) == (0, "")
        assert found.stdout.count("\n") == 1


def test_dry_run_shows_the_plan_and_writes_nothing(cli, family, row_file, tmp_path):
    command = ("prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file)
    found = cli(*command, "--dry-run")
    assert (found.code, found.stdout) == (0, "")  # there is no output that it could name
    assert "nothing was written" in found.stderr
    for word in ("to write", "peak memory", "14 in 2 blocks", "float32 on cpu", "lm_head"):
        assert word in found.stderr
    plan = strict_json(cli(*command, "--dry-run", "--json").stdout)
    assert plan["weights"] == 14
    assert plan["zeros"] * 2 == plan["size"]
    assert plan["bytes_to_write"] == (family("llama") / WEIGHTS).stat().st_size
    assert list(tmp_path.iterdir()) == []


def test_existing_output_needs_overwrite_and_then_is_replaced(cli, family, row_file, tmp_path):
    command = ("prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file)
    assert cli(*command).code == 0
    first = sha256_file(tmp_path / "out" / WEIGHTS)
    assert_one_line_error(cli(*command), 2, tmp_path / "out", "--overwrite")
    assert cli(*command, "--pattern", "1:4", "--overwrite").code == 0
    assert sha256_file(tmp_path / "out" / WEIGHTS) != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_a_run_killed_at_its_end_left_is_removed(cli, family, pruned, copy_of):
    out = copy_of(pruned)
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    (out / ".sparsekit-state-7.saved").write_bytes(b"moments")
    (out / ".sparsekit-replaced").mkdir()
    (out / ".sparsekit-replaced" / WEIGHTS).write_bytes(b"the output before")
    assert_one_line_error(cli("prune", family("llama"), "-o", out), 2, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == kept


def test_source_or_a_file_as_output_is_refused_without_advice_to_lose_it(cli, copy_of, tmp_path):
    folder = copy_of("llama")
    found = cli("prune", folder, "-o", folder, "--overwrite")
    assert_one_line_error(found, 2, folder)
    found = cli("prune", folder, "-o", folder / WEIGHTS, "--overwrite")
    assert_one_line_error(found, 2, folder / WEIGHTS)


def test_folder_called_like_the_demo_model_can_be_written(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    monkeypatch.setattr(
        "sparsekit.pruning.prepare.resolve", lambda *_: pytest.fail("was not refused before")
    )
    assert_one_line_error(cli("prune", "demo", "-o", "demo"), 2, " demo ")


def test_output_that_is_not_sparsekits_is_never_overwritten(cli, family, row_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    command = ("prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file)
    assert_one_line_error(cli(*command, "--overwrite"), 2, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--method", "sparsgpt"], ["'sparsgpt'", "'sparsegpt'"]),
        (["--pattern", "2-4"], ["'2-4'", "N:M"]),
        (["--pattern", "5:4"], ["'5:4'"]),
        (["--pattern", "100%"], ["'100%'"]),
        (["--method", "alps", "-O", "dampin=1"], ["'dampin'", "'damping'"]),
        (["--method", "alps", "-O", "damping=x"], ["damping", "alps", "'x'"]),
        (["--method", "alps", "-O", "damping=-1"], ["damping", "-1"]),
        (["-O", "damping"], ["--option", "'damping'", "KEY=VALUE"]),
        (["--calibration", "bultin"], ["'bultin'", "'builtin'"]),
        (["--calibration", "no/such.txt"], ["no/such.txt"]),
        (["--reconstruct", "qr"], ["--reconstruct", "'qr'", "none, cg"]),
        (["--device", "tpu"], ["--device", "'tpu'", "auto, cpu, cuda"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
        (["--samples", "0"], ["samples", "0"]),
        (["--length", "1"], ["length", "1"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--skip", "o_prj"], ["--skip", "'o_prj'", "'o_proj'"]),
        (["--skip", "layer.0"], ["'layer.0'", "'layers.0'"]),
        (["--skip", "zzz"], ["'zzz'", "model.layers.0.self_attn"]),
        (["--method", "magnitude", "--samples", "4"], ["magnitude", "calibration"]),
        (["--method", "magnitude", "--length", "9"], ["magnitude", "calibration"]),
        (["--method", "magnitude", "--no-propagate"], ["magnitude", "calibration"]),
    ],
)
def test_wrong_option_of_prune_is_one_line_and_exit_2(cli, family, tmp_path, arguments, named):
    found = cli("prune", family("llama"), "-o", tmp_path / "out", *arguments)
    assert_one_line_error(found, 2, *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", ["t.txt", "empty"]),
        (b"caf\xe9 " * 1000, ["t.txt", "UTF-8"]),
        (b"too short", ["t.txt", 9, 24, "--length 8"]),
    ],
)
def test_unusable_calibration_text_is_one_line_and_exit_2(cli, family, tmp_path, content, named):
    (tmp_path / "t.txt").write_bytes(content)
    found = cli(
        "prune", family("llama"), "-o", tmp_path / "out",
        "--calibration", tmp_path / "t.txt", "--length", 24,
    )  # fmt: skip
    assert_one_line_error(found, 2, *named)
    assert not (tmp_path / "out").exists()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def only_bin(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])


def too_new(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"model_type": "llama"', '"model_type": "llama7"')
    )


def with_nan(folder: Path) -> None:
    edit(folder, lambda tensors: tensors[UP].view(-1)[0].fill_(math.nan))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (no_config, ["config.json"]),
        (no_weights, ["safetensors"]),
        (only_bin, ["pytorch_model.bin"]),
        (truncated, [WEIGHTS]),
        (too_new, ["'llama7'", "pip install -U transformers"]),
        (with_nan, [UP]),
    ],
)
@pytest.mark.parametrize("command", ["prune", "eval", "inspect", "verify"])
def test_broken_model_is_one_line_and_a_failing_exit_code(
    cli, copy_of, row_file, tmp_path, command, damage, named
):
    folder = copy_of("llama")
    damage(folder)
    more = {
        "prune": ["-o", tmp_path / "out", "--calibration", row_file],
        "eval": ["--text", row_file],
        "inspect": [],
        "verify": ["--pattern", "2:4"],
    }[command]
    found = cli(command, folder, *more)
    if damage is with_nan and command == "inspect":  # it counts zeros; `verify` is the check
        assert found.code == 0
        return
    # For `verify`, a weight that is not finite is an offender, not a file that cannot be read.
    assert_one_line_error(found, 1 if (command, damage) == ("verify", with_nan) else 2, *named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "a/b/c"])
def test_model_that_does_not_exist_is_one_line(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    found = cli("prune", name, "-o", "out")
    assert_one_line_error(found, 2, name)


def test_hub_id_without_a_connection_is_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    found = cli("prune", "org/no-such-model", "-o", "out")
    assert_one_line_error(found, 2, "org/no-such-model")


def test_debug_shows_the_traceback_of_an_error(cli, tmp_path):
    plain = cli("inspect", tmp_path / "nowhere")
    debug = cli("inspect", tmp_path / "nowhere", "--debug")
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert debug.stderr.endswith(plain.stderr)


def test_unforeseen_error_is_one_line_too(cli, copy_of):
    """A folder in place of a file is a surprise that nothing foresees."""
    folder = copy_of("llama")
    (folder / "config.json").rename(folder / "kept")
    (folder / "kept").unlink()
    (folder / "config.json").mkdir()
    found = cli("inspect", folder)
    assert found.code in (1, 2)
    assert re.fullmatch(r"[a-z]+: error: [^\n]+\n", found.stderr)


# stdin; pipelines of processes are in test_pipes.py


def test_dash_reads_the_model_from_stdin(cli, pruned, family, row_file, tmp_path):
    found = cli("verify", "-", stdin=f"{pruned}\n")
    assert (found.code, found.stdout) == (0, f"{pruned}\n")
    assert cli("inspect", "-", stdin=f"{pruned}\n").stdout == f"{pruned}\n"
    found = cli("eval", "-", "--text", row_file, stdin=f"\n{pruned}\n\n")
    assert (found.code, found.stdout) == (0, f"{pruned}\n")
    found = cli(
        "prune", "-", "-o", tmp_path / "out", "--method", "magnitude", stdin=f"{family('llama')}\n"
    )
    assert (found.code, found.stdout) == (0, f"{tmp_path / 'out'}\n")


# eval


def test_eval_of_several_models_is_one_table_in_the_order_asked(cli, family, pruned, row_file):
    dense = family("llama")
    found = cli("eval", pruned, dense, "--text", row_file)
    assert found.code == 0
    assert found.stdout == f"{pruned}\n{dense}\n"
    assert found.stderr.count("perplexity on ") == 1
    words = "".join(found.stderr.split())  # long paths are folded
    assert f"perplexityon{row_file}" in words
    assert "modelwindowstokenseachperplexity" in words
    assert re.search(r"524\d+\.\d{3}", words)  # five windows of 24 tokens, then the figure
    scores = strict_json(cli("eval", pruned, dense, "--text", row_file, "--json").stdout)
    assert [score["model"] for score in scores["models"]] == [str(pruned), str(dense)]
    assert all(score["difference"] == {} for score in scores["models"])
    shown = [f"{score['perplexity']['value']:.3f}" for score in scores["models"]]
    assert 0 < found.stderr.index(shown[0]) < found.stderr.index(shown[1])


def test_eval_with_a_baseline_gives_the_paired_difference(cli, family, pruned, row_file):
    dense = family("llama")
    found = cli("eval", pruned, "--baseline", dense, "--text", row_file, "--json")
    base, score = strict_json(found.stdout)["models"]
    assert (base["model"], score["model"]) == (str(dense), str(pruned))
    assert base["difference"] == {}
    difference = score["difference"]["log_perplexity"]
    expected = score["perplexity"]["log_perplexity"] - base["perplexity"]["log_perplexity"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["n"] == 5
    assert 0 < difference["stderr"] < math.inf
    assert score["perplexity"]["value"] == pytest.approx(
        math.exp(score["perplexity"]["log_perplexity"])
    )
    table = cli("eval", pruned, "--baseline", dense, "--text", row_file)
    assert f"{difference['value']:+.4f} ± {difference['stderr']:.4f}" in table.stderr
    assert table.stdout == f"{pruned}\n"


def test_eval_keeps_its_scores_when_asked_to(cli, family, pruned, row_file, copy_of, tmp_path):
    sparse = tmp_path / "sparse"
    shutil.copytree(pruned, sparse)
    told = ("--text", row_file, "--baseline", family("llama"), "--save")
    found = cli("eval", sparse, *told, "--json")
    entry = read_scores(sparse)[0].to_json()
    (_, score) = json.loads(found.stdout)["models"]
    assert {key: entry[key] for key in score} == score
    assert entry["config"]["text"] == str(row_file)
    cli("eval", sparse, *told)
    assert len(read_scores(sparse)) == 1
    cli("eval", sparse, *told, "--limit", "2")
    assert len(read_scores(sparse)) == 2
    refused = cli("eval", sparse, copy_of("llama"), "--text", row_file, "--save")
    assert_one_line_error(refused, 2, "--save")


def test_eval_of_one_window_has_no_standard_error_and_still_is_json(cli, pruned, family, row_file):
    found = cli(
        "eval", pruned, "--baseline", family("llama"), "--text", row_file, "--limit", 1, "--json"
    )
    _, score = strict_json(found.stdout)["models"]
    assert score["difference"]["log_perplexity"]["stderr"] is None
    assert score["perplexity"]["log_stderr"] is None


def test_eval_on_token_rows_needs_no_tokenizer(cli, family, row_file):
    assert cli("eval", family("llama_tied"), "--text", row_file).code == 0
    found = cli("eval", family("llama_tied"), "--length", 32)
    assert_one_line_error(found, 2, family("llama_tied"), "token rows")


def test_eval_without_a_text_takes_the_builtin_one(cli, family):
    found = cli("eval", family("llama"), "--length", 32, "--limit", 3, "--json")
    (score,) = strict_json(found.stdout)["models"]
    assert score["perplexity"]["text"] == "builtin"
    assert (score["perplexity"]["windows"], score["perplexity"]["length"]) == (3, 32)
    # A random model of 260 tokens knows nothing: about the logarithm of 260, or worse.
    assert score["perplexity"]["value"] > 100


def test_eval_of_an_own_task_has_both_accuracies_with_errors(
    cli, family, pruned, tmp_path, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"question": f"Is {i} prime?", "label": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    command = (
        "eval", pruned, "--baseline", family("llama"),
        "--tasks", "tiny_choice", "--include-path", tmp_path / "tasks",
    )  # fmt: skip
    found = cli(*command, "--json")
    assert found.code == 0, found.stderr
    base, score = strict_json(found.stdout)["models"]
    (task,) = score["tasks"]
    assert (task["task"], task["version"], task["n"], task["n_shot"]) == (
        "tiny_choice",
        "1.5",
        6,
        0,
    )
    assert set(task["metrics"]) == {"acc", "acc_norm"}
    assert score["perplexity"] is None
    assert set(score["difference"]) == {"tiny_choice.acc", "tiny_choice.acc_norm"}
    difference = score["difference"]["tiny_choice.acc"]
    (other,) = base["tasks"]
    own = other["metrics"]["acc"]
    expected = task["metrics"]["acc"]["value"] - own["value"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["baseline"] == {key: own[key] for key in ("value", "stderr")}
    table = cli(*command, "--limit", 4)
    assert table.code == 0
    assert "acc_norm" in table.stderr
    assert re.search(r"lm-eval \d+\.\d+", table.stderr)
    assert "shots" in table.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tasks", "hellaswga"], ["'hellaswga'", "'hellaswag'", "[no-such-task]"]),
        (["--text", "bultin"], ["'bultin'", "'builtin'"]),
        (["--text", "self"], ["self"]),
        (["--limit", "0"], ["--limit", "1", "0"]),
        (["--batch-size", "4"], ["--batch-size", "--tasks", "[no-effect]"]),
        (["--tasks", "x", "--batch-size", "0"], ["--batch-size", "1", "0"]),
        (["--include-path", "no/such"], ["--include-path", "no/such", "[not-a-folder]"]),
        (["--include-path", "."], ["--include-path", "--tasks", "[no-effect]"]),
        (["--dtype", "int8"], ["--dtype", "'int8'"]),
    ],
)
def test_wrong_option_of_eval_is_one_line_and_exit_2(cli, family, arguments, named):
    assert_one_line_error(cli("eval", family("llama"), *arguments), 2, *named)


def test_second_broken_model_is_seen_before_the_first_is_measured(cli, family, row_file, tmp_path):
    found = cli("eval", family("llama"), tmp_path / "nowhere", "--text", row_file)
    assert_one_line_error(found, 2, "nowhere")  # no progress line before it


def test_scores_of_the_models_before_a_failing_one_are_told(cli, copy_of, family, row_file):
    broken = copy_of("llama")
    name = "lm_head.weight"
    tensors = load_file(broken / WEIGHTS)
    tensors[name].fill_(3e38)  # finite, as the sums of its products are not
    save_file(tensors, broken / WEIGHTS)
    found = cli("eval", family("llama"), broken, "--text", row_file)
    alone = cli("eval", family("llama"), "--text", row_file)
    assert found.code == 1
    assert "the loss is not a number" in found.stderr
    figure = re.search(r"perplexity (\d+\.\d{3})", found.stderr)[1]
    assert f"measured before: {family('llama')}: perplexity {figure}" in found.stderr
    assert figure in alone.stderr


# inspect and verify


def test_inspect_shows_blocks_types_and_history(cli, pruned, family):
    found = cli("inspect", pruned)
    assert (found.code, found.stdout) == (0, f"{pruned}\n")
    for word in ("by block", "by weight type", "model.layers.1", "mlp.down_proj", "2:4", "history"):
        assert word in found.stderr
    value = strict_json(cli("inspect", pruned, "--json").stdout)
    assert value["total"]["sparsity"] == 0.5
    assert value["total"]["pattern"] == "2:4"
    assert [row["name"] for row in value["blocks"]] == ["model.layers.0", "model.layers.1"]
    assert value["history"][0]["settings"]["method"] == "wanda"
    dense = strict_json(cli("inspect", family("llama"), "--json").stdout)
    assert dense["total"] == {**value["total"], "zeros": 0, "sparsity": 0.0, "pattern": "dense"}
    assert dense["history"] == []


def test_verify_of_a_good_checkpoint_says_so(cli, pruned):
    found = cli("verify", pruned, "--pattern", "2:4")
    assert (found.code, found.stdout) == (0, f"{pruned}\n")
    assert "14 weights are 2:4" in found.stderr
    value = strict_json(cli("verify", pruned, "--json").stdout)
    assert value["weights"] == 14
    assert value["pattern"] == ["2:4"]
    assert value["zeros"] * 2 == value["size"]


def one_weight_too_many(tensors) -> None:
    row = tensors[UP][3]
    row[8:12] = torch.tensor([1.0, 0.0, 2.0, 3.0])


def negative_zero(tensors) -> None:
    weight = tensors[UP]
    row, column = (weight == 0).nonzero()[5].tolist()
    weight[row, column] = -0.0


def infinite(tensors) -> None:
    tensors["model.norm.weight"][0] = math.inf


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (one_weight_too_many, "", [f"{UP}: row 3, inputs 8 to 11", 1, "2:4", 2]),
        (negative_zero, "negative-zero", [f"{UP}: row "]),
        (infinite, "", ["model.norm.weight"]),
    ],
)
def test_verify_names_the_first_offender_with_exit_1(cli, copy_of, pruned, change, code, named):
    folder = edit(copy_of(pruned), change)
    found = cli("verify", folder, "--pattern", "2:4")
    assert_one_line_error(found, 1, *named, code)


def test_verify_of_a_dense_checkpoint_names_its_first_weight(cli, family):
    found = cli("verify", family("llama"), "--pattern", "2:4")
    assert_one_line_error(found, 1, "model.layers.0.self_attn.q_proj.weight: row 0, inputs 0")


def test_verify_sees_tied_weights_that_differ(cli, copy_of, tmp_path):
    folder = copy_of("llama_tied")
    assert cli("prune", folder, "-o", tmp_path / "out", "--method", "magnitude").code == 0

    def untie(tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    def tie(tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    assert cli("verify", edit(tmp_path / "out", tie), "--pattern", "2:4").code == 0
    found = cli("verify", edit(tmp_path / "out", untie), "--pattern", "2:4", "--quiet")
    assert_refused(found, 1, "tied-weights-differ", "lm_head.weight", "model.embed_tokens.weight")


def test_verify_sees_bytes_that_are_not_those_that_were_written(cli, copy_of, pruned):
    folder = copy_of(pruned)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert_one_line_error(cli("verify", folder), 1, "sparsekit.json")


def test_verify_without_a_pattern_or_history_says_what_to_pass(cli, family):
    found = cli("verify", family("llama"))
    assert_refused(found, 2, "no-history", family("llama"), "--pattern 2:4")


def test_verify_of_a_wrong_pattern_is_a_usage_error(cli, pruned):
    assert_one_line_error(cli("verify", pruned, "--pattern", "two"), 2, "'two'")
    assert_one_line_error(cli("verify", pruned, "--pattern", "1:4"), 1, 2, "1:4", 3)


# methods, bench, demo


def test_methods_lists_every_method_with_source_options_and_defaults(cli):
    found = cli("methods")
    assert found.code == 0
    kinds = ("pruners", "refiners", "recoverers", "quantizers")
    assert found.stdout.split() == [name for kind in kinds for name in methods.names(kind)]
    assert {"alps", "magnitude", "nowag", "ria", "sparsegpt", "wanda"} <= set(found.stdout.split())
    listed = strict_json(cli("methods", "--json").stdout)["methods"]
    for method in listed:
        assert method["summary"]
        assert "20" in method["source"]  # the year of the paper
        assert method["cost"]
        shown = cli("methods", method["name"])
        assert shown.code == 0
        assert f"source\t{method['source']}" in shown.stdout.splitlines()
        for option in method["options"]:
            assert option["help"]
            assert option["default"]
            assert f"option\t{option['name']}\t" in shown.stdout
    free = [method["name"] for method in listed if method["data_free"]]
    assert free == ["magnitude", "rtn"]
    sparsegpt = next(method for method in listed if method["name"] == "sparsegpt")
    assert [(o["name"], o["type"], o["default"]) for o in sparsegpt["options"]] == [
        ("damping", "float", "0.01"),
        ("block", "int", "128"),
    ]
    armor = strict_json(cli("methods", "armor", "--json").stdout)
    assert armor.pop("schema") == 1
    assert armor in listed
    assert (armor["initial"], armor["can_follow"]) == ("nowag", ["pack"])
    assert armor["differs"]
    assert "30.7" in armor["result"]


def test_methods_is_one_table_of_80_columns(cli, monkeypatch):
    monkeypatch.setattr("sparsekit.cli.console.FILE_WIDTH", 80)
    table = cli("methods").stderr.splitlines()
    assert max(map(len, table)) <= 80
    columns = "method", "kind", "what it does", "result", "calibrates", "can follow"
    assert [line for line in table if all(name in line for name in columns)]
    row = " ".join(line for line in table if line.startswith(("wanda", "rtn")))
    assert "193.8 in 57 s" in row
    assert "quantizer" in row


def test_unknown_method_is_refused_with_a_suggestion(cli):
    assert_refused(cli("methods", "wandaa"), 2, "no-method", "'wandaa'", "'wanda'")


def test_bench_prints_the_ratio_and_as_json_everything(cli, family, row_file, tmp_path):
    command = ("bench", "prune", family("llama"), "--calibration", row_file, "--repeat", 1)
    found = cli(*command, "--scratch", tmp_path)
    assert found.code == 0
    assert float(found.stdout) > 0
    assert "their median" in found.stderr
    value = strict_json(cli(*command, "--json").stdout)
    assert value["ratio"] == pytest.approx(value["prune_seconds"][0] / value["floor_seconds"][0])
    assert cli(*command, "--no-floor", "-q").stdout == "-\n"
    assert list(tmp_path.iterdir()) == []
    assert_refused(cli(*command[:-1], 0), 2, "out-of-range", "--repeat", 1, 0)


def test_demo_prunes_three_ways_keeps_scores_and_writes_the_page(cli, family, tmp_path):
    out = tmp_path / "demo"
    command = ("demo", family("llama"), "-o", out)
    found = cli(*command, "--json")
    assert found.code == 0, found.stderr
    value = strict_json(found.stdout)
    made = ["magnitude", "sparsegpt", "wanda"]
    assert value["out"] == str(out)
    assert [row["name"] for row in value["models"]] == ["dense", *made]
    assert [row["seconds"] is None for row in value["models"]] == [True, False, False, False]
    for row in value["models"]:
        (perplexity,) = row["perplexity"]
        assert perplexity["value"] > 1
        differences = list(perplexity["log_differences"].values())
        assert len(differences) == (row["name"] != "dense")
        assert all(difference["stderr"] > 0 for difference in differences)
    for name in made:
        assert cli("verify", out / name, "--pattern", "2:4").code == 0
    page = (out / "report.html").read_text()
    assert all(name in page for name in ("dense", *made))
    reported = cli("report", *sorted(out.glob("[!.]*")), "-o", tmp_path / "again.html", "--json")
    assert strict_json(reported.stdout)["models"] == value["models"]
    assert "no scores" not in reported.stderr
    before = {name: sha256_file(out / name / WEIGHTS) for name in made}
    stamps = {name: (out / name / WEIGHTS).stat().st_mtime_ns for name in made}
    again = cli(*command)
    assert again.stdout == f"{out}\n"
    assert again.stderr.count(": kept") == 3
    for name in made:
        assert sha256_file(out / name / WEIGHTS) == before[name]
        assert (out / name / WEIGHTS).stat().st_mtime_ns == stamps[name]
    other = cli("demo", family("llama_tied"), "-o", out)
    assert_one_line_error(other, 2, "--out")


def test_demo_is_the_recipe_quickstart(cli, family, tmp_path):
    assert cli("demo", family("llama"), "-o", tmp_path / "demo").code == 0
    found = cli("run", "quickstart", f"model={family('llama')}", "-o", tmp_path / "demo", "--json")
    assert {step["state"] for step in strict_json(found.stdout)["steps"]} == {"kept"}


def test_demo_checks_every_method_before_the_first_is_run(cli, family, tmp_path):
    found = cli("demo", family("llama_odd"), "-o", tmp_path / "demo")
    assert_one_line_error(found, 2, 66, 4)
    assert not (tmp_path / "demo").exists()


# The command line as a whole


@pytest.mark.parametrize("arguments", [[], ["bench"]])
def test_no_command_shows_help(cli, arguments):
    found = cli(*arguments)
    assert "Usage:" in found.stdout + found.stderr
    assert found.code in (0, 2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["prune", "x", "-o", "y", "--patern", "2:4"], r"No such option: --patern.*--pattern"),
        (["prnue"], r"No such command 'prnue'.*prune"),
        (["prune", "x"], r"Missing option.*--out"),
        (["prune"], r"Missing argument"),
        (["prune", "x", "-o", "y", "--samples", "many"], r"'--samples'.*integer"),
        (["eval"], r"Missing argument"),
    ],
)
def test_wrong_usage_is_exit_2_and_says_what_is_meant(cli, arguments, match):
    found = cli(*arguments)
    assert (found.code, found.stdout) == (2, "")
    assert re.search(match, found.stderr.replace("\n", " ")), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_and_option_has_help_and_an_example(cli, name):
    command = commands()[name]
    assert re.search(rf"Example: sparsekit {name}\b", command.help)
    for parameter in command.params:
        if parameter.name != "help":
            assert parameter.help, parameter.name
    found = cli(*name.split(), "--help")
    assert found.code == 0
    assert found.stderr == ""
    assert f"Example: sparsekit {name}" in found.stdout
    assert cli(*name.split(), "-h").stdout == found.stdout


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("prune", PruneConfig),
        ("eval", EvalConfig),
        ("recover", RecoverConfig),
        ("quantize", QuantizeConfig),
    ],
)
def test_flags_have_the_names_and_defaults_of_the_configuration(name, config):
    flags = {parameter.name: parameter for parameter in commands()[name].params}
    for option, default in config.defaults().items():
        given = flags[option].default
        assert (tuple(given) if isinstance(given, list) else given) == default, option
        assert flags[option].help, option


@pytest.mark.parametrize("name", ["prune", "recover", "quantize", "eval"])
def test_help_shows_options_in_groups_with_choices_and_defaults(cli, name):
    text = cli(name, "--help").stdout
    titles = [title for title in ("What:", "Where:", "Running:") if f"\n{title}\n" in text]
    assert titles == ["What:", "Where:", "Running:"]
    assert text.index("What:") < text.index("Where:") < text.index("Running:")
    assert "<str>" not in text.partition("What:")[2]
    assert re.search(r"--device \[auto\|cpu\|cuda\] .*\[default:\s+auto\]", text)


def test_help_shows_verbs_in_groups(cli):
    text = cli("--help").stdout
    places = [text.index(f"\n{title}:\n") for title in ("Make", "Measure", "Look", "Run")]
    assert places == sorted(places)
    assert re.search(
        r"Measure:\n  eval .*?\n  inspect .*?\n  verify .*?\n  bench .*?Look:", text, re.DOTALL
    )


def test_words_that_are_given_are_kept_as_they_were_written():
    given = {"method": "sparsegpt", "pattern": "50.0%", "option": {"block": 64}, "budget": None}
    config = PruneConfig(**given)
    assert config.words == {k: v for k, v in given.items() if v is not None}
    assert (str(config.pattern), config.option) == ("50%", {"block": "64"})
    assert config == PruneConfig(method="sparsegpt", pattern="50%", option=["block=64"])


def test_what_is_expected_of_other_tools_is_answered_with_ours(cli):
    found = cli("prune", "demo", "-o", "out", "--sparsity", "0.5")
    assert found.code == 2
    assert "No such option: --sparsity; use --pattern 50%" in " ".join(found.stderr.split())
    found = cli("prune", "demo", "-o", "out", "--method", "random")
    assert_one_line_error(found, 2, "'random'", "alps", "magnitude", "wanda")


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_working_command_has_the_three_common_flags(name):
    flags = {flag for parameter in commands()[name].params for flag in parameter.opts}
    assert {"--json", "--quiet", "--debug"} <= flags


# armor


def test_armor_with_a_budget_says_what_it_did(cli, family, row_file, tmp_path):
    command = ("prune", family("llama"), "--method", "armor", "--calibration", row_file)
    found = cli(*command, "-o", tmp_path / "a", "--budget", "0.001s")
    assert found.code == 0
    assert "14 of 14" in found.stderr
    found = cli(*command, "-o", tmp_path / "b", "--budget", "20s", "--json")
    rows = strict_json(found.stdout)["weights"]
    assert min(row["numbers"]["sweeps"] for row in rows) >= 1
    assert "bits per weight as factors" in found.stderr
    for text in ("10", "0s", "ten minutes", "-5m"):
        wrong = cli(*command, "-o", tmp_path / "c", f"--budget={text}")
        assert_one_line_error(wrong, 2, "--budget", text, "90s, 10m or 2h")
    wrong = cli("prune", family("llama"), "-o", tmp_path / "c", "--budget", "10m")
    assert_one_line_error(wrong, 2, "--budget", "wanda", "armor")


def test_armor_refuses_patterns_and_blocks_that_it_cannot_have(cli, family, row_file, tmp_path):
    command = ("prune", family("llama"), "-o", tmp_path / "a", "--method", "armor")
    for arguments, named in [
        (("--pattern", "50%"), ["armor", "N:M", "50%"]),
        (("-O", "block=6"), [6, 4]),
        (("-O", "block=8", "-O", "block=16"), ["'block'"]),
        (("--pattern", "8:16"), ["8:16", "12,870"]),
        (("--reconstruct", "cg"), ["--reconstruct", "armor"]),
        (("--format", "packed"), ["--format", "'packed'"]),
    ]:
        found = cli(*command, "--calibration", row_file, *arguments)
        assert_one_line_error(found, 2, *named)
