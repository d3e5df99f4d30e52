"""The place of an output: checks that need neither torch nor the model."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.checkpoint.folder import PROVENANCE
from sparsekit.errors import StorageError, UsageError

if TYPE_CHECKING:
    from sparsekit.checkpoint.layout import Layout


# Held while a run writes. In a folder next to an output it shows that the folder is that output's.
LOCK = ".sparsekit-lock"
# Prefix of the names of all files that only an unfinished run needs.
OWN = ".sparsekit-"
# Room for everything that is not a weight: tokenizer, configuration, provenance.
SPARE_BYTES = 64 << 20


def refuse_source(out: Path, source: Path) -> None:
    """Refuse an output folder that is, or holds, the model that is read.

    Raises:
        UsageError: It is such a folder.
    """
    if out.resolve() == source.resolve():
        raise UsageError(
            f"the output {out} is the model itself",
            "choose another output folder",
            code="output-is-source",
        )
    if out.resolve() in source.resolve().parents:
        raise UsageError(
            f"the output {out} contains the model {source}",
            "choose another folder",
            code="output-is-source",
        )


def refuse_output(out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder whose writing could cost the user data.

    Raises:
        UsageError: The folder exists and is not to be, or must not be, overwritten.
    """
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"the output {out} is the current folder or contains it",
            code="output-is-current-folder",
        )
    if out.is_symlink():
        raise UsageError(
            f"the output {out} is a link", "name the folder itself", code="output-is-link"
        )
    if not out.exists():
        nearest = next(path for path in out.absolute().parents if path.exists())
        if not nearest.is_dir():
            raise UsageError(
                f"the output {out} cannot be made: {nearest} is not a folder", code="not-a-folder"
            )
        if not os.access(nearest, os.W_OK):
            raise UsageError(
                f"the output {out} cannot be made: permission denied in {nearest}",
                code="cannot-write",
            )
        return
    if not out.is_dir():
        raise UsageError(f"the output {out} is a file", "choose another name", code="not-a-folder")
    if (out / PROVENANCE).is_file():
        _tidy(out)
    if not overwrite:
        raise UsageError(
            f"the output {out} exists",
            "choose another folder or pass --overwrite",
            code="output-exists",
        )
    if any(out.iterdir()) and not (out / PROVENANCE).is_file():
        raise UsageError(
            f"{out} was not written by sparsekit and is not overwritten",
            "delete it yourself or choose another folder",
            code="not-by-sparsekit",
        )


def _tidy(out: Path) -> None:
    """Remove what a run that was killed after its last rename left in a complete output.

    The files of a run that is not complete are next to the output, never in it.
    """
    for left in out.glob(f"{OWN}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                left.unlink()


def refuse_foreign(partial: Path) -> None:
    """Refuse to work in a folder next to the output that no run of sparsekit made.

    Raises:
        UsageError: The folder holds something and has no lock file.
    """
    if partial.exists() and any(partial.iterdir()) and not (partial / LOCK).exists():
        raise UsageError(
            f"{partial} is in the way and was not made by sparsekit",
            "move it or choose another output",
            code="not-by-sparsekit",
        )


def require_space(folder: Path, layout: Layout, others: int = 0) -> None:
    """Refuse an output that does not fit on the disk.

    Args:
        folder: An existing folder on the output's disk; weight files that an interrupted run has
            laid out there count as room.
        layout: The weight files of the output.
        others: Bytes of other files that are kept there until it is complete.

    Raises:
        StorageError: Says how much is missing.
    """
    needed, free = layout.n_bytes + others + SPARE_BYTES, shutil.disk_usage(folder).free
    laid_out = [folder / file for file in layout.headers if (folder / file).is_file()]
    free += sum(file.stat().st_blocks * 512 for file in laid_out)
    if free < needed:
        raise StorageError(
            f"the output {'and saved states need' if others else 'needs'} {needed / 1e9:.2f} GB, "
            f"{folder} has {free / 1e9:.2f} GB free",
            "make room or choose another disk",
            code="not-enough-disk",
        )
