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

    Arguments and errors as of `pack`.
    """
    job = packplan.prepare(model, out, overwrite=overwrite, progress=progress)
    found = begun(job.source, out, "pack", job.layout) | _weights(job)
    return found | {"patterns": dict(Counter(job.told.values()))}


def plan_unpack(
    model: str, out: Path, *, overwrite: bool = False, progress: Progress = SILENT
) -> dict[str, Any]:
    """The plan of `unpack`, after the same checks; arguments and errors as of `unpack`."""
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
    """The plan of `convert`, after the same checks; arguments and errors as of `convert`.

    Where it also `packs`, what that saves shows in the plain form only: the plan is of this one.
    """
    job = convert.prepare(model, out, overwrite=overwrite, progress=progress)
    notes = ["the plan is of the plain form, which is packed when it is there"] * packs
    found = _weights(job) | {"notes": notes}
    return begun(job.source, out, f"convert {job.form}", job.layout) | found


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
