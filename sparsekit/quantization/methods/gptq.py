"""GPTQ: round column by column and let the later columns make up for it; zeros stay.

Source: Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", algorithm 1; the code in IST-DASLab/gptq@2d65066, `gptq.py`.
Differs: a weight that is 0 is rounded to 0 whatever it should make up for, and what that leaves is
made up for by the columns to its right (llm-compressor, which kept zeros until 0.13, dropped it);
the sweep is SparseGPT's, with the Cholesky factor of the Hessian instead of that of its inverse
(see `HessianFactor`); scales come from what the columns of a group hold when the first is reached,
also where groups are shorter than the published blocks of 128 columns; inputs that were zero for
every token are rounded, not zeroed; damping is raised and reported when the factorisation fails.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.quantization.methods import Quantized, Quantizer
from sparsekit.solvers.column_sweep import Rounding, Sweep
from sparsekit.solvers.hessian import factorise
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Gptq(Quantizer):
    """An optimal-brain-surgeon update of the columns to the right of a rounded one."""

    needs: ClassVar[Stats | None] = Stats.GRAM
    damping: float = 0.01
    """Share of the mean diagonal of the Gram matrix that is added to the diagonal."""

    def quantize(
        self,
        weight: Tensor,
        sums: InputStats | None,
        grid: Grid,
        dtype: torch.dtype,
        mask: Tensor | None = None,
    ) -> Quantized:
        """See `Quantizer.quantize`.

        With a mask `[out, in]`, True = keep, what is off it becomes 0, which the rest makes up for.
        """
        assert sums is not None
        factor = factorise(sums, self.damping)
        columns = weight.T.contiguous()  # codes where they are passed
        error, kept = columns.clone(), (columns != 0 if mask is None else mask.T).float()
        rounding = Rounding(grid, dtype, columns * kept)

        def span(start: int, held: Tensor) -> None:
            rounding.fit_scales(start, held * kept[start : start + len(held)])

        def quantize_or_prune(at: int, column: Tensor, error: Tensor) -> None:
            rounding.quantize_column(at, column, error, kept[at])

        groups = [(grid.group, span)] if grid.group else []
        Sweep(
            columns=columns,
            error=error,
            factor=factor,
            quantize_or_prune=quantize_or_prune,
            groups=groups,
        ).run()
        return Quantized(codes=rounding.codes(columns), numbers={"damping": factor.damping})
