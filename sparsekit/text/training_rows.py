"""Rows of tokens to train on: text tokenised once into a file, cut into rows, in a fixed order.

Documents follow each other, each closed by the end-of-text token; rows are cut from this stream
without overlap, and never held in memory together.
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
TOGETHER = 64
CACHE_FORMAT = 3


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Which rows are trained on."""

    source: str = "builtin"
    """One of `SOURCES`, or a file: text, JSON lines or parquet with a field `text`, token rows."""
    length: int | None = None
    """Tokens in a row; 2048, or the length of a row file; capped at the model's maximum."""
    tokens: int | None = None
    """At most so many of a text are taken; None: all of them (`self` needs a number)."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what can be known to be wrong without loading anything.

        Raises:
            UsageError: The source or a number is not one that exists.
            DataError: The file is missing, empty or unreadable.
        """
        Calibration(source=self.source, length=self.length, seed=self.seed).check()

    def rows(
        self, checkpoint: Checkpoint, teacher: Checkpoint | None, progress: Progress = SILENT
    ) -> TrainingRows:
        """The rows for a checkpoint; text is tokenised once and then taken from the cache.

        Args:
            checkpoint: The model that is trained.
            teacher: The model that `self` is sampled from; other sources need none.
            progress: Told of the documents.

        Raises:
            UsageError: See `check`.
            DataError: The source is broken, has not one row, or does not fit the model.
        """
        self.check()
        if is_kind(self.source, ROW_FILE):
            return self._from_rows(checkpoint.config)
        length, notes = cap_length(self.length or LENGTH, checkpoint.config)
        if self.source != "self":
            return self._from_text(checkpoint, length, notes, progress)
        samples = -(-(self.tokens or 0) // length)
        drawn = Calibration(source="self", samples=samples, length=length, seed=self.seed)
        told = drawn.rows(teacher, progress)
        return TrainingRows(
            stream=told.tokens.reshape(-1),
            length=told.tokens.shape[1],
            count=told.tokens.numel(),
            seed=self.seed,
            fingerprint=told.fingerprint,
            notes=told.notes,
        )

    def _from_rows(self, config: PretrainedConfig) -> TrainingRows:
        """The rows of a row file; where a length is given, its rows are cut into pieces."""
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
                code="too-few-tokens",
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
    """Rows in the order of training: each epoch draws an order of its own."""

    stream: Tensor | RowFile  # [count] integers, or part of a file that is read when it is cut
    length: int
    count: int
    seed: int
    fingerprint: str
    """sha256 of the token stream."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count // self.length

    def numbers(self, first: int, number: int) -> list[int]:
        """Which rows of the stream are `first` to `first + number` of the endless order."""
        found = []
        for position in range(first, first + number):
            epoch, place = divmod(position, len(self))
            found.append(int(_order(len(self), self.seed, epoch)[place]))
        return found

    def take(self, first: int, number: int) -> Tensor:
        """Rows `first` to `first + number` of the endless order, `[number, length]` int64."""
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
    """The ids of one document after another, each closed by the end-of-text token if there is one.

    Args:
        source: Where the text comes from.
        checkpoint: Has the tokenizer.
        skipped: So many documents are left out at the beginning.

    Raises:
        DataError: There is no tokenizer, or the source is broken.
    """
    tokenizer = checkpoint.tokenizer()
    documents = islice(training_texts(source), skipped, None)
    end = tokenizer.eos_token_id if is_documents(source) else None
    for some in batches(documents):
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            yield ids if end is None else [*ids, end]


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in lists of `TOGETHER`, or fewer that make a megabyte."""
    some, size = [], 0
    for document in documents:
        some.append(document)
        size += len(document)
        if len(some) == TOGETHER or size >= PIECE_BYTES:
            yield some
            some, size = [], 0
    if some:
        yield some
