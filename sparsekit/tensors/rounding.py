"""Columns that are rounded when a sweep passes them, with scales from what they hold then."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.tensors.grids import Codes, Grid


class Rounding:
    """The grid of a weight's columns; a scale for each of its rows, or group of one.

    Args:
        grid: The grid.
        dtype: Of the scales.
        kept: `[in, out]` float32, the columns before the sweep, with zeros where nothing is kept.
    """

    def __init__(self, grid: Grid, dtype: torch.dtype, kept: Tensor) -> None:
        self.grid = grid
        self.dtype = dtype
        self.group = grid.group or len(kept)
        self.scales = grid.scale(kept.T, dtype).repeat(len(kept) // self.group, 1)  # [groups, out]

    def span(self, start: int, kept: Tensor) -> None:
        """Let the scales of some groups span what their columns `[columns, out]` keep.

        Args:
            start: The first of the columns.
            kept: What they hold, with zeros where nothing is kept.
        """
        for number, part in enumerate(kept.unflatten(0, (-1, self.group)), start // self.group):
            self.scales[number] = self.grid.scale(part.T, self.dtype)

    def settle(self, at: int, column: Tensor, lost: Tensor, kept: Tensor) -> None:
        """Round a column, of which `kept` has 1 and 0, and take what it then is off what is lost.

        The column holds codes afterwards.
        """
        scale = self.scales[at // self.group]
        column.copy_(self.grid.round(column * kept, scale))
        lost.addcmul_(column, scale, value=-1)

    def codes(self, columns: Tensor) -> Codes:
        """The weight `[out, in]` of which all columns `[in, out]` were settled.

        Raises:
            NumericalError: What they had to make up for was not finite.
        """
        if not columns.isfinite().all():
            raise NumericalError(
                "a column that makes up for others is not finite", "raise damping, or use rtn"
            )
        scales = self.scales.T.contiguous()
        return Codes.of(self.grid, columns.T.contiguous(), scales, self.dtype)
