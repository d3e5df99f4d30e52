"""The verbs `compare` and `report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli.showcompare import show_comparison, show_report
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Quiet
from sparsekit.errors import UsageError

Folders = Annotated[
    list[str],
    typer.Argument(
        help="Checkpoints, folders that hold some (as of a run), or - to read them from stdin."
    ),
]


def compare(
    folders: Folders,
    csv: Annotated[bool, typer.Option("--csv", help="Write the table to stdout as CSV.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Write the table to stdout as Markdown.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show models in one table: how they were made, what they take, and what they are worth.

    Example: sparsekit compare wanda sparsegpt recovered --markdown
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        if csv + markdown + json > 1:
            raise UsageError("stdout takes one of --json, --csv and --markdown", "leave out others")
        places = _places(folders)
        from sparsekit.stages.compare import compare as stage

        form = "csv" if csv else "markdown" if markdown else "paths"
        show_comparison(terminal, stage(places), form)


def report(
    folders: Folders,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page on models: the table, pictures, and how to make them again.

    Example: sparsekit report wanda sparsegpt recovered -o report.html
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        places = _places(folders)
        from sparsekit.stages.page import report as stage

        show_report(terminal, stage(places, out), out)


def _places(folders: list[str]) -> list[Path]:
    """The folders that are named; `-` stands for the lines of stdin.

    Raises:
        UsageError: stdin names none.
    """
    names: list[str] = []
    for name in folders:
        names += [line.strip() for line in sys.stdin if line.strip()] if name == "-" else [name]
    if not names:
        raise UsageError(
            "no folder on stdin", "pipe paths, as: sparsekit compare … | sparsekit report -"
        )
    return [Path(name).expanduser() for name in names]
