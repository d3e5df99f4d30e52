"""The plan of a quantization run."""

import math
from pathlib import Path
from typing import Any

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.pipeline.dry_run import begun, dtype_name
from sparsekit.pipeline.forecast import forecast, peak_estimate
from sparsekit.pipeline.selection import family_notes
from sparsekit.progress import SILENT, Progress
from sparsekit.quantization.block import quantize_block
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.prepare import QuantizeJob, prepare_quantize, stats_of


def plan_quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the checks of `quantize` and describe what it would do; nothing is written.

    `timed` also quantizes the first block, in memory, to estimate the duration. Other arguments and
    errors are those of `quantize`.
    """
    job = prepare_quantize(config, model, out, overwrite=overwrite, progress=progress)
    size = sum(math.prod(target.shape) for target in job.targets)
    return {
        **begun(job.source, out, config.method, job.layout),
        "grid": str(job.grid),
        "format": config.format,
        "blocks": len(job.stream),
        "weights": len(job.targets),
        "size": size,
        "skipped": job.skipped,
        "notes": family_notes(job.stream),
        "peak_memory_estimate_bytes": peak_estimate(job.stream, job.want, job.calibration),
        "seconds_estimate": _quantize_seconds(job, progress) if timed else None,
        "device": str(job.stream.device),
        "dtype": dtype_name(job.stream.dtype),
    }


def memory_ahead(config: QuantizeConfig, source: Checkpoint) -> int:
    """Estimated memory, in bytes, of quantizing a model with the shapes of `source`."""
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    quantizer = methods.load("quantizers", config.method, config.option)
    return peak_estimate(stream, stats_of(quantizer, config.rows), config.rows)


def _quantize_seconds(job: QuantizeJob, progress: Progress) -> float:
    """Estimated duration of the run."""
    return forecast(
        job.stream,
        job.targets,
        lambda block, sums: quantize_block(job, block, sums),
        calibration=job.calibration,
        want=job.want,
        propagate=True,
        progress=progress,
    )
