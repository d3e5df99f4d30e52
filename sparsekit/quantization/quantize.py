"""Put the weights of a checkpoint on a grid, block by block, from disk to disk; zeros stay."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.files import read_json, sha256_json
from sparsekit.pipeline.cost import Cost
from sparsekit.pipeline.loops import rewrite_blocks
from sparsekit.pipeline.selection import family_notes
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS, Report, as_given, damping_notes
from sparsekit.provenance.environment import versions
from sparsekit.provenance.front_matter import Origin
from sparsekit.provenance.model_card import model_card
from sparsekit.quantization.block import quantize_block, restore
from sparsekit.quantization.config import QuantizeConfig
from sparsekit.quantization.prepare import QuantizeJob, prepare_quantize
from sparsekit.quantization.storage import coded_config
from sparsekit.text.rows import TokenRows

# Of the recipe that a resumed run must share, what the history records elsewhere or not at all.
UNTOLD = ("stage", "versions", "source", "config", "layout")


def quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report:
    """Write a quantized copy of a model to the folder `out`.

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
        StorageError: The output cannot be written.
    """
    cost = Cost()
    job = prepare_quantize(config, model, out, overwrite=overwrite, progress=progress)
    rows = job.calibration.rows(job.source, progress) if job.calibration else None
    for note in (*family_notes(job.stream), *(rows.notes if rows else ())):
        progress.note(note)
    recipe = _recipe(job, job.source.scan(progress), rows)
    with CheckpointWriter(
        out, job.source, recipe, layout=job.layout, overwrite=overwrite
    ) as writer:
        resumed = len(writer.finished)
        if resumed:
            progress.note(f"going on after {resumed} finished blocks in {writer.partial}")
        progress.begin(f"{config.method} {job.grid}", len(job.stream))
        if rows:
            job.stream.feed(rows.tokens)
        weights = rewrite_blocks(
            job.stream,
            writer,
            job.targets,
            lambda block, sums: quantize_block(job, block, sums),
            lambda block: restore(job, writer, block),
            want=job.want,
            propagate=True,
            progress=progress,
        )
        progress.end()
        for note in damping_notes(weights, asdict(job.quantizer).get("damping", 0.0)):
            progress.note(note)
        entry = _entry(job, recipe, rows, weights) | {
            **as_given(model, config.words),
            "source": {"path": model, "fingerprint": recipe["source"]},
            "resumed_blocks": resumed,
            **cost.told(),
        }
        config_json = coded_config(job.stream, job.targets, job.grid) if job.coded else None
        origin, history = Origin.of(model, job.source.path), job.source.provenance()["history"]
        writer.commit(entry, model_card(entry, origin, history), config_json)
    return Report(out=out, entry=entry)


def _recipe(job: QuantizeJob, fingerprint: str, rows: TokenRows | None) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    return {
        "stage": "quantize",
        "numerics": NUMERICS,
        "source": fingerprint,
        "config": sha256_json(read_json(job.source.path / "config.json")),
        "layout": job.source.layout,
        "method": job.config.method,
        "grid": str(job.grid),
        "options": {key: str(value) for key, value in asdict(job.quantizer).items()},
        "skip": list(job.config.skip),
        "format": job.config.format,
        "calibration": rows.fingerprint if rows else None,
        "device": job.stream.device.type,
        "dtype": str(job.stream.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _entry(
    job: QuantizeJob,
    recipe: Mapping[str, Any],
    rows: TokenRows | None,
    weights: list[dict[str, Any]],
) -> dict[str, Any]:
    """This run's entry of the history."""
    size = sum(row["size"] for row in weights)
    errors = [row["error"] for row in weights if row["error"] is not None]
    return {
        "stage": "quantize",
        "recipe": {key: value for key, value in recipe.items() if key not in UNTOLD},
        "versions": recipe["versions"],
        "calibration": rows.to_json(job.calibration.seed) if rows and job.calibration else None,
        "totals": {
            "weights": len(weights),
            "size": size,
            "zeros": sum(row["zeros"] for row in weights),
            "zeros_before": sum(row["zeros_before"] for row in weights),
            "bits_per_weight": sum(row["bits"] * row["size"] for row in weights) / size,
            "mean_error": sum(errors) / len(errors) if errors else None,
        },
        "weights": weights,
        "skipped": job.skipped,
    }
