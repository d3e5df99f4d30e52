"""A teacher of whom the largest probabilities are kept on disk, so that a row is computed once.

They lie in the user's cache, a file for each row of the text. The numbers of a file depend on the
tokens of the row, the teacher, `--teacher-top`, the temperature and the machine's way to compute,
and on nothing else of a run: other seeds, methods, rates and numbers of tokens use them too. With
`--max-time` all steps are planned as if each row were computed. For this a row always passes
through the teacher alone, not in its batch, where its last bits would depend on the rows beside it.

Numbers are kept as they were computed, in float32: half of a file are token ids, so that float16
would save a quarter, and 1 − Σ p would lose its meaning.
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
# A position takes a float32 and an int32 for each probability.
ENTRY_BYTES = 8
# Of a file: its header, and what the disk rounds up.
SPARE_BYTES = 4096


@dataclass(frozen=True, kw_only=True, eq=False)
class TopTeacher:
    """The `count` largest probabilities of each token, from disk or else from the dense model."""

    folder: Path
    """Where the files of these rows lie."""
    rows: TrainingRows
    count: int
    temperature: float
    load: Callable[[], PreTrainedModel]
    """Gives the dense model, the same one each time; called when a row is first missing."""
    reads: bool = True
    """Whether a row that is on disk is taken from there."""

    @classmethod
    def of(
        cls, job: RecoverJob, rows: TrainingRows, load: Callable[[], PreTrainedModel]
    ) -> TopTeacher:
        """The teacher of a run with `--teacher-top`; no file is looked at yet."""
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
        """The rows among the first positions of the order (None: all) that are not on disk.

        Raises:
            DataError: A file is shorter than the numbers of its row.
        """
        wanted: Iterable[int] = range(len(self.rows))
        if positions is not None and positions < len(self.rows):
            wanted = self.rows.numbers(0, positions)
        found = []
        for number in wanted:
            file = self._file(number)
            if not file.is_file():
                found.append(number)
            elif file.stat().st_size <= self._row_bytes:
                raise cache_file.damaged(file, "it is too short")
        return found

    def announce(self, positions: int, progress: Progress) -> None:
        """Tell where the rows lie and what they take.

        Raises:
            DataError: See `missing`.
            StorageError: The disk has no room for those that are missing.
        """
        missing, used = len(self.missing(positions)), min(positions, len(self.rows))
        needed = missing * (self._row_bytes + SPARE_BYTES)
        where = existing_parent(self.folder)
        if needed > (free := shutil.disk_usage(where).free):
            raise StorageError(
                f"the teacher's {self.count} largest probabilities of {missing} rows take "
                f"{needed / 1e9:.2f} GB, {where} has {free / 1e9:.2f} GB free",
                f"{CACHED}, or take a smaller --teacher-top",
            )
        told = f"the teacher's {self.count} largest probabilities of each token: "
        if missing:
            there = f", {used - missing} of {used} rows are there" if missing < used else ""
            told += f"{needed / 1e9:.2f} GB in {self.folder}{there}"
        else:
            told += f"all {used} rows are in {self.folder}, the teacher is not needed"
        progress.note(told)

    def measured(self) -> TopTeacher:
        """This teacher as speed is measured with it: as slow as the slowest row to come."""
        return replace(self, reads=not self.missing(None))

    def probabilities(self, numbers: Sequence[int], tokens: Tensor) -> Top:
        """Those of the rows with these numbers, given as `[rows, length]`, position by position.

        Raises:
            DataError: A file is damaged.
            NumericalError: What the teacher gives is not finite.
            StorageError: A row that was computed could not be written.
        """
        found = [self._row(*row) for row in zip(numbers, tokens, strict=True)]
        return Top.joined(found).to(tokens.device)

    @property
    def _row_bytes(self) -> int:
        """What the numbers of a row take."""
        return self.rows.length * self.count * ENTRY_BYTES

    def _file(self, number: int) -> Path:
        ids = self.rows.row(number).numpy().tobytes()
        return self.folder / f"{hashlib.sha256(ids).hexdigest()}.safetensors"

    def _row(self, number: int, tokens: Tensor) -> Top:
        """One row, on the CPU; written at once when it is not on disk."""
        file = self._file(number)
        if self.reads and file.is_file():
            return Top(**cache_file.read(file))
        found = self._computed(tokens)
        if not found.log_probabilities.isfinite().all():
            raise NumericalError(
                f"the teacher's probabilities of row {number} are not finite",
                "name another dense model with --teacher, or leave out this text",
            )
        cache_file.write(file, {"log_probabilities": found.log_probabilities, "ids": found.ids})
        return found

    @torch.no_grad()
    def _computed(self, tokens: Tensor) -> Top:
        """A row `[length]`, without ever holding the logits of all its positions."""
        model = self.load()
        head, states = model.get_output_embeddings(), hidden_states(model, tokens[None])
        chunks = states.split(chunk_positions(head.weight.shape[0]))
        parts = [Top.of(head(chunk), self.count, self.temperature) for chunk in chunks]
        return Top.joined(parts).to(torch.device("cpu"))
