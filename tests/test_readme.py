"""The README says what is there: its commands and their options, and its code; all of it runs."""

import ast
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer

import sparsekit
from sparsekit.cli.app import app
from sparsekit.study.recipe import parse

ROOT = Path(__file__).parents[1]
README, RECIPES = (
    (ROOT / file).read_text(encoding="utf-8") for file in ("README.md", "recipes/README.md")
)
LONGEST = 250
LEGACY = Path(__file__).parent / "data" / "legacy" / "sparse-24-bitmask"
# What a tiny model has fewer of: tokens, windows, seconds, and inputs that share a scale.
SMALLER = [
    (r"--samples \d+", "--samples 4"),
    (r"--length \d+", "--length 32"),
    (r"--limit \d+", "--limit 2"),
    (r"--tokens \w+", "--tokens 1K --batch 2 --length 32 --lr 1e-4"),
    (r"--max-time \w+", "--max-time 15s --batch 2 --length 32"),
    (r"--accumulate \d+", ""),
    (r"--budget \w+", "--budget 5s"),
    (r"int4-g\d+", "int4-g16"),
    (r"prune.samples=16", "prune.samples=4 prune.length=32 eval.length=32 eval.limit=2"),
    (r"study.yaml -o study --dry-run", "study.yaml prune.length=32 -o study --dry-run"),
]
# Commands in the text leave out what the ones in blocks have.
REST = {
    "prune": "demo -o out-{n} --samples 4 --length 32",
    "quantize": "pruned -o out-{n} --samples 4 --length 32",
    "eval": "pruned --length 32 --limit 2",
}
# These are told by their own tests: they change the shell, or need several processes.
ELSEWHERE = ("--install-completion",)


def blocks(kind: str, text: str = README) -> list[str]:
    """The fenced blocks of a kind."""
    return re.findall(rf"```{kind}\n(.*?)```", text, flags=re.DOTALL)


def lines(page: str = README + RECIPES) -> list[str]:
    """Every command in a block or between backticks, from the word after `sparsekit`."""
    shown = blocks("text", page)
    shown = [line.removeprefix("$ ") for block in shown for line in block.splitlines()]
    shell = "\n".join([*shown, *blocks("sh", page)]).replace("\\\n", " ")
    found = re.findall(r"(?<![\w/.])sparsekit (\S.*)", "\n".join(re.split(r"[\n|]|&&", shell)))
    prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
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


def words(line: str, n: int, last: str) -> list[str]:
    """The words of a command as it is run here."""
    line = re.sub(r" > \S+", "", line)
    for old, new in SMALLER:
        line = re.sub(old, new, line)
    found = shlex.split(line)
    verb = found[0]
    models = [word for word in found[1:2] if not word.startswith("-") or word == "-"]
    if verb in REST and not models:
        found += shlex.split(REST[verb].format(n=n))
    return [last if word == "-" else word for word in found]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(cli, family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sparsekit.checkpoint.demo_model.demo_model", lambda *_: family("llama"))
    shutil.copytree(LEGACY, "old")
    last = ""
    for n, line in enumerate(lines(README)):
        if line.startswith(ELSEWHERE):
            continue
        given = words(line, n, last)
        if given[0] in ("prune", "recover", "quantize", "pack", "unpack", "convert", "run"):
            given += [] if given[0] == "run" else ["--overwrite"]
        ran = cli(*given)
        assert ran.code == 0, f"{line}: {shlex.join(given)}: {ran.stderr}"
        if given[0] in ("prune", "recover", "quantize"):
            last = ran.stdout.strip()
