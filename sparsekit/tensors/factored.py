"""A weight kept as factors: A S B with a sparse core S, stored so that it is smaller than dense."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.tensors.blockfit import times_left, times_right
from sparsekit.tensors.patterns import Pattern

# The tensors in which factors are stored, by the last part of their name.
PARTS = ("values", "indices", "left", "right")


@dataclass(frozen=True, kw_only=True)
class Factored:
    """W ≈ A S B; the factors that are None are identities."""

    core: Tensor  # S [out, in], exact zeros off the mask
    mask: Tensor  # [out, in] bool
    left: Tensor | None = None  # A [out/b, b, b], the blocks of a block-diagonal matrix
    right: Tensor | None = None  # B [in/b, b, b]

    def to(self, dtype: torch.dtype) -> Factored:
        """The factors rounded to the type in which they are stored."""
        cast = {
            name: None if part is None else part.to(dtype).float()
            for name, part in (("core", self.core), ("left", self.left), ("right", self.right))
        }
        return replace(self, **cast)

    def dense(self) -> Tensor:
        """A S B, `[out, in]` float32."""
        weight = self.core
        if self.right is not None:
            weight = times_right(weight, self.right)
        if self.left is not None:
            weight = times_left(self.left, weight)
        return weight

    def stored(self, pattern: Pattern, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that go to disk, by the last part of their name."""
        packed = pack(self.core, self.mask, pattern)
        found = {"values": packed[0].to(dtype), "indices": packed[1]}
        for name, part in (("left", self.left), ("right", self.right)):
            if part is not None:
                found[name] = part.to(dtype)
        return {name: part.cpu().contiguous() for name, part in found.items()}

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], pattern: Pattern, columns: int) -> Factored:
        """The factors from the tensors on disk, in float32.

        Args:
            stored: What `stored` gave.
            pattern: The pattern of the core.
            columns: Inputs of the weight.

        Raises:
            DataError: The tensors do not fit together.
        """
        core, mask = unpack(stored["values"].float(), stored["indices"], pattern, columns)
        sides = {name: stored[name].float() for name in ("left", "right") if name in stored}
        return cls(core=core, mask=mask, **sides)


def stored_shapes(
    rows: int, columns: int, block: int, pattern: Pattern
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `Factored.stored` with an N:M core."""
    kept = columns // pattern.group * pattern.keep
    return {
        "values": (rows, kept),
        "indices": (rows, math.ceil(kept * _bits(pattern.group) / 8)),
        "left": (rows // block, block, block),
        "right": (columns // block, block, block),
    }


def pack(core: Tensor, mask: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The kept values of an N:M core `[out, in]`, and where they are.

    Returns:
        Values `[out, in/M*N]`, and their places in the groups, ⌈log2 M⌉ bits each, the first in
        the lowest bits, as uint8 `[out, bytes]`.
    """
    order = (
        mask.unflatten(1, (-1, pattern.group)).byte().argsort(dim=-1, descending=True, stable=True)
    )
    places = order[..., : pattern.keep]  # [out, groups, N], rising
    values = core.unflatten(1, (-1, pattern.group)).gather(-1, places).flatten(1)
    width = _bits(pattern.group)
    bits = (places.flatten(1)[..., None] >> torch.arange(width, device=core.device)) & 1
    bits = bits.flatten(1).byte()  # [out, N/M * in * width]
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    powers = 2 ** torch.arange(8, device=core.device, dtype=torch.uint8)
    return values, (bits * powers).sum(-1, dtype=torch.uint8)


def unpack(
    values: Tensor, indices: Tensor, pattern: Pattern, columns: int
) -> tuple[Tensor, Tensor]:
    """The core `[out, in]` and its mask, from what `pack` gave.

    Raises:
        DataError: The shapes do not fit the pattern, or a place lies outside its group.
    """
    rows, kept = values.shape
    width = _bits(pattern.group)
    wanted = columns // pattern.group * pattern.keep, math.ceil(kept * width / 8)
    if (kept, indices.shape[1]) != wanted or len(indices) != rows:
        raise DataError(
            f"{kept} values and {tuple(indices.shape)} index bytes a row do not make a {pattern} "
            f"core of {rows} x {columns}"
        )
    bits = (indices[..., None] >> torch.arange(8, device=values.device)) & 1
    bits = bits.flatten(1)[:, : kept * width].unflatten(1, (kept, width)).long()
    places = (bits << torch.arange(width, device=values.device)).sum(-1)
    places = places.unflatten(1, (-1, pattern.keep))  # [out, groups, N]
    if int(places.max()) >= pattern.group or bool((places.diff(dim=-1) <= 0).any()):
        raise DataError(f"the places of a {pattern} core do not rise within their groups")
    grouped = values.new_zeros(rows, columns // pattern.group, pattern.group)
    core = grouped.scatter(-1, places, values.unflatten(1, (-1, pattern.keep))).flatten(1)
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, places, True).flatten(1)
    return core, mask


def _bits(group: int) -> int:
    """Bits of a place in a group."""
    return max(1, (group - 1).bit_length())
