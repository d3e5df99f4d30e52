"""Preparation of a quantization run: all checks and choices that need no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.pipeline.selection import select
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.methods import Quantizer
from sparsekit.quantization.storage import coded_layout, refuse_grid
from sparsekit.solvers.input_stats import Stats
from sparsekit.weights.grids import Grid

if TYPE_CHECKING:
    from sparsekit.text.calibration import Calibration


@dataclass(frozen=True, kw_only=True)
class QuantizeJob:
    """A checked configuration with everything that the loop over blocks needs."""

    config: QuantizeConfig
    quantizer: Quantizer
    grid: Grid
    source: Checkpoint
    stream: BlockStream
    targets: list[Target]
    skipped: list[dict[str, str]]
    layout: Layout
    calibration: Calibration | None

    @property
    def want(self) -> Stats | None:
        """Sums over the inputs of weights; None: no forward pass."""
        return stats_of(self.quantizer, self.calibration)

    @property
    def coded(self) -> bool:
        """Whether codes are stored, or the rounded numbers."""
        return self.config.format != "dense"


def stats_of(quantizer: Quantizer, calibration: Calibration | None) -> Stats | None:
    """Sums over the inputs of weights; None: no forward pass."""
    return (quantizer.needs or Stats.NORMS) if calibration else None


def prepare_quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeJob:
    """Check a configuration against a model and an output folder.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model cannot be read, is quantized, or keeps factors.
        StorageError: The disk has no room for the output.
    """
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("quantize")
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    targets, skipped = select(stream, config.skip)
    grid = config.grid
    refuse_grid(grid, targets, skipped, flag="--grid", coded=config.format != "dense")
    layout = Layout.of(source)
    if config.format != "dense":
        layout = coded_layout(source, targets, grid)
    require_disk(out, layout)
    calibration = config.rows
    if calibration is not None:
        calibration.require(source)
    return QuantizeJob(
        config=config,
        quantizer=methods.load("quantizers", config.method, config.option),
        grid=grid,
        source=source,
        stream=stream,
        targets=targets,
        skipped=skipped,
        layout=layout,
        calibration=calibration,
    )
