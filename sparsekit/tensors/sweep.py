"""One pass over the columns of a weight, in which later columns make up for what earlier ones lost.

Pruning (SparseGPT) and rounding (GPTQ) are the same pass; they differ in what becomes of a column
when it is reached.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsekit.tensors.curvature import Factor

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
