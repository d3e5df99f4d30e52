"""Prune a checkpoint, block by block, from disk to disk."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import Mask, PruneEntry
from sparsekit.checkpoint.entry_parts import PrunedWeight, PruneSettings
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import DataError
from sparsekit.files import sha256_json
from sparsekit.pipeline.loops import rewrite_blocks
from sparsekit.pipeline.output import Output
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS, Report, damping_notes, sparse_totals
from sparsekit.pruning.block import prune_block, restore
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.method_chain import require_patterns
from sparsekit.pruning.prepare import PruneJob, prepare_prune

if TYPE_CHECKING:
    from sparsekit.pruning.time_budget import TimeBudget
    from sparsekit.text.rows import TokenRows


def prune(
    config: PruneConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a pruned copy of a model to the folder `out`.

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
        PatternError: A pruned weight does not have the pattern after the cast to disk.
        StorageError: The output cannot be written.
    """
    output = Output("prune", model, out, config.words, overwrite=overwrite, progress=progress)
    job = prepare_prune(config, model, out, overwrite=overwrite, progress=progress)
    rows = _rows(job, progress)
    if job.chain.given:
        _require_parent(job, job.chain.given, job.source.scan(progress), progress)
    own = {name: str(pattern) for name, pattern in job.patterns.own.items()}
    key, settings = {"own_patterns": sha256_json(own)}, _settings(job, rows)
    with output.writing(job.source, settings, layout=job.layout, key=key, parts="blocks") as writer:
        budget = _budget(job, writer, output.cost.started)
        if rows and config.allocate == "owl":
            from sparsekit.pruning.owl import allocate

            job = replace(job, patterns=allocate(job, rows, progress))
        weights = _pruned(job, rows, writer, budget, progress)
        _tell_trouble(job, weights, progress)
        return output.publish(
            PruneEntry,
            source_name=config.dense,
            config_json=_config_json(job),
            mask=_mask_source(job, model),
            calibration=rows.to_json(job.calibration.seed) if rows and job.calibration else None,
            totals=sparse_totals(weights),
            weights=weights,
            skipped=job.skipped,
            resumed_blocks=output.resumed,
        )


def _config_json(job: PruneJob) -> dict[str, Any] | None:
    """The output's config.json with the grid of its weights; None: that of the source."""
    if job.chain.grid is None:
        return None
    from sparsekit.quantization.storage import coded_config

    return coded_config(job.stream, job.targets, job.chain.grid)


def _pruned(
    job: PruneJob,
    rows: TokenRows | None,
    writer: CheckpointWriter,
    budget: TimeBudget | None,
    progress: Progress,
) -> list[PrunedWeight]:
    """Prune and write every block."""
    grid = job.chain.grid
    words = filter(None, (job.config.title, str(job.pattern), grid and str(grid)))
    progress.begin(" ".join(words), len(job.stream))
    if rows:
        job.stream.feed(rows.tokens)
    weights = rewrite_blocks(
        job.stream,
        writer,
        job.targets,
        lambda block, sums: prune_block(job, block, sums, budget),
        lambda block: restore(job, writer, block),
        want=job.want if rows else None,
        propagate=job.propagate,
        progress=progress,
    )
    progress.end()
    return [PrunedWeight(**row) for row in weights]


def _budget(job: PruneJob, writer: CheckpointWriter, started: float) -> TimeBudget | None:
    """The time limit of a run that began at `started`, for the blocks that are not done."""
    if job.config.budget is None:
        return None
    from sparsekit.pruning.time_budget import TimeBudget

    names = {target.name: math.prod(target.shape) for target in job.targets}
    blocks = [job.stream.block(index) for index in range(len(job.stream))]
    sizes = [
        sum(names.get(target.name, 0) for target in block.targets)
        for block in blocks
        if block.name not in writer.finished
    ]
    return TimeBudget(job.config.budget - (time.perf_counter() - started), sizes)


def _require_parent(job: PruneJob, given: Checkpoint, dense: str, progress: Progress) -> None:
    """Refuse a sparse model that was made from another dense one, or lacks the pattern."""
    given.scan(progress)
    require_patterns(given, job.targets, job.patterns)
    parents = [entry.source for entry in given.pruned()]
    if not parents:
        progress.note(f"{given.path} does not say which model it was made from")
    elif dense not in [parent.fingerprint for parent in parents]:
        raise DataError(
            f"{given.path} was not made from the weights in {job.source.path}",
            f"its history names {' and '.join(parent.path for parent in parents)}",
            code="other-dense-model",
        )


def _rows(job: PruneJob, progress: Progress) -> TokenRows | None:
    """The calibration rows; first shows the notes that the user should see before the run."""
    for note in job.notes():
        progress.note(note)
    rows = job.calibration.rows(job.source, progress) if job.calibration else None
    for note in rows.notes if rows else ():
        progress.note(note)
    return rows


def _settings(job: PruneJob, rows: TokenRows | None) -> PruneSettings:
    """The settings that decide the output's bytes, besides the source."""
    return PruneSettings(
        numerics=NUMERICS,
        method=job.config.title,
        pattern=str(job.pattern),
        **job.chain.options(),
        mask=job.chain.given.fingerprint if job.chain.given else None,
        reconstruct=job.config.reconstruct,
        allocate=job.config.allocate,
        compensate=str(job.config.share),
        propagate=job.propagate if rows else None,
        skip=list(job.config.skip),
        format=job.config.format,
        budget=job.config.budget,
        then=str(job.chain.grid) if job.chain.grid else None,
        calibration=rows.fingerprint if rows else None,
        device=job.stream.device.type,
        dtype=str(job.stream.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _mask_source(job: PruneJob, model: str) -> Mask | None:
    """The origin of the first mask, if it was given."""
    if job.chain.given is None:
        return None
    history = (entry.to_json() for entry in job.chain.given.provenance().history)
    return Mask(
        path=model,
        fingerprint=job.chain.given.fingerprint,
        history=[{k: v for k, v in entry.items() if k != "weights"} for entry in history],
    )


def _tell_trouble(job: PruneJob, weights: Sequence[PrunedWeight], progress: Progress) -> None:
    """Say where a Gram matrix needed more damping than was asked for, or the time was too short."""
    unswept = sum(row.numbers.get("sweeps") == 0 for row in weights)
    if job.config.budget is not None and unswept:
        progress.note(
            f"{job.config.budget:g} s were not enough for one round on each weight: "
            f"{unswept} of {len(weights)} stay as {job.config.pruner or 'given'}"
        )
    asked = asdict(job.chain.pruner).get("damping", 0.0) if job.chain.pruner else 0.0
    for note in damping_notes(weights, asked):
        progress.note(note)
    if job.chain.grid is not None:
        from sparsekit.quantization.methods.gptq import Gptq

        for note in damping_notes(weights, Gptq().damping, "grid_damping"):
            progress.note(note)
