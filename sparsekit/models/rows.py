"""Rows of token ids: checked, fingerprinted, read from a row file, and kept in the cache."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError
from sparsekit.files import CACHED, storage_errors, write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig


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


def capped(length: int, config: PretrainedConfig) -> tuple[int, tuple[str, ...]]:
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
    if length is not None and length > tokens.shape[1]:
        raise DataError(
            f"the rows of {source} have {tokens.shape[1]} tokens, {length} are asked for",
            f"use --length {tokens.shape[1]} or less",
        )
    length, notes = capped(length or tokens.shape[1], config)
    return tokens[:, :length], notes


def read_row_file(source: str) -> Tensor:
    """All rows of a row file, `[samples, length]` int64.

    Raises:
        DataError: The file is not one 2-D integer tensor.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(source)
    except SafetensorError as error:
        raise DataError(f"{source} is not a valid safetensors file: {error}") from error
    if len(tensors) != 1:
        raise DataError(f"{source} holds {len(tensors)} tensors, a row file holds exactly one")
    (tokens,) = tensors.values()
    fractional = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if fractional or tokens.dim() != 2 or len(tokens) < 1 or tokens.shape[1] < 2:
        raise DataError(
            f"{source} holds {tokens.dtype} of shape {list(tokens.shape)}",
            "a row file holds integers [samples, length], at least one row of two tokens",
        )
    return tokens.to(torch.int64)


def token_rows(
    tokens: Tensor, source: str, config: PretrainedConfig, notes: tuple[str, ...]
) -> TokenRows:
    """Checked rows with their fingerprint.

    Raises:
        DataError: An id is outside the model's vocabulary.
    """
    size = config.get_text_config().vocab_size
    outside = ((tokens < 0) | (tokens >= size)).nonzero()
    if len(outside):
        row, column = outside[0].tolist()
        raise DataError(
            f"{source}: row {row}, column {column} is token {tokens[row, column]}, "
            f"the model's vocabulary has {size}",
            "were the rows or the tokenizer made for another model?",
        )
    return TokenRows(
        tokens=tokens.contiguous(), source=source, fingerprint=fingerprint(tokens), notes=notes
    )


def fingerprint(tokens: Tensor) -> str:
    """The sha256 over shape and ids, all as little-endian int64, in hexadecimal."""
    digest = hashlib.sha256(struct.pack(f"<{tokens.dim()}q", *tokens.shape))
    digest.update(tokens.contiguous().numpy().astype("<i8", copy=False).tobytes())
    return digest.hexdigest()


def read_cache(path: Path) -> Tensor | None:
    """The rows stored at `path`; None when there are none. A damaged file is removed."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            tokens = file.get_tensor("tokens")
            if (file.metadata() or {}).get("fingerprint") == fingerprint(tokens):
                return tokens
    except SafetensorError:
        tokens = None  # as with a wrong fingerprint, the rows are drawn again
    path.unlink(missing_ok=True)
    return None


def write_cache(path: Path, tokens: Tensor) -> None:
    """Store rows at `path`, with their fingerprint to tell later damage.

    Raises:
        StorageError: They could not be written.
    """
    from safetensors.torch import save

    with storage_errors(path, CACHED):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({"tokens": tokens}, {"fingerprint": fingerprint(tokens)}), CACHED)
