"""A teacher whose largest probabilities are cached on disk, so that each row is computed once.

The user's cache has one file per row of the text. A file depends on the tokens of the row, the
teacher, `--teacher-top`, the temperature and the numerics of the machine, but not on seeds,
methods, learning rates or numbers of tokens, so other runs use it too. For that, each row passes
through the teacher alone: in a batch its last bits would depend on the other rows. With
`--max-time` the plan assumes that every row is computed.

Probabilities are stored in float32: float16 would save only a quarter, as half of a file are token
ids, and 1 − Σ p would be rounding error.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekit.checkpoint.folder import config_of
from sparsekit.errors import NumericalError, StorageError
from sparsekit.files import (
    CACHED,
    cache_dir,
    existing_parent,
    sha256_json,
)
from sparsekit.model.full_model import hidden_states
from sparsekit.progress import Progress
from sparsekit.provenance.entry import NUMERICS
from sparsekit.recovery.distillation import Top, chunk_positions
from sparsekit.recovery.prepare import RecoverJob
from sparsekit.text import cache_file
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CACHE_FORMAT = 2
# Bytes per probability: a float32 and an int32.
ENTRY_BYTES = 8
# Bytes per file for its header and disk blocks.
SPARE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTeacher:
    """The `count` largest probabilities of each token, from disk or from the dense model."""

    folder: Path
    """Folder of the cached rows."""
    rows: TrainingRows
    count: int
    temperature: float
    load: Callable[[], PreTrainedModel]
    """Returns the dense model, always the same; called when a row is first missing."""
    reads: bool = True
    """Whether to read rows from disk."""

    @classmethod
    def of(
        cls, job: RecoverJob, rows: TrainingRows, load: Callable[[], PreTrainedModel]
    ) -> TopTeacher:
        """The teacher of a run with `--teacher-top`; reads no file yet."""
        on_cpu = job.device.type == "cpu"
        key = {
            "format": CACHE_FORMAT,
            "numerics": NUMERICS,
            "teacher": job.teacher.fingerprint,
            "config": sha256_json(config_of(job.teacher.config)),
            "count": job.config.teacher_top,
            "temperature": float(job.config.temperature),
            "versions": [version(name) for name in ("torch", "transformers")],
            "device": job.device.type,
            "threads": torch.get_num_threads() if on_cpu else None,
        }
        return cls(
            folder=cache_dir() / "teachers" / sha256_json(key),
            rows=rows,
            count=job.config.teacher_top,
            temperature=job.config.temperature,
            load=load,
        )

    def missing(self, positions: int | None) -> list[int]:
        """The rows at the first `positions` of the order (None: all) that are not on disk.

        Raises:
            DataError: A file is too short.
        """
        wanted: Iterable[int] = range(len(self.rows))
        if positions is not None and positions < len(self.rows):
            wanted = self.rows.numbers(0, positions)
        missing = []
        for number in wanted:
            file = self._file(number)
            if not file.is_file():
                missing.append(number)
            elif file.stat().st_size <= self._row_bytes:
                raise cache_file.damaged(file, "it is too short")
        return missing

    def announce(self, positions: int, progress: Progress) -> None:
        """Report the location and size of the cached rows.

        Raises:
            DataError: A file is too short.
            StorageError: The disk has no space for the missing rows.
        """
        missing, used = len(self.missing(positions)), min(positions, len(self.rows))
        needed = missing * (self._row_bytes + SPARE_BYTES)
        where = existing_parent(self.folder)
        if needed > (free := shutil.disk_usage(where).free):
            raise StorageError(
                f"the teacher's {self.count} largest probabilities of {missing} rows take "
                f"{needed / 1e9:.2f} GB, {where} has {free / 1e9:.2f} GB free",
                f"{CACHED}, or pass a smaller --teacher-top",
                code="disk-full",
            )
        note = f"the teacher's {self.count} largest probabilities of each token: "
        if missing:
            cached = f", {used - missing} of {used} rows are cached" if missing < used else ""
            note += f"{needed / 1e9:.2f} GB in {self.folder}{cached}"
        else:
            note += f"all {used} rows are in {self.folder}, the teacher is not needed"
        progress.note(note)

    def measured(self) -> TopTeacher:
        """This teacher for measuring speed: it computes every row if any row is missing."""
        return replace(self, reads=not self.missing(None))

    def probabilities(self, numbers: Sequence[int], tokens: Tensor) -> Top:
        """The probabilities of rows `[rows, length]` with these numbers, by position.

        Raises:
            DataError: A file is damaged.
            NumericalError: The teacher's probabilities are not finite.
            StorageError: A computed row could not be written.
        """
        rows = [self._row(*row) for row in zip(numbers, tokens, strict=True)]
        return Top.joined(rows).to(tokens.device)

    @property
    def _row_bytes(self) -> int:
        """Bytes of the probabilities of a row."""
        return self.rows.length * self.count * ENTRY_BYTES

    def _file(self, number: int) -> Path:
        ids = self.rows.row(number).numpy().tobytes()
        return self.folder / f"{hashlib.sha256(ids).hexdigest()}.safetensors"

    def _row(self, number: int, tokens: Tensor) -> Top:
        """One row, on the CPU; written to disk if it was computed."""
        file = self._file(number)
        if self.reads and file.is_file():
            return Top(**cache_file.read(file))
        row = self._computed(tokens)
        if not row.log_probabilities.isfinite().all():
            raise NumericalError(
                f"the teacher's probabilities of row {number} are not finite",
                "name another dense model with --teacher, or leave out this text",
                code="not-finite",
            )
        cache_file.write(file, {"log_probabilities": row.log_probabilities, "ids": row.ids})
        return row

    @torch.no_grad()
    def _computed(self, tokens: Tensor) -> Top:
        """Compute a row `[length]` in chunks, never holding all its logits."""
        model = self.load()
        head, states = model.get_output_embeddings(), hidden_states(model, tokens[None])
        chunks = states.split(chunk_positions(head.weight.shape[0]))
        parts = [Top.of(head(chunk), self.count, self.temperature) for chunk in chunks]
        return Top.joined(parts).to(torch.device("cpu"))
