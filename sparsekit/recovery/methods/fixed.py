"""Fixed mask: AdamW on the kept weights.

Source: the fixed-mask arm of AST's ablation (Huang et al., AAAI 2025, table of components); AdamW
as in torch.
Differs: the learning rate of small models is higher (4e-4) and falls linearly after the warm-up.
Cost: a forward and backward pass of the model and a forward pass of the teacher per batch; weights,
gradients and two moments in float32 (16 bytes per parameter), and the teacher (4).
Result: perplexity 48.9 from 69.6 (SmolLM2-135M at 2:4 from ALPS, dense 20.9, 38,912 tokens).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsekit.recovery.methods import Recoverer, Rule, Scale, by_size


@dataclass(frozen=True, kw_only=True)
class Fixed(Recoverer):
    """Pruned weights stay zero."""

    schedule: ClassVar[Literal["flat", "cosine", "linear"]] = "linear"

    def rule(self, decay: float) -> Rule:
        """See `Recoverer.rule`."""
        return Held()

    def default_lr(self, scale: Scale) -> float:
        """See `Recoverer.default_lr`."""
        return by_size(scale.parameters, 4e-4, 5e-5, 2e-5)

    def decay_of(self, scale: Scale) -> float:
        """See `Recoverer.decay_of`."""
        return 0.0


class Held(Rule):
    """Entries off the mask stay zero; the others take the step of Adam."""

    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.on_gradient`."""
        return gradient

    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.mix`."""
        return mean
