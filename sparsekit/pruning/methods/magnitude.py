"""Magnitude: remove the smallest weights.

Source: Han et al. 2015, "Learning both Weights and Connections", as the baseline of Wanda:
locuslab/wanda@8e8fc87, `lib/prune.py`.
Differs: counts are exact, where the published threshold rule (score <= cut) removes one weight
more, or every weight that ties with the cut. Published unstructured pruning compares the whole
tensor: that is the pattern `50%/tensor` here, while `50%` compares within each row.
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
