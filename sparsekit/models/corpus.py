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
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import DataError
from sparsekit.files import CACHED, cache_dir, fsync_path, sha256_json, storage_errors
from sparsekit.models.calibration import Calibration, check_number, source_key, tokenizer_key
from sparsekit.models.rows import capped
from sparsekit.models.texts import ROW_FILE, check_source, is_documents, is_kind, training_texts
from sparsekit.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.models.checkpoint import Checkpoint

LENGTH = 2048
# Documents that are tokenised together.
TOGETHER = 64
# Bytes kept free for the header of a token file, which is written last.
HEADER_BYTES = 512
CACHE_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Which rows are trained on."""

    source: str = "builtin"
    """One of `SOURCES`, or a file: text, JSON lines or parquet with a field `text`, token rows."""
    length: int | None = None
    """Tokens in a row; 2048, or the length of a row file; capped at the model's maximum."""
    tokens: int | None = None
    """At most so many are read from the source; None: all of them (`self` needs a number)."""
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
        self, checkpoint: Checkpoint, teacher: Checkpoint, progress: Progress = SILENT
    ) -> TrainingRows:
        """The rows for a checkpoint; text is tokenised once and then taken from the cache.

        Args:
            checkpoint: The model that is trained.
            teacher: The model that `self` is sampled from.
            progress: Told of the documents.

        Raises:
            UsageError: See `check`.
            DataError: The source is broken, has not one row, or does not fit the model.
        """
        self.check()
        length, notes = capped(self.length or LENGTH, checkpoint.config)
        if is_kind(self.source, ROW_FILE):
            told = Calibration(source=self.source, length=self.length).rows(checkpoint)
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
                "tokens": self.tokens,
                "versions": [version(name) for name in ("transformers", "tokenizers")],
            }
        )
        path = cache_dir() / "corpora" / f"{key}.safetensors"
        if not path.is_file():
            progress.begin(f"tokenising {self.source}", 1)
            write_tokens(path, token_ids(self.source, checkpoint), self.tokens, progress)
            progress.end()
        stream, count, fingerprint = read_tokens(path)
        if count < length:
            raise DataError(
                f"{self.source} has {count} tokens, a row needs {length}",
                f"use --length {count} or less, or a longer text",
            )
        return TrainingRows(
            stream=stream,
            length=length,
            count=count,
            seed=self.seed,
            fingerprint=fingerprint,
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


def token_ids(source: str, checkpoint: Checkpoint) -> Iterator[list[int]]:
    """The ids of one document after another, each closed by the end-of-text token if there is one.

    Raises:
        DataError: There is no tokenizer, or the source is broken.
    """
    tokenizer = checkpoint.tokenizer()
    documents = training_texts(source)
    end = tokenizer.eos_token_id if is_documents(source) else None
    while some := list(islice(documents, TOGETHER)):
        for ids in tokenizer(some, verbose=False)["input_ids"]:
            yield ids if end is None else [*ids, end]


def write_tokens(
    path: Path, documents: Iterable[list[int]], limit: int | None, progress: Progress
) -> None:
    """Write at most `limit` token ids as one int32 tensor, document by document.

    Raises:
        StorageError: They could not be written.
    """
    import torch

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    digest, count = hashlib.sha256(), 0
    with storage_errors(path, CACHED):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("wb") as file:
                file.write(bytes(HEADER_BYTES))
                for ids in documents:
                    kept = ids if limit is None else ids[: limit - count]
                    data = torch.tensor(kept, dtype=torch.int32).numpy().astype("<i4").tobytes()
                    file.write(data)
                    digest.update(data)
                    count += len(kept)
                    if limit is not None and count >= limit:
                        break
                file.seek(0)
                file.write(_header(count, digest.hexdigest()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        fsync_path(path.parent)
    progress.step(f"{count} tokens")


def _header(count: int, fingerprint: str) -> bytes:
    """What precedes the data of a token file, `HEADER_BYTES` long."""
    text = json.dumps(
        {
            "__metadata__": {"fingerprint": fingerprint},
            "tokens": {"dtype": "I32", "shape": [count], "data_offsets": [0, 4 * count]},
        }
    ).encode()
    size = HEADER_BYTES - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def read_tokens(path: Path) -> tuple[Tensor, int, str]:
    """The token stream of a file, read where it is cut; its length and fingerprint.

    Raises:
        DataError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
        stream = file.get_slice("tokens")
        return stream, stream.get_shape()[0], file.metadata()["fingerprint"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged: {error}", "delete it") from error
