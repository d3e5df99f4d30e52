"""SparseGPT: remove weights column by column and let the later columns make up for it.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
in One-Shot", algorithm 1; the code in locuslab/wanda@8e8fc87, `lib/sparsegpt.py`.
Differs: counts are exact (the published threshold removes one weight more in each column block);
the published unstructured rule, which compares all rows of a block of 128 columns, is the pattern
`50%/tensor`, while `50%` gives every row the same share of each block; damping is raised and
reported when the factorisation fails. The same sweep is written with the Cholesky factor of the
Hessian instead of that of its inverse (see `Factor`), so nothing is inverted: a column gets the
sum of what all columns before it lost. Sums are taken in halves, a few large products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruners import Pruned, Pruner
from sparsekit.tensors.curvature import Factor, factorise
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want

# This many columns are compensated one by one; between larger parts it is one product.
STRIP = 16


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(Pruner):
    """Score W² / U_jj², with an optimal-brain-surgeon update of the columns to the right."""

    needs: ClassVar[Want | None] = Want.GRAM
    updates: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    damping: float = 0.01
    """Share of the mean diagonal of the Gram matrix that is added to the diagonal."""
    block: int = 128
    """Columns that an unstructured pattern masks together; N:M masks each group when reached."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError("option block of sparsegpt must be above 0", "its default is 128")

    def prune(self, weight: Tensor, sums: InputSums | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        factor = factorise(sums, self.damping)
        dense = weight.masked_fill(factor.dead, 0.0).T.contiguous()
        sweep = _Sweep(
            columns=dense.clone(),
            lost=dense,
            mask=torch.empty(dense.shape, dtype=torch.bool, device=dense.device),
            factor=factor,
            pattern=pattern,
            unit=pattern.group or self.block,
        )
        with torch.inference_mode():  # thousands of small steps: their bookkeeping takes a sixth
            sweep.run(0, len(dense))
        return Pruned(
            weight=sweep.columns.T.masked_fill(~sweep.mask.T, 0.0),
            mask=sweep.mask.T.contiguous(),
            numbers={"damping": factor.damping},
        )


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """The columns of a weight, from first to last; here each is a row of `[in, out]`."""

    columns: Tensor  # [in, out] float32; each holds what it makes up for when it is reached
    lost: Tensor  # [in, out] float32, the dense columns; less what is kept once they are passed
    mask: Tensor  # [in, out] bool
    factor: Factor
    pattern: Pattern
    unit: int  # columns that are masked together

    def run(self, start: int, stop: int) -> None:
        """Mask and compensate the columns from `start` to `stop`, unit by unit."""
        if stop - start > self.unit:
            self._halve(start, stop, self.unit, self.run)
            return
        # What all columns of the unit would make up for if none of them were pruned.
        feedback, dense = self.factor.feedback[start:stop, start:stop], self.lost[start:stop]
        pending = self.columns[start:stop] - dense
        gained = torch.linalg.solve_triangular(feedback.T, pending, upper=False, unitriangular=True)
        scores = (dense + gained).square() * self.factor.cost[start:stop, None]
        first = 0 if self.pattern.scope == "group" else start
        self.mask[start:stop] = self.pattern.mask(scores.T, first).T
        self._compensate(start, stop)

    def _compensate(self, start: int, stop: int) -> None:
        """Let each column make up for those before it; their mask is known."""
        if stop - start > STRIP:
            self._halve(start, stop, STRIP, self._compensate)
            return
        columns, lost = self.columns[start:stop], self.lost[start:stop]
        feedback = self.factor.feedback[start:stop, start:stop]
        kept = self.mask[start:stop].to(columns.dtype)
        for i in range(stop - start):
            columns[i].addmv_(lost[:i].T, feedback[:i, i])
            lost[i].addcmul_(columns[i], kept[i], value=-1)

    def _halve(self, start: int, stop: int, step: int, go: Callable[[int, int], None]) -> None:
        """The left half, then what it lost into the right half, then the right half."""
        middle = start + ((stop - start) // step + 1) // 2 * step
        go(start, middle)
        feedback = self.factor.feedback[start:middle, middle:stop]
        self.columns[middle:stop].addmm_(feedback.T, self.lost[start:middle])
        go(middle, stop)
