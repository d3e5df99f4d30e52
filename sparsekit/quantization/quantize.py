"""Put the weights of a checkpoint on a grid, block by block, from disk to disk; zeros stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsekit.checkpoint.entry import QuantizeEntry
from sparsekit.checkpoint.entry_parts import QuantizedTotals, QuantizedWeight, QuantizeSettings
from sparsekit.pipeline.loops import rewrite_blocks
from sparsekit.pipeline.output import Output
from sparsekit.pipeline.selection import family_notes
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS, Report, damping_notes, mean_error
from sparsekit.quantization.block import quantize_block, restore
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.prepare import QuantizeJob, prepare_quantize
from sparsekit.quantization.storage import coded_config

if TYPE_CHECKING:
    from sparsekit.text.rows import TokenRows


def quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a quantized copy of a model to the folder `out`.

    Args:
        config: What to do.
        model: A folder, hub id or `demo`.
        out: The folder to make; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Reports each block.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model or the calibration cannot be read, or is not finite.
        NumericalError: A weight cannot be solved for.
        StorageError: The output cannot be written.
    """
    output = Output("quantize", model, out, config.words, overwrite=overwrite, progress=progress)
    job = prepare_quantize(config, model, out, overwrite=overwrite, progress=progress)
    rows = job.calibration.rows(job.source, progress) if job.calibration else None
    for note in (*family_notes(job.stream), *(rows.notes if rows else ())):
        progress.note(note)
    settings = _settings(job, rows)
    with output.writing(job.source, settings, layout=job.layout, parts="blocks") as writer:
        progress.begin(f"{config.method} {job.grid}", len(job.stream))
        if rows:
            job.stream.feed(rows.tokens)
        rows_of_weights = rewrite_blocks(
            job.stream,
            writer,
            job.targets,
            lambda block, sums: quantize_block(job, block, sums),
            lambda block: restore(job, writer, block),
            want=job.want,
            propagate=True,
            progress=progress,
        )
        progress.end()
        weights = [QuantizedWeight(**row) for row in rows_of_weights]
        for note in damping_notes(weights, asdict(job.quantizer).get("damping", 0.0)):
            progress.note(note)
        return output.publish(
            QuantizeEntry,
            config_json=coded_config(job.stream, job.targets, job.grid) if job.coded else None,
            calibration=rows.to_json(job.calibration.seed) if rows and job.calibration else None,
            totals=_totals(weights),
            weights=weights,
            skipped=job.skipped,
            resumed_blocks=output.resumed,
        )


def _settings(job: QuantizeJob, rows: TokenRows | None) -> QuantizeSettings:
    """The settings that decide the output's bytes, besides the source."""
    return QuantizeSettings(
        numerics=NUMERICS,
        method=job.config.method,
        grid=str(job.grid),
        options={key: str(value) for key, value in asdict(job.quantizer).items()},
        skip=list(job.config.skip),
        format=job.config.format,
        calibration=rows.fingerprint if rows else None,
        device=job.stream.device.type,
        dtype=str(job.stream.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _totals(weights: Sequence[QuantizedWeight]) -> QuantizedTotals:
    """Sums over the weights."""
    size = sum(row.size for row in weights)
    return QuantizedTotals(
        weights=len(weights),
        size=size,
        zeros=sum(row.zeros for row in weights),
        zeros_before=sum(row.zeros_before for row in weights),
        bits_per_weight=sum(row.bits * row.size for row in weights) / size,
        mean_error=mean_error(weights),
    )
