"""A safetensors file of the user's cache, with the sha256 of its tensors to tell later damage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError
from sparsekit.files import CACHED, storage_errors, write_atomic

if TYPE_CHECKING:
    from torch import Tensor


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store tensors, which are on the CPU.

    Raises:
        StorageError: They could not be written.
    """
    from safetensors.torch import save

    with storage_errors(path, CACHED):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(dict(tensors), {"fingerprint": _fingerprint(tensors)}), CACHED)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DataError: It is damaged.
    """
    file, metadata = opened(path)
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    if metadata.get("fingerprint") != _fingerprint(tensors):
        raise damaged(path, "its numbers are not those that were written")
    return tensors


def read_or_remove(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file; None when there is none. A damaged file is removed."""
    if not path.is_file():
        return None
    try:
        return read(path)
    except DataError:
        path.unlink(missing_ok=True)
        return None


def opened(path: Path) -> tuple[Any, dict[str, str]]:
    """A file as the safetensors library opens it, and its metadata.

    Raises:
        DataError: It is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
    return file, file.metadata() or {}


def damaged(path: Path, reason: object) -> DataError:
    """What to raise of a file that is not as it was written."""
    return DataError(
        f"{path} is damaged: {reason}", "delete it, and it is made again", code="damaged-file"
    )


def header(n_bytes: int, name: str, shape: list[int], metadata: Mapping[str, str]) -> bytes:
    """What precedes the data of a file with one int32 tensor, padded to a length.

    For a file whose data is written before its size is known.
    """
    size = 4 * shape[0]
    entry = {"dtype": "I32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": dict(metadata), name: entry}).encode()
    return (n_bytes - 8).to_bytes(8, "little") + text.ljust(n_bytes - 8)


def _fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()
