"""Log of a training run: one row per step, appended to a file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsekit.files import storage_errors, write_atomic

LOG = "sparsekit-training.jsonl"
# Name of the log during the run.
PROGRESS = ".sparsekit-log.jsonl"


class TrainingLog:
    """The rows of the steps so far.

    Args:
        folder: The folder of the log, which has one if the run resumes.
        steps: Steps taken; rows of later steps are discarded.
        writes: Whether this process writes.
    """

    def __init__(self, folder: Path, steps: int, *, writes: bool) -> None:
        self._file = folder / PROGRESS
        self._writes = writes
        self.rows = [row for row in _read(self._file) if row["step"] <= steps]
        self.earlier_steps = steps
        self.earlier_seconds: float = sum(row.get("seconds", 0.0) for row in self.rows)
        """Seconds of the steps of an interrupted run."""

    def begin(self) -> None:
        """Write the rows to disk; all processes must have read the old file."""
        if self._writes:
            write_atomic(self._file, _lines(self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append the row of a step to the log.

        Raises:
            StorageError: The disk is full.
        """
        self.rows.append(row)
        if self._writes:
            with storage_errors(self._file), self._file.open("ab") as file:
                file.write(_lines([row]))

    @property
    def kept_mass(self) -> float | None:
        """Mean share of the teacher's probability in the loss; None: all of it."""
        shares = [row["kept_mass"] for row in self.rows if "kept_mass" in row]
        return fmean(shares) if shares else None

    def publish(self, folder: Path) -> None:
        """Write the log into an output."""
        write_atomic(folder / LOG, _lines(self.rows))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of a log; an incomplete last line was cut off by an interruption."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
