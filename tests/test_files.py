"""Writing files: a failed write leaves the old file and is reported with a hint."""

import errno
import os

import pytest
from refusals import refused

from sparsekit.errors import StorageError
from sparsekit.files import reserve, storage_errors, write_atomic


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room"),
        (errno.EACCES, "permissions"),
        (errno.EROFS, "permissions"),
        (None, "make room"),  # safetensors gives no number
    ],
)
def test_failed_write_is_reported_with_a_hint(tmp_path, number, hint):
    error = OSError("failed") if number is None else OSError(number, os.strerror(number))
    path = tmp_path / "x"
    with refused("cannot-write", path, hint, kind=StorageError), storage_errors(path):
        raise error


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with refused("cannot-write", tmp_path / "file", "No space left", kind=StorageError):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("system", ["linux", "macos"])
def test_a_file_gets_its_size_if_the_system_cannot_reserve_room(tmp_path, monkeypatch, system):
    if system == "macos":
        monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 12345)
    assert (tmp_path / "file").read_bytes() == bytes(12345)
