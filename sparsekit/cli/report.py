"""Verbs `compare` and `report`."""

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Quiet
from sparsekit.errors import UsageError

if TYPE_CHECKING:
    from sparsekit.reporting.compare import Comparison
    from sparsekit.reporting.table import Column


Folders = Annotated[
    list[str],
    typer.Argument(help="Checkpoints, folders that contain some (e.g. of a run), or - for stdin."),
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
    """Show models in one table: method, size, cost and quality.

    Example: sparsekit compare wanda sparsegpt recovered --markdown
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        if csv + markdown + json > 1:
            message = "stdout takes one of --json, --csv and --markdown"
            raise UsageError(message, "leave out the others", code="conflicting-options")
        places = _places(folders)
        from sparsekit.reporting.compare import compare as stage

        form = "csv" if csv else "markdown" if markdown else "paths"
        show_comparison(terminal, stage(places), form)


def report(
    folders: Folders,
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path(
        "report.html"
    ),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an HTML report on models: table, charts, and commands to repeat them.

    Example: sparsekit report wanda sparsegpt recovered -o report.html
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        places = _places(folders)
        from sparsekit.reporting.page import report as stage

        show_report(terminal, stage(places, out), out)


def _places(folders: list[str]) -> list[Path]:
    """The given folders; `-` reads them from stdin.

    Raises:
        UsageError: stdin has none.
    """
    names: list[str] = []
    for name in folders:
        names += [line.strip() for line in sys.stdin if line.strip()] if name == "-" else [name]
    if not names:
        raise UsageError(
            "no folder on stdin",
            "pipe paths: sparsekit compare … | sparsekit report -",
            code="empty-stdin",
        )
    return [Path(name).expanduser() for name in names]


def show_comparison(
    terminal: Terminal, comparison: "Comparison", form: Literal["paths", "csv", "markdown"]
) -> None:
    """Show the table; stdout has one path per line, or the table as CSV or Markdown."""
    from sparsekit.reporting import table as comparetable

    show_table(terminal, comparison)
    paths = [str(row.path) for row in comparison.rows if row.stored]
    text = {
        "paths": lambda _: "\n".join(paths),
        "csv": comparetable.to_csv,
        "markdown": comparetable.to_markdown,
    }[form](comparison)
    terminal.result(text, comparison.to_json())


def show_report(terminal: Terminal, comparison: "Comparison", out: Path) -> None:
    """Show the notes; stdout has the path of the page."""
    for note in comparison.notes:
        terminal.note(f"note: {note}")
    terminal.result(out, {"out": str(out), **comparison.to_json()})


def show_table(terminal: Terminal, comparison: "Comparison") -> None:
    """Show the table and its notes."""
    from sparsekit.reporting.table import captions, columns

    shown = columns(comparison, brief=True)
    rows = list(zip(*(column.texts for column in shown), strict=True))
    title = f"{len(rows)} model{'s' if len(rows) > 1 else ''}"
    terminal.table(title, [_folded(column) for column in shown], rows)
    for caption in captions(comparison, brief=True):
        terminal.note(caption)
    for note in comparison.notes:
        terminal.note(f"note: {note}")


def _folded(column: "Column") -> str:
    """A title wrapped to the width of its column, but not within words."""
    width = max(map(len, (*column.texts, *column.title.split())))
    return textwrap.fill(column.title, width, break_long_words=False, break_on_hyphens=False)
