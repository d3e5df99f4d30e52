"""Pruning methods, one per file. The file name is the method's name, its fields are the options.

To add a method, add a file with one `Pruner` subclass; nothing else needs an edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsekit.solvers.input_stats import FACTORING_BYTES, InputStats, Stats
from sparsekit.weights.grids import Codes, Grid
from sparsekit.weights.patterns import Pattern

if TYPE_CHECKING:
    from sparsekit.weights.form import Form


ShouldContinue = Callable[[float | None], bool]
"""Decides whether another round is worth its time. Takes None before the first round, later the
decrease of the loss in the last one."""


def no_limit(loss_drop: float | None) -> bool:
    """Never stop for lack of time."""
    return True


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The result of pruning one weight."""

    weight: Tensor  # [out, in] float32, zeros off the mask unless it has factors
    mask: Tensor  # [out, in] bool, True = keep; with factors the mask of the core
    factors: Form | None = None
    """Factors whose product is the weight."""
    codes: Codes | None = None
    """Codes of the weight, if it was quantized."""
    scores: Tensor | None = None  # [out, in], the score that chose the mask, if any
    numbers: Mapping[str, float | Tensor] = field(default_factory=dict)
    """Numbers for the report, e.g. the damping used; a tensor `[out]` has counts by row."""


@dataclass(frozen=True, kw_only=True)
class Pruner(ABC):
    """A pruning method with its options."""

    needs: ClassVar[Stats | None] = None
    """The sums over inputs that the method reads; None: no calibration."""
    rowwise: ClassVar[bool] = False
    """Whether rows are independent of each other, unless the pattern compares them; weights with
    the same inputs are then solved as one."""
    updates: ClassVar[bool] = False
    """Whether kept weights get new values."""
    propagate: ClassVar[bool] = True
    """Whether a block's inputs come from the pruned blocks before it or from the dense model."""
    gram_bytes: ClassVar[int] = FACTORING_BYTES
    """Working memory in bytes per entry of a Gram matrix, for methods that read it."""

    @abstractmethod
    def prune(
        self,
        weight: Tensor,  # [out, in] float32, not to be changed
        sums: InputStats | None,
        pattern: Pattern,
    ) -> Pruned:
        """Prune a weight; the mask has exactly the pattern.

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
        """Prune and quantize a weight in one pass; None: the method has no such pass.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """
        return None


def keep_on(mask: Tensor, weight: Tensor) -> Tensor:
    """The weight with exact positive zeros off the mask."""
    return weight.masked_fill(~mask, 0.0)
