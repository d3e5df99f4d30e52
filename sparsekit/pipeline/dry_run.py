"""What the verbs that write, but for prune, would do and cost, told without doing it."""

import shutil
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout
from sparsekit.files import existing_parent


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def begun(source: Checkpoint, out: Path, method: str, layout: Layout) -> dict[str, Any]:
    """What every plan tells."""
    return {
        "model": str(source.path),
        "out": str(out),
        "method": method,
        "bytes_to_write": layout.n_bytes,
        "bytes_free": shutil.disk_usage(existing_parent(out)).free,
    }
