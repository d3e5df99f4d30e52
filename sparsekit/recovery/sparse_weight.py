"""A weight that is to become sparse, beside the parameter that the model computes with."""

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
    weight: Tensor  # [out, in] float32: what is trained; the parameter itself when nothing hides
    mask: Tensor  # [out, in] bool, True = keep
    scale: Tensor | None = None  # [out, spans] float32
    inputs: Tensor | None = None  # [in] float32: by what the size of an entry is multiplied

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
        """The weight in a parameter, with the mask of its largest entries.

        Under a rule that frees no other entries, these become zero.

        Raises:
            NumericalError: The parameter is not float32: steps of 1e-5 of the size of a weight are
                lost in 16 bits.
        """
        if parameter.dtype != torch.float32:
            raise NumericalError(
                f"weights of type {str(parameter.dtype).removeprefix('torch.')} cannot be trained: "
                "a step is smaller than their resolution",
                "load the model in float32",
            )
        view = local(parameter.data).T if transposed else local(parameter.data)
        weight = view.clone() if rule.masks_forward or spans else view
        scale = torch.ones(len(view), spans, device=view.device) if spans else None
        mask = pattern.mask(view.abs() if inputs is None else view.abs() * inputs)
        made = cls(parameter, transposed, pattern, weight, mask, scale, inputs)
        if not rule.updates_pruned:
            weight.masked_fill_(~made.mask, 0.0)
        made.publish(masks_forward=rule.masks_forward)
        return made

    @property
    def view(self) -> Tensor:
        """The parameter's values as `[out, in]`; of a sharded one the rows that are here."""
        here = local(self.parameter.data)
        return here.T if self.transposed else here

    @property
    def gradient(self) -> Tensor:
        """The gradient by the parameter as `[out, in]`."""
        found = self.parameter.grad
        if found is None:
            raise NumericalError("a sparse weight has no gradient: the loss does not depend on it")
        return local(found).T if self.transposed else local(found)

    @property
    def values(self) -> Tensor:
        """What the weight is in the sparse model, `[out, in]`: kept entries times their scale."""
        kept = self.weight.masked_fill(~self.mask, 0.0)
        return kept if self.scale is None else self.scaled(kept)

    def scaled(self, tensor: Tensor) -> Tensor:
        """A tensor `[out, in]` times the scale of each entry."""
        if self.scale is None:
            return tensor
        spans = self.scale.shape[1]
        return (tensor.unflatten(1, (spans, -1)) * self.scale[:, :, None]).flatten(1)

    def publish(self, *, masks_forward: bool) -> None:
        """Bring the parameter up to date with the weight."""
        if masks_forward:
            torch.mul(self.weight, self.mask, out=self.view)
        elif self.scale is not None:
            self.view.copy_(self.scaled(self.weight))

    def refresh(self) -> int:
        """Select the largest entries anew; gives how many entries changed sides."""
        old = self.mask
        sizes = self.weight.abs()
        self.mask = self.pattern.mask(sizes if self.inputs is None else sizes * self.inputs)
        return int((old ^ self.mask).sum())


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds a part of a parameter only."""
    return hasattr(parameter, "to_local")


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, unless it is sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor
