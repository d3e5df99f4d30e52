"""Many command lines from one fresh interpreter, each in a fork: what it printed and imported.

Starting an interpreter takes most of the time of an answer. The forks share only the libraries of
the command line; sparsekit's own modules, and whatever they import, are loaded in each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Reads a JSON list of [arguments, environment] and prints a JSON list of
# [exit code, stdout, stderr, top-level packages loaded].
SERVER = """
import contextlib, io, json, os, sys, tempfile
import typer, rich.table, rich.progress, pydantic  # the libraries of the command line

def answer(arguments, environment, out, err):
    os.environ |= environment
    sys.argv = ["sparsekit", *arguments]
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    code = 0
    try:
        from sparsekit.__main__ import main
        main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    return code, sorted({name.partition(".")[0] for name in sys.modules})

answers = []
for arguments, environment in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write, json.dumps(answer(arguments, environment, out, err)).encode())
            os._exit(0)
        os.close(write)
        with open(read) as pipe:
            code, packages = json.load(pipe)
        os.waitpid(child, 0)
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
        answers.append([code, *texts, packages])
print(json.dumps(answers))
"""


@dataclass(frozen=True)
class Answer:
    """The outcome of a command line."""

    code: int
    stdout: str
    stderr: str
    packages: frozenset[str]
    """Top-level packages that it had imported in the end."""


def answers(commands: Sequence[tuple[Sequence[str], Mapping[str, str]]]) -> list[Answer]:
    """The outcome of each command line, given as its arguments and further environment."""
    ran = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps([[list(words), dict(more)] for words, more in commands]),
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return [Answer(c, out, err, frozenset(p)) for c, out, err, p in json.loads(ran.stdout)]
