"""The plan of a recovery run."""

import math
from pathlib import Path
from typing import Any

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.pipeline.dry_run import begun
from sparsekit.progress import SILENT, Progress
from sparsekit.recovery.config import AUTO, RecoverConfig
from sparsekit.recovery.deadline import WRITTEN
from sparsekit.recovery.memory_needs import pass_bytes, state_bytes, training_bytes
from sparsekit.recovery.prepare import RecoverJob, chosen, prepare_recover
from sparsekit.recovery.speed import bench_recover
from sparsekit.recovery.student import probe_steps

# Training steps to time; the median counts.
STEPS = 3


def plan_recover(
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Run the checks of `recover` that read no text and describe what it would do.

    The memory is that of weights, gradients, moments and teacher; activations come on top. `timed`
    also takes some steps, in memory, to estimate the duration. Other arguments are those of
    `recover`.
    """
    job = prepare_recover(config, model, out, overwrite=overwrite, progress=progress)
    config = job.config
    size = sum(math.prod(target.shape) for target in job.targets)
    zeros = sum(job.patterns.of(target).zeros(*target.shape) for target in job.targets)
    return {
        **begun(job.source, out, config.method, job.layout),
        "pattern": str(job.patterns.base),
        "teacher": job.teacher_name or None,
        "data": config.data,
        "steps": None if config.tokens is None else config.steps(),
        "step_tokens": config.step_tokens,
        "max_time": config.max_time,
        "weights": len(job.targets),
        "zeros": zeros,
        "size": size,
        "skipped": job.skipped,
        "notes": job.notes,
        "state_bytes": state_bytes(job.source),
        "seconds_estimate": _recover_seconds(job, model, progress) if timed else None,
        "peak_memory_at_least_bytes": job.held,
        "activation_bytes_estimate": pass_bytes(job.config, job.linear),
        "device": str(job.device),
        "dtype": "float32",
        "mixed_precision": config.mixed_precision,
    }


def memory_ahead(config: RecoverConfig, source: Checkpoint) -> int:
    """Least memory, in bytes, of training a model with the shapes of `source` against it."""
    if config.method == AUTO:
        config, _ = chosen(config)
    recoverer = methods.load("recoverers", config.method, config.option)
    needed = config.kl_weight != 0 and config.teacher_top is None
    return training_bytes(config, source, source if needed else None, recoverer)


def _recover_seconds(job: RecoverJob, model: str, progress: Progress) -> float:
    """Estimated duration of the run, without evaluations and without sampling its text.

    Loading and some steps are timed; the estimate includes measuring steps and a saved state.
    """
    config = job.config
    if config.max_time is not None:
        return config.max_time
    speed = bench_recover(config, model, steps=STEPS, progress=progress)
    step, loading = config.step_tokens / speed["tokens_per_second"], speed["loading_seconds"]
    steps = config.steps() + probe_steps(config, job.recoverer)
    return loading + steps * step + state_bytes(job.source) / WRITTEN
