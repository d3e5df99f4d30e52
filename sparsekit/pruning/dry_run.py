"""What a prune run would do and cost, told without doing it."""

import math
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.folder import FACTORS
from sparsekit.pipeline.dry_run import begun
from sparsekit.pipeline.forecast import forecast
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
    """What `prune` would do, after the same checks, without a written byte.

    Args:
        config: As of `prune`, as are `model`, `out`, `overwrite` and `progress`.
        model: See there.
        out: See there.
        overwrite: See there.
        timed: Also prune the first block, in memory, to tell how long the run would take.
        progress: See there.

    Raises:
        UsageError: As `prune`.
        DataError: As `prune`, except for what only reading all weights shows.
    """
    job = prepare_prune(config, model, out, overwrite=overwrite, progress=progress)
    size = sum(rows * columns for rows, columns in (t.shape for t in job.targets))
    zeros = sum(job.patterns.of(t).zeros(*t.shape) for t in job.targets)
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
        "peak_memory_estimate_bytes": job.room,
        "seconds_estimate": _seconds(job, progress) if timed else None,
        "device": str(job.stream.device),
        "dtype": str(job.stream.dtype).removeprefix("torch."),
    }


def _seconds(job: PruneJob, progress: Progress) -> float:
    """How long the run would take."""
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
    """Mean bits on disk of a weight that is kept as factors; None without such."""
    stored = [place for place in job.layout.places.values() if place.file == FACTORS]
    shapes = [t.shape for t in job.targets if job.chain.factor_shapes(t, job.patterns.of(t))]
    if not stored:
        return None
    return 8 * sum(p.stop - p.start for p in stored) / sum(map(math.prod, shapes))
