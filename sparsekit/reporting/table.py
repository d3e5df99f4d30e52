"""The one table of a comparison: its columns, as text for people, as CSV and as Markdown."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.reporting.compare import Comparison
from sparsekit.reporting.model_row import Row
from sparsekit.scoring.quality import Measured, Windows, headings, perplexity_of
from sparsekit.scoring.standard_error import Figure

# Signs of Markdown that change the text around them.
SIGNS = re.compile(r"([\\|<*`\[])")
BEST = "no other model is smaller and at least as good, or better and at least as small"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column for people, of one or more for machines."""

    title: str
    names: tuple[str, ...]
    """Of the columns for machines."""
    values: Sequence[tuple[Any, ...]]
    """For each row one of each name; None where there is nothing."""
    form: Callable[..., str]
    """What stands in a cell, made of its values."""
    numeric: bool = True

    @property
    def texts(self) -> list[str]:
        """The cells for people; empty where the first value is None."""
        return ["" if told[0] is None else self.form(*told) for told in self.values]


def columns(comparison: Comparison, *, brief: bool = False) -> list[Column]:
    """All columns that have anything to tell, from left to right.

    Figures that were not measured on the same stand in columns of their own.

    Args:
        comparison: The models.
        brief: Whether the titles of those columns have numbers, which `captions` tells the meaning
            of, in the place of what was measured on.
    """
    rows = comparison.rows
    made = [
        _plain(rows, "model", lambda row: row.name, str, numeric=False),
        *_perplexities(comparison, brief),
        *_times(comparison, brief),
        _plain(rows, "method", lambda row: row.method or None, str, numeric=False),
        _plain(rows, "pattern", lambda row: row.pattern, str, numeric=False),
        _plain(rows, "bytes", lambda row: row.n_bytes, lambda n: f"{n / 1e6:,.1f}", "size, MB"),
        _plain(rows, "bits_per_weight", lambda row: row.bits, "{:.2f}".format, "bits per weight"),
        *_log_differences(comparison, brief),
        *_means(comparison, brief),
        _plain(rows, "seconds", lambda row: row.seconds, _seconds),
        _plain(rows, "tokens", lambda row: row.tokens, "{:,}".format, "tokens trained on"),
        _plain(
            rows,
            "peak_memory_bytes",
            lambda row: row.peak_bytes,
            lambda n: f"{n / 1e6:,.0f}",
            "peak memory, MB",
        ),
    ]
    return [column for column in made if any(told[0] is not None for told in column.values)]


def captions(comparison: Comparison, *, brief: bool = False) -> list[str]:
    """What the figures are of, where the titles of the columns do not say it."""
    told = []
    measured = {"perplexity": comparison.windows, "zero-shot": comparison.task_sets}
    for what, keys in measured.items():
        if len(keys) == 1 or brief:
            numbers = ["" if len(keys) == 1 else f" ({n})" for n in range(1, len(keys) + 1)]
            named = zip(numbers, headings(keys), strict=True)
            told += [f"{what}{number}: {title}" for number, title in named]
    if any(any(comparison.best(windows)) for windows in comparison.windows):
        told.append(f"*: {BEST}")
    return told


def summary(comparison: Comparison) -> str:
    """One sentence: the best model and the smallest, against the one they were compared with.

    It is empty where no two models have a perplexity on the same windows.
    """
    measured = {
        key: [row for row in comparison.rows if row.history and key in row.quality]
        for key in comparison.windows
    }
    if not (found := max(measured.items(), key=lambda item: len(item[1]), default=None)):
        return ""
    key, rows = found
    if not rows or sum(key in row.quality for row in comparison.rows) < 2:
        return ""
    best = min(rows, key=lambda row: row.quality[key].figure.value)
    told = f"Best: {best.name}, {_worth(best, key)}"
    sized = [row for row in rows if row.n_bytes is not None]
    if sized:
        smallest = min(sized, key=lambda row: (row.n_bytes, row.quality[key].figure.value))
        size = f"{smallest.n_bytes / 1e6:,.1f} MB"
        told += (
            f"; it is also the smallest, {size}"
            if smallest is best
            else (f"; smallest: {smallest.name}, {size}, {_worth(smallest, key)}")
        )
    return f"{told}; on {key.title}."


def _worth(row: Row, key: Windows) -> str:
    """The perplexity of a row, and what it is against that of the models it was compared with."""
    quality = row.quality[key]
    against = "".join(
        f", {perplexity_of(difference.value):,.2f} times {short(name)}"
        for name, difference in quality.differences.items()
    )
    return f"perplexity {perplexity_of(quality.figure.value):,.2f}{against}"


def to_csv(comparison: Comparison) -> str:
    """The table with full precision, for machines."""
    made = columns(comparison)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([name for column in made for name in column.names])
    for cells in zip(*(column.values for column in made), strict=True):
        writer.writerow([value for told in cells for value in told])
    return file.getvalue().removesuffix("\n")


def to_markdown(comparison: Comparison) -> str:
    """The table for people, with what has to be known of it below."""
    made = columns(comparison)
    lines = [
        [column.title for column in made],
        *zip(*(column.texts for column in made), strict=True),
    ]
    head, *body = [f"| {' | '.join(map(_escaped, cells))} |" for cells in lines]
    rule = f"|{'|'.join('---:' if column.numeric else '---' for column in made)}|"
    below = [f"- {_escaped(note)}" for note in (*captions(comparison), *comparison.notes)]
    return "\n".join([head, rule, *body, *([""] if below else []), *below])


def short(name: str) -> str:
    """What a model is called in a title: the last part of its path or hub id."""
    return Path(name).name or name


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """A figure, with its standard error where it has one."""
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _escaped(text: str) -> str:
    """A text that Markdown shows as it is, in one line."""
    return SIGNS.sub(r"\\\1", " ".join(text.split()))


def _plain(
    rows: Sequence[Row],
    name: str,
    value: Callable[[Row], Any],
    form: Callable[[Any], str],
    title: str = "",
    *,
    numeric: bool = True,
) -> Column:
    """A column of one value each."""
    values = [(value(row),) for row in rows]
    return Column(title=title or name, names=(name,), values=values, form=form, numeric=numeric)


def _perplexities(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """For all windows the perplexity, and which rows are best."""
    keys = comparison.windows
    for key, suffix in _suffixes(keys, brief):
        told = [row.quality.get(key) for row in comparison.rows]
        yield Column(
            title=f"perplexity{suffix}",
            names=tuple(f"{n}{suffix}" for n in ("perplexity", "log_perplexity", "log_stderr")),
            values=[
                (None, None, None)
                if q is None
                else (perplexity_of(q.figure.value), q.figure.value, q.figure.stderr)
                for q in told
            ],
            form=lambda value, *_: f"{value:,.2f}",
        )
        marks = zip(told, comparison.best(key), strict=True)
        yield Column(
            title=f"best{suffix}",
            names=(f"best{suffix}",),
            values=[(None if q is None else "yes" if best else "no",) for q, best in marks],
            form=lambda best: "*" if best == "yes" else "",
            numeric=False,
        )


def _times(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """For all windows the perplexity as a multiple of that of each baseline."""
    for key, suffix in _suffixes(comparison.windows, brief):
        for name, called in _baselines(comparison, key):
            differences = _differences_to(comparison, key, name)
            yield Column(
                title=f"times {called}{suffix}",
                names=(f"perplexity_times {called}{suffix}",),
                values=[(None if d is None else perplexity_of(d.value),) for d in differences],
                form="{:,.2f}".format,
            )


def _log_differences(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """For all windows the differences of the logarithm of the perplexity."""
    for key, suffix in _suffixes(comparison.windows, brief):
        yield from _differences(comparison, key, "log", suffix)


def _means(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """For all sets of tasks the mean accuracy, and the differences."""
    for key, suffix in _suffixes(comparison.task_sets, brief):
        told = [row.quality.get(key) for row in comparison.rows]
        yield Column(
            title=f"zero-shot{suffix}",
            names=(f"zero_shot{suffix}", f"zero_shot_stderr{suffix}"),
            values=[(None, None) if q is None else (q.figure.value, q.figure.stderr) for q in told],
            form=with_error,
        )
        yield from _differences(comparison, key, "zero-shot", suffix)


def _differences(comparison: Comparison, key: Measured, what: str, suffix: str) -> Iterator[Column]:
    """The paired differences, to each baseline in a column of its own."""
    for name, called in _baselines(comparison, key):
        differences = _differences_to(comparison, key, name)
        plain = f"{what.replace('-', '_')}_difference"
        to = f" to {called}"
        yield Column(
            title=f"{what} difference{to}{suffix}",
            names=(f"{plain}{to}{suffix}", f"{plain}_stderr{to}{suffix}"),
            values=[(None, None) if d is None else (d.value, d.stderr) for d in differences],
            form=lambda value, stderr: with_error(value, stderr, "+"),
        )


def _baselines(comparison: Comparison, key: Measured) -> Iterator[tuple[str, str]]:
    """Each baseline with its name in titles: the whole one where short ones are equal."""
    names = comparison.baselines(key)
    shown = [short(name) for name in names]
    alike = len(set(shown)) < len(shown)
    yield from zip(names, names if alike else shown, strict=True)


def _differences_to(comparison: Comparison, key: Measured, name: str) -> list[Figure | None]:
    """The difference of each row to one baseline, where it was measured."""
    return [
        row.quality[key].differences.get(name) if key in row.quality else None
        for row in comparison.rows
    ]


def _suffixes(keys: Sequence[Measured], brief: bool) -> Iterator[tuple[Any, str]]:
    """Each with what has to stand in its titles: nothing where there is only one."""
    for number, (key, title) in enumerate(zip(keys, headings(keys), strict=True), 1):
        yield key, "" if len(keys) == 1 else f" ({number if brief else title})"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
