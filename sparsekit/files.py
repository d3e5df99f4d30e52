"""Atomic and durable writing of files: a crash leaves either the old state or the new one."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsekit.errors import DataError, StorageError, UsageError

CHUNK = 1 << 24
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
KEPT = "finished work is kept next to the output: make room, then run the same command again"
CACHED = "make room there, or set SPARSEKIT_CACHE to a folder that can be written"


def cache_dir() -> Path:
    """The user's cache directory for sparsekit (`$SPARSEKIT_CACHE`, else `$XDG_CACHE_HOME`)."""
    if "SPARSEKIT_CACHE" in os.environ:
        return Path(os.environ["SPARSEKIT_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sparsekit"


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that exists."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """The sha256 of a JSON value in canonical form, in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Make the bytes of a file, or the entries of a directory, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(handle: int, n_bytes: int) -> None:
    """Set the size of an open file, and reserve the space on the disk if possible.

    macOS has no `posix_fallocate`: there a full disk is noticed only when the bytes are written.

    Raises:
        OSError: The disk is full.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
    else:
        os.ftruncate(handle, n_bytes)


@contextlib.contextmanager
def replacing(path: Path, hint: str = KEPT) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces the one at `path`, durably and atomically.

    Args:
        path: The file.
        hint: The hint of the error when the disk is full.

    Raises:
        StorageError: It could not be written; the old file is untouched.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with storage_errors(path, hint):
        try:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        fsync_path(path.parent)


def write_atomic(path: Path, data: bytes, hint: str = KEPT) -> None:
    """Replace the file at `path` by `data`, see `replacing`."""
    with replacing(path, hint) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        DataError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", code="cannot-read") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}", code="invalid-json") from error


@contextlib.contextmanager
def storage_errors(path: Path, hint: str = KEPT) -> Iterator[None]:
    """Turn a failed write below `path` into a `StorageError` with a hint.

    Args:
        path: The file or folder that is written.
        hint: The hint when the disk is full.

    Raises:
        StorageError: The write failed.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and error.errno is not None:
            hint = "check the path and its permissions, then run the same command again"
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", hint, code="cannot-write"
        ) from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file at `path`.

    Raises:
        UsageError: Another process holds it.
    """
    import fcntl  # which Windows lacks

    with storage_errors(path):
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is writing {path.parent}",
                "wait for it or choose another output",
                code="output-in-use",
            ) from error
        yield
