"""ALPS: mask and weights together by ADMM, then conjugate gradients.

Source: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
Large Language Models", algorithms 1 and 2; mazumder-lab/ALPS@bbdad62, `alps.py`.
Differs: the published code projects unstructured patterns over the whole tensor (`50%/tensor`
here); the final support is that of the sparse copy, as in the paper (the code ranks the dense
copy once more); the conjugate gradients of a row stop by its own residual.
Cost: one eigendecomposition per input and up to 300 ADMM steps per weight, each a product with an
[in, in] matrix; the Gram matrix of each input, in² float32, and 48 bytes more per entry of the one
in work.
Result: perplexity 76.2 in 182 s (SmolLM2-135M at 2:4, dense 22.9).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import UsageError
from sparsekit.pruning.methods import Pruned, Pruner, keep_on
from sparsekit.solvers.hessian import UnitGram, solve_on_support, unit_gram
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

# The penalty is adjusted every third iteration and grows with the share of the support that has
# changed since.
CHECK_EVERY = 3
SLOW = 0.005
GROWTH = ((0.1, 1.3), (SLOW, 1.2), (0.0, 1.1))


@dataclass(frozen=True, kw_only=True)
class Alps(Pruner):
    """Approximate minimiser of the layer error under the pattern; needs no initial score."""

    needs: ClassVar[Stats | None] = Stats.GRAM
    updates: ClassVar[bool] = True
    gram_bytes: ClassVar[int] = 8 * 6  # eigenvectors, inverse, LAPACK workspace; float64
    damping: float = 0.01
    """Share of the mean diagonal of the Gram matrix that is added to the diagonal."""
    penalty: float = 0.1
    """Initial penalty on the difference between the dense and the sparse copy."""
    iterations: int = 300
    """Maximum number of ADMM steps."""
    settled: float = 3e-4
    """Stop after 30 steps when less than this share of the support changes."""
    solve_iterations: int = 10
    """Conjugate-gradient steps on the final support."""

    def __post_init__(self) -> None:
        if self.penalty <= 0 or self.iterations < 1:
            raise UsageError(
                "options penalty and iterations of alps must be above 0",
                "their defaults are 0.1 and 300",
                code="out-of-range",
            )

    def prune(self, weight: Tensor, sums: InputStats | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        system = unit_gram(sums, self.damping)
        values, vectors = sums.derived(("eigh", self.damping), lambda: _eigh(system))
        mask, sparse, steps = self._admm(weight * system.scale, system, values, vectors, pattern)
        start = sparse / system.scale
        solved = solve_on_support(
            weight, mask, system, start=start, iterations=self.solve_iterations
        )
        return Pruned(weight=keep_on(mask, solved), mask=mask, numbers={"admm_steps": steps})

    def _admm(
        self, weight: Tensor, system: UnitGram, values: Tensor, vectors: Tensor, pattern: Pattern
    ) -> tuple[Tensor, Tensor, int]:
        """The mask, the sparse copy (both `[out, in]`) and the number of steps."""
        penalty = self.penalty
        pull = weight @ system.gram
        kept = max(weight.numel() - pattern.zeros(*weight.shape), 1)
        first = checked = pattern.mask(weight.abs())
        sparse, dual = keep_on(first, weight), torch.zeros_like(weight)
        mask, moved = first, False
        inverse = _inverse(values, vectors, penalty)
        for step in range(1, self.iterations + 1):
            dense = (pull + penalty * sparse - dual) @ inverse
            target = dense + dual / penalty
            mask = pattern.mask(target.abs())
            sparse = keep_on(mask, target)
            dual += penalty * (dense - sparse)
            if step % CHECK_EVERY:
                continue
            change = int((mask ^ checked).sum()) / kept
            checked = mask
            moved |= change > SLOW
            if (moved and change == 0) or (step > 30 and change < self.settled):
                return mask, sparse, step
            if not moved:
                # The penalty fixes the support from the start: restart with a smaller one.
                penalty /= 5
                if change > 0:
                    sparse, dual = keep_on(first, weight), torch.zeros_like(weight)
            else:
                penalty *= next(factor for floor, factor in GROWTH if change > floor)
            inverse = _inverse(values, vectors, penalty)
        return mask, sparse, self.iterations


def _eigh(system: UnitGram) -> tuple[Tensor, Tensor]:
    """Eigenvalues `[in]` float64 and eigenvectors `[in, in]` float64."""
    values, vectors = torch.linalg.eigh(system.gram.double())
    return values.clamp_min(0), vectors


def _inverse(values: Tensor, vectors: Tensor, penalty: float) -> Tensor:
    """(Gram + penalty)⁻¹, `[in, in]` float32."""
    single = vectors.float()
    return (single / (values + penalty).float()) @ single.T
