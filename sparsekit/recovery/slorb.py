"""A trained low-rank branch beside a sparse linear layer (SLoRB)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.weights.form import low_rank


class Branch(nn.Module):
    """x ↦ (x Xᵀ) Sᵀ, added to what a linear layer gives.

    X begins as the sum over each span of `width` inputs, and S as the mean of what the sparse
    weight lacks in the span: then every row has the sum over each span that it has when dense.

    Source: AST (Huang et al., AAAI 2025), section "SLoRB", mean initialisation.
    Differs: what the sparse weight lacks is measured against the dense parent, so that a branch can
    also begin beside a weight that was pruned and updated.

    Args:
        lost: W − Ŵ, `[out, in]`.
        width: Inputs of a span; divides them.
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
    """Let a layer add the branch to its output; its parameters become the layer's."""
    layer.branch = branch
    layer.register_forward_hook(lambda module, inputs, output: output + module.branch(inputs[0]))
