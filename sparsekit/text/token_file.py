"""The tokens of a text on disk: one int32 tensor that grows by whole documents.

The header of the safetensors file also records the number of documents, whether the text is
complete, and the sha256 of the tokens.
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
# Tokens that are read at a time when the whole file is read.
PIECE_TOKENS = 1 << 22
# Age at which an unchanged temporary file counts as the leftover of a killed process.
LEFTOVER_SECONDS = 86_400.0
# Number of progress steps.
PARTS = 100


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenFile:
    """The tokens of a text's first documents, or of all of them."""

    path: Path
    stream: Tensor  # a slice of the file, int32, read on indexing
    count: int
    documents: int
    complete: bool
    fingerprint: str

    @classmethod
    def read(cls, path: Path) -> TokenFile:
        """Open a file.

        Raises:
            DataError: It is damaged.
        """
        from safetensors import SafetensorError

        try:
            file, metadata = cache_file.opened(path)
            stream = file.get_slice("tokens")
            return cls(
                path=path,
                stream=stream,
                count=stream.get_shape()[0],
                documents=int(metadata["documents"]),
                complete=metadata["complete"] == "yes",
                fingerprint=metadata["fingerprint"],
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise cache_file.damaged(path, error) from error

    def reaches(self, tokens: int | None) -> bool:
        """Whether the file has this many tokens (None: all), or the text has no more."""
        return self.complete or (tokens is not None and self.count >= tokens)

    def pieces(self, ends: Iterable[int] = ()) -> Iterator[Tensor]:
        """The tokens in pieces that fit into memory, with cuts also at `ends`."""
        import torch

        cuts = sorted({*range(0, self.count, PIECE_TOKENS), *ends, self.count})
        for start, end in pairwise(cuts):
            yield torch.as_tensor(self.stream[start:end])

    def check(self, count: int, vocabulary: int) -> str:
        """The sha256 of the first `count` tokens, after a check of the whole file.

        Raises:
            DataError: The file is damaged, or a token is outside the model's vocabulary.
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
                code="token-out-of-range",
            )
        return wanted


def write_tokens(
    path: Path,
    documents: Iterable[list[int]],
    limit: int | None,
    before: TokenFile | None,
    progress: Progress,
) -> None:
    """Write the tokens of whole documents up to a limit; an interrupt keeps those written so far.

    Args:
        path: The file to create or replace.
        documents: The ids of the documents that follow those of `before`.
        limit: Number of tokens that is enough; None: all.
        before: The existing file.
        progress: Steps at each hundredth of the limit.

    Raises:
        DataError: The existing file is damaged.
        StorageError: The tokens could not be written.
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
        added.mark()  # so that an interrupt from here on leaves a valid file
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
    """Remove temporary files of killed processes after a day."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - part.stat().st_mtime > LEFTOVER_SECONDS:
                part.unlink()


class _TokenWriter:
    """The data of a token file while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.count = self.documents = 0
        file.write(bytes(HEADER_BYTES))

    def mark(self) -> None:
        """Remember the current state as one with whole documents only."""
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
        """Write documents up to `limit` tokens; returns whether the text has no more."""
        import torch

        steps = 0
        for ids in documents:
            self.take(torch.tensor(ids, dtype=torch.int32))
            self.documents += 1
            self.mark()
            if limit is None:
                continue
            for _ in range(steps, min(PARTS, PARTS * self.count // limit)):
                progress.step(f"{self.count} tokens")
                steps += 1
            if self.count >= limit:
                return False  # as far as is known
        return True


def _changed(path: Path) -> DataError:
    return cache_file.damaged(path, "its tokens are others")
