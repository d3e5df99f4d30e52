"""One pruning method a file: the file's name is the method's, its dataclass fields the options.

To add a method, add a file with one `Pruner` subclass; nothing else needs an edit.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.solvers.hessian import FACTORING_BYTES
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.form import Form
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method made of one weight."""

    weight: Tensor  # [out, in] float32, exact zeros where the mask is False unless it has factors
    mask: Tensor  # [out, in] bool, True = keep; with factors that of their core
    factors: Form | None = None
    """Of which the weight is the product."""
    codes: Codes | None = None
    """Of which the weight consists, where it was put on a grid."""
    scores: Tensor | None = None  # [out, in], what the mask was chosen by, where it was one score
    numbers: Mapping[str, float | Tensor] = field(default_factory=dict)
    """What the report should tell of this weight, for example the damping that was needed; a tensor
    `[out]` holds counts of its rows."""


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """A pruning method with its options."""

    needs: ClassVar[Stats | None] = None
    """Which sums of the inputs the method reads; None needs no calibration."""
    rowwise: ClassVar[bool] = False
    """Whether a row's result depends on no other row, unless the pattern compares them; weights
    with the same inputs are then solved as one."""
    updates: ClassVar[bool] = False
    """Whether weights that are kept get other values than they had."""
    propagate: ClassVar[bool] = True
    """Whether a block's inputs come from the pruned blocks before it, or from the dense model."""
    gram_bytes: ClassVar[int] = FACTORING_BYTES
    """Of a method that reads Gram matrices: the memory it makes of one, for each entry."""

    @abstractmethod
    def prune(
        self,
        weight: Tensor,  # [out, in] float32, not to be changed
        sums: InputStats | None,
        pattern: Pattern,
    ) -> Pruned:
        """The pruned weight and its mask, which has exactly the pattern.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """

    def prune_on_grid(
        self,
        weight: Tensor,  # [out, in] float32, not to be changed
        sums: InputStats | None,
        pattern: Pattern,
        grid: Grid,
        dtype: torch.dtype,  # of the scales
    ) -> Pruned | None:
        """The mask, and the kept weights on a grid, found in one pass; None: there is no such pass.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """
        return None


def keep_on(mask: Tensor, weight: Tensor) -> Tensor:
    """The weight with exact positive zeros off the mask."""
    return weight.masked_fill(~mask, 0.0)
