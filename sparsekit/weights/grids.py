"""Quantization grids "int4-g128", "int8", "w8a8" and "fp8": codes times scales, with an exact zero.

All grids are symmetric, so code 0 stands for 0 and zeros of the weight stay zeros.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.errors import NumericalError, UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


GRIDS = ("int4-g128", "int8", "w8a8", "fp8")
# The largest value of float8_e4m3fn.
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that a weight can have: codes times one scale per row or group of inputs."""

    bits: int
    group: int = 0
    """Number of inputs that share a scale; 0: the whole row."""
    floating: bool = False
    """Whether codes are float8_e4m3fn instead of integers."""
    activations: bool = False
    """Whether the inputs are also rounded to this number of bits when the model runs."""

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Parse a grid, e.g. `int4-g64`.

        Raises:
            UsageError: The text is not a grid.
        """
        text = text.strip().lower()
        if text == "w8a8":
            return cls(bits=8, activations=True)
        if text == "fp8":
            return cls(bits=8, floating=True, activations=True)
        if match := re.fullmatch(r"int([48])(?:-g([1-9]\d*))?", text):
            return cls(bits=int(match[1]), group=int(match[2] or 0))
        raise UsageError(
            f"grid {text!r} is not known",
            f"one of {', '.join(GRIDS)}; write int4-g64 for another group, int4 for none",
            code="unknown-grid",
        )

    def __str__(self) -> str:
        if self.activations:
            return "fp8" if self.floating else "w8a8"
        return f"int{self.bits}" + (f"-g{self.group}" if self.group else "")

    def mismatch(self, columns: int) -> str:
        """Why a weight with this many inputs cannot have the grid; empty when it can."""
        if self.group and columns % self.group:
            return f"{columns} inputs do not divide into groups of {self.group}"
        return ""

    def scales(self, columns: int) -> int:
        """The number of scales of a row with this many inputs."""
        return columns // self.group if self.group else 1

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        if self.floating:
            return -FP8_MAX, FP8_MAX
        return -float(2 ** (self.bits - 1)), float(2 ** (self.bits - 1) - 1)

    def scale(
        self,
        weight: Tensor,  # [out, columns] float32
        dtype: torch.dtype,
    ) -> Tensor:
        """For each row the scale that spans its largest magnitude, `[out]` float32.

        Scales are rounded to `dtype`, their type on disk. A row of zeros gets 1. Integers have one
        more code below zero than above; the scale is chosen in between, as in compressed-tensors,
        so the largest magnitude is rounded by half a step at most.

        Raises:
            NumericalError: A scale is not finite.
        """
        import torch

        low, high = self.range
        largest = weight.abs().amax(1)
        scale = (largest * (2 / (high - low))).clamp_min(torch.finfo(dtype).tiny)
        scale = scale.to(dtype).float().masked_fill(largest == 0, 1.0)
        if not scale.isfinite().all():
            raise NumericalError(
                "a scale is not finite", f"{dtype} cannot hold it", code="not-finite"
            )
        return scale

    def round(
        self,
        weight: Tensor,  # float32
        scale: Tensor,  # broadcast over the weight
    ) -> Tensor:
        """The nearest codes, as float32; none is -0.0."""
        import torch

        codes = (weight / scale).clamp_(*self.range)
        codes = codes.to(torch.float8_e4m3fn).float() if self.floating else codes.round_()
        return codes.add_(0.0)

    def round_inputs(self, x: Tensor) -> Tensor:
        """Inputs `[..., in]` of a layer, rounded with one scale per token, in their dtype.

        This is what compressed-tensors computes when a model with `activations` runs.
        """
        import torch

        low, high = self.range
        scale = x.abs().amax(-1, keepdim=True) / ((high - low) / 2)
        scale = scale.masked_fill(scale == 0, torch.finfo(x.dtype).eps)
        return self.round(x, scale).to(x.dtype) * scale


@dataclass(frozen=True)
class Codes:
    """A weight on a grid."""

    codes: Tensor  # [out, in] int8 or float8_e4m3fn
    scale: Tensor  # [out, groups], in the dtype of the weight on disk
    grid: Grid

    @classmethod
    def of(
        cls,
        grid: Grid,
        codes: Tensor,  # [out, in] float32
        scale: Tensor,  # [out, groups] float32, rounded to `dtype`
        dtype: torch.dtype,
    ) -> Codes:
        """Codes and scales in their dtypes on disk."""
        import torch

        codes = codes.to(torch.float8_e4m3fn if grid.floating else torch.int8)
        return cls(codes, scale.to(dtype), grid)

    @classmethod
    def nearest(
        cls,
        grid: Grid,
        weight: Tensor,  # [out, in] float32
        dtype: torch.dtype,
    ) -> Codes:
        """The nearest codes, with scales that span the largest value of each row or group."""
        parts = weight.unflatten(1, (-1, grid.group or weight.shape[1]))  # [out, groups, group]
        scale = grid.scale(parts.flatten(0, 1), dtype).view(parts.shape[:2])
        return cls.of(grid, grid.round(parts, scale[..., None]).flatten(1), scale, dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`[out, in]`."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The trainable tensors, by name: the scales; codes are fixed."""
        return {"scale": self.scale}

    def to(self, dtype: torch.dtype) -> Codes:
        """This weight itself: codes and scales keep their dtypes."""
        return self

    def dense(self) -> Tensor:
        """The dequantized weight `[out, in]`, in the dtype of the scales."""
        groups = self.scale.shape[1]
        parts = self.codes.to(self.scale.dtype).unflatten(1, (groups, -1))
        return (parts * self.scale[..., None]).flatten(1)
