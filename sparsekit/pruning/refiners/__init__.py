"""Refining methods, which start from the result of a pruner, one per file.

The file name is the method's name, its fields are the options. To add a method, add a file with one
`Refiner` subclass; nothing else needs an edit.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner, ShouldContinue, no_limit
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

__all__ = ["Pruned", "Pruner", "Refiner", "ShouldContinue", "no_limit"]


@dataclass(frozen=True, kw_only=True)
class Refiner(ABC):
    """A refining method with its options."""

    needs: ClassVar[Stats]
    """The sums over inputs that the method reads."""
    initial: ClassVar[str]
    """The pruner that the method starts from by default."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of options."""
    rowwise: ClassVar[bool] = False
    """Whether rows are independent of each other; weights with the same inputs are then solved as
    one."""
    unlimited: ClassVar[Mapping[str, Any]] = {}
    """Options with which only a time limit ends the method, for methods that work in rounds and
    report their number as `sweeps`; empty for others."""
    propagate: ClassVar[bool] = True
    """Whether a block's inputs come from the pruned blocks before it or from the dense model."""

    @abstractmethod
    def refine(
        self,
        weight: Tensor,  # the dense weight, [out, in] float32, not to be changed
        start: Pruned,  # not to be changed
        sums: InputStats,
        pattern: Pattern,
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """Refine a pruned weight.

        Methods that work in rounds call `should_continue` before each round.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """

    def applies_to(self, name: str) -> bool:
        """Whether to refine the weight of this name; others keep the result of the pruner."""
        return True

    def mismatch(self, pattern: Pattern, rows: int, columns: int) -> str:
        """Why the pattern does not fit a weight `[rows, columns]`; empty if it does."""
        return ""

    def block_size(self, rows: int, columns: int, pattern: Pattern) -> int:
        """Side of the blocks of a weight's factors; 0 without factors."""
        return 0

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """Notes for the user about this pattern and this pruner, shown before the run."""
        return []
