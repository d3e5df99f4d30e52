"""The README says what is there: its commands and their options, and its code."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

import sparsekit
from sparsekit import api
from sparsekit.cli.app import app
from sparsekit.study.recipe import parse

ROOT = Path(__file__).parents[1]
README, RECIPES = (
    (ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "recipes/README.md")
)
LONGEST = 250


def blocks(kind: str, text: str = README) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def lines() -> list[str]:
    """Every command in a block or between backticks, from the word after `sparsekit`."""
    shown = [line.removeprefix("$ ") for block in blocks("text") for line in block.splitlines()]
    shell = "\n".join([*shown, *blocks("sh"), *blocks("sh", RECIPES)]).replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.])sparsekit (\S.*)", "\n".join(re.split(r"[\n|]|&&", shell)))
    prose = re.sub(r"```.*?```", "", README + RECIPES, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", prose):
        first, *rest = code.split()
        if rest and (first == "sparsekit" or first in typer.main.get_command(app).commands):
            found.append(" ".join(code.split()).removeprefix("sparsekit "))
    return list(dict.fromkeys(found))


def unknown(line: str) -> list[str]:
    """The words of a command that there are not: verbs of a group, and options."""
    command, words = typer.main.get_command(app), shlex.split(line)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        verb = words.pop(0)
        if verb not in command.commands:
            return [verb]
        command = command.commands[verb]
    options = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
    return sorted(options - {name for p in command.params for name in (*p.opts, *p.secondary_opts)})


def test_readme_is_short():
    assert len(README.splitlines()) <= LONGEST


def test_there_are_commands_to_check():
    assert {"recipe ls", "bench infer pruned packed", "eval --save"} <= set(lines())
    assert "verify pruned --pattern 2:4" in lines()  # of a block of text
    assert "bench recover demo --batch 8 --length 256" in lines()  # of recipes/README.md


@pytest.mark.parametrize("line", lines())
def test_command_and_its_options_exist(line):
    assert unknown(line) == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("recipe foo", "foo"),
        ("bench infr a b", "infr"),
        ("bench recover demo --bach 8", "--bach"),
        ("eval --sav", "--sav"),
        ("--instal-completion", "--instal-completion"),
        ("prun demo", "prun"),
    ],
)
def test_what_there_is_not_is_found(line, wrong):
    assert unknown(line) == [wrong]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipe_of_the_readme_is_one(text):
    assert [s.name for s in parse(text).steps if s.verb == "recover"] == [
        "pruned-wanda.ast",
        "pruned-sparsegpt.ast",
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python_compiles_and_uses_what_sparsekit_has(text):
    compile(text, "README.md", "exec")
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    ours = [call for call in calls if ast.unparse(call.func).startswith("sparsekit.")]
    assert ours
    for call in ours:
        function = getattr(sparsekit, ast.unparse(call.func).removeprefix("sparsekit."))
        words = {word.arg: word.value for word in call.keywords}
        inspect.signature(function).bind(*call.args, **words)
        if given := inspect.get_annotations(function).get("given"):  # as Unpack[PruneWords]
            known = getattr(api, re.findall(r"\w+", given)[-1]).__annotations__
            assert set(words) - set(inspect.signature(function).parameters) <= set(known)
