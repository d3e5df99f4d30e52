"""Verb `prune` as a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.api.keywords import writer
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@writer(PruneConfig)
def prune(  # noqa: D417  (callers pass keywords instead of config)
    config: PruneConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a pruned copy of a model, as `sparsekit prune MODEL -o OUT` does.

    Args:
        model: A folder, hub id or `demo`.
        out: Folder to write; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Reports each block.

    Returns:
        The folder, and the history entry.

    Raises:
        SparsekitError: As the command, with the same message and hint.
    """
    from sparsekit.pruning.prune import prune as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)
