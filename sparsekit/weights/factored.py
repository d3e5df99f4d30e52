"""A weight kept as factors: A S B with a sparse core S, stored so that it is smaller than dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.weights.packed import check_shapes, mask_of, pack, unpack
from sparsekit.weights.patterns import Pattern

# The tensors in which factors are stored, by the last part of their name; the first two are always
# there.
PARTS = ("values", "indices", "left", "right", "up", "down")


@dataclass(frozen=True, kw_only=True)
class Factored:
    """W ≈ A S B + L R; sides that are None are identities, L R is left out when it is None."""

    core: Tensor  # S [out, in], exact zeros off the mask
    mask: Tensor  # [out, in] bool
    left: Tensor | None = None  # A [out/b, b, b], the blocks of a block-diagonal matrix
    right: Tensor | None = None  # B [in/b, b, b]
    up: Tensor | None = None  # L [out, rank]
    down: Tensor | None = None  # R [rank, in]

    def to(self, dtype: torch.dtype) -> Factored:
        """The factors rounded to the type in which they are stored."""
        parts = {"core": self.core, **self._sides()}
        # A small negative value may round to -0.0, which the sum makes 0.
        return replace(self, **{name: part.to(dtype).float() + 0.0 for name, part in parts.items()})

    def dense(self) -> Tensor:
        """A S B + L R, `[out, in]` float32."""
        weight = self.core
        if self.right is not None:
            weight = times_right(weight, self.right)
        if self.left is not None:
            weight = times_left(self.left, weight)
        if self.up is not None and self.down is not None:
            weight = weight + self.up @ self.down
        return weight

    def stored(self, pattern: Pattern, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensors that go to disk, by the last part of their name."""
        values, indices = pack(self.core, self.mask, pattern)
        found = {"values": values.to(dtype), "indices": indices}
        found |= {name: part.to(dtype) for name, part in self._sides().items()}
        return {name: part.cpu().contiguous() for name, part in found.items()}

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], pattern: Pattern, columns: int) -> Factored:
        """The factors from the tensors on disk, in float32.

        Args:
            stored: What `stored` gave.
            pattern: The pattern of the core.
            columns: Inputs of the weight.

        Raises:
            DataError: The tensors do not fit together.
        """
        rows = len(stored["indices"])
        check_shapes(
            {name: tuple(part.shape) for name, part in stored.items()}, rows, columns, pattern
        )
        packed = stored["values"].float(), stored["indices"], pattern, columns
        mask, core = mask_of(*packed), unpack(*packed)
        sides = {name: stored[name].float() for name in PARTS[2:] if name in stored}
        return cls(core=core, mask=mask, **sides)

    def _sides(self) -> dict[str, Tensor]:
        """The dense factors that there are."""
        found = {name: getattr(self, name) for name in PARTS[2:]}
        return {name: part for name, part in found.items() if part is not None}


def first_off(product: Tensor, weight: Tensor) -> tuple[int, int] | None:
    """Row and column where a weight `[out, in]` is no product of its factors; None when it is.

    Products are float32 sums in any order, rounded to the type of the weight: they may differ by
    one unit in the last place, and by the rounding of terms that cancel.
    """
    unit = torch.finfo(weight.dtype).eps
    off = (weight.double() - product.double()).abs()
    allowed = unit * weight.double().abs() + 1e-5 * product.abs().max()
    places = (off > allowed).nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def compensate(
    lost: Tensor,  # W − Ŵ [out, in]
    scale: Tensor,  # [in], the norm of each input
    rank: int,
) -> tuple[Tensor, Tensor]:
    """L `[out, rank]` and R `[rank, in]` with the least ‖(lost − L R) diag(scale)‖.

    The leading left singular vectors of lost · diag(scale) span L; they are taken from the
    eigenvectors of the smaller of its two Gram matrices, in float64. Source: Mozaffari et al. 2025,
    SLiM, section 3.2 (saliency-based low-rank adapters).
    """
    scaled = (lost * scale).double()
    if lost.shape[0] <= lost.shape[1]:
        vectors = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    else:
        inner = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
        vectors = torch.linalg.qr(scaled @ inner).Q
    return vectors.float(), (vectors.T @ lost.double()).float()


def times_right(weight: Tensor, blocks: Tensor) -> Tensor:
    """`[rows, in]` times a block-diagonal matrix `[K, b, b]`."""
    return (_columns(weight, blocks.shape[1]) @ blocks).transpose(0, 1).flatten(1)


def times_left(blocks: Tensor, weight: Tensor) -> Tensor:
    """A block-diagonal matrix `[J, b, b]` times `[out, columns]`."""
    return (blocks @ _rows(weight, blocks.shape[2])).flatten(0, 1)


def _rows(weight: Tensor, block: int) -> Tensor:
    """`[J, b, in]`, a view."""
    return weight.unflatten(0, (-1, block))


def _columns(weight: Tensor, block: int) -> Tensor:
    """`[K, rows, b]`, a view; a vector counts as one row."""
    weight = weight if weight.ndim == 2 else weight[None]
    return weight.unflatten(1, (-1, block)).transpose(0, 1)
