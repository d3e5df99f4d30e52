"""Hessians of the layer error tr(D G Dᵀ) of a weight change D: damping, factorisation, solving."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.solvers.input_stats import InputStats, require_finite

# A failed factorisation is tried again with ten times the damping, up to this share.
MAX_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True)
class HessianFactor:
    """A unit upper triangular A and pivots c with A diag(c) Aᵀ = H + damping, H = 2/rows · Gram.

    With D[k] the error of column k of a weight, the layer error is the sum over the columns j of
    c[j] ‖D[j] + Σ A[k, j] D[k]‖², k < j. From left to right, weight j therefore compensates best
    for the errors before it by adding Σ A[k, j] D[k]; removing the resulting value v adds c[j] v².
    """

    compensation: Tensor  # A [in, in] float32
    pivot: Tensor  # c [in] float32: the conditional variances, inverse squares of published U_jj
    dead: Tensor  # [in] bool: inputs that were zero for every token
    damping: float  # share of the mean diagonal that was added


def factorise(sums: InputStats, damping: float) -> HessianFactor:
    """The factor for optimal-brain-surgeon sweeps, shared by weights with the same input.

    One Cholesky step instead of the published three with an inverse: with J the reversal of the
    order and J H J = L Lᵀ, the matrix J L J is A diag(√c). The published U is its inverse; in exact
    arithmetic both lead to the same sweep (Chee et al. 2023, "QuIP", on LDLQ and OPTQ).

    Args:
        sums: Statistics with a Gram matrix.
        damping: Share of the mean diagonal to add; raised tenfold until H is positive definite.

    Raises:
        NumericalError: The Gram matrix holds NaN or Inf, or no damping up to 1 helps.
    """
    return sums.derived(("factor", damping), lambda: _factorise(sums, damping))


def _factorise(sums: InputStats, damping: float) -> HessianFactor:
    hessian = sums.gram * (2 / sums.rows)
    require_finite(hessian)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    mean = float(diagonal.mean())
    bare = diagonal.clone()
    used = damping
    while used <= max(damping, MAX_DAMPING):
        diagonal.copy_(bare + used * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            upper = lower.flip(0, 1)
            root = upper.diagonal().clone()
            upper /= root
            if upper.isfinite().all():
                return HessianFactor(
                    compensation=upper, pivot=root.square(), dead=dead, damping=used
                )
        used = max(used * 10, 1e-4)
    raise NumericalError(
        f"the Gram matrix of {sums.tokens} tokens is not positive definite with damping up to "
        f"{MAX_DAMPING}",
        "use more calibration rows",
        code="not-positive-definite",
    )


@dataclass(frozen=True, kw_only=True)
class UnitGram:
    """The damped Gram matrix scaled to a unit diagonal: `gram[i, j] = G[i, j] / (d[i] d[j])`."""

    gram: Tensor  # [in, in] float32
    scale: Tensor  # d [in] float32; a weight is multiplied by it to match


def unit_gram(sums: InputStats, damping: float) -> UnitGram:
    """The system matrix of least squares on a support, shared by weights with the same input.

    Args:
        sums: Statistics with a Gram matrix.
        damping: Share of the mean diagonal to add to the diagonal.

    Raises:
        NumericalError: The Gram matrix holds NaN or Inf.
    """

    def compute() -> UnitGram:
        gram = sums.gram.clone()
        require_finite(gram)
        diagonal = gram.diagonal()
        diagonal += damping * diagonal.mean()
        diagonal[diagonal == 0] = 1
        scale = diagonal.sqrt()
        gram /= scale[:, None] * scale
        return UnitGram(gram=gram, scale=scale)

    return sums.derived(("unit_gram", damping), compute)


def solve_on_support(
    weight: Tensor,  # W [out, in] float32
    mask: Tensor,  # [out, in] bool, True = keep
    system: UnitGram,
    *,
    start: Tensor | None = None,  # [out, in]; W where None
    iterations: int = 10,
    tolerance: float = 1e-4,
) -> Tensor:
    """The weights on `mask` that minimise tr((W−Ŵ) G (W−Ŵ)ᵀ), `[out, in]` float32.

    Conjugate gradients, one independent system for each row but all rows in one product, with
    the diagonal of G as preconditioner (`system` is already scaled by it).

    Args:
        weight: The dense weight.
        mask: The support.
        system: The quadratic form.
        start: The initial solution, restricted to the mask.
        iterations: At most this many products with G.
        tolerance: A row is done when its residual has fallen to this share of the first one.
    """
    target = weight * system.scale
    solution = (weight if start is None else start) * system.scale * mask
    residual = ((target - solution) @ system.gram) * mask
    direction = residual.clone()
    square = residual.square().sum(-1, keepdim=True)  # [out, 1]
    enough = square * tolerance**2
    for _ in range(iterations):
        active = square > enough
        if not active.any():
            break
        image = (direction @ system.gram) * mask
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where(active & (curvature > 0), square / curvature, 0.0)
        solution += step * direction
        residual -= step * image
        new_square = residual.square().sum(-1, keepdim=True)
        direction = residual + torch.where(active, new_square / square, 0.0) * direction
        square = new_square
    return torch.where(mask, solution / system.scale, 0.0)
