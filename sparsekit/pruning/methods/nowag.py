"""NoWag-P: magnitude after normalising columns, then rows, weighted by the mean squared input.

Source: Liu et al. 2025, "NoWag: A Unified Framework for Shape Preserving Compression of Large
Language Models"; the initialisation of LawrenceRLiu/ARMOR@3977e54.
Differs: counts are exact; the sum of squared inputs replaces their running mean, a common factor.
As in the source, the inputs come from the dense model (`propagate` is off).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.solvers.nowag_scaling import importance, normalise
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Nowag(Pruner):
    """Score W̄² h with W̄ the doubly normalised weight and h the squared input."""

    needs: ClassVar[Stats | None] = Stats.NORMS
    propagate: ClassVar[bool] = False
    epsilon: float = 1e-5
    """Added to every column and row norm."""

    def prune(self, weight: Tensor, sums: InputStats | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        normal, _, _ = normalise(weight, self.epsilon)
        scores = normal.square() * importance(sums.squares)
        mask = pattern.mask(scores)
        return Pruned(weight=keep_on(mask, weight), mask=mask, scores=scores)
