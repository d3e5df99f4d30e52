"""Writing files so that a crash leaves either the old state or the new one."""

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
KEPT = "finished work is kept beside the output: make room, then run the same command again"
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
    """Give an open file this size, and take the room on the disk where the system can.

    macOS has no `posix_fallocate`: there a full disk shows only when the bytes are written.

    Raises:
        OSError: The disk has no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, n_bytes)
    else:
        os.ftruncate(handle, n_bytes)


@contextlib.contextmanager
def replacing(path: Path, hint: str = KEPT) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of that at `path`, durably and in one step.

    Args:
        path: The file.
        hint: What to do when the disk is full.

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
    """Replace the file at `path` by `data`; arguments and errors as of `replacing`."""
    with replacing(path, hint) as file:
        file.write(data)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value for people to read, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in a file.

    Raises:
        DataError: The file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


@contextlib.contextmanager
def storage_errors(path: Path, hint: str = KEPT) -> Iterator[None]:
    """Turn a failed write below `path` into a `StorageError` that says what to do.

    Args:
        path: What is written.
        hint: What to do when the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL and error.errno is not None:
            hint = "check the path and its permissions, then run the same command again"
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}",
            hint,
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
                f"another process is writing {path.parent}", "wait for it or choose another output"
            ) from error
        yield
