"""AWQ: inputs that carry much get a finer grid, by a scale that the layer before takes back.

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for On-Device LLM Compression
and Acceleration" (MLSys 2024), section 3.2; the code in mit-han-lab/llm-awq@6afbeb1,
`awq/quantize/auto_scale.py`.
Differs: the importance of an input is the root mean square over all calibration tokens, not the
mean size; the loss is the sum over the linear layers that share the input of the relative error of
their outputs, from the Gram matrix, not that of the attention or the whole MLP on some tokens;
weights are not clipped. A scale never moves a zero.

Absolute errors let those of q and k, whose outputs are large, hide that of v: SmolLM2 at 2:4 from
SparseGPT on int4-g64, 8 windows of WikiText-2, has 132.7 with them and 117.3 with relative ones,
133.5 by rounding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.quantization.methods import Quantized, Quantizer
from sparsekit.solvers.hessian import require_finite
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.grids import Codes, Grid

# Of an input that is never anything, before all are brought to the mean 1.
LEAST_SCALE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Awq(Quantizer):
    """Scale = importance ** ratio, with the ratio that leaves the least output error."""

    needs: ClassVar[Stats | None] = Stats.GRAM
    ratios: int = 20
    """How many ratios are tried, evenly spaced from 0 (no scale) up to, but not with, 1."""

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise UsageError("option ratios of awq must be above 0", "its default is 20")

    def input_scale(
        self, weights: Sequence[Tensor], sums: InputStats | None, grid: Grid, dtype: torch.dtype
    ) -> tuple[Tensor, Mapping[str, float]] | None:
        """See `Quantizer.input_scale`."""
        assert sums is not None
        require_finite(sums.squares)
        best, chosen, ratio = float("inf"), torch.ones_like(sums.squares), 0.0
        for step in range(self.ratios):
            scale = scale_of(sums, step / self.ratios)
            loss = sum(_loss(weight, scale, sums, grid, dtype) for weight in weights)
            if loss < best:
                best, chosen, ratio = loss, scale, step / self.ratios
        return (chosen, {"ratio": ratio}) if ratio else None

    def quantize(
        self, weight: Tensor, sums: InputStats | None, grid: Grid, dtype: torch.dtype
    ) -> Quantized:
        """To the nearest numbers; see `Quantizer.quantize`."""
        return Quantized(codes=Codes.nearest(grid, weight, dtype))


def scale_of(sums: InputStats, ratio: float) -> Tensor:
    """The scale of each input at a ratio, `[in]`; its largest and smallest are inverse."""
    importance = (sums.squares / sums.tokens).sqrt()
    scale = importance.pow(ratio).clamp_min(LEAST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def _loss(weight: Tensor, scale: Tensor, sums: InputStats, grid: Grid, dtype: torch.dtype) -> float:
    """The relative output error over all calibration tokens of a weight rounded with a scale."""
    rounded = Codes.nearest(grid, weight * scale, dtype).dense().float() / scale
    lost, given = (
        float(((part @ sums.gram) * part).sum(dtype=torch.float64))
        for part in (rounded - weight, weight)
    )
    return lost / given if given else 0.0
