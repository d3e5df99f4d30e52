"""CAST: a dense model whose smallest weights follow their gradient less and a pull to zero more.

Source: "CAST: Continuous Adaptive Sparse Trainer", 2025 (arXiv 2509.25996), of which no code is
public; AdamS and weight scaling after an independent reproduction that cites its equations and
algorithm lines.
Differs: what is not known is chosen. β1, β2, ε = 0.9, 0.95, 1e-8, those of the same group's AST;
the schedule (warm-up, constant, to 0 in the last tenth); spans of a row are contiguous; scales and
all other parameters take AdamW without decay; a model of which leaving out what is off the mask
moves the last hidden states by more than half a percent, as hundreds of steps and fewer may do, is
written with a note, and refused from five percent on; the strength λ, when not given, is the root
mean square of the averaged gradient off the mask over eight batches before training (the paper: of
its order; a factor of 1 to 2 after 200 steps is what its figures agree with). The share of KL is
published for LLaMA alone (1/3); smaller models take AST's. Gradients are clipped to a norm of 1, as
AST's are. How the run ends is not told: the largest entries are selected once more, and the others
left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsekit.recovery.methods import Recoverer, Rule, Scale, by_size


@dataclass(frozen=True, kw_only=True)
class Cast(Recoverer):
    """Dense forward; AdamS; a scale for each half of a row."""

    needs_gradient: ClassVar[bool] = True
    dense_until_end: ClassVar[bool] = True
    spans: int = 2
    """Spans of a row that have a trained scale each; 0: none."""
    refresh: int = 10
    """Steps between two selections of the largest entries."""
    decay: float = 0.0
    """λ: strength of the pull toward zero; 0: the size of the gradients before training."""

    def rule(self, decay: float) -> Rule:
        """See `Recoverer.rule`."""
        return Continuous(decay)

    def default_lr(self, scale: Scale) -> float:
        """See `Recoverer.default_lr`; the second is a choice, the third is published."""
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
