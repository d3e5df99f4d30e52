"""A sparse tensor in fewer bytes, and back to the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import torch
from torch import Tensor

from sparsekit.tensors.factored import pack, stored_shapes, unpack
from sparsekit.tensors.patterns import Pattern

# Integers of the size of a number, to look at its bits: -0.0 is a value that has to come back.
BITS = {2: torch.int16, 4: torch.int32}
# Digits of the share of zeros by which a tensor without N:M is packed: it counts them exactly.
DIGITS = 12


def packed_bytes(shape: tuple[int, int], dtype: torch.dtype, pattern: Pattern) -> int:
    """How many bytes a weight `[out, in]` takes as values and their places."""
    shapes = stored_shapes(*shape, pattern)
    return math.prod(shapes["values"]) * dtype.itemsize + math.prod(shapes["indices"])


def exact_pattern(zeros: int, size: int) -> Pattern:
    """The unstructured pattern of a tensor with exactly so many zeros.

    Args:
        zeros: Entries whose bits are all 0.
        size: All entries, less than 10^12.
    """
    share = Fraction(-(-zeros * 10**DIGITS // size), 10**DIGITS)
    return Pattern(sparsity=share, scope="tensor")


def packing(weight: Tensor, patterns: Iterable[Pattern]) -> Pattern | None:
    """The pattern by which to pack a weight `[out, in]`; None where none makes it smaller.

    It is the N:M pattern among those that the weight has with the fewest bytes, since what is
    packed so cannot lose it; without one, the pattern that counts the zeros.

    Args:
        weight: Of a 16-bit or 32-bit type.
        patterns: N:M patterns to try.
    """
    kept = _kept(weight)
    rows, columns = weight.shape
    zeros = kept.numel() - int(kept.sum())
    if not 0 < zeros < kept.numel():
        return None
    fitting = [p for p in patterns if not p.misfit(columns) and _fits(kept, p)]
    tried = sorted(fitting, key=lambda p: packed_bytes((rows, columns), weight.dtype, p))
    tried.append(exact_pattern(zeros, kept.numel()))
    saving = (p for p in tried if packed_bytes((rows, columns), weight.dtype, p) < weight.nbytes)
    return next(saving, None)


def pack_weight(weight: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Values and places of a weight `[out, in]` that has the pattern, as of `pack`."""
    return pack(weight, pattern.mask(_kept(weight).float()), pattern)


def unpack_weight(values: Tensor, indices: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """What `pack_weight` was given, bit for bit."""
    return unpack(values, indices, pattern, columns)


def _kept(weight: Tensor) -> Tensor:
    """Which entries have a bit set, `[out, in]` bool."""
    return weight.contiguous().view(BITS[weight.dtype.itemsize]) != 0


def _fits(kept: Tensor, pattern: Pattern) -> bool:
    return bool((kept.unflatten(1, (-1, pattern.group)).sum(-1) <= pattern.keep).all())
