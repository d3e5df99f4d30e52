"""SLoRB: a trained low-rank branch next to a sparse linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.weights.form import low_rank


class Branch(nn.Module):
    """x ↦ (x Xᵀ) Sᵀ, added to the output of a linear layer.

    X starts as the sum over each span of `width` inputs, and S as the mean of the pruning error in
    the span, so that every row keeps the dense weight's sum over each span.

    Source: AST (Huang et al., AAAI 2025), section "SLoRB", mean initialisation.
    Differs: the error is measured against the dense model, so that branches also work for weights
    that were updated when they were pruned.

    Args:
        lost: W − Ŵ, `[out, in]`.
        width: Inputs per span; divides the number of inputs.
    """

    def __init__(self, lost: Tensor, width: int) -> None:
        super().__init__()
        spans = lost.shape[1] // width
        self.up = nn.Parameter(lost.unflatten(1, (spans, width)).mean(-1))  # S [out, spans]
        inputs = torch.arange(lost.shape[1], device=lost.device)
        rows = torch.arange(spans, device=lost.device)
        self.down = nn.Parameter((inputs // width == rows[:, None]).to(lost.dtype))  # X [spans, in]

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return low_rank(x, self.up, self.down)


def attach(layer: nn.Module, branch: Branch) -> None:
    """Add a branch to the output of a layer, as a submodule of it."""
    layer.branch = branch
    layer.register_forward_hook(lambda module, inputs, output: output + module.branch(inputs[0]))
