"""Fixed mask: AdamW on the weights that are kept, against a teacher.

Source: the fixed-mask arm of AST's ablation (Huang et al., AAAI 2025, table of components); AdamW
as in torch.
Differs: the learning rate of small models is higher, and falls from its top on. SmolLM2-135M at 2:4
from SparseGPT (92.7 on eight windows of WikiText-2) is at 54.2 after 24 steps of 1024 tokens of C4
with 3e-4, and at 57.4 with 1.5e-4; 4e-4 is what the half hours of the README were measured with.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsekit.recovery.methods import Recoverer, Rule, Scale, by_size


@dataclass(frozen=True, kw_only=True)
class Fixed(Recoverer):
    """What is pruned stays pruned."""

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
    """Entries off the mask are zero, and stay so; the others take Adam's step."""

    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.on_gradient`."""
        return gradient

    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.mix`."""
        return mean
