"""TODO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import DataError, UsageError
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.packed import code_shapes, mask_of, pack_weight, stored_shapes, unpack
from sparsekit.weights.patterns import Pattern

# The last part of the name of the scales of packed codes.
SCALE = "scale"
SCALES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class CodeForm:
    """What packed codes stand for."""

    grid: Grid
    dtype: torch.dtype
    """Of the scales, and of the numbers that codes and scales make."""

    @classmethod
    def parse(cls, text: str) -> CodeForm:
        """What `str` wrote, as `int4-g64 bfloat16`.

        Raises:
            UsageError: It is no such text.
        """
        grid, _, name = text.partition(" ")
        if name not in SCALES:
            raise UsageError(f"{name!r} is no type of scales", f"one of {', '.join(SCALES)}")
        return cls(Grid.parse(grid), SCALES[name])

    def __str__(self) -> str:
        return f"{self.grid} {str(self.dtype).removeprefix('torch.')}"

    def shapes(self, shape: tuple[int, int], pattern: Pattern) -> dict[str, tuple[int, ...]]:
        """The shape, in bytes, of each tensor that a weight `[out, in]` becomes."""
        rows, columns = shape
        values, indices = code_shapes(shape, self.grid.bits, pattern)
        scale = rows, self.grid.scales(columns) * self.dtype.itemsize
        return {"values": values, "indices": indices, SCALE: scale}


def pack_grid(codes: Codes, pattern: Pattern, grid: Grid) -> dict[str, Tensor]:
    """A weight on a grid as bytes of its codes off zero, of their places, and of its scales.

    Bytes, so that no loader casts them to the type in which a model computes. Codes of 4 bits lie
    two in a byte, the first lowest; a last one without a neighbour has 0.
    """
    values, indices = pack_weight(codes.codes.view(torch.int8), pattern)
    values = values.contiguous().view(torch.uint8)
    if grid.bits == 4:
        values = torch.nn.functional.pad(values & 15, (0, values.shape[-1] % 2))
        values = values[..., ::2] | values[..., 1::2] << 4
    return {"values": values, "indices": indices, SCALE: codes.scale.contiguous().view(torch.uint8)}


def unpack_grid(
    parts: Mapping[str, Tensor],
    pattern: Pattern,
    columns: int,
    form: CodeForm,
    *,
    check: bool = True,
) -> Codes:
    """What `pack_grid` was given.

    Args:
        parts: What it gave.
        pattern: Of the codes.
        columns: Inputs of the weight.
        form: Of the codes.
        check: Whether to look at the places, which takes as long as the rest.

    Raises:
        DataError: The shapes do not fit the pattern, or a place lies outside its group.
    """
    check_codes({name: tuple(part.shape) for name, part in parts.items()}, columns, pattern, form)
    values, indices, bits = parts["values"], parts["indices"], form.grid.bits
    if bits == 4:
        values = torch.stack([values & 15, values >> 4], -1).flatten(-2)
        values = values[..., : stored_shapes(len(indices), columns, pattern)["values"][-1]]
        values = (values ^ 8) - 8  # wraps, as two's complement does
    values = values.contiguous().view(torch.int8)
    if check:
        mask_of(values, indices, pattern, columns)
    codes = unpack(values, indices, pattern, columns)
    codes = codes.view(torch.float8_e4m3fn) if form.grid.floating else codes
    return Codes(codes, parts[SCALE].contiguous().view(form.dtype))


def check_codes(
    shapes: Mapping[str, tuple[int, ...]], columns: int, pattern: Pattern, form: CodeForm
) -> None:
    """Refuse tensors that cannot be those of packed codes.

    Raises:
        DataError: Names the first whose shape does not fit.
    """
    rows = (shapes.get("indices") or (0,))[0]
    for name, wanted in form.shapes((rows, columns), pattern).items():
        if shapes.get(name) != wanted:
            raise DataError(
                f"{name!r} of a {pattern} {form} weight {rows} x {columns} has the shape "
                f"{shapes.get(name)}, not {wanted}"
            )
