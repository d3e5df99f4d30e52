"""The tokens of a text on disk: one int32 tensor that grows by whole documents.

The header of the safetensors file also tells how many documents are in it, whether the text has no
more, and the sha256 of the tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparsekit.errors import DataError
from sparsekit.files import CACHED, replacing, storage_errors
from sparsekit.progress import Progress
from sparsekit.text import cache_file

if TYPE_CHECKING:
    from torch import Tensor


# Bytes kept free for the header, which is written last.
HEADER_BYTES = 512
# Tokens that are read at a time, where all of a file are.
PIECE_TOKENS = 1 << 22
# When a file that nobody has written to since is one that a killed process has left.
LEFTOVER_SECONDS = 86_400.0
# In how many parts writing is told of.
PARTS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
    """The tokens of a text on disk: of its first documents, or of all of them."""

    path: Path
    stream: Tensor  # a slice of the file, int32, read where it is cut
    count: int
    documents: int
    complete: bool
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> TokenFile:
        """What a file holds.

        Raises:
            DataError: It is damaged.
        """
        from safetensors import SafetensorError

        try:
            file, told = cache_file.opened(path)
            stream = file.get_slice("tokens")
            return cls(
                path=path,
                stream=stream,
                count=stream.get_shape()[0],
                documents=int(told["documents"]),
                complete=told["complete"] == "yes",
                fingerprint=told["fingerprint"],
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise cache_file.damaged(path, error) from error

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
                code="outside-vocabulary",
            )
        return wanted


def write_tokens(
    path: Path,
    documents: Iterable[list[int]],
    limit: int | None,
    before: TokenFile | None,
    progress: Progress,
) -> None:
    """Write the tokens of whole documents until there are `limit`; an interrupt keeps those so far.

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
    with storage_errors(path, CACHED):
        path.parent.mkdir(parents=True, exist_ok=True)
    _forget_leftovers(path)
    interrupt = None
    with replacing(path, CACHED) as file:
        added = _TokenWriter(file)
        for piece in before.pieces() if before else ():
            added.take(piece)
        if before and added.digest.hexdigest() != before.fingerprint:
            raise _changed(path)
        read = before.documents if before else 0
        added.mark()  # before an interrupt may be taken for the end
        try:
            complete = added.take_documents(documents, limit, progress)
        except KeyboardInterrupt as error:
            interrupt, complete = error, False
        count, taken, digest = added.whole
        file.truncate(HEADER_BYTES + 4 * count)
        file.seek(0)
        metadata = {
            "fingerprint": digest.hexdigest(),
            "documents": str(read + taken),
            "complete": "yes" if complete else "no",
        }
        file.write(cache_file.header(HEADER_BYTES, "tokens", [count], metadata))
    if interrupt is not None:
        raise interrupt


def _forget_leftovers(path: Path) -> None:
    """Remove what processes that were killed while they wrote a file have left, after a day."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > LEFTOVER_SECONDS:
                part.unlink()


class _TokenWriter:
    """The data of a token file, while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = self.documents = 0
        file.write(bytes(HEADER_BYTES))

    def mark(self) -> None:
        """Remember what there is, as it is whole."""
        self.whole = self.count, self.documents, self.digest.copy()

    def take(self, tokens: Tensor) -> None:
        """Write some tokens."""
        data = tokens.numpy().astype("<i4", copy=False).tobytes()
        self._file.write(data)
        self.digest.update(data)
        self.count += len(tokens)

    def take_documents(
        self, documents: Iterable[list[int]], limit: int | None, progress: Progress
    ) -> bool:
        """Write documents until there are `limit` tokens; gives whether the text has no more."""
        import torch

        told = 0
        for ids in documents:
            self.take(torch.tensor(ids, dtype=torch.int32))
            self.documents += 1
            self.mark()
            if limit is None:
                continue
            for _ in range(told, min(PARTS, PARTS * self.count // limit)):
                progress.step(f"{self.count} tokens")
                told += 1
            if self.count >= limit:
                return False  # as far as is known
        return True


def _changed(path: Path) -> DataError:
    return cache_file.damaged(path, "its tokens are others")
