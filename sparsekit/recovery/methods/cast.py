"""CAST: dense forward pass with a growing decay.

Source: "CAST: Continuous Adaptive Sparse Trainer", 2025 (arXiv 2509.25996), without public code;
AdamS and weight scaling after an independent reproduction that cites its equations.
Differs: unpublished details are chosen here. β1, β2, ε = 0.9, 0.95, 1e-8 as in AST, by the same
group; the schedule is warm-up, constant, and to 0 in the last tenth; spans of a row are contiguous;
scales and all other parameters use AdamW without decay. The default λ is the root mean square of
the averaged gradient off the mask before training, the order of magnitude that the paper gives. The
weight of KL is published for LLaMA only (1/3); smaller models use AST's. Gradients are clipped to a
norm of 1, as in AST. At the end the mask is selected once more and applied. If that changes the
last hidden states by more than half a percent, which short runs may not avoid, there is a note;
from five percent on the run fails.
Cost: a forward and backward pass of the model and a forward pass of the teacher per batch, plus up
to eight measuring steps; weights, a second copy of sparse weights, gradients and two moments in
float32 (20 bytes per parameter), and the teacher (4).
Result: perplexity 47.0 from 69.6 (SmolLM2-135M at 2:4 from ALPS, dense 20.9, 38,912 tokens).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekit.recovery.methods import Recoverer, Rule, Scale, by_size


@dataclass(frozen=True, kw_only=True)
class Cast(Recoverer):
    """Dense forward pass, AdamS, a scale for each half of a row."""

    needs_gradient: ClassVar[bool] = True
    dense_until_end: ClassVar[bool] = True
    spans: int = 2
    """Spans of a row with a trained scale each; 0: no scales."""
    refresh: int = 10
    """Steps between mask selections."""
    decay: float = 0.0
    """λ: strength of the decay; 0: the size of the gradients before training."""

    def rule(self, decay: float) -> Rule:
        """See `Recoverer.rule`."""
        return Continuous(decay)

    def default_lr(self, scale: Scale) -> float:
        """See `Recoverer.default_lr`; only the last value is published."""
        return by_size(scale.parameters, 1e-4, 2e-5, 2e-5)

    def decay_of(self, scale: Scale) -> float:
        """See `Recoverer.decay_of`."""
        return self.decay or scale.masked_gradient


class Continuous(Rule):
    """Off the mask the first moment m becomes (1 − a) m + a λ sign(W), a the share of steps done.

    Args:
        decay: λ.
    """

    updates_pruned = True
    second_moment_of_mixed = True

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.on_gradient`."""
        return gradient

    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.mix`."""
        share = min(1.0, done)
        pull = weight.sign().mul_(share * self.decay).add_(mean, alpha=1 - share)
        return pull.where(~mask, mean)
