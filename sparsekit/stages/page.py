"""The report: one HTML page that needs nothing else, neither files, network nor scripts."""

import importlib.metadata
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from sparsekit.errors import UsageError
from sparsekit.files import storage_errors, write_atomic
from sparsekit.stages.commands import commands
from sparsekit.stages.compare import Comparison, compare
from sparsekit.stages.comparetable import Column, captions, columns
from sparsekit.stages.modelrow import Row
from sparsekit.stages.pagefigures import figures
from sparsekit.stages.pagestyle import CSS

# A page with this may be replaced.
MARK = '<meta name="generator" content="sparsekit report">'
# Whatever a name in the page says, a browser loads nothing and runs nothing.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare the models in folders, as `compare` does, and write the page.

    Args:
        folders: As of `compare`.
        out: The file to write; an earlier page is replaced.

    Raises:
        UsageError: `out` is another file, or a folder.
        DataError: A folder is no checkpoint and holds none, or a file in one is damaged.
        StorageError: The page cannot be written.
    """
    _refuse(out)
    comparison = compare(folders)
    text = page(comparison)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())
    return comparison


def page(comparison: Comparison) -> str:
    """The page as HTML; the same models give the same bytes."""
    count = len(comparison.rows)
    title = f"{count} model{'s' if count != 1 else ''}, measured by sparsekit"
    told = [*captions(comparison), *comparison.notes]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}
<title>{title}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{_table(columns(comparison), comparison)}
<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in told)}</ul>
{figures(comparison)}
<section>
<h2>Made with</h2>
{"".join(_made(row) for row in comparison.rows)}</section>
</main>
<footer><p>Written by sparsekit {escape(importlib.metadata.version("sparsekit"))}.</p></footer>
</body>
</html>
"""


def _table(made: Sequence[Column], comparison: Comparison) -> str:
    """The table; the names of the models stay in sight when it scrolls."""
    marks = [comparison.best(windows) for windows in comparison.windows]
    head = "".join(f'<th scope="col"{_kind(column)}>{escape(column.title)}</th>' for column in made)
    body = []
    for index in range(len(comparison.rows)):
        name, *cells = [escape(column.texts[index]) for column in made]
        mark = ' class="best"' if any(best[index] for best in marks) else ""
        told = "".join(
            f"<td{_kind(column)}>{cell}</td>" for column, cell in zip(made[1:], cells, strict=True)
        )
        body.append(f'<tr{mark}><th scope="row">{name}</th>{told}</tr>\n')
    return (
        '<div class="scroll" role="region" aria-label="models" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>"
    )


def _kind(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _made(row: Row) -> str:
    """How to make a model again: its commands, and all that its history and scores record."""
    lines = "\n".join(commands(row)) or "# nothing is known"
    history = [
        {k: v for k, v in entry.items() if k not in ("weights", "mask")} for entry in row.history
    ]
    told = json.dumps(
        {"history": history, "scores": list(row.scores)}, indent=1, ensure_ascii=False
    )
    return (
        f"<h3>{escape(row.name)}</h3>\n<pre>{escape(lines)}</pre>\n"
        f"<details><summary>all options and versions</summary><pre>{escape(told)}</pre></details>\n"
    )


def _refuse(out: Path) -> None:
    """Refuse a file that is not a page of ours.

    Raises:
        UsageError: It would be lost.
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder", "name a file, as --out report.html")
    if out.is_file():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(4096):
                raise UsageError(f"{out} is no report of sparsekit", "choose another --out")
