"""Writing files: what a failed write costs and says."""

import errno
import os

import pytest

from sparsekit.errors import StorageError
from sparsekit.files import reserve, storage_errors, write_atomic


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "make room, then run the same command again"),
        (errno.EDQUOT, "make room, then run the same command again"),
        (errno.EACCES, "check the path and its permissions"),
        (errno.EROFS, "check the path and its permissions"),
        (None, "make room, then run the same command again"),  # safetensors gives no number
    ],
)
def test_failed_write_is_told_with_what_helps(tmp_path, code, hint):
    error = OSError("failed") if code is None else OSError(code, os.strerror(code))
    with (
        pytest.raises(StorageError, match=rf"cannot write .*/x: .*; .*{hint}"),
        storage_errors(tmp_path / "x"),
    ):
        raise error


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_atomic(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("system", ["linux", "macos"])
def test_a_file_gets_its_size_where_the_system_cannot_reserve_room(tmp_path, monkeypatch, system):
    if system == "macos":
        monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), 12345)
    assert (tmp_path / "file").read_bytes() == bytes(12345)
