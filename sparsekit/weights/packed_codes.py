"""Lossless packing of sparse weights on a grid."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.packed import code_shapes, factor_shapes, pack_weight, unpack
from sparsekit.weights.patterns import Pattern

# Last part of the name of the scales of packed codes.
SCALE = "scale"


def packed_code_shapes(
    shape: tuple[int, int], pattern: Pattern, grid: Grid, dtype: torch.dtype
) -> dict[str, tuple[int, ...]]:
    """The shape, in bytes, of each tensor of a packed weight `[out, in]` on a grid."""
    rows, columns = shape
    values, indices = code_shapes(shape, grid.bits, pattern)
    scale = rows, grid.scales(columns) * dtype.itemsize
    return {"values": values, "indices": indices, SCALE: scale}


def pack_grid(codes: Codes, pattern: Pattern) -> dict[str, Tensor]:
    """The nonzero codes of a weight, their places and the scales, all as bytes.

    As bytes no loader casts them to the dtype in which a model computes. There are two 4-bit codes
    per byte, the first in the lower half; an odd one is padded with 0.
    """
    values, indices = pack_weight(codes.codes.view(torch.int8), pattern)
    values = values.contiguous().view(torch.uint8)
    if codes.grid.bits == 4:
        values = torch.nn.functional.pad(values & 15, (0, values.shape[-1] % 2))
        values = values[..., ::2] | values[..., 1::2] << 4
    return {"values": values, "indices": indices, SCALE: codes.scale.contiguous().view(torch.uint8)}


def unpack_grid(
    parts: Mapping[str, Tensor],
    shape: tuple[int, int],
    pattern: Pattern,
    grid: Grid,
    dtype: torch.dtype,
) -> Codes:
    """The inverse of `pack_grid`, for parts that `CoreFormat.check` and `mask_of` accept."""
    values = codes_as_int8(parts, shape, pattern, grid)
    codes = unpack(values, parts["indices"], pattern, shape[1])
    codes = codes.view(torch.float8_e4m3fn) if grid.floating else codes
    return Codes(codes, parts[SCALE].contiguous().view(dtype), grid)


def codes_as_int8(
    parts: Mapping[str, Tensor], shape: tuple[int, int], pattern: Pattern, grid: Grid
) -> Tensor:
    """The packed codes, one per byte."""
    values = parts["values"]
    if grid.bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
        values = values[..., : factor_shapes(*shape, pattern)["values"][-1]]
        values = (values ^ 8) - 8  # wraps, as two's complement does
    return values.contiguous().view(torch.int8)
