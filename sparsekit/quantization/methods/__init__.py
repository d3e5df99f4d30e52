"""Quantization methods, one per file. The file name is the method's name, its fields the options.

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
    """The result of quantizing one weight."""

    codes: Codes
    """Code 0 wherever the weight was 0."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Numbers for the report, for example the damping that was needed."""


@dataclass(frozen=True, kw_only=True)
class Quantizer(ABC):
    """A quantization method with its options."""

    needs: ClassVar[Stats | None] = None
    """The sums over inputs that the method reads; None: no calibration."""

    def input_scale(
        self,
        weights: Sequence[Tensor],  # each [out, in] float32, of layers that share the input
        sums: InputStats | None,
        grid: Grid,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Mapping[str, float]] | None:
        """A scale of the inputs `[in]` float32 and numbers for the report; None: no scaling.

        The weights are multiplied by it before they are quantized, and the layer that produces the
        inputs is divided by it.
        """
        return None

    @abstractmethod
    def quantize(
        self,
        weight: Tensor,  # [out, in] float32, not to be changed
        sums: InputStats | None,
        grid: Grid,  # divides the inputs
        dtype: torch.dtype,
    ) -> Quantized:
        """Quantize a weight, with scales that `dtype` can hold.

        Raises:
            NumericalError: The sums or the solution are not finite.
        """
