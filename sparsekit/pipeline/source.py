"""Checks that come first in every verb that writes: the source, the output folder, the disk."""

from pathlib import Path

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout
from sparsekit.checkpoint.output_folder import (
    refuse_foreign,
    refuse_output,
    refuse_source,
    require_space,
)
from sparsekit.checkpoint.resolve import resolve
from sparsekit.files import existing_parent
from sparsekit.progress import Progress


def open_source(model: str, out: Path, *, overwrite: bool, progress: Progress) -> Checkpoint:
    """Open the model of a verb that writes to `out`, after checking that it may.

    Raises:
        UsageError: `out` is in use, or is or holds the model.
        DataError: The model cannot be read.
    """
    refuse_output(out, overwrite=overwrite)
    source = Checkpoint.open(resolve(model, progress))
    refuse_source(out, source.path)
    refuse_foreign(out.with_name(out.name + ".partial"))
    return source


def require_disk(out: Path, layout: Layout, others: int = 0) -> None:
    """Refuse an output that does not fit on the disk, unless an earlier run has reserved the space.

    Args:
        out: The folder to make.
        layout: Its weight files.
        others: Bytes of other files that are kept there until it is complete.

    Raises:
        StorageError: Says how much is missing.
    """
    if not out.with_name(out.name + ".partial").exists():
        require_space(existing_parent(out), layout, others)
