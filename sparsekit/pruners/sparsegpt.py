"""SparseGPT: remove weights column by column and let the later columns make up for it.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
in One-Shot", algorithm 1; the code in locuslab/wanda@8e8fc87, `lib/sparsegpt.py`.
Differs: counts are exact (the published threshold removes one weight more in each column block);
the published unstructured rule, which compares all rows of a block of 128 columns, is the pattern
`50%/tensor`, while `50%` gives every row the same share of each block; damping is raised and
reported when the factorisation fails. The same sweep is written with the Cholesky factor of the
Hessian instead of that of its inverse (see `Factor`), so nothing is inverted: a column gets the
sum of what all columns before it lost.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruners import Pruned, Pruner
from sparsekit.tensors.curvature import factorise
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want
from sparsekit.tensors.sweep import Sweep


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
        columns, mask = dense.clone(), torch.empty_like(dense, dtype=torch.bool)
        kept = torch.empty_like(dense)

        def select(start: int, held: Tensor) -> None:
            stop = start + len(held)
            scores = held.square() * factor.cost[start:stop, None]
            first = 0 if pattern.scope == "group" else start
            mask[start:stop] = pattern.mask(scores.T, first).T
            kept[start:stop] = mask[start:stop]

        def settle(at: int, column: Tensor, lost: Tensor) -> None:
            lost.addcmul_(column, kept[at], value=-1)

        Sweep(
            columns=columns,
            lost=dense,
            factor=factor,
            settle=settle,
            unit=pattern.group or self.block,
            enter=select,
        ).run()
        return Pruned(
            weight=columns.T.masked_fill(~mask.T, 0.0),
            mask=mask.T.contiguous(),
            numbers={"damping": factor.damping},
        )
