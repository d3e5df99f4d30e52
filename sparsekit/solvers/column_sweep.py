"""The column-by-column OBS update shared by SparseGPT and GPTQ.

Each column compensates for the errors of the columns before it and is then pruned (SparseGPT) or
quantized (GPTQ).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.solvers.hessian import HessianFactor
from sparsekit.weights.grids import Codes, Grid

# Up to this many columns are compensated one by one; larger parts with one matrix product.
STRIP = 16
ColumnGroup = tuple[int, Callable[[int, Tensor], None]]
"""A number of columns and a function that makes a decision for them together, such as a mask.

It is called before the columns are swept, with the index of the first one and the values
`[group, out]` that they would have if none of them had an error."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One pass over the columns of a weight, stored as the rows of `[in, out]`.

    Error feedback is applied recursively by halves, so that most of it is a few large products.
    """

    columns: Tensor  # [in, out] float32; a column is compensated when it is reached
    error: Tensor  # [in, out] float32: the dense columns; once swept, dense less kept
    factor: HessianFactor
    quantize_or_prune: Callable[[int, Tensor, Tensor], None]
    """Called with a column's index, its compensated values and its row of `error`, from which it
    subtracts the kept values."""
    groups: Sequence[ColumnGroup] = ()
    """Nested groups of columns, the largest first; each is a whole number of the next."""

    def run(self) -> None:
        """Sweep all columns, in place."""
        with torch.inference_mode():  # thousands of small steps: saves a sixth of the time
            self._pass(0, len(self.error), self.groups)

    def _pass(self, start: int, stop: int, groups: Sequence[ColumnGroup]) -> None:
        if not groups:
            self._compensate(start, stop)
            return
        size, decide = groups[0]
        if stop - start > size:
            self._halve(start, stop, size, partial(self._pass, groups=groups))
            return
        decide(start, self._free(start, stop))
        self._pass(start, stop, groups[1:])

    def _free(self, start: int, stop: int) -> Tensor:
        """The values of these columns if none of them had an error: dense plus compensation."""
        dense = self.error[start:stop]
        compensation = self.factor.compensation[start:stop, start:stop]
        pending = self.columns[start:stop] - dense
        gained = torch.linalg.solve_triangular(
            compensation.T, pending, upper=False, unitriangular=True
        )
        return dense + gained

    def _compensate(self, start: int, stop: int) -> None:
        """Compensate each column for those before it, then prune or quantize it."""
        if stop - start > STRIP:
            self._halve(start, stop, STRIP, self._compensate)
            return
        columns, error = self.columns[start:stop], self.error[start:stop]
        compensation = self.factor.compensation[start:stop, start:stop]
        for i in range(stop - start):
            columns[i].addmv_(error[:i].T, compensation[:i, i])
            self.quantize_or_prune(start + i, columns[i], error[i])

    def _halve(self, start: int, stop: int, step: int, go: Callable[[int, int], None]) -> None:
        """Sweep the left half, compensate the right half for its errors, then sweep that."""
        middle = start + ((stop - start) // step + 1) // 2 * step
        go(start, middle)
        compensation = self.factor.compensation[start:middle, middle:stop]
        self.columns[middle:stop].addmm_(compensation.T, self.error[start:middle])
        go(middle, stop)


class Rounding:
    """Quantization of columns during a sweep, with one scale per row or group of inputs.

    Args:
        grid: The grid.
        dtype: Type of the scales.
        kept: `[in, out]` float32, the columns before the sweep, 0 off the mask.
    """

    def __init__(self, grid: Grid, dtype: torch.dtype, kept: Tensor) -> None:
        self.grid = grid
        self.dtype = dtype
        self.group = grid.group or len(kept)
        self.scales = grid.scale(kept.T, dtype).repeat(len(kept) // self.group, 1)  # [groups, out]

    def fit_scales(self, start: int, kept: Tensor) -> None:
        """Set the scales of some groups from the values of their columns.

        Args:
            start: Index of the first column.
            kept: Their values `[columns, out]`, 0 off the mask.
        """
        for number, part in enumerate(kept.unflatten(0, (-1, self.group)), start // self.group):
            self.scales[number] = self.grid.scale(part.T, self.dtype)

    def quantize_column(self, at: int, column: Tensor, error: Tensor, kept: Tensor) -> None:
        """Replace a column by its codes and subtract their values from its error.

        Args:
            at: Index of the column.
            column: Its compensated values.
            error: Its dense values.
            kept: 1 on the mask, 0 off it.
        """
        scale = self.scales[at // self.group]
        column.copy_(self.grid.round(column * kept, scale))
        error.addcmul_(column, scale, value=-1)

    def codes(self, columns: Tensor) -> Codes:
        """The quantized weight `[out, in]`, from the codes of all columns `[in, out]`.

        Raises:
            NumericalError: A compensated column is not finite.
        """
        if not columns.isfinite().all():
            raise NumericalError(
                "a column is not finite after error compensation",
                "raise damping, or use rtn",
                code="not-finite",
            )
        scales = self.scales.T.contiguous()
        return Codes.of(self.grid, columns.T.contiguous(), scales, self.dtype)
