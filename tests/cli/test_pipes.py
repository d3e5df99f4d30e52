"""Verbs in a shell pipeline, and streams whose other end is closed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekit.cli.streams import READER_GONE

EMPTY = "[empty-stdin]"
TOOL = f"{sys.executable} -m sparsekit"
PIPE = """\
set -o pipefail
tool prune {model} --method wanda --pattern {pattern} --calibration {rows} -o A -q \
| tool recover - --tokens 96 --batch 2 --length 24 --data {rows} -o B -q {recover} \
| tool quantize - --grid {grid} --calibration {rows} -o C -q \
| tool eval - --text {rows} --json -q > scores.json
status=("$?" "${{PIPESTATUS[@]}}")
echo "${{status[@]}}"
"""


def bash(line: str, folder: Path) -> SimpleNamespace:
    """What a shell shows of a line in which `tool` is sparsekit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        ["bash", "-c", f'tool() {{ {TOOL} "$@"; }}\n{line}'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    return SimpleNamespace(code=found.returncode, stdout=found.stdout, stderr=found.stderr)


@pytest.fixture
def pipe(family, row_file, tmp_path):
    """Runs the pipeline of four verbs; gives the exit codes, that of the whole first."""

    def run(pattern: str = "2:4", recover: str = "", grid: str = "int4-g16"):
        line = PIPE.format(
            model=family("llama"), rows=row_file, pattern=pattern, recover=recover, grid=grid
        )
        found = bash(line, tmp_path)
        codes = [int(code) for code in found.stdout.split()]
        return codes, found.stderr.splitlines(), sorted(p.name for p in tmp_path.iterdir())

    return run


# Pipelines


@pytest.mark.slow
def test_prune_verify_eval_work_as_a_shell_pipeline(family, row_file, tmp_path):
    found = bash(
        f"set -o pipefail; tool prune {family('llama')} -o out --calibration {row_file} -q "
        f"| tool verify - --pattern 2:4 -q | tool eval - --text {row_file} --json -q",
        tmp_path,
    )
    assert (found.code, found.stderr) == (0, "")
    (score,) = json.loads(found.stdout)["models"]
    assert score["model"] == "out"
    assert score["perplexity"]["windows"] == 5


@pytest.mark.slow
def test_prune_recover_quantize_eval_work_as_a_shell_pipeline(pipe, tmp_path, cli):
    codes, said, made = pipe()
    assert (codes, said) == ([0, 0, 0, 0, 0], [])
    assert made == ["A", "B", "C", "scores.json"]
    (score,) = json.loads((tmp_path / "scores.json").read_text())["models"]
    assert score["model"] == "C"
    history = json.loads((tmp_path / "C" / "sparsekit.json").read_text())["history"]
    assert [entry["stage"] for entry in history] == ["prune", "recover", "quantize"]
    assert cli("verify", tmp_path / "C", "--pattern", "2:4").code == 0


@pytest.mark.slow
def test_stage_that_fails_in_the_middle_fails_the_pipe_with_one_line_of_its_own(pipe, tmp_path):
    codes, said, made = pipe(grid="int4-g48")  # of 32 and 64 inputs
    assert codes == [2, 0, 0, 2, 2]
    assert len(said) == 2
    (line,) = (line for line in said if "stdin" not in line)
    assert re.match(r"quantize: error: .*\b32\b.*\b48\b", line)
    assert sum(line.endswith(EMPTY) for line in said) == 1
    # What was finished before stays, and of what failed there is nothing.
    assert made == ["A", "B", "scores.json"]
    assert (tmp_path / "scores.json").read_bytes() == b""


@pytest.mark.slow
def test_stage_that_fails_at_once_does_not_end_the_work_before_it(pipe, tmp_path, cli):
    codes, said, made = pipe(recover="--lr -1")
    assert codes == [2, READER_GONE, 2, 2, 2]
    assert {line.partition(": error: ")[0] for line in said} == {"recover", "quantize", "eval"}
    assert sum(line.endswith(EMPTY) for line in said) == 2
    assert len(said) == 3
    assert made == ["A", "scores.json"]
    assert cli("verify", tmp_path / "A", "--pattern", "2:4").code == 0


@pytest.mark.parametrize(
    ("stdin", "code", "named"),
    [
        ("", "empty-stdin", []),
        ("\n \n", "empty-stdin", []),
        ("one\ntwo\n", "several-lines", [2]),
        ("no/such/folder\n", "", ["no/such/folder", "stdin"]),
        ("fp8\tyes\tno\n", "", ["fp8", "stdin"]),
        ('{"out": "A"}\n', "json-on-stdin", ["--json"]),
        ("x" * 5000, "path-too-long", [5000]),
    ],
)
@pytest.mark.parametrize("command", ["verify", "eval", "quantize", "recover", "pack", "prune"])
def test_stdin_that_is_no_path_is_one_line_and_exit_2(cli, tmp_path, command, stdin, code, named):
    more = {"verify": [], "eval": [], "recover": ["-o", tmp_path / "o", "--tokens", "8K"]}
    found = cli(command, "-", *more.get(command, ["-o", tmp_path / "o"]), stdin=stdin)
    assert (found.code, found.stdout) == (2, "")
    assert re.fullmatch(rf"{command}: error: [^\n]*{code}\]?\n", found.stderr), found.stderr
    assert all(str(value) in found.stderr for value in named)
    assert list(tmp_path.iterdir()) == []


def test_stdin_that_is_no_text_is_one_line_and_exit_2(tmp_path):
    found = bash(r"printf '\377\376\n' | PYTHONUTF8=0 LC_ALL=C.UTF-8 tool verify -", tmp_path)
    assert found.code == 2
    assert re.fullmatch(r"[a-z]+: error: [^\n]+\n", found.stderr), found.stderr


# Streams whose other end is closed


def gone() -> int:
    """The end to write to of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["inspect"], ["inspect", "--json"], ["methods"], ["--help"], ["--version"], ["prune", "-h"]],
    ids=" ".join,
)
def test_reader_of_stdout_that_has_gone_is_exit_141_without_a_word(start, pruned, command):
    model = [pruned] if command[0] == "inspect" else []
    writer = gone()
    process = start(*command, *model, stdout=writer)
    os.close(writer)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == READER_GONE
    assert not re.search("BrokenPipe|Broken pipe|Traceback|ignored|error:", stderr), stderr


@pytest.mark.slow
def test_output_is_complete_when_nobody_reads_its_path(start, family, row_file, tmp_path, cli):
    writer = gone()
    process = start(
        "prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file, "-q",
        stdout=writer,
    )  # fmt: skip
    os.close(writer)
    assert process.communicate(timeout=300)[1] == ""
    assert process.returncode == READER_GONE
    assert cli("verify", tmp_path / "out", "--pattern", "2:4").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_failure_goes_before_a_reader_that_has_gone(start, tmp_path):
    writer = gone()
    process = start("inspect", tmp_path / "nowhere", stdout=writer)
    os.close(writer)
    assert "no such model folder" in process.communicate(timeout=300)[1]
    assert process.returncode == 2


@pytest.mark.slow
def test_reader_of_stderr_that_has_gone_does_not_end_the_work(start, family, row_file, tmp_path):
    writer = gone()
    process = start(
        "prune", family("llama"), "-o", tmp_path / "out", "--calibration", row_file,
        stderr=writer,
    )  # fmt: skip
    stdout, _ = process.communicate(timeout=300)
    assert (process.returncode, stdout) == (0, f"{tmp_path / 'out'}\n")
    wrong = start("prune", "--no-such-flag", stderr=writer)
    os.close(writer)
    assert (wrong.communicate(timeout=300)[0], wrong.returncode) == ("", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("closed", "code", "stdout"),
    [
        ("2>&-", 0, "{model}\n"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("< /dev/null 2> /dev/full", 0, "{model}\n"),
    ],
)
def test_streams_that_are_closed_from_the_start_do_no_harm(tmp_path, pruned, closed, code, stdout):
    found = bash(f"tool inspect {pruned} {closed}", tmp_path)
    assert (found.code, found.stdout) == (code, stdout.format(model=pruned))
    assert "error" not in found.stderr


def test_processes_that_are_started_have_all_streams(tmp_path):
    child = "import os; [os.fstat(handle) for handle in (0, 1, 2)]"
    program = (
        "import subprocess, sys; from sparsekit.cli.streams import guard; guard(); "
        f"sys.exit(subprocess.call([sys.executable, '-c', '{child}']))"
    )
    assert bash(f'{sys.executable} -c "{program}" <&- >&- 2>&-', tmp_path).code == 0


def test_closed_stdin_is_an_empty_one(tmp_path):
    found = bash("tool verify - <&-", tmp_path)
    assert found.code == 2
    assert re.fullmatch(r"verify: error: [^\n]+ \[empty-stdin\]\n", found.stderr), found.stderr


@pytest.mark.parametrize("command", ["methods -q", "--help", "--version"])
def test_stdout_on_a_full_disk_is_exit_1_with_one_line(tmp_path, command):
    found = bash(f"tool {command} > /dev/full", tmp_path)
    assert found.code == 1
    assert re.fullmatch(r"error: cannot write to stdout: No space [^\n]+\n", found.stderr)
