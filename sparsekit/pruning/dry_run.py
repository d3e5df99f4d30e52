"""The plan of a pruning run."""

import math
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.folder import FACTORS
from sparsekit.pipeline.dry_run import begun
from sparsekit.pipeline.forecast import forecast, peak_estimate
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.block import prune_block
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prepare import PruneJob, prepare_prune
from sparsekit.solvers.input_stats import Stats


def plan(
    config: PruneConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the checks of `prune` and describe what it would do; nothing is written.

    Args:
        config: The options.
        model: A folder, hub id or `demo`.
        out: The folder that would be made.
        overwrite: Whether it may replace an earlier output.
        timed: Also prune the first block, in memory, to estimate the duration.
        progress: Receives progress and notes.

    Raises:
        UsageError: `prune` would raise it.
        DataError: `prune` would raise it before it reads all weights.
    """
    job = prepare_prune(config, model, out, overwrite=overwrite, progress=progress)
    size = sum(rows * columns for rows, columns in (t.shape for t in job.targets))
    zeros = sum(job.patterns.of(t).zeros(*t.shape) for t in job.targets)
    memory = peak_estimate(job.stream, job.want, job.calibration, job.chain.gram_bytes)
    return {
        **begun(job.source, out, config.title, job.layout),
        "pattern": str(job.pattern),
        "then": str(job.chain.grid) if job.chain.grid else None,
        "blocks": len(job.stream),
        "weights": len(job.targets),
        "zeros": zeros,
        "size": size,
        "skipped": job.skipped,
        "bits_per_weight": _bits(job),
        "notes": job.notes(),
        "peak_memory_estimate_bytes": memory,
        "seconds_estimate": _seconds(job, progress) if timed else None,
        "device": str(job.stream.device),
        "dtype": str(job.stream.dtype).removeprefix("torch."),
    }


def _seconds(job: PruneJob, progress: Progress) -> float:
    """Estimated duration of the run."""
    if job.config.budget is not None:
        return job.config.budget
    return forecast(
        job.stream,
        job.targets,
        lambda block, sums: prune_block(job, block, sums, None),
        calibration=job.calibration,
        want=job.want,
        propagate=job.propagate,
        others=[job.chain.given] if job.chain.given else [],
        passes=[Stats.NORMS] if job.config.allocate == "owl" else [],
        progress=progress,
    )


def _bits(job: PruneJob) -> float | None:
    """Mean bits per entry of weights that are stored as factors; None without factors."""
    stored = [place for place in job.layout.places.values() if place.file == FACTORS]
    shapes = [t.shape for t in job.targets if job.chain.factor_shapes(t, job.patterns.of(t))]
    if not stored:
        return None
    return 8 * sum(p.stop - p.start for p in stored) / sum(map(math.prod, shapes))
