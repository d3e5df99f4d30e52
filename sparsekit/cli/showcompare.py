"""How the reports of `compare` and `report` look."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sparsekit.cli.console import Terminal

if TYPE_CHECKING:
    from sparsekit.stages.compare import Comparison
    from sparsekit.stages.comparetable import Column


def show_comparison(
    terminal: Terminal, comparison: "Comparison", form: Literal["paths", "csv", "markdown"]
) -> None:
    """The table; stdout has the paths of the models one a line, or the table in another form."""
    from sparsekit.stages import comparetable

    show_table(terminal, comparison)
    paths = [str(row.path) for row in comparison.rows if row.stored]
    text = {
        "paths": lambda _: "\n".join(paths),
        "csv": comparetable.to_csv,
        "markdown": comparetable.to_markdown,
    }[form](comparison)
    terminal.result(text, comparison.to_json())


def show_report(terminal: Terminal, comparison: "Comparison", out: Path) -> None:
    """What became of a page: its path."""
    for note in comparison.notes:
        terminal.note(f"note: {note}")
    terminal.result(out, {"out": str(out), **comparison.to_json()})


def show_table(terminal: Terminal, comparison: "Comparison") -> None:
    """The table for people, and below it what has to be known of it."""
    from sparsekit.stages.comparetable import captions, columns

    made = columns(comparison, brief=True)
    rows = list(zip(*(column.texts for column in made), strict=True))
    title = f"{len(rows)} model{'s' if len(rows) > 1 else ''}"
    terminal.table(title, [_folded(column) for column in made], rows)
    for caption in captions(comparison, brief=True):
        terminal.note(caption)
    for note in comparison.notes:
        terminal.note(f"note: {note}")


def _folded(column: "Column") -> str:
    """A title in lines no wider than the cells below it, as far as its words allow that."""
    width = max(map(len, (*column.texts, *column.title.split())))
    return textwrap.fill(column.title, width, break_long_words=False, break_on_hyphens=False)
