"""AST: masked forward pass, adaptive mask, annealed decay.

Source: Huang et al. 2025, "Pruning Large Language Models with Semi-Structural Adaptive Sparse
Training" (AAAI 2025), sections on SR-STE and distillation; the released code of December 2024.
Differs: the decay follows the paper. In the released GPT-2 optimizer the mask is an integer that is
inverted bit by bit, which pushes kept and pruned entries outwards instead; the released LLaMA code
adds the decay to the gradient (`coupled=yes` here). The default λ is measured: at its plateau the
decay of an entry of mean size equals the averaged gradient (root mean square) off the mask before
training. Published values are 1e-4 for GPT-2 124M and 6e-5 for LLaMA-2-7B, with 131,000 tokens and
more per step; with fewer tokens gradients are larger, and these values have no effect. λ rises for
a quarter of the steps at every size (`ramp`; the LLaMA script: a fifth). The temperature is 1 as in
the paper, not 2 as in the code (`--temperature 2`). Weights of KL by model size are the GPT-2
script's 2/3, the LLaMA code's 1/3, and 1/2 in between, as the paper's appendix is not available.
The loss is a convex mix, where the LLaMA code has CE + KL / 2, which is 1.5 times as large relative
to λ. There is no weight decay (the GPT-2 script: 0.1). Learning rates are half of that script's
2e-4 at its size, and interpolated where none was published; they fall on a cosine to a tenth, as in
the LLaMA script.
Cost: a forward and backward pass of the model and a forward pass of the teacher per batch, plus up
to eight measuring steps; weights, a second copy of sparse weights, gradients and two moments in
float32 (20 bytes per parameter), and the teacher (4).
Result: perplexity 47.6 from 69.6 (SmolLM2-135M at 2:4 from ALPS, dense 20.9, 38,912 tokens);
37.1 from 64.4 in 29 minutes with bf16 and a wider calibration.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.recovery.methods import Recoverer, Rule, Scale


@dataclass(frozen=True, kw_only=True)
class Ast(Recoverer):
    """Forward with the mask, straight-through gradient, annealed decay off the mask."""

    needs_gradient: ClassVar[bool] = True
    schedule: ClassVar[Literal["flat", "cosine", "linear"]] = "cosine"
    refresh: int = 10
    """Steps between mask selections."""
    decay: float = 0.0
    """λ: strength of the decay at its plateau; 0: by the size of gradients and weights."""
    ramp: float = 0.25
    """Share of the steps in which the decay rises from 0 to its plateau."""
    coupled: bool = False
    """Add the decay to the gradient, as in the released LLaMA code."""

    def __post_init__(self) -> None:
        """Refuse a ramp outside 0 to 1.

        Raises:
            UsageError: It is not between 0 and 1.
        """
        if not 0 <= self.ramp <= 1:
            raise UsageError(
                f"option ramp of ast must be between 0 and 1, not {self.ramp:g}",
                "it is a share of all steps",
                code="out-of-range",
            )

    def rule(self, decay: float) -> Rule:
        """See `Recoverer.rule`."""
        return Annealed(decay, self.ramp, coupled=self.coupled)

    def decay_of(self, scale: Scale) -> float:
        """See `Recoverer.decay_of`."""
        measured = scale.masked_gradient / scale.weight if scale.weight else 0.0
        return self.decay or measured


class Annealed(Rule):
    """Adds λ(t) W to the first moment off the mask, where λ(t) = λ min(1, t / ramp).

    Args:
        decay: λ.
        ramp: Share of the steps after which λ(t) = λ.
        coupled: Whether the decay enters both moments, as part of the gradient.
    """

    masks_forward = True
    updates_pruned = True

    def __init__(self, decay: float, ramp: float, *, coupled: bool) -> None:
        self.decay = decay
        self.ramp = ramp
        self.coupled = coupled
        self.second_moment_of_mixed = not coupled

    def strength(self, done: float) -> float:
        """λ after this share of the steps."""
        return self.decay * (min(1.0, done / self.ramp) if self.ramp else 1.0)

    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.on_gradient`."""
        return self._decayed(gradient, weight, mask, done) if self.coupled else gradient

    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """See `Rule.mix`."""
        return mean if self.coupled else self._decayed(mean, weight, mask, done)

    def _decayed(self, moment: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        # On a CPU the product is three times as fast as masked_fill.
        return (weight * ~mask).mul_(self.strength(done)).add_(moment)
