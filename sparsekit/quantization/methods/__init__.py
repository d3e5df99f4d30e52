"""One quantization method a file: the file's name is the method's, its fields the options.

To add a method, add a file with one `Quantizer` subclass; nothing else needs an edit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsekit.solvers.input_stats import InputStats, Stats
from sparsekit.weights.grids import Codes, Grid


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What a method made of one weight."""

    codes: Codes
    """With code 0 wherever the weight was 0."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What the report should tell of this weight, for example the damping that was needed."""


@dataclass(frozen=True, kw_only=True)
class Quantizer(ABC):
    """A quantization method with its options."""

    needs: ClassVar[Stats | None] = None
    """Which sums of the inputs the method reads; None needs no calibration."""

    def input_scale(
        self,
        weights: Sequence[Tensor],  # each [out, in] float32, of the layers that share the input
        sums: InputStats | None,
        grid: Grid,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Mapping[str, float]] | None:
        """What the inputs' weights are multiplied by before they are quantized, `[in]` float32.

        Whatever makes the inputs is divided by it. With it comes what the report should tell; None:
        the method wants no such thing.
        """
        return None

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,  # [out, in] float32, not to be changed
        sums: InputStats | None,
        grid: Grid,  # that divides the inputs
        dtype: torch.dtype,
    ) -> Quantized:
        """The weight on the grid, with scales that `dtype` can hold.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """
