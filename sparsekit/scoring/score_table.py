"""Table of scores in a model card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.files import write_atomic
from sparsekit.scoring.quality import Quality, TaskSet, headings, perplexity_of, qualities
from sparsekit.scoring.score_entry import ScoreEntry
from sparsekit.scoring.standard_error import Figure

# Delimiters of the section that this module writes.
BEGIN, END = "<!-- sparsekit: scores -->", "<!-- sparsekit: end of scores -->"
SECTION = re.compile(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", re.DOTALL)
HEAD = """\
| measured on | baseline | this checkpoint | difference |
|---|---|---|---|"""


def write_scores(folder: Path, entries: Iterable[ScoreEntry]) -> None:
    """Write a table of scores at the end of a folder's card, replacing an older one.

    The rest of the card stays. A folder that sparsekit did not write, or that has no card, is left
    unchanged.

    Args:
        folder: Folder of the checkpoint.
        entries: Scores from `read_scores`.

    Raises:
        StorageError: The disk is full.
    """
    card = folder / "README.md"
    if not (folder / PROVENANCE).is_file() or not card.is_file():
        return
    text = SECTION.sub("\n", card.read_text(encoding="utf-8")).rstrip("\n")
    table = scores_table(entries)
    write_atomic(card, f"{text}\n\n{BEGIN}\n{table}\n{END}\n".encode())


def scores_table(entries: Iterable[ScoreEntry]) -> str:
    """Markdown section with one row per text or set of tasks, and baseline.

    Values and paired differences have standard errors. A baseline's own value that was not saved is
    the value minus the difference.
    """
    measured = qualities(entries)
    rows = []
    for heading, (key, quality) in zip(headings(list(measured)), measured.items(), strict=True):
        rows += _task_rows(heading, quality) if isinstance(key, TaskSet) else []
        rows += _text_rows(heading, quality) if not isinstance(key, TaskSet) else []
    lines = "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows)
    return (
        f"## Scores\n\n{HEAD}\n{lines}\n\n± is followed by the standard error; differences are "
        "paired, over the same windows or samples."
    )


def _text_rows(heading: str, quality: Quality) -> list[tuple[str, str, str, str]]:
    """Perplexity on a text, with its difference in nats to each baseline."""
    figure = quality.figure
    here = _of_log(figure)
    rows = []
    for name, difference in quality.differences.items():
        before = f"{_of_log(_before(quality, name))} ({_name(name)})"
        change = f"{_figure(difference, signed=True)} in log perplexity"
        rows.append((f"perplexity, {heading}", before, here, change))
    return rows or [(f"perplexity, {heading}", "-", here, "-")]


def _task_rows(heading: str, quality: Quality) -> list[tuple[str, str, str, str]]:
    """Mean accuracy with its difference to each baseline, and the accuracy of each task."""
    figure = quality.figure
    rows = []
    for name, difference in quality.differences.items():
        before = f"{_figure(_before(quality, name))} ({_name(name)})"
        change = _figure(difference, signed=True)
        rows.append((f"mean accuracy, {heading}", before, _figure(figure), change))
    rows = rows or [(f"mean accuracy, {heading}", "-", _figure(figure), "-")]
    tasks = quality.tasks if len(quality.tasks) > 1 else {}
    return rows + [(f"accuracy, {name}", "", _figure(task), "") for name, task in tasks.items()]


def _before(quality: Quality, name: str) -> Figure:
    """Value of a baseline; without a standard error if none was saved."""
    value = quality.figure.value - quality.differences[name].value
    return quality.baselines.get(name, Figure(value=value, stderr=None))


def _of_log(figure: Figure) -> str:
    """A perplexity with its standard error, from its logarithm."""
    value = perplexity_of(figure.value)
    if figure.stderr is None or not math.isfinite(value):
        return f"{value:.2f}"
    return f"{value:.2f} ± {value * figure.stderr:.2f}"


def _figure(figure: Figure, *, signed: bool = False) -> str:
    """A number with its standard error."""
    value = f"{figure.value:+.4f}" if signed else f"{figure.value:.4f}"
    return value if figure.stderr is None else f"{value} ± {figure.stderr:.4f}"


def _name(baseline: str) -> str:
    """Last part of a folder's path; a hub id stays."""
    return Path(baseline).name if Path(baseline).is_absolute() or baseline[:1] == "." else baseline


def _cell(text: str) -> str:
    """Text escaped for one cell."""
    return " ".join(text.split()).replace("|", "\\|")
