"""Encoding of weights on a grid in the formats of compressed-tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.grids import Codes, Grid

PACKED, INTEGERS, FLOATS = "pack-quantized", "int-quantized", "float-quantized"
# Last parts of the tensors' names.
PACKED_WEIGHT, WEIGHT_SCALE, WEIGHT_SHAPE = "weight_packed", "weight_scale", "weight_shape"
# Rows of packed codes are words of this many bits.
WORD_BITS = 32
# Dtype and shape of tensors, by name.
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def format_of(grid: Grid) -> str:
    """The name of the format for a grid."""
    if not grid.activations:
        return PACKED
    return FLOATS if grid.floating else INTEGERS


def parts_of(grid: Grid) -> tuple[str, ...]:
    """Last parts of the names of the tensors of a weight."""
    if format_of(grid) == PACKED:
        return (PACKED_WEIGHT, WEIGHT_SCALE, WEIGHT_SHAPE)
    return ("weight", WEIGHT_SCALE)


def quantized_shapes(
    grid: Grid,
    shape: tuple[int, int],  # [out, in]
    dtype: torch.dtype,
) -> Shapes:
    """Dtype and shape of each tensor of a weight, by the last part of its name."""
    rows, columns = shape
    scale = dtype, (rows, grid.scales(columns))
    if format_of(grid) != PACKED:
        codes = torch.float8_e4m3fn if grid.floating else torch.int8
        return {"weight": (codes, shape), WEIGHT_SCALE: scale}
    words = math.ceil(columns * grid.bits / WORD_BITS)
    packed = torch.int32, (rows, words)
    return {PACKED_WEIGHT: packed, WEIGHT_SCALE: scale, WEIGHT_SHAPE: (torch.int64, (2,))}


def encode(codes: Codes) -> dict[str, Tensor]:
    """The tensors of a weight, by the last part of their name."""
    if format_of(codes.grid) != PACKED:
        return {"weight": codes.codes, WEIGHT_SCALE: codes.scale}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    packed = pack_to_int32(codes.codes, codes.grid.bits)
    shape = torch.tensor(codes.codes.shape)
    return {PACKED_WEIGHT: packed, WEIGHT_SCALE: codes.scale, WEIGHT_SHAPE: shape}


def decode(grid: Grid, parts: Mapping[str, Tensor], shape: tuple[int, int]) -> Codes:
    """The inverse of `encode`.

    Raises:
        DataError: The tensors do not make a weight of this shape.
    """
    wanted = quantized_shapes(grid, shape, parts[WEIGHT_SCALE].dtype)
    for name in {**wanted, **parts}:
        actual = (parts[name].dtype, tuple(parts[name].shape)) if name in parts else None
        if actual != wanted.get(name):
            raise DataError(
                f"{name} of a {grid} weight {shape} is {actual}, not {wanted.get(name)}",
                code="shape-mismatch",
            )
    if format_of(grid) != PACKED:
        return Codes(parts["weight"], parts[WEIGHT_SCALE], grid)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(parts[PACKED_WEIGHT], grid.bits, torch.Size(shape))
    return Codes(codes.contiguous(), parts[WEIGHT_SCALE], grid)
