"""The log of a training run: a row for each step, on disk as it comes, and its picture."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsekit.files import storage_errors, write_atomic

# Losses are drawn as means over so many points at most, so that a long run stays readable.
POINTS = 200
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
LOG = "sparsekit-training.jsonl"
CURVE = "sparsekit-training.png"
# The log while it grows.
PROGRESS = ".sparsekit-log.jsonl"


class TrainingLog:
    """What was told of the steps so far.

    Args:
        folder: Where the log grows; it may have one, of a run that goes on.
        steps: The steps that are taken; what the log tells of later ones is forgotten.
        writes: Whether this process writes, or another does.
    """

    def __init__(self, folder: Path, steps: int, *, writes: bool) -> None:
        self._file = folder / PROGRESS
        self._writes = writes
        self.rows = [row for row in _read(self._file) if row["step"] <= steps]
        self.earlier_steps = steps
        self.earlier_seconds: float = sum(row.get("seconds", 0.0) for row in self.rows)
        """Of steps that an interrupted run has taken."""

    def begin(self) -> None:
        """Put the rows on disk; all processes must have read what was there."""
        if self._writes:
            write_atomic(self._file, _lines(self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Take the row of a step, and put it on disk.

        Raises:
            StorageError: The disk is full.
        """
        self.rows.append(row)
        if self._writes:
            with storage_errors(self._file), self._file.open("ab") as file:
                file.write(_lines([row]))

    @property
    def kept_mass(self) -> float | None:
        """Mean share of the teacher's mass that the loss looked at; None: it looked at all."""
        found = [row["kept_mass"] for row in self.rows if "kept_mass" in row]
        return fmean(found) if found else None

    def publish(self, folder: Path, title: str) -> None:
        """Put log and picture into an output."""
        write_atomic(folder / LOG, _lines(self.rows))
        write_atomic(folder / CURVE, draw(self.rows, title))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line without its end was cut off by an interruption."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def draw(log: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of a log's rows; pictures of the same rows are the same bytes.

    Args:
        log: A row for each step, as of `StepRow`, some with `perplexity` and `evaluated_on`, the
            text of it; one of step 0 has nothing else.
        title: Stands above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in log if "perplexity" in row]
    log = [row for row in log if row["step"]]  # before the first one there are no losses
    selected = any(row["flips"] for row in log)
    figure = Figure(figsize=(7, 2.2 * (1 + bool(measured) + selected) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1 + bool(measured) + selected, sharex=True, squeeze=False)[:, 0])
    losses = next(axes)
    for name, colour, label in (
        ("divergence", BLUE, "KL from the teacher"),
        ("entropy", ORANGE, "CE with the text"),
    ):
        tokens, values = smoothed(log, name)
        if any(values):  # no line for a divergence that was not computed
            losses.plot(tokens, values, color=colour, label=label)
    losses.set_ylabel("nats per token")
    losses.legend(frameon=False)
    losses.set_title(title, loc="left", fontsize="medium")
    last = losses
    if measured:
        last = next(axes)
        points = [row["tokens"] for row in measured], [row["perplexity"] for row in measured]
        last.plot(*points, color=GREEN, marker="o", markersize=3)
        last.set_ylabel("perplexity")
        texts = dict.fromkeys(row.get("evaluated_on", "") for row in measured)
        last.set_title(", ".join(texts), loc="left", fontsize="small")
    if selected:
        last = next(axes)
        flips = [row for row in log if row["flips"]]
        last.plot([r["tokens"] for r in flips], [r["flips"] for r in flips], ".", color=BLUE)
        last.set_ylabel("mask entries changed")
    last.set_xlabel("tokens")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def smoothed(
    log: Sequence[Mapping[str, Any]], name: str, points: int = POINTS
) -> tuple[list[float], list[float]]:
    """Tokens and values of a column, as means of neighbours where there are more than `points`."""
    width = -(-len(log) // points)
    tokens, values = [], []
    for start in range(0, len(log), width):
        part = log[start : start + width]
        tokens.append(sum(row["tokens"] for row in part) / len(part))
        values.append(sum(row[name] for row in part) / len(part))
    return tokens, values
