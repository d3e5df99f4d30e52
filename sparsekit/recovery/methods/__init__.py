"""How a sparse model is trained: one method a file; the file's name is the method's.

To add a method, add a file with one `Recoverer` subclass; nothing else needs an edit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


class Rule(ABC):
    """How Adam's step treats entries off the mask."""

    masks_forward: bool = False
    """Whether the model computes with the kept entries only, while the others are trained on."""
    updates_pruned: bool = False
    """Whether entries off the mask follow their gradient; else they are zero, and stay so."""
    second_moment_of_mixed: bool = False
    """Whether the second moment is that of what `mix` gives, or that of the gradient."""

    @abstractmethod
    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """What enters the first moment, for a gradient that has been clipped."""

    @abstractmethod
    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """What takes the place of the first moment in this step, and is not kept.

        Args:
            mean: The first moment, not to be changed.
            weight: The weight before the step.
            mask: True = keep.
            done: Share of all steps that lie before this one.
        """


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What the automatic choices go by."""

    parameters: int
    """Of the model."""
    weight: float = 0.0
    """Mean size of the entries of sparse weights that are not zero."""
    masked_gradient: float = 0.0
    """Root mean square of the averaged gradient over the entries off the mask, before training; 0
    when no method asked for it."""


@dataclass(frozen=True, kw_only=True)
class Recoverer(ABC):
    """A method of recovery training with its options."""

    needs_gradient: ClassVar[bool] = False
    """Whether a choice goes by the size of the gradients, which a few batches then measure."""
    dense_until_end: ClassVar[bool] = False
    """Whether the model computes with entries off the mask until the end, so that they must have
    vanished by then."""
    schedule: ClassVar[Literal["flat", "cosine", "linear"]] = "flat"
    """How the learning rate moves when it is not said."""
    spans: int = 0
    """Spans of a row that have a trained scale each; 0: none."""
    refresh: int = 0
    """Steps between two selections of the largest entries; 0: the mask stays."""

    @abstractmethod
    def rule(self, decay: float) -> Rule:
        """How Adam's step treats entries off the mask, with this λ."""

    @abstractmethod
    def decay_of(self, scale: Scale) -> float:
        """λ: the largest strength of the pull toward zero; 0: none."""

    def default_lr(self, scale: Scale) -> float:
        """The largest learning rate when none is given."""
        return by_size(scale.parameters, 1e-4, 5e-5, 2e-5)

    def default_kl_weight(self, scale: Scale) -> float:
        """The share of the divergence in the loss when none is given."""
        return by_size(scale.parameters, 2 / 3, 1 / 2, 1 / 3)


def by_size(parameters: int, small: float, middle: float, large: float) -> float:
    """A choice for models of up to 0.6, up to 3, and more billion parameters."""
    if parameters < 600_000_000:
        return small
    return middle if parameters < 3_000_000_000 else large
