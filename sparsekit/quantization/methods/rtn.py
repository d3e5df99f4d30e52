"""Round to nearest: every weight to the closest number of its grid.

Source: the baseline of Frantar et al. 2023, "GPTQ", section 4; the scale as in compressed-tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.quantization.methods import Quantized, Quantizer
from sparsekit.solvers.input_stats import InputStats
from sparsekit.weights.grids import Codes, Grid


@dataclass(frozen=True, kw_only=True)
class Rtn(Quantizer):
    """The scale spans the largest number of each row or group."""

    def quantize(
        self, weight: Tensor, sums: InputStats | None, grid: Grid, dtype: torch.dtype
    ) -> Quantized:
        """See `Quantizer.quantize`."""
        return Quantized(codes=Codes.nearest(grid, weight, dtype))
