"""Prune a checkpoint, block by block, from disk to disk."""

import fnmatch
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit import methods
from sparsekit.errors import NumericalError, UsageError, did_you_mean
from sparsekit.files import existing_parent, sha256_json
from sparsekit.models.architecture import Target
from sparsekit.models.blocks import Block, BlockStream
from sparsekit.models.calibration import Calibration, TokenRows
from sparsekit.models.checkpoint import Checkpoint, resolve
from sparsekit.models.writer import (
    CheckpointWriter,
    refuse_foreign,
    refuse_output,
    require_space,
)
from sparsekit.progress import SILENT, Progress
from sparsekit.pruners import Pruned, Pruner
from sparsekit.stages import blockwise
from sparsekit.stages.config import PruneConfig
from sparsekit.stages.device import compute_dtype, pick_device
from sparsekit.stages.report import (
    NUMERICS,
    PruneReport,
    WeightRow,
    model_card,
    peak_memory,
    row_json,
    totals,
    versions,
)
from sparsekit.tensors.curvature import require_finite, solve_on_support, unit_gram
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want

# Conjugate-gradient steps of --reconstruct cg, and the damping of its Gram matrix.
RECONSTRUCT_STEPS = 20
RECONSTRUCT_DAMPING = 0.01
# Of the recipe that a resumed run must share, what the history tells elsewhere or not at all.
UNTOLD = ("stage", "versions", "source", "config", "layout")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A checked configuration with everything that the loop needs."""

    config: PruneConfig
    pruner: Pruner
    pattern: Pattern
    source: Checkpoint
    stream: BlockStream
    targets: list[Target]
    skipped: list[dict[str, str]]
    want: Want | None
    propagate: bool
    calibration: Calibration | None


def prune(
    config: PruneConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> PruneReport:
    """Write a pruned copy of a model to the folder `out`.

    Args:
        config: What to do.
        model: A folder or hub id.
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
    started = time.perf_counter()
    job = _prepare(config, resolve(model), out, overwrite=overwrite)
    if not job.stream.tested:
        progress.note(
            f"{job.source.config.model_type!r} is not among the tested families: compare the "
            "output's perplexity with the source's"
        )
    fingerprint = job.source.fingerprint  # reads, and checks, every byte
    rows = job.calibration.rows(job.source, progress) if job.calibration else None
    for note in rows.notes if rows else ():
        progress.note(note)
    recipe = _recipe(job, fingerprint, rows)
    with CheckpointWriter(out, job.source, recipe, overwrite=overwrite) as writer:
        resumed = len(writer.finished)
        if resumed:
            progress.note(f"going on after {resumed} finished blocks in {writer.partial}")
        progress.begin(f"{config.method} {job.pattern}", len(job.stream))
        if rows:
            job.stream.feed(rows.tokens)
        weights = blockwise.rewrite(
            job.stream,
            writer,
            job.targets,
            lambda block, sums: _prune_block(job, block, sums),
            want=job.want if rows else None,
            propagate=job.propagate,
            progress=progress,
        )
        progress.end()
        _tell_damping(weights, progress)
        entry = _entry(job, recipe, rows, weights) | {
            "source": {"path": model, "fingerprint": fingerprint},
            "resumed_blocks": resumed,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        writer.commit(entry, model_card(entry, Path(model).resolve().name))
    return PruneReport(out=out, entry=entry)


def plan(config: PruneConfig, model: str, out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """What `prune` would do, after the same checks, without a forward pass or a written byte.

    Raises:
        UsageError: As `prune`.
        DataError: As `prune`, except for what only reading all weights shows.
    """
    job = _prepare(config, resolve(model), out, overwrite=overwrite)
    size = sum(rows * columns for rows, columns in (t.shape for t in job.targets))
    zeros = sum(job.pattern.zeros(*t.shape) for t in job.targets)
    return {
        "model": str(job.source.path),
        "out": str(out),
        "method": config.method,
        "pattern": str(job.pattern),
        "blocks": len(job.stream),
        "weights": len(job.targets),
        "zeros": zeros,
        "size": size,
        "skipped": job.skipped,
        "bytes_to_write": job.source.n_bytes,
        "bytes_free": shutil.disk_usage(existing_parent(out)).free,
        "peak_memory_estimate_bytes": _peak_estimate(job),
        "device": str(job.stream.device),
        "dtype": str(job.stream.dtype).removeprefix("torch."),
    }


def _prepare(config: PruneConfig, path: Path, out: Path, *, overwrite: bool) -> _Job:
    """All checks that need no weights."""
    config.check()
    refuse_output(out, path, overwrite=overwrite)
    source = Checkpoint.open(path)
    partial = out.with_name(out.name + ".partial")
    refuse_foreign(partial)
    if not partial.exists():
        require_space(existing_parent(out), source)
    pruner = methods.load("pruners", config.method, config.options)
    pattern = Pattern.parse(config.pattern)
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    targets, skipped = _select(stream, config.skip)
    for target in targets:
        if reason := pattern.misfit(target.shape[1]):
            module = target.name.removesuffix(".weight").rpartition(".")[2]
            raise UsageError(f"{target.name}: {reason}", f"leave it dense with --skip {module}")
    calibration = config.rows
    if calibration is None:
        want = None
    else:
        want = "gram" if config.reconstruct == "cg" else pruner.needs or "norms"
    propagate = pruner.propagate if config.propagate is None else config.propagate
    return _Job(
        config=config,
        pruner=pruner,
        pattern=pattern,
        source=source,
        stream=stream,
        targets=targets,
        skipped=skipped,
        want=want,
        propagate=propagate,
        calibration=calibration,
    )


def _select(stream: BlockStream, skip: Sequence[str]) -> tuple[list[Target], list[dict[str, str]]]:
    """The weights to prune, and the linear weights to leave dense with the reason."""
    linear = {target.name: target for target in stream.targets()}
    reasons: dict[str, str] = {}
    for glob in skip:
        matched = [name for name in linear if _matches(name, glob)]
        if not matched:
            parts = {part for name in linear for part in name.split(".")}
            raise UsageError(f"--skip {glob!r} matches no weight", did_you_mean(glob, parts))
        reasons = {name: f"--skip {glob}" for name in matched} | reasons
    targets = [target for name, target in linear.items() if name not in reasons]
    if not targets:
        raise UsageError("--skip leaves no weight to prune", "skip fewer weights")
    reasons |= {
        name: "no linear weight of a decoder block"
        for name, place in stream.source.places.items()
        if len(place.shape) >= 2 and name not in linear
    }
    return targets, [{"name": name, "reason": reason} for name, reason in reasons.items()]


def _matches(name: str, glob: str) -> bool:
    """Whether a glob matches the name or any run of its dot-separated parts."""
    parts = name.split(".")
    runs = (
        ".".join(parts[start:stop])
        for start in range(len(parts))
        for stop in range(start + 1, len(parts) + 1)
    )
    return any(fnmatch.fnmatchcase(run, glob) for run in runs)


def _prune_block(job: _Job, block: Block, sums: dict[str, InputSums]) -> list[dict[str, Any]]:
    """Prune the chosen weights of one block; gives their report rows."""
    rows = []
    for group in _groups(job, block, sums):
        rows += _prune_group(job, block, group, sums.get(group[0].name))
    return [row_json(row) for row in rows]


def _groups(job: _Job, block: Block, sums: dict[str, InputSums]) -> list[list[Target]]:
    """The chosen weights of a block, those together that are solved as one."""
    wanted = {target.name for target in job.targets}
    chosen = [target for target in block.targets if target.name in wanted]
    if not job.pruner.rowwise or job.pattern.scope == "tensor":
        return [[target] for target in chosen]
    groups: dict[int, list[Target]] = {}
    for target in chosen:
        groups.setdefault(id(sums.get(target.name)), []).append(target)
    return list(groups.values())


def _prune_group(
    job: _Job, block: Block, group: list[Target], sums: InputSums | None
) -> list[WeightRow]:
    """Prune weights with the same inputs, stacked, and put the parts in their places."""
    started = time.perf_counter()
    weights = [block.weight(target) for target in group]
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    try:
        if sums:
            require_finite(sums.squares)
        pruned = job.pruner.prune(stacked, sums, job.pattern)
        if job.config.reconstruct == "cg":
            pruned = _reconstruct(stacked, pruned, sums)
    except NumericalError as error:
        names = ", ".join(target.name for target in group)
        raise NumericalError(f"{names}: {error.message}", error.hint) from error
    parts = pruned.weight.split([len(weight) for weight in weights])
    rows = []
    for target, weight, part in zip(group, weights, parts, strict=True):
        on_disk = block.replace(target, part)
        job.pattern.check(on_disk, target.name)
        try:
            error = sums.relative_error(weight, on_disk.to(weight.device)) if sums else None
        except NumericalError as failure:
            raise NumericalError(f"{target.name}: {failure.message}", failure.hint) from failure
        row = WeightRow(
            name=target.name,
            shape=target.shape,
            pattern=str(job.pattern),
            zeros=int((on_disk == 0).sum()),
            size=on_disk.numel(),
            error=error,
            seconds=0.0,
            numbers=pruned.numbers,
        )
        rows.append(row)
    each = (time.perf_counter() - started) / sum(row.size for row in rows)
    return [replace(row, seconds=round(each * row.size, 4)) for row in rows]


def _reconstruct(weight: Tensor, pruned: Pruned, sums: InputSums | None) -> Pruned:
    """The same mask with the weights that least squares gives on it."""
    assert sums is not None
    solved = solve_on_support(
        weight,
        pruned.mask,
        unit_gram(sums, RECONSTRUCT_DAMPING),
        start=pruned.weight,
        iterations=RECONSTRUCT_STEPS,
    )
    return replace(pruned, weight=solved)


def _recipe(job: _Job, fingerprint: str, rows: TokenRows | None) -> dict[str, Any]:
    """Everything that decides the output's bytes."""
    return {
        "stage": "prune",
        "numerics": NUMERICS,
        "source": fingerprint,
        "config": sha256_json(job.source.config.to_dict()),
        "layout": job.source.layout,
        "method": job.config.method,
        "pattern": str(job.pattern),
        "options": {key: str(value) for key, value in asdict(job.pruner).items()},
        "reconstruct": job.config.reconstruct,
        "propagate": job.propagate if rows else None,
        "skip": list(job.config.skip),
        "calibration": rows.fingerprint if rows else None,
        "device": job.stream.device.type,
        "dtype": str(job.stream.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _entry(
    job: _Job, recipe: Mapping[str, Any], rows: TokenRows | None, weights: list[dict[str, Any]]
) -> dict[str, Any]:
    """This run's entry of the history."""
    calibration = None
    if rows and job.calibration:
        samples, length = rows.tokens.shape
        calibration = {
            "source": rows.source,
            "samples": samples,
            "length": length,
            "seed": job.calibration.seed,
            "fingerprint": rows.fingerprint,
            "notes": list(rows.notes),
        }
    return {
        "stage": "prune",
        "recipe": {k: v for k, v in recipe.items() if k not in UNTOLD},
        "versions": recipe["versions"],
        "calibration": calibration,
        "tested_family": job.stream.tested,
        "totals": totals(weights),
        "weights": weights,
        "skipped": job.skipped,
    }


def _tell_damping(weights: list[dict[str, Any]], progress: Progress) -> None:
    """Say when a Gram matrix needed more damping than the least of the run."""
    used = [row["numbers"]["damping"] for row in weights if "damping" in row["numbers"]]
    raised = sum(damping > min(used) for damping in used)
    if raised:
        progress.note(
            f"{raised} weights needed their damping raised, up to {max(used):g}: "
            "more calibration rows would help"
        )


def _peak_estimate(job: _Job) -> int:
    """A bound on this process's memory above the interpreter with its libraries, in bytes."""
    stream, places = job.stream, job.source.places
    wide = torch.tensor([], dtype=stream.dtype).element_size()
    blocks = []
    for index in range(len(stream)):
        block = stream.block(index)
        stored = sum(places[name].stop - places[name].start for name in block.disk_names)
        numbers = sum(math.prod(places[name].shape) for name in block.disk_names)
        # Which weights share an input shows in the forward only: at most one Gram matrix for each,
        # and for the largest its factors (ALPS: eigenvectors in float64 and their inverse).
        widths = [target.shape[1] for target in block.targets]
        grams = 0
        if job.want == "gram":
            grams = 4 * sum(w * w for w in widths) + 8 * 4 * max(widths) ** 2
        solving = 2 * max(math.prod(target.shape) for target in block.targets)
        blocks.append(stored + wide * numbers + grams + 6 * 4 * solving)
    outside = max(wide * math.prod(p.shape) + p.stop - p.start for p in places.values())
    hidden = 0
    if job.calibration:
        samples, length = job.calibration.shape(job.source.config)
        width = job.source.config.get_text_config().hidden_size
        hidden = samples * length * width * wide
    return hidden + max(max(blocks), outside)
