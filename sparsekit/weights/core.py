"""The sparse core of a weight: values or codes, whole or packed by a pattern."""

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
    """A core of unpacked values."""

    values: Tensor  # [out, in], exact zeros off the mask
    mask: Tensor | None = None  # [out, in] bool; None: entries with a bit set

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        rows, columns = self.values.shape
        return rows, columns

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, by name."""
        return {"weight": self.values}

    def dense(self) -> Tensor:
        """The values `[out, in]`."""
        return self.values

    def to(self, dtype: torch.dtype) -> Values:
        """The core in another dtype."""
        return replace(self, values=self.values.to(dtype))

    def packed(self, pattern: Pattern) -> Packed:
        """The core packed by a pattern that it has."""
        if self.mask is None:
            values, indices = pack_weight(self.values, pattern)
        else:
            values, indices = pack(self.values, self.mask, pattern)
        parts = {"values": values, "indices": indices}
        return Packed(parts, CoreFormat(pattern=pattern), self.shape[1])


@dataclass(frozen=True, eq=False)
class Packed:
    """A core stored as its kept values or codes and their places."""

    parts: Mapping[str, Tensor]
    """`values` and `indices`, with codes also `scale`."""
    format: CoreFormat
    columns: int

    @property
    def pattern(self) -> Pattern:
        """The pattern by which it is packed."""
        assert self.format.pattern is not None
        return self.format.pattern

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        return len(self.parts["indices"]), self.columns

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, by name: the kept values; codes are fixed."""
        return {} if self.format.grid else {"values": self.parts["values"]}

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            DataError: The shapes do not fit the pattern, or a place lies outside its group.
        """
        shapes = {name: tuple(part.shape) for name, part in self.parts.items()}
        self.format.check(shapes, self.shape)
        self.mask()

    def mask(self) -> Tensor:
        """The mask of the kept entries, `[out, in]` bool.

        Raises:
            DataError: A place lies outside its group.
        """
        values = self.parts["values"]
        if self.format.grid:
            values = codes_as_int8(self.parts, self.shape, self.pattern, self.format.grid)
        return mask_of(values, self.parts["indices"], self.pattern, self.columns)

    def unpacked(self) -> Values | Codes:
        """The unpacked core, bit for bit; nothing is checked."""
        if self.format.grid is None:
            indices = self.parts["indices"]
            return Values(unpack(self.parts["values"], indices, self.pattern, self.columns))
        assert self.format.dtype is not None
        grid, dtype = self.format.grid, self.format.dtype
        return unpack_grid(self.parts, self.shape, self.pattern, grid, dtype)

    def dense(self) -> Tensor:
        """The values `[out, in]`, in the dtype of the values or of the scales."""
        return self.unpacked().dense()

    def to(self, dtype: torch.dtype) -> Packed:
        """The core with its values in another dtype; codes stay as they are."""
        if self.format.grid:
            return self
        return replace(self, parts={**self.parts, "values": self.parts["values"].to(dtype)})


Core = Values | Codes | Packed


def packed_core(core: Core, pattern: Pattern) -> Packed:
    """Pack a core by a pattern that it has."""
    if isinstance(core, Packed):
        return core
    if isinstance(core, Values):
        return core.packed(pattern)
    fmt = CoreFormat(pattern=pattern, grid=core.grid, dtype=core.scale.dtype)
    return Packed(pack_grid(core, pattern), fmt, core.codes.shape[1])
