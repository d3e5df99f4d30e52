"""Lossless packing of sparse weights: kept values and their places."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.patterns import Pattern

# Integers of the size of a value, to compare bits: -0.0 must be kept.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Digits of the share of zeros in the pattern of a tensor without N:M: enough for an exact count.
DIGITS = 12


def packed_bytes(shape: tuple[int, int], bits: int, pattern: Pattern) -> int:
    """The size in bytes of a packed weight `[out, in]` with this many bits per value."""
    values, indices = code_shapes(shape, bits, pattern)
    return math.prod(values) + math.prod(indices)


def code_shapes(
    shape: tuple[int, int], bits: int, pattern: Pattern
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes, in bytes, of the values and places of a weight `[out, in]`."""
    shapes = factor_shapes(*shape, pattern)
    *rows, count = shapes["values"]
    return (*rows, math.ceil(count * bits / 8)), shapes["indices"]


def theory(pattern: Pattern, bits: int) -> tuple[float, float]:
    """Bits per entry of a packed weight for its values and for their places, without padding.

    Args:
        pattern: The pattern of the weight.
        bits: Bits of one value.
    """
    kept = float(1 - pattern.sparsity)
    place = kept * index_bits(pattern.group) if pattern.scope == "group" else 1.0
    return kept * bits, place


def exact_pattern(zeros: int, size: int) -> Pattern:
    """The unstructured pattern with exactly this many zeros, but at least one kept value.

    Args:
        zeros: Entries whose bits are all 0.
        size: Number of entries, less than 10^12.
    """
    share = Fraction(-(-min(zeros, size - 1) * 10**DIGITS // size), 10**DIGITS)
    return Pattern(sparsity=share, scope="tensor")


def packing(weight: Tensor, patterns: Iterable[Pattern], bits: int = 0) -> Pattern | None:
    """The pattern by which to pack a weight `[out, in]`; None if none makes it smaller.

    Of the N:M patterns that the weight has, the one with the fewest bytes, so the packed weight
    cannot lose it; without one, the unstructured pattern with the exact number of zeros.

    Args:
        weight: Values of 16 or 32 bits, or codes of 8.
        patterns: N:M patterns to try.
        bits: Bits of a stored value; 0: those of the dtype.
    """
    kept, bits = _kept(weight), bits or 8 * weight.dtype.itemsize
    rows, columns = weight.shape
    zeros = kept.numel() - int(kept.sum())
    if not zeros:
        return None
    fitting = [p for p in patterns if not p.mismatch(columns) and _fits(kept, p)]
    tried = sorted(fitting, key=lambda p: packed_bytes((rows, columns), bits, p))
    tried.append(exact_pattern(zeros, kept.numel()))
    whole = kept.numel() * bits / 8
    return next((p for p in tried if packed_bytes((rows, columns), bits, p) < whole), None)


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Pack a weight `[out, in]` that has the pattern, see `pack`."""
    return pack(weight, pattern.mask(_kept(weight).float()), pattern)


def _kept(weight: Tensor) -> Tensor:
    """The mask of entries with a bit set, `[out, in]` bool."""
    return weight.contiguous().view(BITS[weight.dtype.itemsize]) != 0


def _fits(kept: Tensor, pattern: Pattern) -> bool:
    return bool((kept.unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())


def factor_shapes(
    rows: int, columns: int, pattern: Pattern, *, block: int = 0, rank: int = 0
) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a packed core and of the factors around it.

    Args:
        rows: Outputs of the weight.
        columns: Its inputs.
        pattern: The pattern of the core.
        block: Side of the blocks of A and B; 0 without them.
        rank: Rank of L R; 0 without it.
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
    """Refuse factors that do not make a weight `[rows, columns]`.

    Raises:
        DataError: Names the first part whose shape does not fit the others.
    """
    block, rank = side_sizes(shapes, (rows, columns))
    wanted = factor_shapes(rows, columns, pattern, block=block, rank=rank)
    refuse_other_shapes(shapes, wanted, (rows, columns), str(pattern))


def side_sizes(shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> tuple[int, int]:
    """Side of the blocks and rank of the factors around a core; 0 without them.

    Raises:
        DataError: The blocks do not make a weight of this shape.
    """
    block = shapes["left"][-1] if shapes.get("left") else 0
    rank = shapes["up"][-1] if shapes.get("up") else 0
    if block and (shape[0] % block or shape[1] % block):
        raise DataError(
            f"factors with blocks of {block} do not make {shape[0]} x {shape[1]}",
            code="shape-mismatch",
        )
    return block, rank


def refuse_other_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    shape: tuple[int, int],
    core: str,
) -> None:
    """Refuse parts of a weight with unexpected shapes.

    Raises:
        DataError: Names the first such part.
    """
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            raise DataError(
                f"the factor {name!r} of a {core} weight {shape[0]} x {shape[1]} has the shape "
                f"{shapes.get(name)}, not {wanted.get(name)}",
                code="shape-mismatch",
            )


def pack(core: Tensor, mask: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The kept values of a core `[out, in]`, and their places as uint8 `[out, bytes]`.

    For N:M the values are `[out, in/M*N]`, and the place of each in its group takes ⌈log2 M⌉ bits.
    For other patterns the values are one row, and the places are the mask, one bit per weight. The
    first bits are the lowest.
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
    """The core `[out, in]`, from a result of `pack` that `mask_of` accepts."""
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
            raise DataError(
                f"the mask of a {pattern} core does not have its {len(values)} values",
                code="invalid-places",
            )
        return mask
    places = _places(indices, pattern, columns)
    if int(places.max()) >= pattern.group or bool((places[..., 1:] <= places[..., :-1]).any()):
        raise DataError(
            f"the places of a {pattern} core do not rise within their groups", code="invalid-places"
        )
    mask = torch.zeros(*places.shape[:2], pattern.group, dtype=torch.bool, device=places.device)
    return mask.scatter_(-1, places.long(), True).flatten(1)


def _places(indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """The places of the kept values of an N:M core in their groups, `[out, groups, N]`."""
    groups, width = columns // pattern.group, index_bits(pattern.group)
    count = groups * pattern.keep
    if 8 % width == 0:  # no place spans two bytes: a lookup is four times as fast
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
    """Pack rows of bits into uint8, the first bit lowest, the last byte padded with zeros."""
    bits = torch.nn.functional.pad(bits.byte(), (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8))
    powers = 2 ** torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The first `count` bits of each row, as uint8 0 or 1."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return (packed[..., None] >> places & 1).flatten(1)[:, :count]


def index_bits(group: int) -> int:
    """Bits of a place in a group."""
    return max(1, (group - 1).bit_length())
