"""The tensors of a weight on a grid in the formats of compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.grids import Codes, Grid

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
# The last parts of the names of the tensors.
PACKED_WEIGHT, WEIGHT_SCALE, WEIGHT_SHAPE = "weight_packed", "weight_scale", "weight_shape"
# Rows of packed codes are words of so many bits.
WORD_BITS = 32
# Type and shape of tensors by name.
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def format_of(grid: Grid) -> str:
    """The name of the format that a grid is stored in."""
    if not grid.activations:
        return PACKED
    return FLOATS if grid.floating else INTEGERS


def parts_of(grid: Grid) -> tuple[str, ...]:
    """The last parts of the names of the tensors that a weight is stored as."""
    if format_of(grid) == PACKED:
        return (PACKED_WEIGHT, WEIGHT_SCALE, WEIGHT_SHAPE)
    return ("weight", WEIGHT_SCALE)


def quantized_shapes(
    grid: Grid,
    shape: tuple[int, int],  # [out, in]
    dtype: torch.dtype,
) -> Shapes:
    """Type and shape of each tensor that a weight becomes, by the last part of its name."""
    rows, columns = shape
    scale = dtype, (rows, grid.scales(columns))
    if format_of(grid) != PACKED:
        codes = torch.float8_e4m3fn if grid.floating else torch.int8
        return {"weight": (codes, shape), WEIGHT_SCALE: scale}
    words = math.ceil(columns * grid.bits / WORD_BITS)
    packed = torch.int32, (rows, words)
    return {PACKED_WEIGHT: packed, WEIGHT_SCALE: scale, WEIGHT_SHAPE: (torch.int64, (2,))}


def encode(codes: Codes) -> dict[str, Tensor]:
    """The tensors of a weight, by the last part of the name of each."""
    if format_of(codes.grid) != PACKED:
        return {"weight": codes.codes, WEIGHT_SCALE: codes.scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(codes.codes, codes.grid.bits)
    shape = torch.tensor(codes.codes.shape)
    return {PACKED_WEIGHT: packed, WEIGHT_SCALE: codes.scale, WEIGHT_SHAPE: shape}


def decode(grid: Grid, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Codes:
    """What `encode` was given.

    Raises:
        DataError: The tensors are not those of a weight of this shape.
    """
    wanted = quantized_shapes(grid, shape, parts[WEIGHT_SCALE].dtype)
    for name in {**wanted, **parts}:
        found = (parts[name].dtype, tuple(parts[name].shape)) if name in parts else None
        if found != wanted.get(name):
            raise DataError(f"{name} of a {grid} weight {shape} is {found}, not {wanted.get(name)}")
    if format_of(grid) != PACKED:
        return Codes(parts["weight"], parts[WEIGHT_SCALE], grid)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(parts[PACKED_WEIGHT], grid.bits, torch.Size(shape))
    return Codes(codes.contiguous(), parts[WEIGHT_SCALE], grid)
