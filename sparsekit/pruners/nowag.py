"""NoWag-P: magnitude after normalising columns, then rows, weighted by the mean squared input.

Source: Liu et al. 2025, "NoWag: A Unified Framework for Shape Preserving Compression of Large
Language Models"; the initialisation of LawrenceRLiu/ARMOR@3977e54.
Differs: counts are exact; the sum of squared inputs replaces their running mean, a common factor.
As in the source, the inputs come from the dense model (`propagate` is off).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.pruners import Pruned, Pruner, keep_on
from sparsekit.tensors.patterns import Pattern
from sparsekit.tensors.sums import InputSums, Want


@dataclass(frozen=True, kw_only=True)
class Nowag(Pruner):
    """Score W̄² h with W̄ the doubly normalised weight and h the squared input."""

    needs: ClassVar[Want | None] = Want.NORMS
    propagate: ClassVar[bool] = False
    epsilon: float = 1e-5
    """Added to every column and row norm."""

    def prune(self, weight: Tensor, sums: InputSums | None, pattern: Pattern) -> Pruned:
        """See `Pruner.prune`."""
        assert sums is not None
        normal = weight / (weight.norm(dim=0) + self.epsilon)  # columns
        normal = normal / (normal.norm(dim=1, keepdim=True) + self.epsilon)  # rows
        scores = normal.square() * _importance(sums.squares)
        mask = pattern.mask(scores)
        return Pruned(weight=keep_on(mask, weight), mask=mask, scores=scores)


def _importance(squares: Tensor) -> Tensor:
    """The squared inputs, `[in]`; zero entries count as the mean of the others."""
    valid = squares > 0
    if not valid.any():
        raise NumericalError("every calibration input is zero")
    return torch.where(valid, squares, squares[valid].mean())
