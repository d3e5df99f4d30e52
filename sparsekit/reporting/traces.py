"""What the pictures of a report are drawn from: figures by block, and by tokens of training."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.errors import DataError
from sparsekit.recovery.log import LOG
from sparsekit.reporting.model_row import Row

# The number of a weight's block in its name.
BLOCK = re.compile(r"\.(\d+)\.")
# Several lines in one picture are told apart only when each is smooth.
POINTS = 40


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A line of a picture."""

    model: int
    """Which of the compared ones."""
    across: Sequence[float]
    up: Sequence[float]


def errors_by_block(rows: Sequence[Row]) -> dict[str, list[Trace]]:
    """By kind of stage, the mean relative error of the weights of each block.

    It is that of the last stage of the kind: stages of two kinds start from different weights.
    """
    found: dict[str, list[Trace]] = {}
    for index, row in enumerate(rows):
        last = {str(entry.get("stage")): entry for entry in row.history}
        for stage, entry in last.items():
            blocks: dict[int, list[float]] = {}
            for weight in entry.get("weights", ()):
                if weight.get("error") is not None and (match := BLOCK.search(weight["name"])):
                    blocks.setdefault(int(match[1]), []).append(weight["error"])
            if blocks:
                across = sorted(blocks)
                up = [sum(blocks[block]) / len(blocks[block]) for block in across]
                found.setdefault(stage, []).append(Trace(model=index, across=across, up=up))
    return found


def sparsity_by_block(rows: Sequence[Row]) -> list[Trace]:
    """The share of zeros in the weights of each block that the last stage counted them in."""
    found = []
    for index, row in enumerate(rows):
        counted: dict[str, Mapping[str, Any]] = {}
        for entry in row.history:
            counted |= {w["name"]: w for w in entry.get("weights", ()) if "zeros" in w}
        zeros: dict[int, int] = {}
        size: dict[int, int] = {}
        for name, weight in counted.items():
            if weight.get("size") and (match := BLOCK.search(name)):
                block = int(match[1])
                zeros[block] = zeros.get(block, 0) + weight["zeros"]
                size[block] = size.get(block, 0) + weight["size"]
        if size:
            across = sorted(size)
            up = [zeros[block] / size[block] for block in across]
            found.append(Trace(model=index, across=across, up=up))
    return found


@dataclass(frozen=True, kw_only=True)
class Training:
    """The log of one model's last training."""

    model: int
    text: str
    """That it was trained on."""
    steps: Sequence[Mapping[str, Any]]
    measured: Sequence[Mapping[str, Any]]
    """Rows with a perplexity; the first may be from before training."""

    def losses(self, name: str) -> Trace | None:
        """A column of losses, smoothed; None where it was not computed."""
        across, up = smoothed(self.steps, name) if self.steps else ([], [])
        return Trace(model=self.model, across=across, up=up) if any(up) else None

    def perplexities(self, text: str) -> Trace | None:
        """The perplexities on a text, on the way."""
        rows = [row for row in self.measured if row.get("evaluated_on", "") == text]
        return self._trace(rows, "perplexity")

    def flips(self) -> Trace | None:
        """The mask entries that changed sides, in the steps in which any did."""
        return self._trace([row for row in self.steps if row.get("flips")], "flips")

    def _trace(self, rows: Sequence[Mapping[str, Any]], name: str) -> Trace | None:
        across = [row["tokens"] for row in rows]
        return (
            Trace(model=self.model, across=across, up=[row[name] for row in rows]) if rows else None
        )


def smoothed(log: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Tokens and values of a column, as means of neighbours where there are many."""
    width = -(-len(log) // POINTS)
    tokens, values = [], []
    for start in range(0, len(log), width):
        part = log[start : start + width]
        tokens.append(sum(row["tokens"] for row in part) / len(part))
        values.append(sum(row[name] for row in part) / len(part))
    return tokens, values


def trainings(rows: Sequence[Row]) -> list[Training]:
    """The logs of the models that have one.

    Raises:
        DataError: One is damaged.
    """
    found = []
    for index, row in enumerate(rows):
        log = read_log(row.path)
        if not log:
            continue
        texts = [str(e.get("text", "")) for e in row.history if e.get("stage") == "recover"]
        found.append(
            Training(
                model=index,
                text=texts[-1] if texts else "",
                steps=[line for line in log if line["step"]],
                measured=[line for line in log if line.get("perplexity") is not None],
            )
        )
    return found


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The rows of a folder's training log; none when there is no log.

    Raises:
        DataError: A line is not one that training wrote.
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
