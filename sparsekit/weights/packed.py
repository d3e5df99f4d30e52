"""A sparse tensor in fewer bytes, and back to the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from sparsekit.errors import DataError
from sparsekit.weights.patterns import Pattern

# Integers of the size of a number, to look at its bits: -0.0 is a value that has to come back.
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Digits of the share of zeros by which a tensor without N:M is packed: it counts them exactly.
DIGITS = 12


def packed_bytes(shape: tuple[int, int], bits: int, pattern: Pattern) -> int:
    """How many bytes a weight `[out, in]` of numbers with so many bits takes, packed."""
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
    fitting = [p for p in patterns if not p.mismatch(columns) and _fits(kept, p)]
    tried = sorted(fitting, key=lambda p: packed_bytes((rows, columns), bits, p))
    tried.append(exact_pattern(zeros, kept.numel()))
    whole = kept.numel() * bits / 8
    return next((p for p in tried if packed_bytes((rows, columns), bits, p) < whole), None)


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Values and places of a weight `[out, in]` that has the pattern, as of `pack`."""
    return pack(weight, pattern.mask(_kept(weight).float()), pattern)


def _kept(weight: Tensor) -> Tensor:
    """Which entries have a bit set, `[out, in]` bool."""
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
        raise DataError(f"factors with blocks of {block} do not make {shape[0]} x {shape[1]}")
    return block, rank


def refuse_other_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    shape: tuple[int, int],
    core: str,
) -> None:
    """Refuse parts of a weight with other shapes than they should have.

    Raises:
        DataError: Names the first.
    """
    for name in {**wanted, **shapes}:
        if shapes.get(name) != wanted.get(name):
            raise DataError(
                f"the factor {name!r} of a {core} weight {shape[0]} x {shape[1]} has the shape "
                f"{shapes.get(name)}, not {wanted.get(name)}"
            )


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
