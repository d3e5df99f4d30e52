"""Weights stored as codes: which are possible, the entry in config.json, and reading them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.compressed_tensors import quantization_config
from sparsekit.checkpoint.folder import part_name
from sparsekit.checkpoint.layout import Layout
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import UsageError
from sparsekit.files import read_json
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.form import Form
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.quantized import parts_of, quantized_shapes

# Layers that servers fuse, which must have the same grid.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def coded_layout(source: Checkpoint, targets: Sequence[Target], grid: Grid) -> Layout:
    """The files of a checkpoint in which these weights are stored as codes and scales."""
    dtypes = {target.name: source.places[target.name].dtype for target in targets}
    return Layout.with_codes(
        source, {t.name: quantized_shapes(grid, t.shape, dtypes[t.name]) for t in targets}
    )


def coded_config(stream: BlockStream, targets: Sequence[Target], grid: Grid) -> dict[str, Any]:
    """config.json of a checkpoint in which these weights are codes."""
    names, on_disk = {target.name for target in targets}, stream.skeleton.on_disk
    ignore = [
        name
        for name, module in stream.model.named_modules()
        if isinstance(module, nn.Linear) and on_disk.get(f"{name}.weight") not in names
    ]
    config = read_json(stream.source.path / "config.json")
    return config | {"quantization_config": quantization_config(grid, ignore)}


def coded_tensors(target: Target, codes: Codes) -> dict[str, Tensor]:
    """The tensors that store a weight, by name."""
    parts = Form(core=codes).stored()
    return {part_name(target.name, part): tensor for part, tensor in parts.items()}


def read_coded(writer: CheckpointWriter, target: Target, grid: Grid) -> Tensor:
    """The dense values of a weight that was written as codes."""
    names = {part: part_name(target.name, part) for part in parts_of(grid)}
    read = writer.read(names.values())
    parts = {part: read[name] for part, name in names.items()}
    return Form.from_stored(parts, CoreFormat(grid=grid), target.shape).dense()


def refuse_grid(
    grid: Grid,
    targets: Sequence[Target],
    skipped: Sequence[Mapping[str, str]],
    *,
    flag: str,
    coded: bool = True,
) -> None:
    """Refuse a grid that does not fit the weights, or a checkpoint that no server would load.

    Args:
        grid: The grid.
        targets: The weights to quantize.
        skipped: Names of other weights, each with the reason.
        flag: The flag that requested the grid.
        coded: Whether codes are stored, or the rounded numbers.

    Raises:
        UsageError: Names the first such weight, and suggests a way out.
    """
    odd = next((target for target in targets if grid.mismatch(target.shape[1])), None)
    if odd is not None:
        common = math.gcd(*(target.shape[1] for target in targets))
        fitting = next((g for g in (128, 64, 32, 16) if common % g == 0), None)
        hint = f"{flag} int{grid.bits}"
        if fitting:
            hint = f"{flag} int{grid.bits}-g{fitting} fits, and so does {hint}"
        message = f"{odd.name}: {grid.mismatch(odd.shape[1])}"
        raise UsageError(message, hint, code="grid-does-not-divide")
    if not coded:
        return
    transposed = next((target for target in targets if target.transposed), None)
    if transposed is not None:
        raise UsageError(
            f"{transposed.name} is not an nn.Linear, the only layer of compressed-tensors",
            "quantize --format dense stores the rounded numbers",
            code="not-linear",
        )
    left = {row["name"] for row in skipped}
    for name in (target.name for target in targets):
        path, _, last = name.removesuffix(".weight").rpartition(".")
        for group in FUSED:
            others = [f"{path}.{other}.weight" for other in group if last in group]
            if apart := next((other for other in others if other in left), None):
                raise UsageError(
                    f"{apart} is skipped and {name} is not: servers fuse them into one layer",
                    f"skip all of {', '.join(group)}, or quantize with --format dense",
                    code="splits-fused-layers",
                )
