"""Rows of tokens to train on: text tokenised once into a file, cut into rows, in a fixed order.

Documents follow each other, each closed by the end-of-text token; rows are cut from this stream
without overlap, and never held in memory together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import DataError
from sparsekit.files import CACHED, cache_dir, fsync_path, sha256_json, storage_errors
from sparsekit.models.calibration import Calibration, check_number, source_key, tokenizer_key
from sparsekit.models.rows import capped, cut_row_file, read_row_file, token_rows
from sparsekit.models.texts import (
    PIECE_BYTES,
    ROW_FILE,
    check_source,
    is_documents,
    is_kind,
    training_texts,
)
from sparsekit.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.models.checkpoint import Checkpoint

LENGTH = 2048
# Documents that are tokenised together, if they are short.
TOGETHER = 64
# Tokens that are read at a time, where all of a file are.
PIECE_TOKENS = 1 << 22
# In how many parts tokenising is told of.
PARTS = 100
# Bytes kept free for the header of a token file, which is written last.
HEADER_BYTES = 512
CACHE_FORMAT = 2


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
        check_source(self.source)
        check_number("length", self.length, 2)
        check_number("seed", self.seed, 0)

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
        length, notes = capped(self.length or LENGTH, checkpoint.config)
        if is_kind(self.source, ROW_FILE):
            tokens, notes = cut_row_file(self.source, self.length, checkpoint.config)
            if self.length is not None:  # also the rest of a row, in further pieces
                tokens = read_row_file(self.source)
                if left := tokens.shape[1] % length:
                    notes = (*notes, f"{left} tokens of each row of {self.source} are left out")
                tokens = cut(tokens, length)
            told = token_rows(tokens, self.source, checkpoint.config, notes)
        elif self.source == "self":
            samples = -(-(self.tokens or 0) // length)
            drawn = Calibration(source="self", samples=samples, length=length, seed=self.seed)
            told = drawn.rows(teacher, progress)
        else:
            return self._from_text(checkpoint, length, notes, progress)
        return TrainingRows(
            stream=told.tokens.reshape(-1),
            length=told.tokens.shape[1],
            count=told.tokens.numel(),
            seed=self.seed,
            fingerprint=told.fingerprint,
            notes=told.notes,
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
        stored = Stored.read(path) if path.is_file() else None
        while stored is None or not stored.reaches(self.tokens):  # another run may replace it
            documents = token_ids(self.source, checkpoint, stored.documents if stored else 0)
            progress.begin(f"tokenising {self.source}", PARTS if self.tokens else 1)
            write_tokens(path, documents, self.tokens, stored, progress)
            progress.end()
            stored = Stored.read(path)
        count = stored.count if self.tokens is None else min(stored.count, self.tokens)
        if count < length:
            raise DataError(
                f"{self.source} has {count} tokens, a row needs {length}",
                f"use --length {count} or less, or a longer text",
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

    stream: Tensor  # [count] integers, or a slice of a file that is read when it is cut
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


def cut(tokens: Tensor, length: int) -> Tensor:
    """Rows `[rows, any]` in as many pieces as each has, `[pieces, length]`; the rest is dropped."""
    whole = tokens.shape[1] // length * length
    return tokens[:, :whole].reshape(-1, length)


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


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """The tokens of a text on disk: of its first documents, or of all of them."""

    path: Path
    stream: Tensor  # a slice of the file, int32, read where it is cut
    count: int
    documents: int
    complete: bool
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> Stored:
        """What a file holds.

        Raises:
            DataError: It is damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            file = safe_open(path, "pt")
            stream, told = file.get_slice("tokens"), file.metadata()
            return cls(
                path=path,
                stream=stream,
                count=stream.get_shape()[0],
                documents=int(told["documents"]),
                complete=told["complete"] == "yes",
                fingerprint=told["fingerprint"],
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: {error}", "delete it") from error

    def reaches(self, tokens: int | None) -> bool:
        """Whether there are so many tokens (None: all), or the text has no more."""
        return self.complete or (tokens is not None and self.count >= tokens)

    def pieces(self, ends: Iterable[int] = ()) -> Iterator[Tensor]:
        """The tokens in pieces that fit into memory, some of which end at given places."""
        import torch

        cuts = sorted({*range(0, self.count, PIECE_TOKENS), *ends, self.count})
        for start, end in pairwise(cuts):
            yield torch.as_tensor(self.stream[start:end])

    def check(self, count: int, vocabulary: int) -> str:
        """The sha256 of the first `count` tokens, when the file is what was written.

        Raises:
            DataError: It is not, or a token is not one of the model's.
        """
        digest, wanted, seen, largest = hashlib.sha256(), "", 0, -1
        for piece in self.pieces([count]):
            digest.update(piece.numpy().astype("<i4", copy=False))
            seen += len(piece)
            if seen <= count:
                wanted, largest = digest.hexdigest(), max(largest, int(piece.max()))
        if digest.hexdigest() != self.fingerprint:
            raise _changed(self.path)
        if largest >= vocabulary:
            raise DataError(
                f"the tokenizer gives token {largest}, the model's vocabulary has {vocabulary}",
                "is it the tokenizer of another model?",
            )
        return wanted


def write_tokens(
    path: Path,
    documents: Iterable[list[int]],
    limit: int | None,
    before: Stored | None,
    progress: Progress,
) -> None:
    """Write token ids as one int32 tensor, whole documents, until there are `limit`.

    Args:
        path: The file to make or replace.
        documents: Ids of those that follow what is there.
        limit: How many tokens are enough; None: all are taken.
        before: What is there already.
        progress: Told of each hundredth of the limit.

    Raises:
        DataError: What is there already is damaged.
        StorageError: They could not be written.
    """
    import torch

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    digest, count, read = hashlib.sha256(), 0, 0
    told, complete = 0, True
    with storage_errors(path, CACHED):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(bytes(HEADER_BYTES))

                def add(tokens: Tensor) -> None:
                    nonlocal count
                    data = tokens.numpy().astype("<i4", copy=False).tobytes()
                    file.write(data)
                    digest.update(data)
                    count += len(tokens)

                for piece in before.pieces() if before else ():
                    add(piece)
                if before and digest.hexdigest() != before.fingerprint:
                    raise _changed(path)
                for ids in documents:
                    add(torch.tensor(ids, dtype=torch.int32))
                    read += 1
                    for _ in range(told, min(PARTS, PARTS * count // limit) if limit else 0):
                        progress.step(f"{count} tokens")
                        told += 1
                    if limit is not None and count >= limit:
                        complete = False  # as far as is known
                        break
                file.seek(0)
                read += before.documents if before else 0
                file.write(_header(count, read, complete, digest.hexdigest()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        fsync_path(path.parent)


def _changed(path: Path) -> DataError:
    return DataError(f"{path} is damaged: its tokens are others", "delete it")


def _header(count: int, documents: int, complete: bool, fingerprint: str) -> bytes:
    """What precedes the data of a token file, `HEADER_BYTES` long."""
    text = json.dumps(
        {
            "__metadata__": {
                "fingerprint": fingerprint,
                "documents": str(documents),
                "complete": "yes" if complete else "no",
            },
            "tokens": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]},
        }
    ).encode()
    size = HEADER_BYTES - 8
    return size.to_bytes(8, "little") + text.ljust(size)
