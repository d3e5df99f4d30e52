"""What "int4-g128", "int8", "w8a8" and "fp8" mean: codes times scales, with an exact zero.

All grids are symmetric, so that code 0 stands for 0 and a zero of the weight stays one.
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
# The largest number of float8_e4m3fn.
FP8_MOST = 448.0


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a weight may have: codes, times a scale for each row or group of one."""

    bits: int
    group: int = 0
    """Inputs that share a scale; 0: a whole row does."""
    floating: bool = False
    """Whether codes are float8_e4m3fn; else integers."""
    activations: bool = False
    """Whether inputs are rounded to as many bits too, when the model runs."""

    @classmethod
    def parse(cls, text: str) -> Grid:
        """The grid that a text names, as `int4-g64`.

        Raises:
            UsageError: The text is no grid.
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
            f"one of {', '.join(GRIDS)}; another group is written as int4-g64, none as int4",
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
        """How many scales a row with so many inputs has."""
        return columns // self.group if self.group else 1

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        if self.floating:
            return -FP8_MOST, FP8_MOST
        return -float(2 ** (self.bits - 1)), float(2 ** (self.bits - 1) - 1)

    def scale(
        self,
        weight: Tensor,  # [out, columns] float32
        dtype: torch.dtype,
    ) -> Tensor:
        """For each row the scale that spans its largest number, `[out]` float32.

        Its value is one that `dtype`, the type on disk, can hold. It is 1 for a row of zeros.
        Integers have one code more below zero than above; the scale lies in between, as in
        compressed-tensors, so that the largest number is rounded by half a step at most.

        Raises:
            NumericalError: A scale is not finite.
        """
        import torch

        low, high = self.range
        largest = weight.abs().amax(1)
        scale = (largest * (2 / (high - low))).clamp_min(torch.finfo(dtype).tiny)
        scale = scale.to(dtype).float().masked_fill(largest == 0, 1.0)
        if not scale.isfinite().all():
            raise NumericalError("a scale is not finite", f"{dtype} cannot hold it")
        return scale

    def round(
        self,
        weight: Tensor,  # float32
        scale: Tensor,  # to be divided by
    ) -> Tensor:
        """The nearest codes, as float32; none is -0.0."""
        import torch

        codes = (weight / scale).clamp_(*self.range)
        codes = codes.to(torch.float8_e4m3fn).float() if self.floating else codes.round_()
        return codes.add_(0.0)

    def round_inputs(self, x: Tensor) -> Tensor:
        """Inputs `[..., in]` of a layer, each token rounded with a scale of its own, in their type.

        As compressed-tensors does it when a model with `activations` runs.
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
    scale: Tensor  # [out, groups], in the type that the weight had on disk
    grid: Grid

    @classmethod
    def of(
        cls,
        grid: Grid,
        codes: Tensor,  # [out, in] float32
        scale: Tensor,  # [out, groups] float32, of values that `dtype` can hold
        dtype: torch.dtype,
    ) -> Codes:
        """Codes and scales in the types on disk."""
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
        """Each number's nearest, with a scale that spans the largest of each row or group."""
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
        """What training may change: the scales; codes are fixed."""
        return {"scale": self.scale}

    def to(self, dtype: torch.dtype) -> Codes:
        """The same: codes and scales keep their types."""
        return self

    def dense(self) -> Tensor:
        """The weight `[out, in]` in the scale's type, as compressed-tensors computes it.

        A product of a code and a scale is rounded to that type.
        """
        groups = self.scale.shape[1]
        parts = self.codes.to(self.scale.dtype).unflatten(1, (groups, -1))
        return (parts * self.scale[..., None]).flatten(1)
