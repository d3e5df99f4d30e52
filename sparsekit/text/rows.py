"""Rows of token ids: checked, fingerprinted, and read from a row file."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
# Tokens of a row file that are read at a time, where all are checked.
PIECE_TOKENS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenRows:
    """Rows of token ids that are all equally long and never padded."""

    tokens: Tensor  # [samples, length], int64
    source: str
    """What the user asked for."""
    fingerprint: str
    """sha256 over the shape and the ids, as little-endian int64."""
    notes: tuple[str, ...] = ()
    """What the user should be told, such as a capped length."""

    @property
    def title(self) -> str:
        """For people: how many rows of which text."""
        return f"{len(self.tokens)} x {self.tokens.shape[1]} tokens of {Path(self.source).name}"

    def to_json(self, seed: int) -> dict[str, Any]:
        """What the history tells of rows that were drawn with a seed."""
        samples, length = self.tokens.shape
        return {
            "source": self.source,
            "samples": samples,
            "length": length,
            "seed": seed,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }


def cap_length(length: int, config: PretrainedConfig) -> tuple[int, tuple[str, ...]]:
    """The length within the model's maximum, and a note when that is less than asked for."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not limit or limit < 0 or length <= limit:
        return length, ()
    return limit, (f"length capped at {limit}: the model's maximum",)


def cut_row_file(
    source: str, length: int | None, config: PretrainedConfig
) -> tuple[Tensor, tuple[str, ...]]:
    """All rows of a row file [samples, length], cut to the length asked for, and the notes.

    Raises:
        DataError: See `read_row_file`; or its rows are shorter than `length`.
    """
    tokens = read_row_file(source)
    length, notes = row_length(source, tokens.shape[1], length, config)
    return tokens[:, :length], notes


def row_length(
    source: str, columns: int, length: int | None, config: PretrainedConfig
) -> tuple[int, tuple[str, ...]]:
    """The length that rows of a row file are cut to, and the notes.

    Raises:
        DataError: They are shorter than `length`.
    """
    if length is not None and length > columns:
        raise DataError(
            f"the rows of {source} have {columns} tokens, {length} are asked for",
            f"use --length {columns} or less",
            code="rows-too-short",
        )
    return cap_length(length or columns, config)


def read_row_file(source: str) -> Tensor:
    """All rows of a row file, `[samples, length]` int64.

    Raises:
        DataError: The file is not one 2-D integer tensor.
    """
    import torch

    return open_row_file(source)[:].to(torch.int64)


def open_row_file(source: str) -> Any:
    """The rows of a row file as a slice `[samples, length]` that is read where it is cut.

    Raises:
        DataError: The file is not one 2-D integer tensor.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(source, "pt")
        names = list(file.keys())
        if len(names) != 1:
            raise DataError(
                f"{source} holds {len(names)} tensors, a row file holds exactly one",
                code="invalid-rows",
            )
        rows = file.get_slice(names[0])
        shape, kind = rows.get_shape(), rows.get_dtype()
    except SafetensorError as error:
        raise DataError(
            f"{source} is not a valid safetensors file: {error}", code="damaged-file"
        ) from error
    if kind not in INTEGERS or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise DataError(
            f"{source} holds {kind} of shape {shape}",
            "a row file holds integers [samples, length], at least one row of two tokens",
            code="invalid-rows",
        )
    return rows


def token_rows(
    tokens: Tensor, source: str, config: PretrainedConfig, notes: tuple[str, ...]
) -> TokenRows:
    """Checked rows with their fingerprint.

    Raises:
        DataError: An id is outside the model's vocabulary.
    """
    require_vocabulary(tokens, source, config)
    return TokenRows(
        tokens=tokens.contiguous(), source=source, fingerprint=fingerprint(tokens), notes=notes
    )


def require_vocabulary(
    tokens: Tensor, source: str, config: PretrainedConfig, first: int = 0
) -> None:
    """Refuse rows with ids that the model does not have; the first is row `first` of the source.

    Raises:
        DataError: An id is outside the model's vocabulary.
    """
    size = config.get_text_config().vocab_size
    outside = ((tokens < 0) | (tokens >= size)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise DataError(
            f"{source}: row {first + row}, column {column} is token {tokens[row, column]}, "
            f"the model's vocabulary has {size}",
            "were the rows or the tokenizer made for another model?",
            code="outside-vocabulary",
        )


class RowFile:
    """A row file as one stream of rows of another length, read where it is cut.

    Args:
        source: The file.
        length: Tokens of a row of the stream.
        pieces: How many of them each row of the file gives; the rest of it is left out.

    Raises:
        DataError: See `open_row_file`.
    """

    def __init__(self, source: str, length: int, pieces: int) -> None:
        self._source = source
        self._stored = open_row_file(source)
        self._samples, self._columns = self._stored.get_shape()
        self._length, self._pieces = length, pieces

    @property
    def count(self) -> int:
        """Tokens of the stream."""
        return self._samples * self._pieces * self._length

    def __getitem__(self, tokens: slice) -> Tensor:
        """The row of the stream that begins at a token, `[length]`."""
        row, piece = divmod(tokens.start // self._length, self._pieces)
        start = piece * self._length
        return self._stored[row : row + 1, start : start + self._length][0]

    def check(self, config: PretrainedConfig) -> str:
        """The fingerprint of the rows of the stream, read a part of the file at a time.

        Raises:
            DataError: An id is outside the model's vocabulary.
        """
        import torch

        digest = _digest(self._samples * self._pieces, self._length)
        together = max(1, PIECE_TOKENS // self._columns)
        for first in range(0, self._samples, together):
            rows = self._stored[first : first + together, : self._pieces * self._length]
            rows = rows.to(torch.int64)
            require_vocabulary(rows, self._source, config, first)
            digest.update(_bytes(rows))
        return digest.hexdigest()


def fingerprint(tokens: Tensor) -> str:
    """The sha256 over shape and ids, all as little-endian int64, in hexadecimal."""
    digest = _digest(*tokens.shape)
    digest.update(_bytes(tokens))
    return digest.hexdigest()


def _digest(*shape: int) -> Any:
    """A sha256 that has seen a shape."""
    return hashlib.sha256(struct.pack(f"<{len(shape)}q", *shape))


def _bytes(tokens: Tensor) -> bytes:
    """Ids as little-endian int64."""
    return tokens.contiguous().numpy().astype("<i8", copy=False).tobytes()
