"""The log of a training run: a row for each step, on disk as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from sparsekit.files import storage_errors, write_atomic

LOG = "sparsekit-training.jsonl"
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

    def publish(self, folder: Path) -> None:
        """Put the log into an output."""
        write_atomic(folder / LOG, _lines(self.rows))


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _read(file: Path) -> list[dict[str, Any]]:
    """The rows of a log; a line without its end was cut off by an interruption."""
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
