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

# The tensors in which factors are stored, by the last part of their name; the first two are always
# there.
PARTS = ("values", "indices", "left", "right", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Factored:
    """W ≈ A S B + L R; sides that are None are identities, L R is left out when it is None."""

    core: Tensor  # S [out, in], exact zeros off the mask
    mask: Tensor  # [out, in] bool
    left: Tensor | None = None  # A [out/b, b, b], the blocks of a block-diagonal matrix
    right: Tensor | None = None  # B [in/b, b, b]
    up: Tensor | None = None  # L [out, rank]
    down: Tensor | None = None  # R [rank, in]

    def to(self, dtype: torch.dtype) -> Factored:
        """The factors rounded to the type in which they are stored."""
        parts = {"core": self.core, **self._sides()}
        # A small negative value may round to -0.0, which the sum makes 0.
        return replace(self, **{name: part.to(dtype).float() + 0.0 for name, part in parts.items()})

    def dense(self) -> Tensor:
        """A S B + L R, `[out, in]` float32."""
        weight = self.core
        if self.right is not None:
            weight = times_right(weight, self.right)
        if self.left is not None:
            weight = times_left(self.left, weight)
        if self.up is not None and self.down is not None:
            weight = weight + self.up @ self.down
        return weight

    def stored(self, pattern: Pattern, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that go to disk, by the last part of their name."""
        values, indices = pack(self.core, self.mask, pattern)
        found = {"values": values.to(dtype), "indices": indices}
        found |= {name: part.to(dtype) for name, part in self._sides().items()}
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
        rows = len(stored["indices"])
        check_shapes(
            {name: tuple(part.shape) for name, part in stored.items()}, rows, columns, pattern
        )
        packed = stored["values"].float(), stored["indices"], pattern, columns
        mask, core = mask_of(*packed), unpack(*packed)
        sides = {name: stored[name].float() for name in PARTS[2:] if name in stored}
        return cls(core=core, mask=mask, **sides)

    def _sides(self) -> dict[str, Tensor]:
        """The dense factors that there are."""
        found = {name: getattr(self, name) for name in PARTS[2:]}
        return {name: part for name, part in found.items() if part is not None}


def stored_shapes(
    rows: int, columns: int, pattern: Pattern, *, block: int = 0, rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of `Factored.stored`.

    Args:
        rows: Outputs of the weight.
        columns: Its inputs.
        pattern: The pattern of the core.
        block: Side of the blocks of A and B; 0 without them.
        rank: Of L R; 0 without it.
    """
    if pattern.scope == "group":
        kept = columns // pattern.group * pattern.keep
        shapes = {
            "values": (rows, kept),
            "indices": (rows, math.ceil(kept * index_bits(pattern.group) / 8)),
        }
    else:
        kept = rows * columns - pattern.zeros(rows, columns)
        shapes = {"values": (kept,), "indices": (rows, math.ceil(columns / 8))}
    if block:
        shapes["left"] = rows // block, block, block
        shapes["right"] = columns // block, block, block
    if rank:
        shapes["up"], shapes["down"] = (rows, rank), (rank, columns)
    return shapes


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]], rows: int, columns: int, pattern: Pattern
) -> None:
    """Refuse factors that cannot be those of a weight `[rows, columns]`.

    Raises:
        DataError: Names the first part whose shape does not fit the others.
    """
    block = shapes["left"][-1] if shapes.get("left") else 0
    rank = shapes["up"][-1] if shapes.get("up") else 0
    if block and (rows % block or columns % block):
        raise DataError(f"factors with blocks of {block} do not make {rows} x {columns}")
    wanted = stored_shapes(rows, columns, pattern, block=block, rank=rank)
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            raise DataError(
                f"the factor {name!r} of a {pattern} weight {rows} x {columns} has the shape "
                f"{shapes.get(name)}, not {wanted.get(name)}"
            )


def first_off(product: Tensor, weight: Tensor) -> tuple[int, int] | None:
    """Row and column where a weight `[out, in]` is no product of its factors; None when it is.

    Products are float32 sums in any order, rounded to the type of the weight: they may differ by
    one unit in the last place, and by the rounding of terms that cancel.
    """
    unit = torch.finfo(weight.dtype).eps
    off = (weight.double() - product.double()).abs()
    allowed = unit * weight.double().abs() + 1e-5 * product.abs().max()
    places = (off > allowed).nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def compensate(
    lost: Tensor,  # W − Ŵ [out, in]
    scale: Tensor,  # [in], the norm of each input
    rank: int,
) -> tuple[Tensor, Tensor]:
    """L `[out, rank]` and R `[rank, in]` with the least ‖(lost − L R) diag(scale)‖.

    The leading left singular vectors of lost · diag(scale) span L; they are taken from the
    eigenvectors of the smaller of its two Gram matrices, in float64. Source: Mozaffari et al. 2025,
    SLiM, section 3.2 (saliency-based low-rank adapters).
    """
    scaled = (lost * scale).double()
    if lost.shape[0] <= lost.shape[1]:
        vectors = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    else:
        inner = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
        vectors = torch.linalg.qr(scaled @ inner).Q
    return vectors.float(), (vectors.T @ lost.double()).float()


def pack(core: Tensor, mask: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The kept values of a core `[out, in]`, and where they are, as uint8 `[out, bytes]`.

    For N:M the values are `[out, in/M*N]`, and each has its place in its group in ⌈log2 M⌉ bits.
    For the other patterns the values are one row, and each weight has one bit that says whether it
    is kept. The first bits lie lowest.
    """
    if pattern.scope != "group":
        return core[mask], pack_bits(mask)
    grouped = mask.unflatten(1, (-1, pattern.group)).byte()
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    places = order[..., : pattern.keep]  # [out, groups, N], rising
    values = core.unflatten(1, (-1, pattern.group)).gather(-1, places).flatten(1)
    width = torch.arange(index_bits(pattern.group), device=core.device)
    return values, pack_bits((places.flatten(1)[..., None] >> width & 1).flatten(1))


def unpack(values: Tensor, indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """The core `[out, in]`, from what `pack` gave and `mask_of` accepts."""
    if pattern.scope != "group":
        mask = unpack_bits(indices, columns).bool()
        return values.new_zeros(mask.shape).masked_scatter_(mask, values)
    places = _places(indices, pattern, columns).long()
    grouped = values.new_zeros(*places.shape[:2], pattern.group)
    return grouped.scatter_(-1, places, values.unflatten(1, (-1, pattern.keep))).flatten(1)


def mask_of(values: Tensor, indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """The mask `[out, in]` of a packed core.

    Raises:
        DataError: The shapes do not fit the pattern, or a place lies outside its group.
    """
    shapes = {"values": tuple(values.shape), "indices": tuple(indices.shape)}
    check_shapes(shapes, len(indices), columns, pattern)
    if pattern.scope != "group":
        mask = unpack_bits(indices, columns).bool()
        if int(mask.sum()) != len(values):
            raise DataError(f"the bits of a {pattern} core do not count its {len(values)} values")
        return mask
    places = _places(indices, pattern, columns)
    if int(places.max()) >= pattern.group or bool((places[..., 1:] <= places[..., :-1]).any()):
        raise DataError(f"the places of a {pattern} core do not rise within their groups")
    mask = torch.zeros(*places.shape[:2], pattern.group, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places.long(), True).flatten(1)


def _places(indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """Where the kept values of an N:M core lie in their groups, integers `[out, groups, N]`."""
    groups, width = columns // pattern.group, index_bits(pattern.group)
    count = groups * pattern.keep
    if 8 % width == 0:  # no place lies in two bytes: looked up four times as fast as put together
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=indices.device)
        every = torch.arange(256, dtype=torch.uint8, device=indices.device)
        table = every[:, None] >> shifts & (2**width - 1)  # [256, places of a byte]
        places = torch.embedding(table, indices.int()).flatten(1)[:, :count]
        return places.unflatten(1, (groups, pattern.keep))
    bits = unpack_bits(indices, count * width)
    if width > 8:
        bits = bits.int()
    bits = bits.unflatten(1, (groups, pattern.keep, width))
    places = bits[..., 0]
    for at in range(1, width):
        places = places | bits[..., at] << at
    return places


def pack_bits(bits: Tensor) -> Tensor:
    """Rows of bits as uint8, eight in each, the first lowest, the last filled up with zeros."""
    bits = torch.nn.functional.pad(bits.byte(), (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    powers = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first bits of each row, as uint8 0 or 1."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[..., None] >> places & 1).flatten(1)[:, :count]


def index_bits(group: int) -> int:
    """Bits of a place in a group."""
    return max(1, (group - 1).bit_length())
