"""Quantization of one block, and restoring a block that was written before."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import CheckFailedError, NumericalError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block
from sparsekit.quantization.input_scale import fold_scale
from sparsekit.quantization.prepare import QuantizeJob
from sparsekit.quantization.storage import coded_tensors, read_coded
from sparsekit.solvers.input_stats import InputStats
from sparsekit.weights.grids import Codes
from sparsekit.weights.quantized import parts_of


def quantize_block(
    job: QuantizeJob, block: Block, sums: Mapping[str, InputStats]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Quantize the selected weights of one block; returns report rows and the tensors to write."""
    wanted = {target.name for target in job.targets}
    chosen = [target for target in block.targets if target.name in wanted]
    scaled = _scale_inputs(job, block, chosen, sums)
    rows, stored = [], {}
    for target in block.targets:
        if target.name in wanted:
            row, codes = _quantize_weight(job, block, target, sums.get(target.name), scaled)
            rows.append(row)
            if job.coded:
                stored |= coded_tensors(target, codes)
    plain = {name: t for name, t in block.tensors().items() if not job.coded or name not in wanted}
    return rows, plain | stored


@dataclass
class _Scaled:
    """The scales of a weight's rows and columns, and numbers for the report."""

    inputs: Tensor | float = 1.0  # [in], multiplies
    outputs: Tensor | float = 1.0  # [out, 1], divides
    numbers: Mapping[str, float] = field(default_factory=dict)


def _scale_inputs(
    job: QuantizeJob, block: Block, targets: Sequence[Target], sums: Mapping[str, InputStats]
) -> dict[str, _Scaled]:
    """The input scales that the method chooses and the block can absorb, by weight."""
    scaled = {target.name: _Scaled() for target in targets}
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(id(sums.get(target.name)), []).append(target)
    for group in groups.values():
        weights = [block.weight(t) / scaled[t.name].outputs for t in group]
        name = group[0].name
        dtype = job.source.places[name].dtype
        chosen = job.quantizer.input_scale(weights, sums.get(name), job.grid, dtype)
        folded = fold_scale(block, group, chosen[0], targets) if chosen else None
        for target in group:
            if folded and chosen:
                scaled[target.name].inputs = folded.scale
                scaled[target.name].numbers = chosen[1]
        if folded and folded.rows_of is not None:
            scaled[folded.rows_of.name].outputs = folded.scale[:, None]
    return scaled


def _quantize_weight(
    job: QuantizeJob,
    block: Block,
    target: Target,
    sums: InputStats | None,
    scaled: Mapping[str, _Scaled],
) -> tuple[dict[str, Any], Codes]:
    """Quantize one weight and put the rounded weight into the block; returns its report row."""
    started = time.perf_counter()
    weight, dtype = block.weight(target), job.source.places[target.name].dtype
    scale = scaled[target.name]
    try:
        scaled_weight = weight * scale.inputs / scale.outputs
        quantized = job.quantizer.quantize(scaled_weight, sums, job.grid, dtype)
        on_disk = block.replace(target, quantized.codes.dense().float())
        rounded = on_disk.to(weight.device).float() / scale.inputs * scale.outputs
        error = sums.relative_error(weight, rounded) if sums else None
    except NumericalError as failure:
        message = f"{target.name}: {failure.message}"
        raise NumericalError(message, failure.hint, code=failure.code) from failure
    before = weight.cpu() == 0
    after = on_disk == 0
    if (revived := int((before & ~after).sum())) > 0:
        message = f"{target.name}: {revived} zeros became nonzero"
        raise CheckFailedError(message, code="zeros-lost")
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
        "numbers": {**scale.numbers, **quantized.numbers},
    }
    return row, quantized.codes


def _stored_bytes(job: QuantizeJob, target: Target) -> int:
    """Bytes on disk of all tensors that store a weight."""
    names = [target.name]
    if job.coded:
        names = [part_name(target.name, part) for part in parts_of(job.grid)]
    return sum(job.layout.places[name].stop - job.layout.places[name].start for name in names)


def restore(job: QuantizeJob, writer: CheckpointWriter, block: Block) -> dict[str, Tensor]:
    """The tensors of a block that was written before, as it computes with them."""
    wanted = {target.name for target in job.targets} if job.coded else set()
    tensors = writer.read(name for name in block.disk_names if name not in wanted)
    for target in block.targets:
        if target.name in wanted:
            tensors[target.name] = read_coded(writer, target, job.grid)
    return tensors
