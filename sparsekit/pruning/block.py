"""Pruning of one block, and restoring a block that was written before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekit.checkpoint.entry_parts import PrunedWeight
from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import NumericalError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block
from sparsekit.pruning.methods import no_limit
from sparsekit.pruning.prepare import PruneJob
from sparsekit.solvers.input_stats import InputStats
from sparsekit.weights.grids import Codes

if TYPE_CHECKING:
    from sparsekit.pruning.methods import Pruned
    from sparsekit.pruning.time_budget import TimeBudget
    from sparsekit.weights.form import Form
    from sparsekit.weights.patterns import Pattern

# Heap that fitting factors leaves fragmented, as a multiple of the weight's size.
FITTED = 8


def prune_block(
    job: PruneJob, block: Block, sums: dict[str, InputStats], budget: TimeBudget | None
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Prune the selected weights of one block; returns report rows and the tensors to write."""
    wanted = {target.name for target in job.targets}
    chosen = [target for target in block.targets if target.name in wanted]
    rows, stored = [], {}
    for group in job.chain.groups(chosen, sums, job.patterns, job.source.places):
        group_rows, parts = _prune_group(job, block, group, sums.get(group[0].name), budget)
        rows += group_rows
        stored |= parts
    apart = wanted if job.chain.grid else set()
    tensors = {
        name: tensor
        for name, tensor in block.tensors().items()
        if name in job.layout.places and name not in apart
    }
    return [row.to_json() for row in rows], tensors | stored


def _prune_group(
    job: PruneJob,
    block: Block,
    group: list[Target],
    sums: InputStats | None,
    budget: TimeBudget | None,
) -> tuple[list[PrunedWeight], dict[str, Tensor]]:
    """Prune weights with the same inputs as one stacked weight, and put them into the block."""
    started = time.perf_counter()
    weights = [block.weight(target) for target in group]
    stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
    dtype = job.source.places[group[0].name].dtype
    pattern = job.patterns.of(group[0])
    limit = budget.weight(stacked.numel()) if budget else nullcontext(no_limit)
    with _naming(", ".join(target.name for target in group)), limit as should_continue:
        pruned = job.chain.run(group, stacked, sums, pattern, dtype, should_continue)
    factors = None if pruned.factors is None else pruned.factors.rounded(dtype)
    new = pruned.weight if factors is None else factors.dense()
    rows: list[PrunedWeight] = []
    sizes = [len(weight) for weight in weights]
    numbers = _numbers(pruned.numbers, sizes)
    parts = zip(group, weights, new.split(sizes), numbers, strict=True)
    for target, weight, part, target_numbers in parts:
        on_disk = block.replace(target, part)
        core = on_disk if factors is None else factors.core.dense()
        pattern.check(core, target.name)
        with _naming(target.name):
            error = sums.relative_error(weight, on_disk.to(weight.device)) if sums else None
        row = PrunedWeight(
            name=target.name,
            shape=target.shape,
            pattern=str(pattern),
            zeros=int((core == 0).sum()),
            size=on_disk.numel(),
            error=error,
            bits=None,
            seconds=0.0,
            numbers=target_numbers,
        )
        rows.append(row)
    stored = _stored(group, sizes, pruned, factors, pattern, dtype)
    if factors is not None:
        block.stream.skeleton.passed(FITTED * stacked.nbytes)
        bits = 8 * sum(t.nbytes for t in stored.values()) / rows[0].size
        rows = [rows[0].model_copy(update={"bits": bits})]
    each = (time.perf_counter() - started) / sum(row.size for row in rows)
    rows = [row.model_copy(update={"seconds": round(each * row.size, 4)}) for row in rows]
    return rows, stored


@contextmanager
def _naming(names: str) -> Iterator[None]:
    """Name weights in the numerical errors of this context."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{names}: {error.message}", error.hint, code=error.code) from error


def _stored(
    group: list[Target],
    sizes: list[int],  # rows of each weight
    pruned: Pruned,
    factors: Form | None,
    pattern: Pattern,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors that are stored for a group next to or instead of its weights, by name."""
    stored: dict[str, Tensor] = {}
    if factors is not None:  # the group has one weight: weights with factors are not stacked
        parts = factors.packed(pattern).to(dtype).stored()
        stored = {part_name(group[0].name, part): tensor for part, tensor in parts.items()}
    if pruned.codes is not None:
        from sparsekit.quantization.storage import coded_tensors

        codes, scales = (part.split(sizes) for part in (pruned.codes.codes, pruned.codes.scale))
        for target, *parts in zip(group, codes, scales, strict=True):
            stored |= coded_tensors(target, Codes(*parts, pruned.codes.grid))
    return stored


def _numbers(stacked: Mapping[str, float | Tensor], sizes: list[int]) -> list[dict[str, float]]:
    """The reported numbers of each weight in a stack; counts per row are summed."""
    numbers: list[dict[str, float]] = []
    for part in range(len(sizes)):
        rows = slice(sum(sizes[:part]), sum(sizes[: part + 1]))
        numbers.append(
            {k: int(v[rows].sum()) if isinstance(v, Tensor) else v for k, v in stacked.items()}
        )
    return numbers


def restore(job: PruneJob, writer: CheckpointWriter, block: Block) -> dict[str, Tensor]:
    """The tensors of a block that was written before; factors are multiplied again."""
    grid = job.chain.grid
    coded = {target.name for target in job.targets} if grid else set()
    here = (n for n in block.disk_names if n in job.layout.places and n not in coded)
    tensors = writer.read(here)
    for target in block.targets:
        if grid is not None and target.name in coded:
            from sparsekit.quantization.storage import read_coded

            tensors[target.name] = read_coded(writer, target, grid)
        if target.name in tensors:
            continue
        tensors[target.name] = _product(job, writer, target)
    return tensors


def _product(job: PruneJob, writer: CheckpointWriter, target: Target) -> Tensor:
    """A weight as it is stored on disk, from its factors that were written before."""
    from sparsekit.weights.core_format import CoreFormat
    from sparsekit.weights.form import Form

    pattern = job.patterns.of(target)
    parts = job.chain.factor_shapes(target, pattern)
    read = writer.read(part_name(target.name, part) for part in parts)
    stored = {part: read[part_name(target.name, part)] for part in parts}
    form = Form.from_stored(stored, CoreFormat(pattern=pattern), target.shape)
    form.check()
    weight = form.dense().to(job.source.places[target.name].dtype)
    return target.to_disk(weight).contiguous()
