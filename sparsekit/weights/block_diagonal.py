"""Products with block-diagonal matrices that are stored as their blocks."""

from __future__ import annotations

from torch import Tensor


def times_right(weight: Tensor, blocks: Tensor) -> Tensor:
    """`[rows, in]` times a block-diagonal matrix `[K, b, b]`."""
    return (column_blocks(weight, blocks.shape[1]) @ blocks).transpose(0, 1).flatten(1)


def times_left(blocks: Tensor, weight: Tensor) -> Tensor:
    """A block-diagonal matrix `[J, b, b]` times `[out, columns]`."""
    return (blocks @ row_blocks(weight, blocks.shape[2])).flatten(0, 1)


def row_blocks(weight: Tensor, block: int) -> Tensor:
    """`[J, b, in]`, a view."""
    return weight.unflatten(0, (-1, block))


def column_blocks(weight: Tensor, block: int) -> Tensor:
    """`[K, rows, b]`, a view; a vector counts as one row."""
    weight = weight if weight.ndim == 2 else weight[None]
    return weight.unflatten(1, (-1, block)).transpose(0, 1)
