"""A question or a mistake is answered at once, without torch."""

import os
import resource
import subprocess
import sys

import pytest
from forked import Answer, answers
from typer.main import get_command

from sparsekit.cli.app import app

HEAVY = ("torch", "transformers", "lm_eval", "datasets", "accelerate", "numpy", "huggingface_hub")
TIMES = 3.0


ANSWERS = [
    (["--help"], 0, "Prune Hugging Face"),
    (["prune", "--help"], 0, "Example: sparsekit prune"),
    (["eval", "--help"], 0, "Example: sparsekit eval"),
    (["bench", "prune", "--help"], 0, "Example: sparsekit bench prune"),
    (["methods"], 0, "wanda"),
    (["methods", "wanda"], 0, "Sun et al. 2024"),
    (["methods", "armor", "--json"], 0, '"can_follow": ["pack"]'),
    (["--version"], 0, "transformers "),
    (["prune", "m", "-o", "o", "--patern", "2:4"], 2, "--pattern"),
    (["prune", "m", "-o", "o", "--method", "wandaa"], 2, "did you mean 'wanda'"),
    (["prune", "m", "-o", "o", "--pattern", "2/4"], 2, "pattern '2/4' is not understood"),
    (["prune", "m", "-o", "o", "--method", "alps", "-O", "x=1"], 2, "alps has no option 'x'"),
    (["prune", "m", "-o", "o", "--calibration", "no.txt"], 2, "no.txt does not exist"),
    (["prune", "m", "-o", "o", "--dtype", "int4"], 2, "--dtype 'int4' is not known"),
    (["eval", "m", "--limit", "0"], 2, "--limit must be at least 1"),
    (["eval", "m", "--batch-size", "4"], 2, "--batch-size has no effect without --tasks"),
    (["verify", "m", "--pattern", "2/4"], 2, "pattern '2/4' is not understood"),
    (["prune", "./m", "-o", "o"], 2, "no such model folder: ./m"),
    (["prune", "dmo", "-o", "o"], 2, "did you mean 'demo'"),
    (["prune", "demo", "-o", "/"], 2, "the output / is the current folder or contains it"),
    (["eval", "demo", "--baseline", "/"], 2, "/ has no config.json"),
]


@pytest.fixture(scope="module")
def told() -> list[Answer]:
    """The answers to all command lines above."""
    return answers([(arguments, {}) for arguments, _, _ in ANSWERS])


@pytest.mark.parametrize(
    "number", range(len(ANSWERS)), ids=lambda number: " ".join(ANSWERS[number][0])
)
def test_answer_comes_without_importing_torch(told, number):
    _, code, answer = ANSWERS[number]
    found = told[number]
    assert answer in found.stdout + found.stderr
    assert found.code == code
    assert "sparsekit" in found.packages  # the list of imports is really there
    assert found.packages & set(HEAVY) == set()


def spent(*arguments: str) -> float:
    """CPU seconds of a Python process, the best of five: a busy machine must not fail a test."""
    # The first of them keeps the bytecode, as it does for a user.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["COLUMNS"] = "100"
    found = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            env=environment,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


@pytest.fixture(scope="module")
def floor() -> float:
    """What the libraries of the command line take by themselves on this machine."""
    return spent("-c", "import typer, typer.main, rich.table, rich.progress, pydantic")


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["prune", "--wrong-flag"]])
def test_an_answer_takes_little_more_than_the_libraries_of_the_command_line(arguments, floor):
    """Half a second where those take 0.15 s; torch alone takes ten times as long."""
    assert 0.01 < spent("-m", "sparsekit", *arguments) < TIMES * floor


def test_help_shows_the_summary_of_every_command():
    (found,) = answers([(["--help"], {})])
    said = " ".join(found.stdout.split())
    for name, command in get_command(app).commands.items():
        assert f" {name} {command.get_short_help_str(200)}" in said


def test_windows_is_refused_in_one_line():
    code = "import sys; sys.platform = 'win32'; from sparsekit.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: sparsekit does not run on Windows; ")
    assert found.stderr.count("\n") == 1
