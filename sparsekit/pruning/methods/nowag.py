"""NoWag-P: magnitude after normalising rows and columns, times the squared input.

Source: Liu et al. 2025, "NoWag: A Unified Framework for Shape Preserving Compression of Large
Language Models"; the initialisation of LawrenceRLiu/ARMOR@3977e54.
Differs: counts are exact; the sum of squared inputs replaces their running mean, a common factor.
As in the source, inputs come from the dense model (`--no-propagate`).
Cost: the squared norm of each input, in float32, two normalisations and a sort per weight.
Result: perplexity 171.9 in 37 s (SmolLM2-135M at 2:4, dense 22.9).
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
    """Score W̄² h, with W̄ the normalised weight and h the squared input."""

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
