"""SparseGPT: remove weights column by column and let the later columns make up for it.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
in One-Shot", algorithm 1; the code in locuslab/wanda@8e8fc87, `lib/sparsegpt.py`.
Differs: counts are exact (the published threshold removes one weight more in each column block);
the published unstructured rule, which compares all rows of a block of 128 columns, is the pattern
`50%/tensor`, while `50%` gives every row the same share of each block; damping is raised and
reported when the factorisation fails. The same sweep is written with the Cholesky factor of the
Hessian instead of that of its inverse (see `Factor`), so nothing is inverted: a column gets the
sum of what all columns before it lost. With a grid (section 3.5, "joint sparsification and
quantization") the scales of a group come from what its columns hold when the first is reached, as
in `Gptq`, under the mask that they would have then; those of whole rows from a mask of the dense
weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruners import Pruned, Pruner
from sparsekit.tensors.curvature import factorise
from sparsekit.tensors.grids import Codes, Grid
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want
from sparsekit.tensors.sweep import Sweep, Unit


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
        return self._pass(weight, sums, pattern, None, torch.float32)

    def prune_on_grid(
        self,
        weight: Tensor,
        sums: InputSums | None,
        pattern: Pattern,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Pruned | None:
        """See `Pruner.prune_on_grid`."""
        return self._pass(weight, sums, pattern, grid, dtype)

    def _pass(
        self,
        weight: Tensor,
        sums: InputSums | None,
        pattern: Pattern,
        grid: Grid | None,
        dtype: torch.dtype,
    ) -> Pruned:
        """One sweep, with or without a grid."""
        assert sums is not None
        factor = factorise(sums, self.damping)
        dense = weight.masked_fill(factor.dead, 0.0).T.contiguous()
        columns, mask = dense.clone(), torch.empty_like(dense, dtype=torch.bool)
        kept = torch.empty_like(dense)

        def chosen(start: int, held: Tensor) -> Tensor:
            scores = held.square() * factor.cost[start : start + len(held), None]
            return pattern.mask(scores.T, 0 if pattern.scope == "group" else start).T

        rounding = _Rounding(grid, dtype, dense * chosen(0, dense)) if grid is not None else None

        def select(start: int, held: Tensor) -> None:
            stop = start + len(held)
            mask[start:stop] = chosen(start, held)
            kept[start:stop] = mask[start:stop]

        def settle(at: int, column: Tensor, lost: Tensor) -> None:
            if rounding is None:
                lost.addcmul_(column, kept[at], value=-1)
            else:
                rounding.settle(at, column, lost, kept[at])

        unit = pattern.group or self.block
        units: list[Unit] = [(unit, select)]
        if rounding is not None and rounding.group < len(dense):
            units = rounding.among(unit, select, chosen, kept)
        sweep = Sweep(columns=columns, lost=dense, factor=factor, settle=settle, units=units)
        sweep.run()
        codes = rounding.codes(columns) if rounding is not None else None
        found = codes.dense().float() if codes is not None else columns.T
        return Pruned(
            weight=found.masked_fill(~mask.T, 0.0),
            mask=mask.T.contiguous(),
            codes=codes,
            numbers={"damping": factor.damping},
        )


class _Rounding:
    """What columns are rounded to when they are passed.

    Args:
        grid: The grid.
        dtype: Of the scales.
        likely: `[in, out]`, the dense columns with zeros where a mask of them has some.
    """

    def __init__(self, grid: Grid, dtype: torch.dtype, likely: Tensor) -> None:
        self.grid = grid
        self.dtype = dtype
        self.group = grid.group or len(likely)
        self.scales = grid.scale(likely.T, dtype).repeat(len(likely) // self.group, 1)

    def among(
        self,
        unit: int,
        select: Callable[[int, Tensor], None],
        chosen: Callable[[int, Tensor], Tensor],
        kept: Tensor,
    ) -> list[Unit]:
        """The units of a sweep in which masks are selected for so many columns together.

        Scales of a larger group come before its masks, from those that it would have then.
        """
        whole = math.lcm(self.group, unit)
        if self.group >= unit:
            before = (whole, lambda start, held: self._span(start, held * chosen(start, held)))
            return [before, (unit, select)]
        after = (
            self.group,
            lambda start, held: self._span(start, held * kept[start : start + len(held)]),
        )
        return [(whole, select), after]

    def _span(self, start: int, held: Tensor) -> None:
        """Let the scales of some groups span what their columns `[columns, out]` hold."""
        for number, part in enumerate(held.unflatten(0, (-1, self.group)), start // self.group):
            self.scales[number] = self.grid.scale(part.T, self.dtype)

    def settle(self, at: int, column: Tensor, lost: Tensor, kept: Tensor) -> None:
        """Round a column, and take what it then is off what is lost."""
        scale = self.scales[at // self.group]
        column.copy_(self.grid.round(column * kept, scale))
        lost.addcmul_(column, scale, value=-1)

    def codes(self, columns: Tensor) -> Codes:
        """The rounded columns as codes of the weight."""
        scales = self.scales.T.contiguous()
        return Codes.of(self.grid, columns.T.contiguous(), scales, self.dtype)
