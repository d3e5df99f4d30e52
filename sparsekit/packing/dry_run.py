"""Plans of pack, unpack and convert."""

from collections import Counter
from pathlib import Path
from typing import Any

from sparsekit.packing import convert, unpack
from sparsekit.packing import pack_plan as packplan
from sparsekit.pipeline.dry_run import begun
from sparsekit.progress import SILENT, Progress


def plan_pack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """The plan of `pack`, after the same checks, which look at every weight.

    Arguments and errors are those of `pack`.
    """
    job = packplan.prepare(model, out, overwrite=overwrite, progress=progress)
    pack_plan = begun(job.source, out, "pack", job.layout) | _weights(job)
    return pack_plan | {"patterns": dict(Counter(job.metadata.values()))}


def plan_unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """The plan of `unpack`, after the same checks, with its arguments and errors."""
    job = unpack.prepare(model, out, overwrite=overwrite, progress=progress)
    patterns = dict(Counter(str(layer.stored.format.pattern) for layer in job.layers.values()))
    return begun(job.source, out, "unpack", job.layout) | _weights(job) | {"patterns": patterns}


def plan_convert(
    model: str,
    out: Path,
    *,
    packs: bool = False,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """The plan of `convert`, after the same checks, with its arguments and errors.

    With `packs`, the plan is that of the plain form, which is written first.
    """
    job = convert.prepare(model, out, overwrite=overwrite, progress=progress)
    notes = ["this is the plan of the plain form, which is packed afterwards"] * packs
    weights = _weights(job) | {"notes": notes}
    return begun(job.source, out, f"convert {job.form}", job.layout) | weights


def _weights(job: packplan.PackJob | unpack.Unpacking | convert.Conversion) -> dict[str, Any]:
    """The common part of these plans: one weight is in memory at a time."""
    return {
        "weights": len(job.sizes),
        "size": sum(job.sizes.values()),
        "skipped": [],
        "notes": [],
        "bytes_before": job.source.n_bytes,
        "peak_memory_estimate_bytes": job.room,
    }
