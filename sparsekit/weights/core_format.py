"""The storage format of the core of a weight: packed or whole, values or codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparsekit.errors import UsageError
from sparsekit.weights.grids import Grid
from sparsekit.weights.packed import factor_shapes, refuse_other_shapes, side_sizes
from sparsekit.weights.packed_codes import packed_code_shapes
from sparsekit.weights.patterns import Pattern

# Dtypes of the scales of packed codes, which are stored as bytes.
SCALES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True, slots=True)
class CoreFormat:
    """The storage format of a core."""

    pattern: Pattern | None = None
    """The pattern by which it is packed; None: it is not."""
    grid: Grid | None = None
    """The grid of its codes; None: it has values."""
    dtype: torch.dtype | None = None
    """Dtype of the scales of packed codes, and of the dequantized values."""

    @classmethod
    def parse(cls, text: str) -> CoreFormat:
        """Parse the format of a packed core, e.g. `2:4` or `2:4 int4-g64 bfloat16`.

        Raises:
            UsageError: The text is not a format.
        """
        pattern, *codes = text.split(" ", 1)
        if not codes:
            return cls(pattern=Pattern.parse(pattern))
        grid, _, name = codes[0].partition(" ")
        if name not in SCALES:
            raise UsageError(
                f"{name!r} is not a dtype of scales",
                f"one of {', '.join(SCALES)}",
                code="unknown-format",
            )
        return cls(pattern=Pattern.parse(pattern), grid=Grid.parse(grid), dtype=SCALES[name])

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") if self.dtype else None
        return " ".join(str(word) for word in (self.pattern, self.grid, dtype) if word)

    def shapes(
        self, shape: tuple[int, int], *, block: int = 0, rank: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """The shapes of the tensors of a packed weight `[out, in]` and the factors around it.

        Args:
            shape: The shape of the weight.
            block: Side of the blocks left and right of the core; 0 without them.
            rank: Rank of the low-rank term; 0 without it.
        """
        assert self.pattern is not None
        shapes = factor_shapes(*shape, self.pattern, block=block, rank=rank)
        if self.grid is not None and self.dtype is not None:
            shapes |= packed_code_shapes(shape, self.pattern, self.grid, self.dtype)
        return shapes

    def check(self, shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> None:
        """Refuse tensors that do not make a packed weight and the factors around it.

        Raises:
            DataError: Names the first whose shape does not fit.
        """
        block, rank = side_sizes(shapes, shape)
        refuse_other_shapes(shapes, self.shapes(shape, block=block, rank=rank), shape, str(self))
