"""What the verbs that write, but for prune, would do and cost, told without doing it."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

from sparsekit.progress import SILENT, Progress
from sparsekit.stages import convert, packplan, quantjob, recovery, unpack
from sparsekit.stages.forecast import forecast
from sparsekit.stages.job import family_notes
from sparsekit.stages.plan import begun
from sparsekit.stages.quantconfig import QuantizeConfig
from sparsekit.stages.quantweights import quantize_block
from sparsekit.stages.student import PROBED
from sparsekit.stages.trainchecks import pass_bytes, state_bytes
from sparsekit.stages.trainconfig import RecoverConfig
from sparsekit.stages.trainplan import WRITTEN
from sparsekit.stages.trainspeed import bench_recover

# Of training that are timed; the median counts.
STEPS = 3


def plan_quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """What `quantize` would do, after the same checks; arguments and errors as of `quantize`.

    `timed` also quantizes the first block, in memory, to tell how long the run would take.
    """
    job = quantjob.prepare(config, model, out, overwrite=overwrite, progress=progress)
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
        "peak_memory_estimate_bytes": job.room,
        "seconds_estimate": _quantize_seconds(job, progress) if timed else None,
        "device": str(job.stream.device),
        "dtype": _name(job.stream.dtype),
    }


def plan_recover(
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    timed: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """What `recover` would do, after the checks that read no text; arguments as of `recover`.

    The memory is what weights, gradients, moments and teacher take: activations come on top.
    `timed` also takes some steps, in memory, to tell how long the run would take.
    """
    job = recovery.prepare(config, model, out, overwrite=overwrite, progress=progress)
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


def plan_pack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """What `pack` would do, after the same checks; which look at every weight.

    Arguments and errors as of `pack`.
    """
    job = packplan.prepare(model, out, overwrite=overwrite, progress=progress)
    found = begun(job.source, out, "pack", job.layout) | _weights(job)
    return found | {"patterns": dict(Counter(job.told.values()))}


def plan_unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """What `unpack` would do, after the same checks; arguments and errors as of `unpack`."""
    job = unpack.prepare(model, out, overwrite=overwrite, progress=progress)
    patterns = dict(Counter(str(layer.pattern) for layer in job.layers.values()))
    return begun(job.source, out, "unpack", job.layout) | _weights(job) | {"patterns": patterns}


def plan_convert(
    model: str,
    out: Path,
    *,
    packs: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """What `convert` would do, after the same checks; arguments and errors as of `convert`.

    Where it also `packs`, what that saves shows in the plain form only: the plan is of this one.
    """
    job = convert.prepare(model, out, overwrite=overwrite, progress=progress)
    notes = ["the plan is of the plain form, which is packed when it is there"] * packs
    found = _weights(job) | {"notes": notes}
    return begun(job.source, out, f"convert {job.form}", job.layout) | found


def _weights(job: packplan.PackJob | unpack.Unpacking | convert.Conversion) -> dict[str, Any]:
    """What the plans of other forms tell: one weight is in memory at a time."""
    return {
        "weights": len(job.sizes),
        "size": sum(job.sizes.values()),
        "skipped": [],
        "notes": [],
        "bytes_before": job.source.n_bytes,
        "peak_memory_estimate_bytes": job.room,
    }


def _quantize_seconds(job: quantjob.QuantizeJob, progress: Progress) -> float:
    """How long the run would take."""
    return forecast(
        job.stream,
        job.targets,
        lambda block, sums: quantize_block(job, block, sums),
        calibration=job.calibration,
        want=job.want,
        propagate=True,
        progress=progress,
    )


def _recover_seconds(job: recovery.Recovery, model: str, progress: Progress) -> float:
    """How long the run would take, without perplexities on its way and without sampling its text.

    Loading is measured, and some steps, each with the teacher; those that measure gradients before
    the first one count, and a saved state.
    """
    config = job.config
    if config.max_time is not None:
        return config.max_time
    told = bench_recover(config, model, steps=STEPS, progress=progress)
    step, loading = config.step_tokens / told["tokens_per_second"], told["loading_seconds"]
    steps = config.steps() + (PROBED if job.recoverer.needs_gradient else 0)
    return loading + steps * step + state_bytes(job.source) / WRITTEN


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
