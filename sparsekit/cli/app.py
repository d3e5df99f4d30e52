"""Verbs of the command line. A command parses, calls one stage, and shows its report."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
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
PLACES = {name: (panel, *at.split(":")) for panel, v in VERBS.items() for name, at in v.items()}


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


@cache
def _command(name: str) -> Any:
    """Import a verb.

    Raises:
        KeyError: There is no such verb.
    """
    panel, file, attribute = PLACES[name]
    verb = getattr(import_module(f"sparsekit.cli.{file}"), attribute)
    if isinstance(verb, typer.Typer):
        group = typer.main.get_group(verb)
        group.name, group.rich_help_panel = name, panel
        return group
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(name, cls=Command, rich_help_panel=panel)(verb)
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
