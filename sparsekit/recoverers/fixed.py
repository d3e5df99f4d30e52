"""Fixed mask: AdamW on the weights that are kept, against a teacher.

Source: the fixed-mask arm of AST's ablation (Huang et al., AAAI 2025, table of components); AdamW
as in torch.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.recoverers import Recoverer, Scale
from sparsekit.tensors.sparseweight import Rule


@dataclass(frozen=True, kw_only=True)
class Fixed(Recoverer):
    """What is pruned stays pruned."""

    def rule(self, decay: float) -> Rule:
        """See `Recoverer.rule`."""
        return Held()

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
