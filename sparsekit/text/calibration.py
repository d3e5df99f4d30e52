"""Token rows for calibration and for perplexity: from text, from a row file or from the model.

Source: the window draw of Wanda, SparseGPT and DSnoT (locuslab/wanda, lib/data.py) for
calibration, and their perplexity protocol for evaluation.
Differs: a private random generator; documents known to be too short are not tokenised again, and
when all of them are too short that is an error (the references loop for ever); the length is an
option of its own instead of the model's maximum.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError, UsageError
from sparsekit.files import cache_dir, sha256_file, sha256_json
from sparsekit.progress import SILENT, Progress
from sparsekit.text import cache_file
from sparsekit.text import self_text as selftext
from sparsekit.text.rows import TokenRows, cap_length, cut_row_file, token_rows
from sparsekit.text.sources import (
    ROW_FILE,
    SOURCES,
    TRAIN_FILES,
    builtin_text,
    calibration_texts,
    check_source,
    evaluation_text,
    is_documents,
    is_kind,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from sparsekit.checkpoint.checkpoint import Checkpoint


SAMPLES = 128
LENGTH = 2048
C4_WINDOWS = 256
CACHE_FORMAT = 1
TOKENIZER_FILES = ("token*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*_tokens*.json")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Which token rows the activations are observed on."""

    source: str = "builtin"
    """One of `SOURCES`, or a file: text, JSON lines or parquet with a field `text`, token rows."""
    samples: int | None = None
    """Number of rows; 128, or all rows of a row file."""
    length: int | None = None
    """Tokens in a row; 2048, or the length of a row file; capped at the model's maximum."""
    seed: int = 0

    def check(self) -> None:
        """Refuse what can be known to be wrong without loading anything.

        Raises:
            UsageError: The source or a number is not one that exists.
            DataError: The file is missing, empty or unreadable.
        """
        check_source(self.source)
        check_number("samples", self.samples, 1)
        check_number("length", self.length, 2)
        check_number("seed", self.seed, 0)  # random.Random takes -1 and 1 for the same seed

    def rows(self, checkpoint: Checkpoint, progress: Progress = SILENT) -> TokenRows:
        """The token rows for a checkpoint, from the cache when they were drawn before.

        `builtin` is Python's own help text (`pydoc_data.topics`) without every fifth topic, which
        `evaluation_rows` keeps for itself. It varies with the Python version, and so do the
        fingerprint and the cache key.

        Raises:
            UsageError: See `check`.
            DataError: The source is broken, too short, or does not fit the model.
        """
        self.check()
        if is_kind(self.source, ROW_FILE):
            return self._stored(checkpoint.config)
        length, notes = cap_length(self.length or LENGTH, checkpoint.config)
        samples = self.samples or SAMPLES
        path = cache_dir() / "tokens" / f"{self._key(checkpoint, samples, length)}.safetensors"
        stored = cache_file.read_or_remove(path)
        if stored is not None:
            tokens = stored["tokens"]
        else:
            kept = path.with_suffix(".unfinished")
            tokens = self._draw(checkpoint, samples, length, progress, kept)
            cache_file.write(path, {"tokens": tokens})
            kept.unlink(missing_ok=True)
        return token_rows(tokens, self.source, checkpoint.config, notes)

    def require(self, checkpoint: Checkpoint) -> None:
        """Make sure that rows can be had for a checkpoint, as far as that needs no text.

        Raises:
            DataError: A row file does not fit the model, a text needs the missing tokenizer, or
                a model that rows are sampled from does not fit into memory.
        """
        if is_kind(self.source, ROW_FILE):
            self._stored(checkpoint.config)
        elif self.source == "self":
            selftext.require_memory(checkpoint)
        else:
            checkpoint.tokenizer()

    def shape(self, config: PretrainedConfig) -> tuple[int, int]:
        """Samples and length of the rows for a model, without drawing them.

        Raises:
            DataError: A row file is broken or does not fit the model.
        """
        if is_kind(self.source, ROW_FILE):
            samples, length = self._stored(config).tokens.shape
            return samples, length
        return self.samples or SAMPLES, cap_length(self.length or LENGTH, config)[0]

    def _draw(
        self, checkpoint: Checkpoint, samples: int, length: int, progress: Progress, kept: Path
    ) -> Tensor:
        """The rows; `kept` holds those that an interrupted run has sampled."""
        import torch

        if self.source == "self":
            return selftext.sample_rows(checkpoint, samples, length, self.seed, progress, kept=kept)
        texts = calibration_texts(self.source)
        encode = encoder(checkpoint)
        progress.begin(f"calibration rows from {self.source}", samples)
        draw = document_windows if is_documents(self.source) else running_windows
        rows = []
        for row in draw(texts, encode, samples, length, self.seed, self.source):
            rows.append(row)
            progress.step(f"row {len(rows)}")
        progress.end()
        return torch.tensor(rows, dtype=torch.int64)

    def _stored(self, config: PretrainedConfig) -> TokenRows:
        tokens, notes = cut_row_file(self.source, self.length, config)
        samples = len(tokens) if self.samples is None else self.samples
        if samples > len(tokens):
            raise DataError(
                f"{self.source} holds {len(tokens)} rows, {samples} are asked for",
                f"use --samples {len(tokens)} or fewer",
                code="too-few-rows",
            )
        return token_rows(tokens[:samples].clone(), self.source, config, notes)

    def _key(self, checkpoint: Checkpoint, samples: int, length: int) -> str:
        return sha256_json(
            {
                "format": CACHE_FORMAT,
                **source_key(self.source, checkpoint),
                "tokenizer": tokenizer_key(checkpoint),
                "draw": [samples, length, self.seed],
                "versions": [version(name) for name in ("torch", "transformers", "tokenizers")],
            }
        )


def source_key(source: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells the text of a source from any other, for the keys of caches."""
    kind = "documents" if is_documents(source) else "text"
    if source == "builtin":
        content: Any = hashlib.sha256(builtin_text(held_out=False).encode()).hexdigest()
    elif source == "self":
        content = [checkpoint.fingerprint, checkpoint.config.to_json_string()]
    else:
        content = TRAIN_FILES.get(source) or sha256_file(Path(source))
    return {"source": source if source in SOURCES else kind, "content": content}


def tokenizer_key(checkpoint: Checkpoint) -> dict[str, str]:
    """What tells a checkpoint's tokenizer from any other."""
    found = {path for pattern in TOKENIZER_FILES for path in checkpoint.path.glob(pattern)}
    return {path.name: sha256_file(path) for path in found if path.is_file()}


def evaluation_rows(
    source: str, checkpoint: Checkpoint, *, length: int | None = None, limit: int | None = None
) -> TokenRows:
    """The windows that perplexity is measured on: one text, tokenised once, cut without overlap.

    The tail is dropped. `c4` is its first 1100 validation documents, at most 256 windows; the
    documents of a file are joined by an empty line; a row file is taken as it is. `length` is
    2048, or that of a row file, and capped at the model's maximum. `limit` windows are taken
    evenly spaced when there are more.

    Raises:
        UsageError: The source or a number is not one that can be used.
        DataError: The source is broken, too short, or does not fit the model.
    """
    import torch

    check_source(source)
    check_number("length", length, 2)
    check_number("limit", limit, 1)
    if source == "self":
        raise UsageError(
            "perplexity cannot be measured on text of the model itself",
            "use builtin, c4, wikitext2 or a file",
            code="source-not-taken",
        )
    if is_kind(source, ROW_FILE):
        tokens, notes = cut_row_file(source, length, checkpoint.config)
    else:
        length, notes = cap_length(length or LENGTH, checkpoint.config)
        ids = encoder(checkpoint)(evaluation_text(source))
        count = min(len(ids) // length, C4_WINDOWS if source == "c4" else len(ids))
        if count == 0:
            raise too_short(source, len(ids), length)
        tokens = torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)
    if limit is not None and limit < len(tokens):
        tokens = tokens[[i * len(tokens) // limit for i in range(limit)]]
    return token_rows(tokens, source, checkpoint.config, notes)


def check_number(name: str, value: int | None, least: int) -> None:
    """Refuse a number below `least`.

    Raises:
        UsageError: It is below.
    """
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}, it must be at least {least}", code="out-of-range")


def encoder(checkpoint: Checkpoint) -> Callable[[str], list[int]]:
    """The checkpoint's tokenizer as a function, special tokens on."""
    tokenizer = checkpoint.tokenizer()
    # verbose=False: texts longer than the model's maximum are what windows are cut from.
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def document_windows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    samples: int,
    length: int,
    seed: int,
    source: str,
) -> Iterator[list[int]]:
    """Windows of single documents: draw a document, accept it if longer than a window, then cut.

    Raises:
        DataError: No document is longer than a window.
    """
    generator = random.Random(seed)
    longest = 0
    short: set[int] = set()
    while samples > 0:
        index = generator.randint(0, len(documents) - 1)
        if index in short:
            continue
        ids = encode(documents[index])
        if len(ids) > length:
            start = generator.randint(0, len(ids) - length - 1)
            yield ids[start : start + length]
            samples -= 1
            continue
        short.add(index)
        longest = max(longest, len(ids))
        if len(short) == len(documents):
            raise too_short(f"{source}: the longest of {len(documents)} documents", longest, length)


def running_windows(
    documents: Sequence[str],
    encode: Callable[[str], list[int]],
    samples: int,
    length: int,
    seed: int,
    source: str,
) -> Iterator[list[int]]:
    """Windows of one running text that is tokenised once.

    Raises:
        DataError: The text is not longer than a window.
    """
    generator = random.Random(seed)
    ids = encode(documents[0])
    if len(ids) <= length:
        raise too_short(source, len(ids), length)
    for _ in range(samples):
        start = generator.randint(0, len(ids) - length - 1)
        yield ids[start : start + length]


def too_short(what: str, tokens: int, length: int) -> DataError:
    """The error for a text that no window of `length` tokens can be cut from."""
    hint = f"use --length {tokens - 1} or a longer text" if tokens > 2 else "use a longer text"
    return DataError(
        f"{what} has {tokens} tokens, rows of {length} need more", hint, code="too-few-tokens"
    )
