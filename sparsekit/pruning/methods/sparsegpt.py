"""SparseGPT: prune by column; later columns compensate.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
in One-Shot", algorithm 1; the code in locuslab/wanda@8e8fc87, `lib/sparsegpt.py`.
Differs: counts are exact (the published threshold removes one weight more in each column block).
The published unstructured rule, which compares all rows of a block of 128 columns, is the pattern
`50%/tensor`; `50%` gives every row the same share of each block. Damping is raised and reported
when the factorisation fails. The sweep uses the Cholesky factor of the Hessian instead of that of
its inverse, so nothing is inverted: a column receives the summed error of all columns before it.
With a grid (section 3.5, "joint sparsification and quantization") the scales of a group come from
the values of its columns when the first one is reached, as in GPTQ, under the mask that they would
have then; scales of whole rows come from a mask of the dense weight.
Cost: one Cholesky factorisation and one sweep over the columns per weight, shared by weights with
the same input; the Gram matrix of each input, in² float32.
Result: perplexity 99.8 in 78 s (SmolLM2-135M at 2:4, dense 22.9).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruning.methods import Pruned, Pruner
from sparsekit.solvers.column_sweep import ColumnGroup, Rounding, Sweep
from sparsekit.solvers.hessian import factorise
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.grids import Grid
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(Pruner):
    """Score W² / U_jj², with an OBS update of the columns to the right."""

    needs: ClassVar[Stats | None] = Stats.GRAM
    updates: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    damping: float = 0.01
    """Share of the mean diagonal of the Gram matrix that is added to the diagonal."""
    block: int = 128
    """Columns that an unstructured pattern masks together; N:M masks each group in turn."""

    def __post_init__(self) -> None:
        if self.block < 1:
            message = "option block of sparsegpt must be above 0"
            raise UsageError(message, "its default is 128", code="out-of-range")

    def prune(self, weight: Tensor, sums: InputStats | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        return self._pass(weight, sums, pattern, None, torch.float32)

    def prune_on_grid(
        self,
        weight: Tensor,
        sums: InputStats | None,
        pattern: Pattern,
        grid: Grid,
        dtype: torch.dtype,
    ) -> Pruned | None:
        """See `Pruner.prune_on_grid`."""
        return self._pass(weight, sums, pattern, grid, dtype)

    def _pass(
        self,
        weight: Tensor,
        sums: InputStats | None,
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
            scores = held.square() * factor.pivot[start : start + len(held), None]
            return pattern.mask(scores.T, 0 if pattern.scope == "group" else start).T

        rounding = Rounding(grid, dtype, dense * chosen(0, dense)) if grid is not None else None

        def select(start: int, held: Tensor) -> None:
            stop = start + len(held)
            mask[start:stop] = chosen(start, held)
            kept[start:stop] = mask[start:stop]

        def quantize_or_prune(at: int, column: Tensor, error: Tensor) -> None:
            if rounding is None:
                error.addcmul_(column, kept[at], value=-1)
            else:
                rounding.quantize_column(at, column, error, kept[at])

        groups: list[ColumnGroup] = [(pattern.group or self.block, select)]
        if rounding is not None and rounding.group < len(dense):
            groups = _among(rounding, groups[0], chosen, kept)
        sweep = Sweep(
            columns=columns,
            error=dense,
            factor=factor,
            quantize_or_prune=quantize_or_prune,
            groups=groups,
        )
        sweep.run()
        codes = rounding.codes(columns) if rounding is not None else None
        values = codes.dense().float() if codes is not None else columns.T
        return Pruned(
            weight=values.masked_fill(~mask.T, 0.0),
            mask=mask.T.contiguous(),
            codes=codes,
            numbers={"damping": factor.damping},
        )


def _among(
    rounding: Rounding,
    masks: ColumnGroup,
    chosen: Callable[[int, Tensor], Tensor],
    kept: Tensor,  # [in, out], 1 and 0 once a mask is selected
) -> list[ColumnGroup]:
    """The units of a sweep that selects both masks and scales.

    If a group is larger than a unit of masks, its scales come first, from the mask that it would
    have then.
    """
    unit, select = masks
    whole = math.lcm(rounding.group, unit)
    if rounding.group >= unit:
        return [(whole, lambda at, held: rounding.fit_scales(at, held * chosen(at, held))), masks]

    def span(start: int, held: Tensor) -> None:
        rounding.fit_scales(start, held * kept[start : start + len(held)])

    return [(whole, select), (rounding.group, span)]
