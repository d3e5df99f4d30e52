"""The low-rank matrix that makes up for most of what a weight has lost."""

from __future__ import annotations

import torch
from torch import Tensor


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
