"""Prune a checkpoint, block by block, from disk to disk."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import config_of
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import DataError
from sparsekit.files import sha256_json
from sparsekit.pipeline.cost import Cost
from sparsekit.pipeline.loops import rewrite_blocks
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS, Report, as_given, damping_notes, totals
from sparsekit.provenance.environment import versions
from sparsekit.provenance.front_matter import Origin
from sparsekit.provenance.model_card import model_card
from sparsekit.pruning.block import prune_block, restore
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.method_chain import require_patterns
from sparsekit.pruning.owl import allocate
from sparsekit.pruning.prepare import PruneJob, prepare_prune
from sparsekit.pruning.time_budget import TimeBudget
from sparsekit.quantization.methods.gptq import Gptq
from sparsekit.quantization.storage import coded_config
from sparsekit.text.rows import TokenRows

# Of the recipe that a resumed run must share, what the history records elsewhere or not at all.
UNTOLD = ("stage", "versions", "source", "config", "layout", "own_patterns")


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
        progress: Told of each block.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model or the calibration cannot be read, or is not finite.
        NumericalError: A weight cannot be solved for.
        PatternError: A pruned weight does not have the pattern after the cast to disk.
        StorageError: The output cannot be written.
    """
    cost = Cost()
    job = prepare_prune(config, model, out, overwrite=overwrite, progress=progress)
    rows = _rows(job, progress)
    fingerprint = job.source.scan(progress)
    if job.chain.given:
        _require_parent(job, job.chain.given, fingerprint, progress)
    recipe = _recipe(job, fingerprint, rows)
    with CheckpointWriter(
        out, job.source, recipe, layout=job.layout, overwrite=overwrite
    ) as writer:
        resumed = len(writer.finished)
        budget = _budget(job, writer, cost.started)
        if resumed:
            progress.note(f"going on after {resumed} finished blocks in {writer.partial}")
        if rows and config.allocate == "owl":
            job = replace(job, patterns=allocate(job, rows, progress))
        grid = job.chain.grid
        words = filter(None, (config.title, str(job.pattern), grid and str(grid)))
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
        _tell_trouble(job, weights, progress)
        entry = _entry(job, recipe, rows, weights, model) | {
            "resumed_blocks": resumed,
            **cost.told(),
        }
        config_json = coded_config(job.stream, job.targets, grid) if grid else None
        origin, history = Origin.of(model, job.source.path), job.source.provenance()["history"]
        writer.commit(entry, model_card(entry, origin, history), config_json)
    return Report(out=out, entry=entry)


def _budget(job: PruneJob, writer: CheckpointWriter, started: float) -> TimeBudget | None:
    """The time limit of a run that began at `started`, for the blocks that are not done."""
    if job.config.budget is None:
        return None
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
    parents = [entry["source"] for entry in given.pruned()]
    if not parents:
        progress.note(f"{given.path} does not say which model it was made from")
    elif dense not in [parent.get("fingerprint") for parent in parents]:
        raise DataError(
            f"{given.path} was not made from the weights in {job.source.path}",
            f"its history names {' and '.join(str(parent.get('path')) for parent in parents)}",
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


def _recipe(job: PruneJob, fingerprint: str, rows: TokenRows | None) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    return {
        "stage": "prune",
        "numerics": NUMERICS,
        "source": fingerprint,
        "config": sha256_json(config_of(job.source.config)),
        "layout": job.source.layout,
        "method": job.config.title,
        "pattern": str(job.pattern),
        "own_patterns": sha256_json({name: str(own) for name, own in job.patterns.own.items()}),
        **job.chain.options(),
        "mask": job.chain.given.fingerprint if job.chain.given else None,
        "reconstruct": job.config.reconstruct,
        "allocate": job.config.allocate,
        "compensate": str(job.config.share),
        "propagate": job.propagate if rows else None,
        "skip": list(job.config.skip),
        "format": job.config.format,
        "budget": job.config.budget,
        "then": str(job.chain.grid) if job.chain.grid else None,
        "calibration": rows.fingerprint if rows else None,
        "device": job.stream.device.type,
        "dtype": str(job.stream.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _entry(
    job: PruneJob,
    recipe: Mapping[str, Any],
    rows: TokenRows | None,
    weights: list[dict[str, Any]],
    model: str,
) -> dict[str, Any]:
    """This run's entry of the history."""
    return {
        "stage": "prune",
        **as_given(model, job.config.words),
        "source": {"path": job.config.dense or model, "fingerprint": recipe["source"]},
        "mask": _mask_source(job, model),
        "recipe": {k: v for k, v in recipe.items() if k not in UNTOLD},
        "versions": recipe["versions"],
        "calibration": rows.to_json(job.calibration.seed) if rows and job.calibration else None,
        "totals": totals(weights),
        "weights": weights,
        "skipped": job.skipped,
    }


def _mask_source(job: PruneJob, model: str) -> dict[str, Any] | None:
    """Where the first mask came from, when it was given, and how it was made."""
    if job.chain.given is None:
        return None
    history = job.chain.given.provenance()["history"]
    made = [{k: v for k, v in entry.items() if k != "weights"} for entry in history]
    return {"path": model, "fingerprint": job.chain.given.fingerprint, "history": made}


def _tell_trouble(job: PruneJob, weights: list[dict[str, Any]], progress: Progress) -> None:
    """Say where a Gram matrix needed more damping than was asked for, or the time was too short."""
    unswept = sum(row["numbers"].get("sweeps") == 0 for row in weights)
    if job.config.budget is not None and unswept:
        progress.note(
            f"{job.config.budget:g} s were not enough for one round on each weight: "
            f"{unswept} of {len(weights)} stay as {job.config.pruner or 'given'}"
        )
    asked = asdict(job.chain.pruner).get("damping", 0.0) if job.chain.pruner else 0.0
    for note in damping_notes(weights, asked):
        progress.note(note)
    for note in damping_notes(weights, Gptq().damping, "grid_damping"):
        progress.note(note)
