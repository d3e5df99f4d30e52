"""Table of a comparison as text, CSV and Markdown."""

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

# Characters with a meaning in Markdown.
SIGNS = re.compile(r"([\\|<*`\[])")
BEST = "no other model is smaller and at least as good, or better and at least as small"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column for people, made from one or more CSV columns."""

    title: str
    names: tuple[str, ...]
    """Names of the CSV columns."""
    values: Sequence[tuple[Any, ...]]
    """For each row one value per name; None: no value."""
    form: Callable[..., str]
    """Formats the values of a cell."""
    numeric: bool = True

    @property
    def texts(self) -> list[str]:
        """Formatted cells; empty if the first value is None."""
        return ["" if row[0] is None else self.form(*row) for row in self.values]


def columns(comparison: Comparison, *, brief: bool = False) -> list[Column]:
    """Columns with any value, from left to right.

    Figures measured on different data have separate columns.

    Args:
        comparison: The models.
        brief: Whether titles refer to the data by a number, which `captions` explains, instead of
            naming it.
    """
    rows = comparison.rows
    every = [
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
    return [column for column in every if any(row[0] is not None for row in column.values)]


def captions(comparison: Comparison, *, brief: bool = False) -> list[str]:
    """Explanations of the column titles."""
    lines = []
    measured = {"perplexity": comparison.windows, "zero-shot": comparison.task_sets}
    for metric, keys in measured.items():
        if len(keys) == 1 or brief:
            numbers = ["" if len(keys) == 1 else f" ({n})" for n in range(1, len(keys) + 1)]
            named = zip(numbers, headings(keys), strict=True)
            lines += [f"{metric}{number}: {title}" for number, title in named]
    if any(any(comparison.best(windows)) for windows in comparison.windows):
        lines.append(f"*: {BEST}")
    return lines


def summary(comparison: Comparison) -> str:
    """Sentence on the best and the smallest model and their baseline.

    It is empty unless two models have a perplexity on the same windows.
    """
    measured = {
        key: [row for row in comparison.rows if row.history and key in row.quality]
        for key in comparison.windows
    }
    if not (most := max(measured.items(), key=lambda item: len(item[1]), default=None)):
        return ""
    key, rows = most
    if not rows or sum(key in row.quality for row in comparison.rows) < 2:
        return ""
    best = min(rows, key=lambda row: row.quality[key].figure.value)
    text = f"Best: {best.name}, {_worth(best, key)}"
    sized = [row for row in rows if row.n_bytes is not None]
    if sized:
        smallest = min(sized, key=lambda row: (row.n_bytes, row.quality[key].figure.value))
        size = f"{smallest.n_bytes / 1e6:,.1f} MB"
        text += (
            f"; it is also the smallest, {size}"
            if smallest is best
            else (f"; smallest: {smallest.name}, {size}, {_worth(smallest, key)}")
        )
    return f"{text}; on {key.title}."


def _worth(row: Row, key: Windows) -> str:
    """Perplexity of a row, and its ratio to that of each baseline."""
    quality = row.quality[key]
    against = "".join(
        f", {perplexity_of(difference.value):,.2f} times {short(name)}"
        for name, difference in quality.differences.items()
    )
    return f"perplexity {perplexity_of(quality.figure.value):,.2f}{against}"


def to_csv(comparison: Comparison) -> str:
    """The table as CSV, with full precision."""
    shown = columns(comparison)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([name for column in shown for name in column.names])
    for cells in zip(*(column.values for column in shown), strict=True):
        writer.writerow([value for cell in cells for value in cell])
    return file.getvalue().removesuffix("\n")


def to_markdown(comparison: Comparison) -> str:
    """The table as Markdown, followed by its notes."""
    shown = columns(comparison)
    lines = [
        [column.title for column in shown],
        *zip(*(column.texts for column in shown), strict=True),
    ]
    head, *body = [f"| {' | '.join(map(_escaped, cells))} |" for cells in lines]
    rule = f"|{'|'.join('---:' if column.numeric else '---' for column in shown)}|"
    below = [f"- {_escaped(note)}" for note in (*captions(comparison), *comparison.notes)]
    return "\n".join([head, rule, *body, *([""] if below else []), *below])


def short(name: str) -> str:
    """Last part of a path or hub id."""
    return Path(name).name or name


def with_error(value: float, stderr: float | None, sign: str = "") -> str:
    """A figure, with its standard error if it has one."""
    return f"{value:{sign}.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")


def _escaped(text: str) -> str:
    """Text escaped for Markdown, in one line."""
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
    """Column with one value per row."""
    values = [(value(row),) for row in rows]
    return Column(title=title or name, names=(name,), values=values, form=form, numeric=numeric)


def _perplexities(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """Perplexity and Pareto-optimal rows, for each key."""
    keys = comparison.windows
    for key, suffix in _suffixes(keys, brief):
        measurements = [row.quality.get(key) for row in comparison.rows]
        yield Column(
            title=f"perplexity{suffix}",
            names=tuple(f"{n}{suffix}" for n in ("perplexity", "log_perplexity", "log_stderr")),
            values=[
                (None, None, None)
                if q is None
                else (perplexity_of(q.figure.value), q.figure.value, q.figure.stderr)
                for q in measurements
            ],
            form=lambda value, *_: f"{value:,.2f}",
        )
        marks = zip(measurements, comparison.best(key), strict=True)
        yield Column(
            title=f"best{suffix}",
            names=(f"best{suffix}",),
            values=[(None if q is None else "yes" if best else "no",) for q, best in marks],
            form=lambda best: "*" if best == "yes" else "",
            numeric=False,
        )


def _times(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """Perplexity as a multiple of that of each baseline, for each key."""
    for key, suffix in _suffixes(comparison.windows, brief):
        for name, label in _baselines(comparison, key):
            differences = _differences_to(comparison, key, name)
            yield Column(
                title=f"times {label}{suffix}",
                names=(f"perplexity_times {label}{suffix}",),
                values=[(None if d is None else perplexity_of(d.value),) for d in differences],
                form="{:,.2f}".format,
            )


def _log_differences(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """Differences of log perplexity, for each key."""
    for key, suffix in _suffixes(comparison.windows, brief):
        yield from _differences(comparison, key, "log", suffix)


def _means(comparison: Comparison, brief: bool) -> Iterator[Column]:
    """Mean accuracy and its differences, for each key."""
    for key, suffix in _suffixes(comparison.task_sets, brief):
        measurements = [row.quality.get(key) for row in comparison.rows]
        yield Column(
            title=f"zero-shot{suffix}",
            names=(f"zero_shot{suffix}", f"zero_shot_stderr{suffix}"),
            values=[
                (None, None) if q is None else (q.figure.value, q.figure.stderr)
                for q in measurements
            ],
            form=with_error,
        )
        yield from _differences(comparison, key, "zero-shot", suffix)


def _differences(
    comparison: Comparison, key: Measured, metric: str, suffix: str
) -> Iterator[Column]:
    """Paired differences, one column per baseline."""
    for name, label in _baselines(comparison, key):
        differences = _differences_to(comparison, key, name)
        plain = f"{metric.replace('-', '_')}_difference"
        to = f" to {label}"
        yield Column(
            title=f"{metric} difference{to}{suffix}",
            names=(f"{plain}{to}{suffix}", f"{plain}_stderr{to}{suffix}"),
            values=[(None, None) if d is None else (d.value, d.stderr) for d in differences],
            form=lambda value, stderr: with_error(value, stderr, "+"),
        )


def _baselines(comparison: Comparison, key: Measured) -> Iterator[tuple[str, str]]:
    """Each baseline with its name in titles: short if that is unique."""
    names = comparison.baselines(key)
    shown = [short(name) for name in names]
    alike = len(set(shown)) < len(shown)
    yield from zip(names, names if alike else shown, strict=True)


def _differences_to(comparison: Comparison, key: Measured, name: str) -> list[Figure | None]:
    """Difference of each row to one baseline, if measured."""
    return [
        row.quality[key].differences.get(name) if key in row.quality else None
        for row in comparison.rows
    ]


def _suffixes(keys: Sequence[Measured], brief: bool) -> Iterator[tuple[Any, str]]:
    """Each key with the suffix of its titles: empty if there is only one key."""
    for number, (key, title) in enumerate(zip(keys, headings(keys), strict=True), 1):
        yield key, "" if len(keys) == 1 else f" ({number if brief else title})"


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
