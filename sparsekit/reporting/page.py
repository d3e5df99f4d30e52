"""HTML report in one page, without other files, network access or scripts."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from datetime import date
from html import escape
from pathlib import Path
from typing import Any

from sparsekit.errors import UsageError
from sparsekit.files import storage_errors, write_atomic
from sparsekit.reporting.commands import commands
from sparsekit.reporting.compare import Comparison, compare
from sparsekit.reporting.figures import figures
from sparsekit.reporting.model_row import Row
from sparsekit.reporting.table import Column, captions, columns, summary

CSS = """\
:root { color-scheme: light; --ink: #1a1a1a; --paper: #fff; --line: #d4d4d4; --soft: #f3f3f3;
  --best: #0072b2; --faint: #595959; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #242424;
    --best: #56b4e9; --faint: #a8a8a8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 0.3rem; overflow-wrap: anywhere; }
p, .notes { color: var(--faint); font-size: 0.875rem; margin: 0.4rem 0; }
.notes { padding-left: 1.2rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.8125rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.3125rem 0.5rem; line-height: 1.25rem;
  border-bottom: 1px solid var(--line); text-align: left; vertical-align: bottom; }
td { white-space: nowrap; }
thead th { min-width: 3.5rem; }
.number { text-align: right; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600;
  min-width: min(40vw, 10rem); max-width: 40vw; overflow-wrap: break-word; }
.best > * { background: var(--soft); }
.best > th { background: var(--soft); box-shadow: inset 3px 0 var(--best); }
.figures { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; max-width: 40rem; }
figcaption { font-weight: 600; font-size: 0.9rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; }
pre { background: var(--soft); padding: 0.6rem 0.8rem; margin: 0.3rem 0; font-size: 0.8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.summary { color: var(--ink); font-size: 1rem; }
summary { cursor: pointer; font-size: 0.875rem; }
"""
# Marks pages of sparsekit, which may be replaced.
MARK = '<meta name="generator" content="sparsekit report">'
# No name in the page can make a browser load or run anything.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report(folders: Sequence[Path], out: Path) -> Comparison:
    """Compare the models in folders and write the page.

    Args:
        folders: Folders for `compare`.
        out: The file to write; an earlier page is replaced.

    Raises:
        UsageError: `out` is another file, or a folder.
        DataError: A folder is not a checkpoint and holds none, or a file in one is damaged.
        StorageError: The page cannot be written.
    """
    _refuse(out)
    comparison = compare(folders)
    text = page(comparison)
    with storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, text.encode())
    return comparison


def page(comparison: Comparison, day: date | None = None) -> str:
    """The page as HTML, the same bytes for the same models on the same day.

    Args:
        comparison: The models.
        day: Date at the end of the page; None: today.
    """
    count = len(comparison.rows)
    title = f"{count} model{'s' if count != 1 else ''}, measured by sparsekit"
    day = day or date.today()
    notes = [*captions(comparison), *comparison.notes]
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
{_summary(comparison)}
{_table(columns(comparison), comparison)}
<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>
{figures(comparison)}
<section>
<h2>Made with</h2>
{"".join(map(_made, comparison.rows))}</section>
</main>
<footer><p>Written by sparsekit {escape(importlib.metadata.version("sparsekit"))} on
{day.isoformat()}.</p></footer>
</body>
</html>
"""


def _summary(comparison: Comparison) -> str:
    text = summary(comparison)
    return f'<p class="summary">{escape(text)}</p>' if text else ""


def _table(shown: Sequence[Column], comparison: Comparison) -> str:
    """The table; the names of the models stay visible when it scrolls."""
    marks = [comparison.best(windows) for windows in comparison.windows]
    head = "".join(
        f'<th scope="col"{_kind(column)}>{escape(column.title)}</th>' for column in shown
    )
    body = []
    for index in range(len(comparison.rows)):
        name, *cells = [escape(column.texts[index]) for column in shown]
        mark = ' class="best"' if any(best[index] for best in marks) else ""
        data = "".join(
            f"<td{_kind(column)}>{cell}</td>" for column, cell in zip(shown[1:], cells, strict=True)
        )
        body.append(f'<tr{mark}><th scope="row">{name}</th>{data}</tr>\n')
    return (
        '<div class="scroll" role="region" aria-label="models" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(body)}</tbody>\n</table>\n</div>"
    )


def _kind(column: Column) -> str:
    return ' class="number"' if column.numeric else ""


def _made(row: Row) -> str:
    """Commands that make a model again, and its recorded history and scores."""
    if not (row.history or row.scores or row.stored):
        return ""  # a baseline that is known only from the scores of others
    lines = "\n".join(commands(row)) or "# unknown"
    history = [
        {k: v for k, v in entry.to_json().items() if k not in ("weights", "mask")}
        for entry in row.history
    ]
    scores = [score.to_json() for score in row.scores]
    details = json.dumps(
        _rounded({"history": history, "scores": scores}), indent=1, ensure_ascii=False
    )
    return (
        f"<h3>{escape(row.name)}</h3>\n<pre>{escape(lines)}</pre>\n<details>"
        f"<summary>all options and versions</summary><pre>{escape(details)}</pre></details>\n"
    )


def _rounded(value: Any) -> Any:
    """A JSON value with floats rounded to six digits."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _refuse(out: Path) -> None:
    """Refuse to replace a file that is not a report.

    Raises:
        UsageError: `out` is a folder or another file.
    """
    if out.is_dir():
        raise UsageError(
            f"{out} is a folder", "name a file, e.g. --out report.html", code="not-a-file"
        )
    if out.is_file():
        with out.open("rb") as file:
            if MARK.encode() not in file.read(4096):
                message = f"{out} is not a report of sparsekit"
                raise UsageError(message, "choose another --out", code="not-a-report")
