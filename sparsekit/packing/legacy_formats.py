"""Decoders of formats that other libraries no longer write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsekit.checkpoint.foreign import MARLIN, compression
from sparsekit.errors import DataError
from sparsekit.weights.packed import unpack_bits

# Rows and columns of the tiles in which marlin-24 orders its codes.
TILE = 16


def converted_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json without the dropped form, with the rest of its quantization config."""
    kept, settings = dict(config), dict(compression(config))
    for name in ("quantization_config", "compression_config"):
        kept.pop(name, None)
    settings.pop("sparsity_config", None)
    if settings.get("config_groups") and settings.get("format") not in (None, "dense", MARLIN):
        kept["quantization_config"] = settings
    return kept


def bitmask_shape(part: Tensor, mask: tuple[int, ...]) -> tuple[int, int]:
    """The shape `[out, in]` of a weight, as its part of that name holds it.

    Args:
        part: Two integers.
        mask: The shape of its bit mask.

    Raises:
        DataError: They are not a shape, or not that of the mask.
    """
    shape = part.flatten().tolist()
    if part.dtype not in (torch.int64, torch.int32) or len(shape) != 2 or min(shape) < 1:
        raise DataError(f"{shape} is not the shape of a weight", code="invalid-shape")
    if mask != (shape[0], -(-shape[1] // 8)):
        raise DataError(
            f"a bit mask of the shape {mask} does not fit a weight of {shape}",
            code="shape-mismatch",
        )
    return shape[0], shape[1]


def marlin_shape(meta: tuple[int, ...]) -> tuple[int, int]:
    """The shape `[out, in]` of a weight whose `meta` has a shape.

    Raises:
        DataError: No `meta` has it.
    """
    if len(meta) != 2 or meta[1] % (2 * TILE) or not all(meta):
        raise DataError(f"no weight has a meta of the shape {meta}", code="invalid-shape")
    return meta[1] // 2, meta[0] * 2 * TILE


def _require(name: str, part: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Refuse a part of another type or shape.

    Raises:
        DataError: Its type or shape differs.
    """
    if part.dtype != dtype or part.shape != shape:
        raise DataError(
            f"{name} is {part.dtype} of {tuple(part.shape)}, not {dtype} of {tuple(shape)}",
            code="shape-mismatch",
        )


def from_bitmask(parts: Mapping[str, Tensor], *, halves: bool) -> Tensor:
    """The weight `[out, in]` of values and a bit for each entry that says whether it has one.

    Args:
        parts: `compressed`, `bitmask` and `shape`; offsets of rows are not needed.
        halves: Whether each four entries have two values.

    Raises:
        DataError: The parts do not fit together.
    """
    rows, columns = bitmask_shape(parts["shape"], tuple(parts["bitmask"].shape))
    values = parts["compressed"].flatten()
    _require("bitmask", parts["bitmask"], torch.uint8, parts["bitmask"].shape)
    mask = unpack_bits(parts["bitmask"], columns).bool()
    _require("compressed", values, values.dtype, (int(mask.sum()),))
    if halves and (columns % 4 or (mask.unflatten(1, (-1, 4)).sum(-1) != 2).any()):
        raise DataError(
            "a 2:4 bit mask does not have two bits set in each group of four",
            code="pattern-violated",
        )
    # By bits: 8-bit floats cannot be scattered.
    size = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    weight = torch.zeros(rows, columns, dtype=size)
    weight[mask] = values.view(size)
    return weight.view(values.dtype)


def from_marlin(parts: Mapping[str, Tensor], bits: int, group: int | None) -> Tensor:
    """The weight `[out, in]`, float16, of 4-bit or 8-bit codes at 2:4 in the order of a kernel.

    Args:
        parts: `weight_packed`, `scale_packed` and `meta`.
        bits: Of a code.
        group: Inputs that share a scale; None: a row does.

    Raises:
        DataError: The parts do not fit together.
    """
    from compressed_tensors.utils.permutations_24 import get_permutations_24
    from compressed_tensors.utils.semi_structured_conversions import (
        sparse_semi_structured_to_dense_cutlass,
    )

    packed, meta, scale = parts["weight_packed"], parts["meta"], parts["scale_packed"]
    if bits not in (4, 8):
        raise DataError(f"codes of {bits} bits: this form has 4 or 8", code="unsupported-bits")
    rows, columns = marlin_shape(tuple(meta.shape))
    half = columns // 2
    several = bool(group) and group < half  # in the order of the scales, of what is kept
    groups = max(1, columns // group) if group else 1
    _require("meta", meta, torch.int16, meta.shape)
    _require("weight_packed", packed, torch.int32, (half // TILE, rows * TILE * bits // 32))
    _require("scale_packed", scale, scale.dtype, (groups, rows))
    order, grouped, single = get_permutations_24(bits)
    places = torch.tensor(grouped if several else single)
    if half * rows % len(order) or groups * rows % len(places):
        raise DataError(
            f"a weight {rows} x {columns} does not divide into tiles of the kernel",
            code="tiles-do-not-divide",
        )
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[..., None] >> shifts & (1 << bits) - 1).flatten(1).reshape(-1, len(order))
    codes = torch.empty_like(codes).index_copy_(1, order, codes)
    codes = codes.reshape(half // TILE, rows // TILE, TILE, TILE).permute(0, 2, 1, 3)
    codes = codes.reshape(half, rows).T - (1 << bits - 1)
    scale = scale.reshape(-1, len(places))
    scale = torch.empty_like(scale).index_copy_(1, places, scale).reshape(groups, rows).T
    kept = codes.to(torch.float16).contiguous()
    dense = sparse_semi_structured_to_dense_cutlass(kept, meta.reshape(rows, -1).contiguous())
    return (dense.unflatten(1, (groups, -1)) * scale[..., None]).flatten(1).add_(0.0)
