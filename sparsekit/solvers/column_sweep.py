"""One pass over the columns of a weight, in which later columns make up for what earlier ones lost.

Pruning (SparseGPT) and rounding (GPTQ) are the same pass; they differ in what becomes of a column
when it is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.solvers.hessian import Factor
from sparsekit.weights.grids import Codes, Grid

# This many columns are compensated one by one; between larger parts it is one product.
STRIP = 16
Unit = tuple[int, Callable[[int, Tensor], None]]
"""Columns that are decided on together, and what decides: given the first of them, and what they
`[unit, out]` would hold if none of them lost anything, before they are passed."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The columns of a weight, from first to last; here each is a row of `[in, out]`.

    Sums are taken in halves: a few large products.
    """

    columns: Tensor  # [in, out] float32; each holds what it makes up for when it is reached
    lost: Tensor  # [in, out] float32, the dense columns; less what is kept once they are passed
    factor: Factor
    settle: Callable[[int, Tensor, Tensor], None]
    """Given a column's number, its `columns` and its `lost`, takes what is kept off `lost`."""
    units: Sequence[Unit] = ()
    """What is decided on together, the largest first; each is made of whole ones of the next."""

    def run(self) -> None:
        """Pass all columns."""
        with torch.inference_mode():  # thousands of small steps: their bookkeeping takes a sixth
            self._pass(0, len(self.lost), self.units)

    def _pass(self, start: int, stop: int, units: Sequence[Unit]) -> None:
        if not units:
            self._compensate(start, stop)
            return
        size, enter = units[0]
        if stop - start > size:
            self._halve(start, stop, size, partial(self._pass, units=units))
            return
        enter(start, self._free(start, stop))
        self._pass(start, stop, units[1:])

    def _free(self, start: int, stop: int) -> Tensor:
        """What these columns make up for of the ones before and of each other's making up."""
        feedback, dense = self.factor.feedback[start:stop, start:stop], self.lost[start:stop]
        pending = self.columns[start:stop] - dense
        gained = torch.linalg.solve_triangular(feedback.T, pending, upper=False, unitriangular=True)
        return dense + gained

    def _compensate(self, start: int, stop: int) -> None:
        """Let each column make up for those before it."""
        if stop - start > STRIP:
            self._halve(start, stop, STRIP, self._compensate)
            return
        columns, lost = self.columns[start:stop], self.lost[start:stop]
        feedback = self.factor.feedback[start:stop, start:stop]
        for i in range(stop - start):
            columns[i].addmv_(lost[:i].T, feedback[:i, i])
            self.settle(start + i, columns[i], lost[i])

    def _halve(self, start: int, stop: int, step: int, go: Callable[[int, int], None]) -> None:
        """The left half, then what it lost into the right half, then the right half."""
        middle = start + ((stop - start) // step + 1) // 2 * step
        go(start, middle)
        feedback = self.factor.feedback[start:middle, middle:stop]
        self.columns[middle:stop].addmm_(feedback.T, self.lost[start:middle])
        go(middle, stop)


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
