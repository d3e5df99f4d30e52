"""Methods that begin with what another method made of a weight: one a file, like the pruners.

The file's name is the method's, its dataclass fields the options. To add one, add a file with one
`Refiner` subclass; nothing else needs an edit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsekit.pruning.methods import Pruned, Pruner
from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.patterns import Pattern

ShouldContinue = Callable[[float | None], bool]
"""Whether another round is worth its time: asked with None before the first one, and later with
how far the last one has lowered the loss."""


def no_limit(fall: float | None) -> bool:
    """There is no limit on the time."""
    return True


@dataclass(frozen=True, kw_only=True)
class Refiner(ABC):
    """A refinement with its options."""

    needs: ClassVar[Stats]
    """Which sums of the inputs the method reads."""
    initial: ClassVar[str]
    """The pruner that the method begins with when none is named."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of options."""
    rowwise: ClassVar[bool] = False
    """As of `Pruner`."""
    unlimited: ClassVar[Mapping[str, Any]] = {}
    """Options with which only a time limit ends the method; empty: it does not work in rounds. Such
    a method tells in its numbers how many `sweeps` a weight got."""
    propagate: ClassVar[bool] = True
    """As of `Pruner`."""

    @abstractmethod
    def refine(
        self,
        weight: Tensor,  # the dense weight, [out, in] float32, not to be changed
        start: Pruned,  # not to be changed
        sums: InputStats,
        pattern: Pattern,
        should_continue: ShouldContinue = no_limit,
    ) -> Pruned:
        """What becomes of a weight that has been pruned.

        `should_continue` is asked before each round, by methods that work in rounds.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """

    def applies_to(self, name: str) -> bool:
        """Whether the weight of this name is refined, or stays as the initial method left it."""
        return True

    def mismatch(self, pattern: Pattern, rows: int, columns: int) -> str:
        """Why the method cannot have this pattern in a weight `[rows, columns]`; empty: it can."""
        return ""

    def block_size(self, rows: int, columns: int, pattern: Pattern) -> int:
        """Side of the blocks of the factors that a weight gets; 0: it stays one matrix."""
        return 0

    def warnings(self, pattern: Pattern, pruner: Pruner | None) -> list[str]:
        """What the user should know before this pattern is asked for after this pruner."""
        return []
