"""Verb `quantize` as a function."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.api.keywords import writer
from sparsekit.progress import SILENT, Progress
from sparsekit.quantization.config import QuantizeConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@writer(QuantizeConfig)
def quantize(
    config: QuantizeConfig,
    model: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a quantized copy of a model, as `sparsekit quantize MODEL -o OUT` does.

    Arguments and errors are those of `prune`, except for the options.
    """
    from sparsekit.quantization.quantize import quantize as stage

    return stage(config, str(model), Path(out), overwrite=overwrite, progress=progress)
