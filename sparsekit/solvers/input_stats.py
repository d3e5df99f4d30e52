"""Running statistics of the inputs of a weight, from which pruners choose."""

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import NumericalError

# A Gram matrix is symmetric: panels of this many rows, from the diagonal to the right edge,
# need little more than half the multiplications of the full product.
PANEL = 192
# How many calibration tokens, evenly spaced over all rows, the output error is measured on.
SAMPLE_TOKENS = 256
# Memory to factorise a Gram matrix, in bytes for each of its entries.
FACTORING_BYTES = 8 * 2


class Stats(enum.Flag):
    """Which statistics to keep; they can be combined."""

    NORMS = enum.auto()
    """The sum of squares of each input."""
    MOMENTS = enum.auto()
    """Also the sum of each input, and its variance within a calibration row."""
    GRAM = enum.auto()
    """The whole Gram matrix, whose diagonal is the sum of squares."""


class InputStats:
    """Statistics of the inputs of one or more weights that read the same tensor.

    Rows are added one at a time and in order, so the statistics do not depend on a batch size.
    Products within a row are float32. Column sums over rows are float64; the Gram matrix is
    float32, as in the published implementations.

    Args:
        columns: Number of inputs.
        want: The statistics to keep.
        device: Their device.
    """

    def __init__(self, columns: int, want: Stats, device: torch.device | str = "cpu") -> None:
        self.columns = columns
        self.rows = 0
        self.tokens = 0
        self._sample: list[Tensor] = []
        self._derived: dict[Any, Any] = {}
        self._squares: Tensor | None = None
        self._gram: Tensor | None = None
        self._totals: Tensor | None = None
        self._row_squares: Tensor | None = None  # over rows, (sum over the row's tokens)² / tokens
        double = {"dtype": torch.float64, "device": device}
        if Stats.GRAM in want:
            self._gram = torch.zeros(columns, columns, device=device)
        else:
            self._squares = torch.zeros(columns, **double)
        if Stats.MOMENTS in want:
            self._totals = torch.zeros(columns, **double)
            self._row_squares = torch.zeros(columns, **double)

    def update(self, inputs: Tensor, sample: int = 0) -> None:
        """Add one calibration row.

        Args:
            inputs: `[tokens, in]`, any float dtype.
            sample: How many of these tokens, evenly spaced, to keep for `relative_error`.
        """
        x = inputs.float()
        self.rows += 1
        self.tokens += len(x)
        self._derived.clear()
        if self._gram is not None:
            for top in range(0, self.columns, PANEL):
                panel = x[:, top : top + PANEL]
                self._gram[top : top + PANEL, top:].addmm_(panel.T, x[:, top:])
        if self._squares is not None:
            self._squares += x.square().sum(0)
        if self._totals is not None and self._row_squares is not None:
            total = x.sum(0).double()
            self._totals += total
            self._row_squares += total.square() / len(x)
        if sample:
            index = torch.arange(sample, device=x.device) * len(x) // sample
            self._sample.append(x[index])

    @property
    def squares(self) -> Tensor:
        """Sum over all tokens of the squared input, `[in]` float32."""
        if self._gram is not None:
            return self._gram.diagonal().clone()
        assert self._squares is not None
        return self._squares.float()

    @property
    def totals(self) -> Tensor:
        """Sum over all tokens of the input, `[in]` float32."""
        if self._totals is None:
            raise ValueError("no moments were kept: construct with Stats.MOMENTS")
        return self._totals.float()

    @property
    def variance(self) -> Tensor:
        """Variance over the tokens of a row, averaged over all tokens, `[in]` float32."""
        if self._row_squares is None:
            raise ValueError("no moments were kept: construct with Stats.MOMENTS")
        squares = self.squares.double()
        return ((squares - self._row_squares) / self.tokens).clamp_min(0).float()

    @property
    def gram(self) -> Tensor:
        """Sum over all tokens of x xᵀ, `[in, in]` float32; not to be changed in place."""
        if self._gram is None:
            raise ValueError("no Gram matrix was kept: construct with Stats.GRAM")
        return self.derived("gram", self._mirror)

    def _mirror(self) -> Tensor:
        """Copy the upper triangle to the lower one, in place."""
        assert self._gram is not None
        for top in range(0, self.columns, PANEL):
            bottom = top + PANEL
            self._gram[bottom:, top:bottom] = self._gram[top:bottom, bottom:].T
            square = self._gram[top:bottom, top:bottom]
            square.copy_(square.triu() + square.triu(1).T)
        return self._gram

    def derived(self, key: Any, compute: Callable[[], Any]) -> Any:
        """A result that several weights share, computed once from these statistics."""
        if key not in self._derived:
            self._derived[key] = compute()
        return self._derived[key]

    def relative_error(
        self,
        dense: Tensor,  # W [out, in]
        pruned: Tensor,  # Ŵ [out, in]
    ) -> float | None:
        """‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² over the sampled inputs X; None when nothing was sampled.

        The sampled tokens do not depend on the method, so errors are comparable between methods.

        Raises:
            NumericalError: An output is NaN or Inf.
        """
        if not self._sample:
            return None
        x = torch.cat(self._sample)  # [sampled tokens, in]
        total = torch.linalg.matrix_norm((x @ dense.float().T).double())
        error = torch.linalg.matrix_norm((x @ (dense.float() - pruned.float()).T).double())
        if not (total.isfinite() and error.isfinite()):
            raise NumericalError("the outputs on sampled inputs are not finite", code="not-finite")
        return float((error / total) ** 2) if total > 0 else 0.0


def require_finite(sums: Tensor) -> None:
    """Refuse sums over calibration inputs that are not finite.

    Raises:
        NumericalError: They hold NaN or Inf.
    """
    if not sums.isfinite().all():
        raise NumericalError(
            "the calibration inputs hold NaN or Inf",
            "compute in a wider type: --dtype float32",
            code="not-finite",
        )
