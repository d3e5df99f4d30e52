"""Low-rank compensation of the error of a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def compensate(
    error: Tensor,  # W − Ŵ [out, in]
    scale: Tensor,  # [in], the norm of each input
    rank: int,
) -> tuple[Tensor, Tensor]:
    """L `[out, rank]` and R `[rank, in]` that minimise ‖(error − L R) diag(scale)‖.

    The leading left singular vectors of error · diag(scale) span L; they are computed as
    eigenvectors of the smaller of its two Gram matrices, in float64. Source: Mozaffari et al. 2025,
    SLiM, section 3.2 (saliency-based low-rank adapters).
    """
    scaled = (error * scale).double()
    if error.shape[0] <= error.shape[1]:
        vectors = torch.linalg.eigh(scaled @ scaled.T).eigenvectors[:, -rank:]
    else:
        inner = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:]
        vectors = torch.linalg.qr(scaled @ inner).Q
    return vectors.float(), (vectors.T @ error.double()).float()
