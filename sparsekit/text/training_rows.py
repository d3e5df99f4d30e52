"""Token rows for training: text is tokenised once into a file and cut into rows in a fixed order.

Documents are concatenated, each followed by the end-of-text token. Rows are cut from this stream
without overlap and read when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import islice
from typing import TYPE_CHECKING

from sparsekit.errors import DataError
from sparsekit.files import cache_dir, sha256_json
from sparsekit.progress import SILENT, Progress
from sparsekit.text.calibration import Calibration, source_key, tokenizer_key
from sparsekit.text.rows import RowFile, cap_length, open_row_file, row_length
from sparsekit.text.sources import PIECE_BYTES, ROW_FILE, is_documents, is_kind, training_texts
from sparsekit.text.token_file import PARTS, TokenFile, write_tokens

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from sparsekit.checkpoint.checkpoint import Checkpoint


LENGTH = 2048
# Documents that are tokenised together, if they are short.
BATCH_DOCUMENTS = 64
CACHE_FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The rows to train on."""

    source: str = "builtin"
    """One of `SOURCES`, or a file: text, JSON lines or parquet with a field `text`, token rows."""
    length: int | None = None
    """Tokens in a row; 2048, or the length of a row file; capped at the model's maximum."""
    tokens: int | None = None
    """Maximum number of tokens of a text; None: all (`self` needs a number)."""
    seed: int = 0

    def check(self) -> None:
        """Refuse options that are wrong whatever the model is.

        Raises:
            UsageError: The source is unknown or a number is out of range.
            DataError: The file is missing, empty or unreadable.
        """
        Calibration(source=self.source, length=self.length, seed=self.seed).check()

    def rows(
        self, checkpoint: Checkpoint, teacher: Checkpoint | None, progress: Progress = SILENT
    ) -> TrainingRows:
        """The rows for a checkpoint; text is tokenised once and then read from the cache.

        Args:
            checkpoint: The model to train.
            teacher: The model from which `self` is sampled; other sources need none.
            progress: Shows the tokenisation.

        Raises:
            UsageError: The source is unknown or a number is out of range.
            DataError: The source is damaged, shorter than a row, or does not fit the model.
        """
        self.check()
        if is_kind(self.source, ROW_FILE):
            return self._from_rows(checkpoint.config)
        length, notes = cap_length(self.length or LENGTH, checkpoint.config)
        if self.source != "self":
            return self._from_text(checkpoint, length, notes, progress)
        samples = -(-(self.tokens or 0) // length)
        drawn = Calibration(source="self", samples=samples, length=length, seed=self.seed)
        rows = drawn.rows(teacher, progress)
        return TrainingRows(
            stream=rows.tokens.reshape(-1),
            length=rows.tokens.shape[1],
            count=rows.tokens.numel(),
            seed=self.seed,
            fingerprint=rows.fingerprint,
            notes=rows.notes,
        )

    def _from_rows(self, config: PretrainedConfig) -> TrainingRows:
        """The rows of a row file, cut into pieces if a length is set."""
        columns = open_row_file(self.source).get_shape()[1]
        length, notes = row_length(self.source, columns, self.length, config)
        pieces = 1 if self.length is None else columns // length
        if self.length is not None and (left := columns % length):
            notes = (*notes, f"{left} tokens of each row of {self.source} are left out")
        rows = RowFile(self.source, length, pieces)
        return TrainingRows(
            stream=rows,
            length=length,
            count=rows.count,
            seed=self.seed,
            fingerprint=rows.check(config),
            notes=notes,
        )

    def _from_text(
        self, checkpoint: Checkpoint, length: int, notes: tuple[str, ...], progress: Progress
    ) -> TrainingRows:
        key = sha256_json(
            {
                "format": CACHE_FORMAT,
                "content": source_key(self.source, checkpoint),
                "tokenizer": tokenizer_key(checkpoint),
                "versions": [version(name) for name in ("transformers", "tokenizers")],
            }
        )
        path = cache_dir() / "corpora" / f"{key}.safetensors"
        stored = TokenFile.read(path) if path.is_file() else None
        while stored is None or not stored.reaches(self.tokens):  # another run may replace it
            documents = token_ids(self.source, checkpoint, stored.documents if stored else 0)
            progress.begin(f"tokenising {self.source}", PARTS if self.tokens else 1)
            write_tokens(path, documents, self.tokens, stored, progress)
            progress.end()
            stored = TokenFile.read(path)
        count = stored.count if self.tokens is None else min(stored.count, self.tokens)
        if count < length:
            raise DataError(
                f"{self.source} has {count} tokens, a row needs {length}",
                f"use --length {count} or less, or a longer text" if count > 1 else "name a text",
                code="text-too-short",
            )
        return TrainingRows(
            stream=stored.stream,
            length=length,
            count=count,
            seed=self.seed,
            fingerprint=stored.check(count, checkpoint.config.get_text_config().vocab_size),
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """Rows in the order of training: each epoch has its own random order."""

    stream: Tensor | RowFile  # [count] integers, or a file that is read on indexing
    length: int
    count: int
    seed: int
    fingerprint: str
    """sha256 of the token stream."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count // self.length

    def numbers(self, first: int, number: int) -> list[int]:
        """Row numbers at positions `first` to `first + number` of the endless order."""
        rows = []
        for position in range(first, first + number):
            epoch, place = divmod(position, len(self))
            rows.append(int(_order(len(self), self.seed, epoch)[place]))
        return rows

    def take(self, first: int, number: int) -> Tensor:
        """Rows at positions `first` to `first + number` of the endless order."""
        import torch

        return torch.stack([self.row(row) for row in self.numbers(first, number)])

    def row(self, number: int) -> Tensor:
        """One row of the stream, `[length]` int64."""
        import torch

        start = number * self.length
        return torch.as_tensor(self.stream[start : start + self.length]).to(torch.int64)


@lru_cache(maxsize=2)
def _order(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of one epoch."""
    import torch

    mixed = int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:7], "little")
    return torch.randperm(rows, generator=torch.Generator().manual_seed(mixed))


def token_ids(source: str, checkpoint: Checkpoint, skipped: int = 0) -> Iterator[list[int]]:
    """The ids of each document, followed by the end-of-text token if there is one.

    Args:
        source: The source of the text.
        checkpoint: The checkpoint with the tokenizer.
        skipped: Number of documents to skip at the beginning.

    Raises:
        DataError: There is no tokenizer, or the source is damaged.
    """
    tokenizer = checkpoint.tokenizer()
    documents = islice(training_texts(source), skipped, None)
    end = tokenizer.eos_token_id if is_documents(source) else None
    for batch in batches(documents):
        for ids in tokenizer(batch, verbose=False)["input_ids"]:
            yield ids if end is None else [*ids, end]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of `BATCH_DOCUMENTS`, or fewer with a megabyte of text."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if len(batch) == BATCH_DOCUMENTS or size >= PIECE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
