"""The README says what is there: its tree, its commands and their options."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from sparsekit.cli.app import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tree_lists_every_source_file_once():
    tree = README.partition("## The tree")[2]
    listed = re.findall(r"^ +(\S+\.py) ", tree, flags=re.MULTILINE)
    there = [path.name for path in (ROOT / "sparsekit").rglob("*.py")]
    methods = {"pruners", "refiners", "recoverers", "quantizers"}
    packages = {"tensors", "models", *methods, "stages", "cli"}
    for package in packages:  # their __init__.py is the folder's own line
        there.remove("__init__.py")
        assert f"  {package}/" in tree
    assert sorted(listed) == sorted(there)


def lines() -> list[str]:
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    commands = re.split(r"[\n|]|&&", shell)
    return [c.strip() for c in commands if c.strip().startswith("sparsekit ")]


def test_there_are_commands_to_check():
    assert len(lines()) >= 8


@pytest.mark.parametrize("line", lines())
def test_command_and_its_options_exist(line):
    group = typer.main.get_command(app)
    verb, *rest = shlex.split(line)[1:]
    known = {name for parameter in group.commands[verb].params for name in parameter.opts}
    assert {word for word in rest if word.startswith("-") and word != "-"} <= known
