"""A sparse weight in training, and the parameter that the model computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.recovery.methods import Rule
from sparsekit.weights.patterns import Pattern


@dataclass(eq=False)
class SparseWeight:
    """A weight with its mask, and the parameter that the model computes with."""

    parameter: torch.nn.Parameter
    transposed: bool
    """Whether the parameter is stored as `[in, out]` (GPT-2's Conv1D)."""
    pattern: Pattern
    weight: (
        Tensor  # [out, in] float32, trained; the parameter itself without masks_forward and scales
    )
    mask: Tensor  # [out, in] bool, True = keep
    scale: Tensor | None = None  # [out, spans] float32
    inputs: Tensor | None = None  # [in] float32, factors of the entries in mask selection

    @classmethod
    def of(
        cls,
        parameter: torch.nn.Parameter,
        pattern: Pattern,
        *,
        transposed: bool = False,
        rule: Rule,
        spans: int = 0,
        inputs: Tensor | None = None,
    ) -> SparseWeight:
        """The weight of a parameter, with the mask of its largest entries.

        Other entries become zero, unless the rule updates pruned entries.

        Raises:
            NumericalError: The parameter is not float32: steps of 1e-5 of a weight's size are lost
                in 16 bits.
        """
        if parameter.dtype != torch.float32:
            raise NumericalError(
                f"weights of type {str(parameter.dtype).removeprefix('torch.')} cannot be trained: "
                "a step is smaller than their resolution",
                "load the model in float32",
                code="wrong-dtype",
            )
        view = local(parameter.data).T if transposed else local(parameter.data)
        weight = view.clone() if rule.masks_forward or spans else view
        scale = torch.ones(len(view), spans, device=view.device) if spans else None
        mask = pattern.mask(view.abs() if inputs is None else view.abs() * inputs)
        sparse = cls(parameter, transposed, pattern, weight, mask, scale, inputs)
        if not rule.updates_pruned:
            weight.masked_fill_(~mask, 0.0)
        sparse.publish(masks_forward=rule.masks_forward)
        return sparse

    @property
    def view(self) -> Tensor:
        """The parameter's values as `[out, in]`; the local rows of a sharded one."""
        values = local(self.parameter.data)
        return values.T if self.transposed else values

    @property
    def gradient(self) -> Tensor:
        """The gradient of the parameter as `[out, in]`."""
        gradient = self.parameter.grad
        if gradient is None:
            message = "a sparse weight has no gradient: the loss does not depend on it"
            raise NumericalError(message, code="no-gradient")
        return local(gradient).T if self.transposed else local(gradient)

    @property
    def values(self) -> Tensor:
        """The weight of the sparse model, `[out, in]`: kept entries times their scale."""
        kept = self.weight.masked_fill(~self.mask, 0.0)
        return kept if self.scale is None else self.scaled(kept)

    def scaled(self, tensor: Tensor) -> Tensor:
        """A tensor `[out, in]` times the scale of each entry."""
        if self.scale is None:
            return tensor
        spans = self.scale.shape[1]
        return (tensor.unflatten(1, (spans, -1)) * self.scale[:, :, None]).flatten(1)

    def publish(self, *, masks_forward: bool) -> None:
        """Update the parameter from the weight."""
        if masks_forward:
            torch.mul(self.weight, self.mask, out=self.view)
        elif self.scale is not None:
            self.view.copy_(self.scaled(self.weight))

    def refresh(self) -> int:
        """Select the mask again; returns the number of changed entries."""
        old = self.mask
        sizes = self.weight.abs()
        self.mask = self.pattern.mask(sizes if self.inputs is None else sizes * self.inputs)
        return int((old ^ self.mask).sum())


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of a parameter."""
    return hasattr(parameter, "to_local")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor
