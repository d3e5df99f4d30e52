"""Put the weights of a checkpoint on a grid, block by block, from disk to disk; zeros stay."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsekit import methods
from sparsekit.errors import CheckFailedError, DataError, NumericalError, UsageError
from sparsekit.files import existing_parent, read_json, sha256_json
from sparsekit.memory import peak_memory
from sparsekit.models.architecture import Target
from sparsekit.models.blocks import Block, BlockStream
from sparsekit.models.calibration import Calibration
from sparsekit.models.checkpoint import Checkpoint, part_name
from sparsekit.models.inputscale import fold_scale
from sparsekit.models.layout import Layout
from sparsekit.models.output import refuse_foreign, refuse_output, refuse_source, require_space
from sparsekit.models.quantized import (
    decode,
    encode,
    parts_of,
    quantization_config,
    stored_shapes,
)
from sparsekit.models.reference import resolve, title
from sparsekit.models.rows import TokenRows
from sparsekit.models.writer import CheckpointWriter
from sparsekit.progress import SILENT, Progress
from sparsekit.quantizers import Quantizer
from sparsekit.stages import blockwise
from sparsekit.stages.device import compute_dtype, pick_device
from sparsekit.stages.job import select
from sparsekit.stages.quantconfig import QuantizeConfig
from sparsekit.stages.report import NUMERICS, quantize_card, versions
from sparsekit.tensors.grids import Codes, Grid
from sparsekit.tensors.sums import InputSums, Want

# Layers that servers compute as one: they must be on the same grid.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# Of the recipe that a resumed run must share, what the history tells elsewhere or not at all.
UNTOLD = ("stage", "versions", "source", "config", "layout")


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """The outcome of `quantize`."""

    out: Path
    entry: Mapping[str, Any]
    """This run's entry of the history."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"out": str(self.out), **self.entry}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checked configuration with everything that the loop needs."""

    config: QuantizeConfig
    quantizer: Quantizer
    grid: Grid
    source: Checkpoint
    stream: BlockStream
    targets: list[Target]
    skipped: list[dict[str, str]]
    layout: Layout
    calibration: Calibration | None

    @property
    def coded(self) -> bool:
        """Whether codes are stored, or the numbers that they stand for."""
        return self.config.format != "dense"


def quantize(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> QuantizeReport:
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
    started = time.perf_counter()
    job = prepare(config, model, out, overwrite=overwrite, progress=progress)
    rows = job.calibration.rows(job.source, progress) if job.calibration else None
    for note in rows.notes if rows else ():
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
        weights = blockwise.rewrite(
            job.stream,
            writer,
            job.targets,
            lambda block, sums: _quantize_block(job, block, sums),
            lambda block: _restore(job, writer, block),
            want=(job.quantizer.needs or Want.NORMS) if rows else None,
            propagate=True,
            progress=progress,
        )
        progress.end()
        entry = _entry(job, recipe, rows, weights) | {
            "source": {"path": model, "fingerprint": recipe["source"]},
            "resumed_blocks": resumed,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_memory(),
        }
        writer.commit(entry, quantize_card(entry, title(model)), _config_json(job))
    return QuantizeReport(out=out, entry=entry)


def prepare(
    config: QuantizeConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Job:
    """Check a configuration against a model and an output folder.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model cannot be read, is quantized, or keeps factors.
        StorageError: The disk has no room for the output.
    """
    config.check()
    refuse_output(out, overwrite=overwrite)
    source = Checkpoint.open(resolve(model, progress))
    refuse_source(out, source.path)
    partial = out.with_name(out.name + ".partial")
    refuse_foreign(partial)
    _refuse_other_forms(source)
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=compute_dtype(config.dtype, device, source))
    targets, skipped = select(stream, config.skip)
    grid = Grid.parse(config.grid)
    _refuse_misfits(config, grid, targets, skipped)
    layout = Layout.of(source)
    if config.format != "dense":
        layout = Layout.with_codes(
            source,
            {t.name: stored_shapes(grid, t.shape, source.places[t.name].dtype) for t in targets},
        )
    if not partial.exists():
        require_space(existing_parent(out), layout)
    calibration = config.rows
    if calibration is not None:
        calibration.require(source)
    return Job(
        config=config,
        quantizer=methods.load("quantizers", config.method, config.options),
        grid=grid,
        source=source,
        stream=stream,
        targets=targets,
        skipped=skipped,
        layout=layout,
        calibration=calibration,
    )


def _refuse_other_forms(source: Checkpoint) -> None:
    """Refuse what is quantized already, and weights that are products of factors.

    Raises:
        DataError: It is one of these.
    """
    if source.grid is not None:
        raise DataError(
            f"{source.path} is quantized to {source.grid} already",
            "quantize the model that it comes from",
        )
    if source.factors:
        raise DataError(
            f"{source.path} keeps weights as factors, whose product is not sparse; quantize takes "
            "plain checkpoints only",
            "prune without armor and --compensate",
        )


def _refuse_misfits(
    config: QuantizeConfig,
    grid: Grid,
    targets: Sequence[Target],
    skipped: Sequence[Mapping[str, str]],
) -> None:
    """Refuse a grid that does not fit the weights, or what no server would load.

    Raises:
        UsageError: Names the first such weight, and the ways out.
    """
    odd = next((target for target in targets if grid.misfit(target.shape[1])), None)
    if odd is not None:
        common = math.gcd(*(target.shape[1] for target in targets))
        fitting = next((g for g in (128, 64, 32, 16) if common % g == 0), None)
        hint = f"--grid int{grid.bits}"
        if fitting:
            hint = f"--grid int{grid.bits}-g{fitting} fits, and so does {hint}"
        raise UsageError(f"{odd.name}: {grid.misfit(odd.shape[1])}", hint)
    if config.format == "dense":
        return
    transposed = next((target for target in targets if target.transposed), None)
    if transposed is not None:
        raise UsageError(
            f"{transposed.name} is no nn.Linear, which is all that compressed-tensors knows",
            "--format dense writes the rounded numbers themselves",
        )
    left = {row["name"] for row in skipped}
    for name in (target.name for target in targets):
        path, _, last = name.removesuffix(".weight").rpartition(".")
        for group in FUSED:
            others = [f"{path}.{other}.weight" for other in group if last in group]
            if apart := next((other for other in others if other in left), None):
                raise UsageError(
                    f"{apart} is skipped and {name} is not: servers compute both as one layer",
                    f"skip all of {', '.join(group)}, or write --format dense",
                )


def _quantize_block(
    job: Job, block: Block, sums: Mapping[str, InputSums]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Quantize the chosen weights of one block; gives report rows and the tensors to write."""
    wanted = {target.name for target in job.targets}
    chosen = [target for target in block.targets if target.name in wanted]
    scaled = _scale_inputs(job, block, chosen, sums)
    rows, stored = [], {}
    for target in block.targets:
        if target.name in wanted:
            row, codes = _quantize_weight(job, block, target, sums.get(target.name), scaled)
            rows.append(row)
            if job.coded:
                parts = encode(job.grid, codes)
                stored |= {part_name(target.name, part): tensor for part, tensor in parts.items()}
    plain = {name: t for name, t in block.tensors().items() if not job.coded or name not in wanted}
    return rows, plain | stored


@dataclass
class _Scaled:
    """The scales of one weight's rows and columns, and what to tell of them."""

    inputs: Tensor | float = 1.0  # [in], multiplies
    outputs: Tensor | float = 1.0  # [out, 1], divides
    numbers: Mapping[str, float] = field(default_factory=dict)


def _scale_inputs(
    job: Job, block: Block, targets: Sequence[Target], sums: Mapping[str, InputSums]
) -> dict[str, _Scaled]:
    """For each weight of a block the scales that its method wants and the block can take back."""
    scaled = {target.name: _Scaled() for target in targets}
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(sums.get(target.name)), []).append(target)
    for group in groups.values():
        weights = [block.weight(t) / scaled[t.name].outputs for t in group]
        name = group[0].name
        dtype = job.source.places[name].dtype
        found = job.quantizer.input_scale(weights, sums.get(name), job.grid, dtype)
        folded = fold_scale(block, group, found[0], targets) if found else None
        for target in group:
            if folded and found:
                scaled[target.name].inputs = folded.scale
                scaled[target.name].numbers = found[1]
        if folded and folded.rows_of is not None:
            scaled[folded.rows_of.name].outputs = folded.scale[:, None]
    return scaled


def _quantize_weight(
    job: Job,
    block: Block,
    target: Target,
    sums: InputSums | None,
    scaled: Mapping[str, _Scaled],
) -> tuple[dict[str, Any], Codes]:
    """Quantize one weight, put what it then is into the block, and tell of it."""
    started = time.perf_counter()
    weight, dtype = block.weight(target), job.source.places[target.name].dtype
    scale = scaled[target.name]
    try:
        found = job.quantizer.quantize(weight * scale.inputs / scale.outputs, sums, job.grid, dtype)
        on_disk = block.replace(target, found.codes.dense().float())
        made = on_disk.to(weight.device).float() / scale.inputs * scale.outputs
        error = sums.relative_error(weight, made) if sums else None
    except NumericalError as failure:
        raise NumericalError(f"{target.name}: {failure.message}", failure.hint) from failure
    before = weight.cpu() == 0
    after = on_disk == 0
    if (revived := int((before & ~after).sum())) > 0:
        raise CheckFailedError(f"{target.name}: {revived} zeros were given a value")
    row = {
        "name": target.name,
        "shape": list(target.shape),
        "grid": str(job.grid),
        "zeros": int(after.sum()),
        "zeros_before": int(before.sum()),
        "size": on_disk.numel(),
        "error": error,
        "seconds": round(time.perf_counter() - started, 4),
        "bits": 8 * _stored_bytes(job, target) / on_disk.numel(),
        "numbers": {**scale.numbers, **found.numbers},
    }
    codes = Codes(found.codes.codes.cpu(), found.codes.scale.cpu())
    return row, codes


def _stored_bytes(job: Job, target: Target) -> int:
    """Bytes on disk of everything that a weight is stored as."""
    names = [target.name]
    if job.coded:
        names = [part_name(target.name, part) for part in parts_of(job.grid)]
    return sum(job.layout.places[name].stop - job.layout.places[name].start for name in names)


def _restore(job: Job, writer: CheckpointWriter, block: Block) -> dict[str, Tensor]:
    """The tensors of a block that has been written, as it computes with them."""
    wanted = {target.name for target in job.targets} if job.coded else set()
    tensors = writer.read(name for name in block.disk_names if name not in wanted)
    for target in block.targets:
        if target.name in wanted:
            names = {part: part_name(target.name, part) for part in parts_of(job.grid)}
            read = writer.read(names.values())
            parts = {part: read[name] for part, name in names.items()}
            tensors[target.name] = decode(job.grid, parts, target.shape).dense()
    return tensors


def _config_json(job: Job) -> dict[str, Any] | None:
    """What config.json is to say; None when it is to stay as it is."""
    if not job.coded:
        return None
    names = {target.name for target in job.targets}
    left = [t.name for t in job.stream.targets() if t.name not in names]
    ignore = ["lm_head", *(name.removesuffix(".weight") for name in left)]
    told = read_json(job.source.path / "config.json")
    return told | {"quantization_config": quantization_config(job.grid, ignore)}


def _recipe(job: Job, fingerprint: str, rows: TokenRows | None) -> dict[str, Any]:
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
    job: Job, recipe: Mapping[str, Any], rows: TokenRows | None, weights: list[dict[str, Any]]
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
    size = sum(row["size"] for row in weights)
    errors = [row["error"] for row in weights if row["error"] is not None]
    return {
        "stage": "quantize",
        "recipe": {key: value for key, value in recipe.items() if key not in UNTOLD},
        "versions": recipe["versions"],
        "calibration": calibration,
        "tested_family": job.stream.tested,
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
