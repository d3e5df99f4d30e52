"""Verb `recover` as a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.api.keywords import writer
from sparsekit.progress import SILENT, Progress
from sparsekit.recovery.config import RecoverConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@writer(RecoverConfig)
def recover(
    config: RecoverConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report | None:
    """Write a trained copy of a model, as `sparsekit recover MODEL -o OUT` does.

    Arguments and errors are those of `prune`, except for the options.

    Returns:
        The folder, and the history entry; None in processes other than the main one.
    """
    from sparsekit.recovery.recover import recover as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)
