"""A sparse tensor in fewer bytes, and back to the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsekit.errors import DataError, UsageError
from sparsekit.tensors.factored import index_bits, mask_of, pack, stored_shapes, unpack
from sparsekit.tensors.grids import Codes, Grid
from sparsekit.tensors.patterns import Pattern

# Integers of the size of a number, to look at its bits: -0.0 is a value that has to come back.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# The last part of the name of the scales of packed codes.
SCALE = "scale"
SCALES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Digits of the share of zeros by which a tensor without N:M is packed: it counts them exactly.
DIGITS = 12


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


def packed_bytes(shape: tuple[int, int], bits: int, pattern: Pattern) -> int:
    """How many bytes a weight `[out, in]` of numbers with so many bits takes, packed."""
    values, indices = code_shapes(shape, bits, pattern)
    return math.prod(values) + math.prod(indices)


def code_shapes(
    shape: tuple[int, int], bits: int, pattern: Pattern
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes, in bytes, of the values and places of a weight `[out, in]`."""
    shapes = stored_shapes(*shape, pattern)
    *rows, count = shapes["values"]
    return (*rows, math.ceil(count * bits / 8)), shapes["indices"]


def theory(pattern: Pattern, bits: int) -> tuple[float, float]:
    """Bits for each entry of a weight that its values and their places take, without any padding.

    Args:
        pattern: Its own.
        bits: Of one value.
    """
    kept = float(1 - pattern.sparsity)
    place = kept * index_bits(pattern.group) if pattern.scope == "group" else 1.0
    return kept * bits, place


def exact_pattern(zeros: int, size: int) -> Pattern:
    """The unstructured pattern of a tensor with exactly so many zeros, or one less than all.

    Args:
        zeros: Entries whose bits are all 0.
        size: All entries, less than 10^12.
    """
    share = Fraction(-(-min(zeros, size - 1) * 10**DIGITS // size), 10**DIGITS)
    return Pattern(sparsity=share, scope="tensor")


def packing(weight: Tensor, patterns: Iterable[Pattern], bits: int = 0) -> Pattern | None:
    """The pattern by which to pack a weight `[out, in]`; None where none makes it smaller.

    It is the N:M pattern among those that the weight has with the fewest bytes, since what is
    packed so cannot lose it; without one, the pattern that counts the zeros.

    Args:
        weight: Numbers of 16 or 32 bits, or codes of 8.
        patterns: N:M patterns to try.
        bits: Of a number when it is stored; 0: those that it has.
    """
    kept, bits = _kept(weight), bits or 8 * weight.dtype.itemsize
    rows, columns = weight.shape
    zeros = kept.numel() - int(kept.sum())
    if not zeros:
        return None
    fitting = [p for p in patterns if not p.misfit(columns) and _fits(kept, p)]
    tried = sorted(fitting, key=lambda p: packed_bytes((rows, columns), bits, p))
    tried.append(exact_pattern(zeros, kept.numel()))
    whole = kept.numel() * bits / 8
    return next((p for p in tried if packed_bytes((rows, columns), bits, p) < whole), None)


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Values and places of a weight `[out, in]` that has the pattern, as of `pack`."""
    return pack(weight, pattern.mask(_kept(weight).float()), pattern)


def unpack_weight(values: Tensor, indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """What `pack_weight` was given, bit for bit."""
    return unpack(values, indices, pattern, columns)


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


def _kept(weight: Tensor) -> Tensor:
    """Which entries have a bit set, `[out, in]` bool."""
    return weight.contiguous().view(BITS[weight.dtype.itemsize]) != 0


def _fits(kept: Tensor, pattern: Pattern) -> bool:
    return bool((kept.unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())
