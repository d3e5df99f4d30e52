"""Where text comes from: the interpreter, the hub or a local file."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from sparsekit.errors import DataError, UsageError, did_you_mean

SOURCES = ("builtin", "self", "c4", "wikitext2")
C4 = "allenai/c4"
WIKITEXT2 = "Salesforce/wikitext"
TRAIN_FILES = {
    "c4": (C4, "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": (WIKITEXT2, "wikitext-2-raw-v1/train-*.parquet"),
}
EVALUATION_FILES = {
    "c4": (C4, "en/c4-validation.00000-of-00008.json.gz"),
    "wikitext2": (WIKITEXT2, "wikitext-2-raw-v1/test-*.parquet"),
}
TEXT_FILES = (".txt", ".raw", ".md")
DOCUMENT_FILES = (".jsonl", ".json.gz", ".parquet")
ROW_FILE = ".safetensors"
C4_DOCUMENTS = 1100
PIECE_BYTES = 1 << 20
# A line that is longer is cut at a space, or else where a character ends.
LINE_BYTES = 16 << 20
ELSEWHERE = "use builtin or a local file instead"


def check_source(source: str) -> None:
    """Refuse a source that is neither a known name nor a readable file of a known kind.

    Raises:
        UsageError: The name or the kind of file is unknown.
        DataError: The file is missing, empty or unreadable.
    """
    if source in SOURCES:
        return
    path = Path(source)
    if not path.exists() and "/" not in source and "." not in source:
        raise UsageError(
            f"unknown source of text '{source}'",
            did_you_mean(source, SOURCES),
            code="no-such-source",
        )
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(
            f"{source} {problem}", f"name a file, or one of {', '.join(SOURCES)}", code="not-a-file"
        )
    kinds = (*TEXT_FILES, *DOCUMENT_FILES, ROW_FILE)
    if not is_kind(source, *kinds):
        raise UsageError(
            f"{source} is of an unknown kind of file",
            f"known: {', '.join(kinds)}",
            code="unknown-kind-of-file",
        )
    if path.stat().st_size == 0:
        raise DataError(f"{source} is empty", code="empty-file")
    if not os.access(path, os.R_OK):
        raise DataError(
            f"{source} cannot be read: permission denied",
            "check its permissions",
            code="cannot-read",
        )


def is_kind(source: str, *endings: str) -> bool:
    """Whether a source is a file with one of these name endings."""
    return source not in SOURCES and source.lower().endswith(endings)


def is_documents(source: str) -> bool:
    """Whether windows are drawn from single documents, not from one running text."""
    return source == "c4" or is_kind(source, *DOCUMENT_FILES)


def calibration_texts(source: str) -> Sequence[str]:
    """The documents to draw windows from; exactly one when the text is a running one."""
    if source == "builtin":
        return [builtin_text(held_out=False)]
    if source == "c4":
        return hub_texts(*TRAIN_FILES["c4"])
    if source == "wikitext2":
        return [" ".join(hub_texts(*TRAIN_FILES["wikitext2"]))]
    return file_texts(Path(source))


def training_texts(source: str) -> Iterator[str]:
    """The documents of a source one after another, never all of them in memory.

    A plain text comes in pieces that end with a line; Python's help text comes without the part
    that is held out for evaluation.
    """
    if source == "wikitext2":  # its rows are the lines of one text
        return iter(["\n\n".join(hub_texts(*TRAIN_FILES[source]))])
    if source in TRAIN_FILES:
        return iter(hub_texts(*TRAIN_FILES[source]))
    if source == "builtin":
        return iter([builtin_text(held_out=False)])
    return READERS[_ending(source)](Path(source))


def text_pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of about `PIECE_BYTES`, each ending with a line.

    Of lines longer than `LINE_BYTES` a piece is a part, that begins with a space where there is
    one: so do the words of most tokenizers.

    Raises:
        DataError: It is not UTF-8.
    """
    offset, held = 0, bytearray()
    with path.open("rb") as file:
        while data := file.read(PIECE_BYTES):
            end = data.rfind(b"\n") + 1
            cut = len(held) + end if end else 0
            held += data
            if not cut and len(held) >= LINE_BYTES:
                cut = held.rfind(b" ", 1)
                cut = cut if cut > 0 else end_of_character(held)
            if cut:
                yield decode(bytes(held[:cut]), path, offset)
                offset, held = offset + cut, held[cut:]
    if held:
        yield decode(bytes(held), path, offset)


def end_of_character(data: bytearray) -> int:
    """Where the last character of UTF-8 that may not be whole begins."""
    start = len(data) - 1
    while start > len(data) - 4 and data[start] & 0xC0 == 0x80:  # bytes that go on with one
        start -= 1
    return start


def evaluation_text(source: str) -> str:
    """The one text that perplexity is measured on."""
    if source == "builtin":
        return builtin_text(held_out=True)
    if source == "c4":
        return " ".join(hub_texts(*EVALUATION_FILES["c4"])[:C4_DOCUMENTS])
    if source == "wikitext2":
        return "\n\n".join(hub_texts(*EVALUATION_FILES["wikitext2"]))
    return "\n\n".join(file_texts(Path(source)))


def builtin_text(held_out: bool) -> str:
    """Python's help text: every fifth topic in sorted order is held out for evaluation."""
    from pydoc_data.topics import topics

    kept = (name for i, name in enumerate(sorted(topics)) if (i % 5 == 4) == held_out)
    return "\n\n".join(topics[name] for name in kept)


def hub_texts(repo: str, files: str) -> Sequence[str]:
    """The `text` fields in files of a hub dataset, or of a local folder with the same layout.

    Raises:
        DataError: The hub cannot be reached, or the files cannot be loaded.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HTTPError  # of httpx, under the name its version goes by

    try:
        return load_dataset(repo, data_files={"train": files}, split="train")["text"]
    except ConnectionError as error:
        raise DataError(
            f"the Hugging Face hub cannot be reached to load {repo}: {error}",
            ELSEWHERE,
            code="hub-unavailable",
        ) from error
    except (OSError, HTTPError, DatasetsError) as error:
        reason = str(error)[:200]
        raise DataError(
            f"{files} of {repo} cannot be loaded: {reason}", ELSEWHERE, code="cannot-load"
        ) from error


def file_texts(path: Path) -> list[str]:
    """The documents of a file, one for a plain text file.

    Raises:
        DataError: It is damaged, not UTF-8, or a record has no text; the message names the place.
    """
    if is_kind(path.name, *TEXT_FILES):
        return [decode(path.read_bytes(), path, 0)]
    texts = list(READERS[_ending(path.name)](path))
    if not texts:
        raise DataError(f"{path} holds no documents", code="no-documents")
    return texts


def json_texts(path: Path) -> Iterator[str]:
    """The field `text` of every line of a JSON lines file, compressed or not.

    Raises:
        DataError: A line is not such a record, or the compressed file is damaged.
    """
    opener = gzip.open if is_kind(path.name, ".gz") else open
    offset = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}, line {number}"
                if line.strip():
                    yield record_text(decode(line, path, offset), place)
                offset += len(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} is not a complete gzip file: {error}", code="damaged-file"
        ) from error


def record_text(line: str, place: str) -> str:
    """The field `text` of a JSON object.

    Raises:
        DataError: It is not JSON, or has no such field.
    """
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON: {error}", code="invalid-json") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f"{place}: no field 'text' that is a string", code="no-text")
    return record["text"]


def parquet_texts(path: Path) -> Iterator[str]:
    """The column `text` of a parquet file, a batch of rows in memory at a time.

    Raises:
        DataError: The file is damaged, or a row has no text.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(
                    f"{path} has no column 'text'",
                    f"its columns: {', '.join(names)}",
                    code="no-text",
                )
            batches = (batch["text"].to_pylist() for batch in file.iter_batches(columns=["text"]))
            for row, text in enumerate(chain.from_iterable(batches)):
                if not isinstance(text, str):
                    raise DataError(
                        f"{path}, row {row}: no field 'text' that is a string", code="no-text"
                    )
                yield text
    except (ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a valid parquet file: {error}", code="damaged-file"
        ) from error


def decode(data: bytes, path: Path, offset: int) -> str:
    """UTF-8 bytes, found at `offset` of the (uncompressed) file, as text.

    Raises:
        DataError: They are not UTF-8; the message says at which byte of the file.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8 at byte {offset + error.start}",
            "convert it with iconv",
            code="not-utf-8",
        ) from error


# The documents of a file by the end of its name, read one after another.
READERS: Mapping[str, Callable[[Path], Iterator[str]]] = {
    **dict.fromkeys(TEXT_FILES, text_pieces),
    ".jsonl": json_texts,
    ".json.gz": json_texts,
    ".parquet": parquet_texts,
}


def _ending(source: str) -> str:
    """The end of a file's name that says what kind of text it holds."""
    return next(ending for ending in READERS if is_kind(source, ending))
