"""The part that all dry-run plans share."""

import shutil
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout
from sparsekit.files import existing_parent


def dtype_name(dtype: Any) -> str:
    """A torch dtype without its prefix, e.g. `float32`."""
    return str(dtype).removeprefix("torch.")


def begun(source: Checkpoint, out: Path, method: str, layout: Layout) -> dict[str, Any]:
    """The fields that every plan starts with."""
    return {
        "model": str(source.path),
        "out": str(out),
        "method": method,
        "bytes_to_write": layout.n_bytes,
        "bytes_free": shutil.disk_usage(existing_parent(out)).free,
    }
