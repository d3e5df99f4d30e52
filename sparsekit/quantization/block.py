"""One block's weights: put on a grid, told of, and read again."""

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
                stored |= coded_tensors(target, codes)
    plain = {name: t for name, t in block.tensors().items() if not job.coded or name not in wanted}
    return rows, plain | stored


@dataclass
class _Scaled:
    """The scales of one weight's rows and columns, and what to tell of them."""

    inputs: Tensor | float = 1.0  # [in], multiplies
    outputs: Tensor | float = 1.0  # [out, 1], divides
    numbers: Mapping[str, float] = field(default_factory=dict)


def _scale_inputs(
    job: QuantizeJob, block: Block, targets: Sequence[Target], sums: Mapping[str, InputStats]
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
    job: QuantizeJob,
    block: Block,
    target: Target,
    sums: InputStats | None,
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
    return row, found.codes


def _stored_bytes(job: QuantizeJob, target: Target) -> int:
    """Bytes on disk of everything that a weight is stored as."""
    names = [target.name]
    if job.coded:
        names = [part_name(target.name, part) for part in parts_of(job.grid)]
    return sum(job.layout.places[name].stop - job.layout.places[name].start for name in names)


def restore(job: QuantizeJob, writer: CheckpointWriter, block: Block) -> dict[str, Tensor]:
    """The tensors of a block that has been written, as it computes with them."""
    wanted = {target.name for target in job.targets} if job.coded else set()
    tensors = writer.read(name for name in block.disk_names if name not in wanted)
    for target in block.targets:
        if target.name in wanted:
            tensors[target.name] = read_coded(writer, target, job.grid)
    return tensors
