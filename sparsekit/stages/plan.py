"""What a prune run would do and cost, told without doing it."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch

from sparsekit.files import existing_parent
from sparsekit.models.blocks import BlockStream
from sparsekit.models.calibration import Calibration
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.folder import FACTORS
from sparsekit.models.layout import Layout
from sparsekit.models.skeleton import KEPT_BYTES
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.config import PruneConfig
from sparsekit.stages.job import Job, prepare
from sparsekit.tensors.sums import SAMPLE_TOKENS, Want


def plan(
    config: PruneConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """What `prune` would do, after the same checks, without a forward pass or a written byte.

    Raises:
        UsageError: As `prune`.
        DataError: As `prune`, except for what only reading all weights shows.
    """
    job = prepare(config, model, out, overwrite=overwrite, progress=progress)
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
        "peak_memory_estimate_bytes": peak_estimate(job.stream, job.want, job.calibration),
        "device": str(job.stream.device),
        "dtype": str(job.stream.dtype).removeprefix("torch."),
    }


def begun(source: Checkpoint, out: Path, method: str, layout: Layout) -> dict[str, Any]:
    """What every plan tells."""
    return {
        "model": str(source.path),
        "out": str(out),
        "method": method,
        "bytes_to_write": layout.n_bytes,
        "bytes_free": shutil.disk_usage(existing_parent(out)).free,
    }


def _bits(job: Job) -> float | None:
    """Mean bits on disk of a weight that is kept as factors; None without such."""
    stored = [place for place in job.layout.places.values() if place.file == FACTORS]
    shapes = [t.shape for t in job.targets if job.chain.stored_shapes(t, job.patterns.of(t))]
    if not stored:
        return None
    return 8 * sum(p.stop - p.start for p in stored) / sum(map(math.prod, shapes))


def peak_estimate(
    stream: BlockStream,
    want: Want | None,
    calibration: Calibration | None,
    solver_bytes: int = 8 * 6,
) -> int:
    """An estimate of this process's memory above the interpreter with its libraries, in bytes.

    Args:
        stream: The model, whose blocks are rewritten one by one.
        want: The sums of inputs that are kept for a block; None: none.
        calibration: The rows that run through it.
        solver_bytes: What is made of the largest Gram matrix, for each of its entries. ALPS takes
            most: eigenvectors in float64, their inverse, and what LAPACK works in.
    """
    source = stream.source
    places = source.places
    wide = torch.tensor([], dtype=stream.dtype).element_size()
    blocks = []
    for index in range(len(stream)):
        block = stream.block(index)
        stored = sum(places[name].stop - places[name].start for name in block.disk_names)
        numbers = sum(math.prod(places[name].shape) for name in block.disk_names)
        # Which weights share an input shows in the forward only: at most one Gram matrix for each.
        widths = [target.shape[1] for target in block.targets]
        grams = 0
        if want and Want.GRAM in want:
            grams = 4 * sum(w * w for w in widths) + solver_bytes * max(widths) ** 2
        solving = 2 * max(math.prod(target.shape) for target in block.targets)
        blocks.append(stored + wide * numbers + grams + 6 * 4 * solving)
    outside = max(wide * math.prod(p.shape) + p.stop - p.start for p in places.values())
    hidden = 0
    if calibration:
        samples, length = calibration.shape(source.config)
        width = source.config.get_text_config().hidden_size
        hidden = samples * length * width * wide
        # What one row makes on its way through a block, and the sampled inputs.
        ends = max(sum(sum(t.shape) for t in stream.block(i).targets) for i in range(len(stream)))
        hidden += (length * wide + SAMPLE_TOKENS * 4) * ends
    return hidden + max(max(blocks), outside) + KEPT_BYTES
