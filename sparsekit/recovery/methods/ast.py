"""AST: an adaptive mask, and a pull toward zero on what it leaves out that grows and stays.

Source: Huang et al. 2025, "Pruning Large Language Models with Semi-Structural Adaptive Sparse
Training" (AAAI 2025), sections on SR-STE and distillation; the released code of December 2024.
Differs: the decay follows the text. In the released optimizer of GPT-2 the mask is an integer that
is inverted bit by bit, which pushes kept and pruned entries outwards instead; the released LLaMA
code adds the decay to the gradient (`coupled=yes` here). The strength λ, when not given, is
measured: at its plateau the pull on an entry of mean size is as large as the averaged gradient
(root mean square) off the mask before training. Published are 1e-4 for GPT-2 124M and 6e-5 for
LLaMA-2-7B, with 131,000 tokens and more in a step; with few tokens in a step gradients are larger,
and such a λ moves nothing. It rises for a quarter of the steps at every size (`ramp`; the LLaMA
script: a fifth). The temperature is 1 as in the text, not the code's 2 (`--temperature 2`); the
shares of KL by size stand in an unknown appendix: the GPT-2 script's 2/3, the LLaMA code's 1/3, and
1/2 between them; the loss is their convex mix, where the LLaMA code has CE + KL / 2, which is 1.5
times as much beside the same λ. There is no weight decay (the GPT-2 script: 0.1); learning rates
are half of that script's 2e-4 at its size (SmolLM2-135M at 2:4 from ALPS, after 38 steps of 1024
tokens of C4: 48.7 with 5e-5, 48.5 with 1e-4, 52.3 with 2e-4) and, where none was published, between
those of the neighbours; they fall on a cosine to a tenth, as the LLaMA script's do.
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
    """Steps between two selections of the largest entries."""
    decay: float = 0.0
    """λ: strength of the decay at its plateau; 0: by the size of gradients and weights."""
    ramp: float = 0.25
    """Share of the steps in which the decay rises from 0 to its plateau."""
    coupled: bool = False
    """Whether the decay is part of the gradient, as in the released LLaMA code."""

    def __post_init__(self) -> None:
        """Refuse a ramp that is no share of the steps.

        Raises:
            UsageError: It is not between 0 and 1.
        """
        if not 0 <= self.ramp <= 1:
            raise UsageError(
                f"ramp must be between 0 and 1, not {self.ramp:g}", "it is a share of all steps"
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
        ramp: Share of the steps after which it is reached.
        coupled: Whether the decay goes through both moments, as a part of the gradient.
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
        # The product is three times as fast on a CPU as to fill by the mask.
        return (weight * ~mask).mul_(self.strength(done)).add_(moment)
