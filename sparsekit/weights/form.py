"""The form of a linear weight, whichever verb wrote it: W = left · core · right + up · down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.weights.block_diagonal import times_left, times_right
from sparsekit.weights.core import Core, Packed, Values, packed_core
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.grids import Codes
from sparsekit.weights.packed import refuse_other_shapes, side_sizes
from sparsekit.weights.packed_codes import SCALE
from sparsekit.weights.patterns import Pattern
from sparsekit.weights.quantized import decode, encode

SIDES = ("left", "right", "up", "down")
# The tensors of a weight with a packed core, by the last part of their name.
PARTS = ("values", "indices", SCALE, *SIDES)


@dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """A weight `[out, in]` as a core and the factors around it, each of which may be absent."""

    core: Core
    left: Tensor | None = None  # [out/b, b, b], the blocks of a block-diagonal matrix
    right: Tensor | None = None  # [in/b, b, b]
    up: Tensor | None = None  # [out, rank]
    down: Tensor | None = None  # [rank, in]

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        return self.core.shape

    @property
    def format(self) -> CoreFormat:
        """The storage format of the core."""
        if isinstance(self.core, Packed):
            return self.core.format
        return CoreFormat(grid=self.core.grid if isinstance(self.core, Codes) else None)

    @property
    def sides(self) -> dict[str, Tensor]:
        """The factors around the core, without the absent ones."""
        sides = {name: getattr(self, name) for name in SIDES}
        return {name: side for name, side in sides.items() if side is not None}

    @property
    def composed(self) -> bool:
        """Whether there are factors around the core."""
        return bool(self.sides)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, by name."""
        return {**self.core.parameters, **self.sides}

    def dense(self) -> Tensor:
        """The weight `[out, in]`: a product in float32, a core alone in its own dtype."""
        weight = self.core.dense()
        if not self.composed:
            return weight
        weight = weight.float()
        if self.right is not None:
            weight = times_right(weight, self.right.float())
        if self.left is not None:
            weight = times_left(self.left.float(), weight)
        if self.up is not None and self.down is not None:
            weight = weight + self.up.float() @ self.down.float()
        return weight

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """X Wᵀ + bias, `[..., in]` to `[..., out]`, factor by factor in the dtype of x.

        With a core alone the result equals that of `nn.Linear` bit for bit.
        """
        core = self.core.dense().to(x.dtype)
        if not self.composed:
            return torch.nn.functional.linear(x, core, bias)
        inner = x if self.right is None else _by_blocks(x, self.right)
        product = inner @ core.T
        if self.left is not None:
            product = _by_blocks(product, self.left)
        if self.up is not None and self.down is not None:
            product = product + low_rank(x, self.up.to(x.dtype), self.down.to(x.dtype))
        return product if bias is None else product + bias

    def to(self, dtype: torch.dtype) -> Form:
        """The form in another dtype; codes and their scales keep theirs."""
        return replace(
            self,
            core=self.core.to(dtype),
            **{name: part.to(dtype) for name, part in self.sides.items()},
        )

    def rounded(self, dtype: torch.dtype) -> Form:
        """The form in float32, with all values rounded to the dtype in which they are stored.

        A small negative number may round to -0.0; it becomes 0.
        """
        form = self.to(dtype).to(torch.float32)
        core = form.core
        if isinstance(core, Values):
            core = replace(core, values=core.values + 0.0)
        return replace(form, core=core, **{name: part + 0.0 for name, part in form.sides.items()})

    def packed(self, pattern: Pattern) -> Form:
        """The form with its core packed by a pattern that it has."""
        return replace(self, core=packed_core(self.core, pattern))

    def unpacked(self) -> Form:
        """The form with its core unpacked, bit for bit."""
        return replace(self, core=self.core.unpacked()) if isinstance(self.core, Packed) else self

    def stored(self) -> dict[str, Tensor]:
        """The tensors on disk, by the last part of their name."""
        if isinstance(self.core, Packed):
            parts = dict(self.core.parts)
        elif isinstance(self.core, Codes):
            parts = encode(self.core)
        else:
            parts = {"weight": self.core.values}
        return {name: part.cpu().contiguous() for name, part in (parts | self.sides).items()}

    @classmethod
    def from_stored(
        cls, parts: Mapping[str, Tensor], stored_as: CoreFormat, shape: tuple[int, int]
    ) -> Form:
        """The form with these tensors; those of a packed core are not checked until `check`.

        Args:
            parts: The result of `stored`.
            stored_as: The format of the core.
            shape: The shape of the weight, `[out, in]`.

        Raises:
            DataError: The tensors of unpacked codes do not fit together.
        """
        core_parts = {name: part for name, part in parts.items() if name not in SIDES}
        core: Core
        if stored_as.pattern is not None:
            core = Packed(core_parts, stored_as, shape[1])
        elif stored_as.grid is not None:
            core = decode(stored_as.grid, core_parts, shape)
        else:
            core = Values(core_parts["weight"])
        return cls(core=core, **{name: parts[name] for name in SIDES if name in parts})

    @property
    def bits(self) -> float:
        """Bits on disk per entry of the weight."""
        n_bytes = sum(part.nbytes for part in self.stored().values())
        return 8 * n_bytes / (self.shape[0] * self.shape[1])

    def check(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            DataError: Names the first part that does not fit.
        """
        rows, columns = self.shape
        shapes = {name: tuple(part.shape) for name, part in self.sides.items()}
        block, rank = side_sizes(shapes, self.shape)
        wanted: dict[str, tuple[int, ...]] = {}
        if block:
            wanted |= {"left": (rows // block, block, block)}
            wanted |= {"right": (columns // block, block, block)}
        if rank:
            wanted |= {"up": (rows, rank), "down": (rank, columns)}
        refuse_other_shapes(shapes, wanted, self.shape, str(self.format) or "plain")
        if isinstance(self.core, Packed):
            self.core.check()


def low_rank(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """X (up · down)ᵀ, `[..., in]` to `[..., out]`."""
    return x @ down.T @ up.T


def first_off(product: Tensor, weight: Tensor) -> tuple[int, int] | None:
    """Row and column of the first entry of a weight that differs from a product; None without one.

    Products are float32 sums in any order, rounded to the dtype of the weight: they may differ by
    one unit in the last place, and by the rounding of terms that cancel.
    """
    unit = torch.finfo(weight.dtype).eps
    off = (weight.double() - product.double()).abs()
    allowed = unit * weight.double().abs() + 1e-5 * product.abs().max()
    places = (off > allowed).nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """`[..., columns]` times the transpose of a block-diagonal matrix `[blocks, b, b]`."""
    return times_right(x.reshape(-1, x.shape[-1]), blocks.to(x.dtype).mT).view(x.shape)
