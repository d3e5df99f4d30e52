"""SparseGPT: remove weights column by column and let the later columns make up for it.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned
in One-Shot", algorithm 1; the code in locuslab/wanda@8e8fc87, `lib/sparsegpt.py`.
Differs: counts are exact (the published threshold removes one weight more in each column block);
the published unstructured rule, which compares all rows of a block of 128 columns, is the pattern
`50%/tensor`, while `50%` gives every row the same share of each block; a block is shortened to
a multiple of M; damping is raised and reported when the factorisation fails; the update inside a
block is applied group by group, the same sum in another order.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruners import Pruned, Pruner
from sparsekit.tensors.curvature import inverse_factor
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want

# Columns whose update reaches the rest of the block in one product, for unstructured patterns.
STRIP = 16


@dataclass(frozen=True, kw_only=True)
class Sparsegpt(Pruner):
    """Score W² / U_jj², with an optimal-brain-surgeon update of the columns to the right."""

    needs: ClassVar[Want | None] = "gram"
    rowwise: ClassVar[bool] = True
    damping: float = 0.01
    """Share of the mean diagonal of the Gram matrix that is added to the diagonal."""
    block: int = 128
    """Columns that are masked (unstructured) and updated together."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UsageError("option block of sparsegpt must be above 0", "its default is 128")

    def prune(self, weight: Tensor, sums: InputSums | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        factor = inverse_factor(sums, self.damping)
        columns = weight.masked_fill(factor.dead, 0.0).T.contiguous()  # [in, out]
        mask = _sweep(columns, factor.upper, pattern, self.block)
        return Pruned(
            weight=columns.T.masked_fill(~mask.T, 0.0),
            mask=mask.T.contiguous(),
            numbers={"damping": factor.damping},
        )


def _sweep(
    columns: Tensor,  # [in, out] float32, changed in place
    upper: Tensor,  # [in, in]
    pattern: Pattern,
    block: int,
) -> Tensor:
    """Prune `columns` from first to last; gives the mask `[in, out]`."""
    grouped = pattern.scope == "group"
    strip = pattern.group if grouped else STRIP
    block = max(block - block % strip, strip)
    diagonal = upper.diagonal()[:, None]  # [in, 1]
    mask = torch.empty(columns.shape, dtype=torch.bool, device=columns.device)
    for start in range(0, len(columns), block):
        stop = min(start + block, len(columns))
        errors = torch.empty_like(columns[start:stop])
        if not grouped:
            scores = (columns[start:stop] / diagonal[start:stop]).square()
            mask[start:stop] = pattern.mask(scores.T, start).T
        for left in range(start, stop, strip):
            right = min(left + strip, stop)
            if grouped:
                scores = (columns[left:right] / diagonal[left:right]).square()
                mask[left:right] = pattern.mask(scores.T).T
            local = errors[left - start : right - start]
            _eliminate(columns[left:right], mask[left:right], upper[left:right, left:right], local)
            columns[right:stop].addmm_(upper[left:right, right:stop].T, local, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return mask


def _eliminate(columns: Tensor, mask: Tensor, upper: Tensor, errors: Tensor) -> None:
    """Zero the masked-out weights of a few columns, each updating those after it."""
    for i in range(len(columns)):
        torch.div(columns[i].masked_fill(mask[i], 0.0), upper[i, i], out=errors[i])
        columns[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
