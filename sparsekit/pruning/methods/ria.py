"""RIA: relative importance in row and column, times the input norm.

Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large
Language Models", section 3; biomedical-cybernetics/Relative-importance-and-activation-pruning
@b87b897, `lib/prune.py`.
Differs: counts are exact (published unstructured pruning uses a threshold over the whole tensor,
the pattern `50%/tensor` here). The input norm is the root mean square over tokens. There is no
channel permutation: its result is not N:M in the stored order of the weights.
Cost: the squared norm of each input, in float32, row and column sums and a sort per weight.
Result: perplexity 71.5 where Wanda has 60.1 (recipe compare-oneshot-2x4, dense 10.12).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Ria(Pruner):
    """Score (|W| / column sum + |W| / row sum) ‖X‖ᵖ."""

    needs: ClassVar[Stats | None] = Stats.NORMS
    power: float = 0.5
    """Exponent of the input norm."""

    def prune(self, weight: Tensor, sums: InputStats | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        size = weight.abs()
        tiny = torch.finfo(size.dtype).tiny  # an all-zero row or column scores 0, not NaN
        share = size / size.sum(0).clamp_min(tiny) + size / size.sum(1, True).clamp_min(tiny)
        norm = (sums.squares / sums.tokens).sqrt()
        scores = share * norm**self.power
        mask = pattern.mask(scores)
        return Pruned(weight=keep_on(mask, weight), mask=mask, scores=scores)
