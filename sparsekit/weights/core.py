"""The sparse core of a weight: numbers, or codes on a grid, whole or packed by a pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.grids import Codes
from sparsekit.weights.packed import mask_of, pack, pack_weight, unpack
from sparsekit.weights.packed_codes import codes_as_int8, pack_grid, unpack_grid
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Values:
    """A core of numbers that is whole."""

    values: Tensor  # [out, in], exact zeros off the mask
    mask: Tensor | None = None  # [out, in] bool; None: where a bit is set

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What training may change."""
        return {"weight": self.values}

    def dense(self) -> Tensor:
        """The numbers `[out, in]`."""
        return self.values

    def to(self, dtype: torch.dtype) -> Values:
        """The same in another type."""
        return replace(self, values=self.values.to(dtype))

    def packed(self, pattern: Pattern) -> Packed:
        """The same in fewer bytes, by a pattern that it has."""
        if self.mask is None:
            values, indices = pack_weight(self.values, pattern)
        else:
            values, indices = pack(self.values, self.mask, pattern)
        parts = {"values": values, "indices": indices}
        return Packed(parts, CoreFormat(pattern=pattern), self.shape[1])


@dataclass(frozen=True, eq=False)
class Packed:
    """A core as what it keeps, and where."""

    parts: Mapping[str, Tensor]
    """`values` and `indices`, and of codes `scale`."""
    format: CoreFormat
    columns: int

    @property
    def pattern(self) -> Pattern:
        """By which it is packed."""
        assert self.format.pattern is not None
        return self.format.pattern

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        return len(self.parts["indices"]), self.columns

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What training may change: the kept values; codes are fixed."""
        return {} if self.format.grid else {"values": self.parts["values"]}

    def check(self) -> None:
        """Refuse parts that do not make a core.

        Raises:
            DataError: The shapes do not fit the pattern, or a place lies outside its group.
        """
        shapes = {name: tuple(part.shape) for name, part in self.parts.items()}
        self.format.check(shapes, self.shape)
        self.mask()

    def mask(self) -> Tensor:
        """Which entries are kept, `[out, in]` bool.

        Raises:
            DataError: A place lies outside its group.
        """
        values = self.parts["values"]
        if self.format.grid:
            values = codes_as_int8(self.parts, self.shape, self.pattern, self.format.grid)
        return mask_of(values, self.parts["indices"], self.pattern, self.columns)

    def unpacked(self) -> Values | Codes:
        """The same, whole, bit for bit; nothing is checked."""
        if self.format.grid is None:
            indices = self.parts["indices"]
            return Values(unpack(self.parts["values"], indices, self.pattern, self.columns))
        assert self.format.dtype is not None
        grid, dtype = self.format.grid, self.format.dtype
        return unpack_grid(self.parts, self.shape, self.pattern, grid, dtype)

    def dense(self) -> Tensor:
        """The numbers `[out, in]`, in the type of the values or of the scales."""
        return self.unpacked().dense()

    def to(self, dtype: torch.dtype) -> Packed:
        """The same with its values in another type; codes stay as they are."""
        if self.format.grid:
            return self
        return replace(self, parts={**self.parts, "values": self.parts["values"].to(dtype)})


Core = Values | Codes | Packed


def packed_core(core: Core, pattern: Pattern) -> Packed:
    """A core in fewer bytes, by a pattern that it has."""
    if isinstance(core, Packed):
        return core
    if isinstance(core, Values):
        return core.packed(pattern)
    fmt = CoreFormat(pattern=pattern, grid=core.grid, dtype=core.scale.dtype)
    return Packed(pack_grid(core, pattern), fmt, core.codes.shape[1])
