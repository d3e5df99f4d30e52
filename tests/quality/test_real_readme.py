"""The commands of README's quick start print what it shows.

On a real model: `pytest -m real tests/quality/test_real_readme.py` (three minutes on two quiet
cores). The figures were taken with Python 3.11; other versions have another reference text.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SHOWN = README.partition("```text\n")[2].partition("```")[0]
NUMBER = r"\d[\d,]*(?:\.\d+)?"
# SparseGPT amplifies roundings, which are others on other processors; times are another matter.
ALIKE = 0.15

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another Python has another text"),
]


def words(line: str) -> tuple[str, ...]:
    """A line without its numbers."""
    return tuple(re.sub(NUMBER, "#", line).split())


def numbers(line: str, command: str) -> list[float]:
    """Its numbers, but for seconds: called so, or the last column of the table of `prune`."""
    found = re.findall(NUMBER, re.sub(r"\d+ s\b", "", line))
    return [float(n.replace(",", "")) for n in (found[:-1] if command == "prune" else found)]


def test_the_commands_of_the_quick_start_print_what_it_shows(tmp_path):
    commands = re.split(r"^\$ sparsekit (.*)\n", SHOWN, flags=re.MULTILINE)[1:]
    pairs = list(zip(commands[::2], commands[1::2], strict=True))
    assert len(pairs) >= 3
    environment = {k: v for k, v in os.environ.items() if k != "SPARSEKIT_CACHE"}
    for command, shown in pairs:
        told = subprocess.run(
            [sys.executable, "-m", "sparsekit", *command.split()],
            cwd=tmp_path,
            env=environment | {"COLUMNS": "160"},
            capture_output=True,
            text=True,
            check=True,
        )
        verb = command.split()[0]
        lines = (told.stderr + told.stdout).splitlines()
        for line in shown.splitlines():
            wanted = numbers(line, verb)
            like = [found for found in lines if words(found)[: len(words(line))] == words(line)]
            assert any(
                numbers(found, verb)[: len(wanted)] == pytest.approx(wanted, rel=ALIKE)
                for found in like
            ), (command, line, like)
