"""Curves of a report: values by block, and by training tokens."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.entry import RecoverEntry
from sparsekit.checkpoint.entry_parts import Weight
from sparsekit.errors import DataError
from sparsekit.recovery.log import LOG
from sparsekit.reporting.model_row import Row

# Number of the block in a weight's name.
BLOCK = re.compile(r"\.(\d+)\.")
# Points of a smoothed curve, so that several curves in one chart stay readable.
POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart."""

    model: int
    """Index of the model in the comparison."""
    across: Sequence[float]
    up: Sequence[float]


def errors_by_block(rows: Sequence[Row]) -> dict[str, list[Curve]]:
    """Mean output error of the weights of each block, by kind of stage.

    Of several stages of a kind the last one counts. Stages of different kinds start from different
    weights and are not comparable.
    """
    curves: dict[str, list[Curve]] = {}
    for index, row in enumerate(rows):
        last = {entry.stage: entry for entry in row.history}
        for stage, entry in last.items():
            blocks: dict[int, list[float]] = {}
            for weight in entry.weights:
                if weight.error is not None and (match := BLOCK.search(weight.name)):
                    blocks.setdefault(int(match[1]), []).append(weight.error)
            if blocks:
                across = sorted(blocks)
                up = [sum(blocks[block]) / len(blocks[block]) for block in across]
                curves.setdefault(stage, []).append(Curve(model=index, across=across, up=up))
    return curves


def sparsity_by_block(rows: Sequence[Row]) -> list[Curve]:
    """Sparsity of each block according to the last stage that counted its zeros."""
    curves = []
    for index, row in enumerate(rows):
        counted: dict[str, Weight] = {}
        for entry in row.history:
            counted |= {weight.name: weight for weight in entry.weights}
        zeros: dict[int, int] = {}
        size: dict[int, int] = {}
        for name, weight in counted.items():
            if match := BLOCK.search(name):
                block = int(match[1])
                zeros[block] = zeros.get(block, 0) + weight.zeros
                size[block] = size.get(block, 0) + weight.size
        if size:
            across = sorted(size)
            up = [zeros[block] / size[block] for block in across]
            curves.append(Curve(model=index, across=across, up=up))
    return curves


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """The log of one model's last training."""

    model: int
    text: str
    """TrainingLog text."""
    steps: Sequence[Mapping[str, Any]]
    measured: Sequence[Mapping[str, Any]]
    """Rows with a perplexity; the first may precede training."""

    def losses(self, name: str) -> Curve | None:
        """Smoothed column of losses; None if it was not computed."""
        across, up = smoothed(self.steps, name) if self.steps else ([], [])
        return Curve(model=self.model, across=across, up=up) if any(up) else None

    def perplexities(self, text: str) -> Curve | None:
        """Perplexities on a text during training."""
        rows = [row for row in self.measured if row.get("evaluated_on", "") == text]
        return self._curve(rows, "perplexity")

    def mask_changes(self) -> Curve | None:
        """Mask changes in the steps that had any."""
        return self._curve([row for row in self.steps if row.get("flips")], "flips")

    def _curve(self, rows: Sequence[Mapping[str, Any]], name: str) -> Curve | None:
        across = [row["tokens"] for row in rows]
        return (
            Curve(model=self.model, across=across, up=[row[name] for row in rows]) if rows else None
        )


def smoothed(log: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Tokens and values of a column, averaged over neighbours if there are many."""
    width = -(-len(log) // POINTS)
    tokens, values = [], []
    for start in range(0, len(log), width):
        part = log[start : start + width]
        tokens.append(sum(row["tokens"] for row in part) / len(part))
        values.append(sum(row[name] for row in part) / len(part))
    return tokens, values


def trainings(rows: Sequence[Row]) -> list[TrainingLog]:
    """TrainingLog logs of the models that have one.

    Raises:
        DataError: A log is damaged.
    """
    logs = []
    for index, row in enumerate(rows):
        log = read_log(row.path)
        if not log:
            continue
        texts = [entry.text for entry in row.history if isinstance(entry, RecoverEntry)]
        logs.append(
            TrainingLog(
                model=index,
                text=texts[-1] if texts else "",
                steps=[line for line in log if line["step"]],
                measured=[line for line in log if line.get("perplexity") is not None],
            )
        )
    return logs


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Rows of a folder's training log; empty if there is no log.

    Raises:
        DataError: A line is damaged.
    """
    file = folder / LOG
    if not file.is_file():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            needed = ("divergence", "entropy", "flips") if row["step"] else ("perplexity",)
            if not all(isinstance(row[name], int | float) for name in (*needed, "tokens")):
                raise ValueError(f"step {row['step']} has no numbers")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged: {error}",
            "delete it to leave out its curves",
            code="damaged-file",
        ) from error
    return rows
