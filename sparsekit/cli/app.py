"""Verbs of the command line. A command parses, calls one stage, and shows its report."""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli import streams
from sparsekit.cli.verb import Command, Group

# Verbs by panel of the help, each with its file and function or group in this folder.
VERBS = {
    "Make": {
        "prune": "prune:prune",
        "recover": "recover:recover",
        "quantize": "quantize:quantize",
        "pack": "pack:pack",
        "unpack": "pack:unpack",
        "convert": "pack:convert",
    },
    "Measure": {
        "eval": "eval:evaluate",
        "inspect": "inspect:inspect",
        "verify": "inspect:verify",
        "bench": "bench:app",
    },
    "Look": {
        "compare": "report:compare",
        "report": "report:report",
        "deploy": "inspect:deploy",
        "methods": "about:list_methods",
        "env": "about:env",
    },
    "Run": {"run": "study:run", "recipe": "study:app", "demo": "study:demo"},
}
PLACES = {name: at.split(":") for verbs in VERBS.values() for name, at in verbs.items()}


class Commands(Mapping[str, Any]):
    """The commands of all verbs by name, each of which is imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        return _command(name)

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


class Verbs(Group):
    """The group of all verbs."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Commands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the verbs by panel, with summaries from the source files: none is imported."""
        for panel, verbs in VERBS.items():
            with formatter.section(panel):
                formatter.write_dl([(name, summary(name)) for name in verbs])


def summary(name: str) -> str:
    """The first paragraph of a verb's docstring, or the help of its group."""
    file, attribute = PLACES[name]
    tree = ast.parse(Path(__file__).with_name(f"{file}.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return (ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == attribute:
            values = {word.arg: word.value for word in getattr(node.value, "keywords", ())}
            return ast.literal_eval(values["help"])
    raise LookupError(f"{file} has no {attribute}")


@cache
def _command(name: str) -> Any:
    """Import a verb.

    Raises:
        KeyError: There is no such verb.
    """
    file, attribute = PLACES[name]
    verb = getattr(import_module(f"sparsekit.cli.{file}"), attribute)
    if isinstance(verb, typer.Typer):
        return typer.main.get_group(verb)
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Command)(verb)
    return typer.main.get_command(alone)


app = typer.Typer(
    cls=Verbs,
    help="Prune Hugging Face language-model checkpoints on disk, and know what it cost.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the versions.")] = False,
) -> None:
    if version:
        from sparsekit.cli.about import version_text

        print(version_text())
        raise typer.Exit()


def main() -> None:
    """Run the command line."""
    stdout = streams.guard()
    try:
        # The same name under `python -m`, also for shell completion.
        app(prog_name="sparsekit")
    except SystemExit as end:
        raise SystemExit(streams.exit_code(stdout, end.code)) from None
