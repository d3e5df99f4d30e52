"""Recovery methods, one per file. The file name is the method's name, its fields are the options.

To add a method, add a file with one `Recoverer` subclass; nothing else needs an edit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor


class Rule(ABC):
    """Update of entries off the mask in a step of Adam."""

    masks_forward: bool = False
    """Whether the forward pass uses kept entries only, while the others are still trained."""
    updates_pruned: bool = False
    """Whether entries off the mask are updated; otherwise they are and stay zero."""
    second_moment_of_mixed: bool = False
    """Whether the second moment is that of the result of `mix`, not of the gradient."""

    @abstractmethod
    def on_gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """The contribution of a clipped gradient to the first moment."""

    @abstractmethod
    def mix(self, mean: Tensor, weight: Tensor, mask: Tensor, done: float) -> Tensor:
        """The replacement of the first moment in this step, which is not stored.

        Args:
            mean: The first moment, not to be changed.
            weight: The weight before the step.
            mask: True = keep.
            done: Share of all steps taken before this one.
        """


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Statistics for the automatic choices."""

    parameters: int
    """Number of parameters of the model."""
    weight: float = 0.0
    """Mean size of the nonzero entries of sparse weights."""
    masked_gradient: float = 0.0
    """Root mean square of the averaged gradient off the masks before training; 0: unknown."""


@dataclass(frozen=True, kw_only=True)
class Recoverer(ABC):
    """A recovery method with its options."""

    needs_gradient: ClassVar[bool] = False
    """Whether a choice depends on the size of the gradients, measured in steps before training."""
    dense_until_end: ClassVar[bool] = False
    """Whether the forward pass uses entries off the mask until the end, when they must have
    vanished."""
    schedule: ClassVar[Literal["flat", "cosine", "linear"]] = "flat"
    """Default schedule of the learning rate."""
    spans: int = 0
    """Spans of a row with a trained scale each; 0: no scales."""
    refresh: int = 0
    """Steps between mask selections; 0: the mask is fixed."""

    @abstractmethod
    def rule(self, decay: float) -> Rule:
        """The update rule with decay λ."""

    @abstractmethod
    def decay_of(self, scale: Scale) -> float:
        """λ: the largest strength of the decay off the mask; 0: none."""

    def default_lr(self, scale: Scale) -> float:
        """Default of the largest learning rate."""
        return by_size(scale.parameters, 1e-4, 5e-5, 2e-5)

    def default_kl_weight(self, scale: Scale) -> float:
        """Default weight of KL in the loss."""
        return by_size(scale.parameters, 2 / 3, 1 / 2, 1 / 3)


def by_size(parameters: int, small: float, middle: float, large: float) -> float:
    """A value for models of up to 0.6, up to 3, and more than 3 billion parameters."""
    if parameters < 600_000_000:
        return small
    return middle if parameters < 3_000_000_000 else large
