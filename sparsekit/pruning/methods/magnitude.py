"""Magnitude: remove the smallest weights.

Source: Han et al. 2015, "Learning both Weights and Connections", as the baseline of Wanda:
locuslab/wanda@8e8fc87, `lib/prune.py`.
Differs: counts are exact; the published threshold rule (score <= cut) removes one weight more, or
all weights that tie with the cut. Published unstructured pruning compares the whole tensor, which
is the pattern `50%/tensor` here; `50%` compares within each row.
Cost: a sort per weight; no calibration, no forward pass. Holds one block.
Result: perplexity 4461 where Wanda has 60.1 (recipe compare-oneshot-2x4, dense 10.12).
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.solvers.input_stats import InputStats
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Magnitude(Pruner):
    """Score |W|; needs no calibration."""

    def prune(self, weight: Tensor, sums: InputStats | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        scores = weight.abs()
        mask = pattern.mask(scores)
        return Pruned(weight=keep_on(mask, weight), mask=mask, scores=scores)
