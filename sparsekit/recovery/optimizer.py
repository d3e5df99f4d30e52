"""Adam for a model some of whose weights are to become sparse: one step, with a rule for the decay.

The model computes with ordinary parameters, so that its forward and backward passes, and sums of
its gradients over processes, are those of any model. What is trained may lie beside the parameter:

- a rule with `masks_forward` makes the model compute with `mask * weight` while the other entries
  of the weight are kept; the gradient of the parameter is then the straight-through gradient, for
  all entries;
- with scales the parameter is `weight * scale`, one scale for each of a few spans of a row.

Source: one family (recovery specification, section 4.1): AdamW; SR-STE of AST (Huang et al., AAAI
2025, section "Annealing SR-STE"); AdamS of CAST (arXiv 2509.25996, algorithm 1).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import EllipsisType

import torch
from torch import Tensor

from sparsekit.errors import NumericalError
from sparsekit.recovery.methods import Rule
from sparsekit.recovery.sparse_weight import SparseWeight, is_sharded, local
from sparsekit.weights.packed import pack_bits, unpack_bits

# Ends the name of a weight's scale.
SCALE = ".scale"
# Entries of a piece of a tensor that is gone over several times on a CPU.
IN_CACHE = 1 << 18
# Added to second moments before the root: some processors take twenty times as long for that of 0.
# Far below what can be seen beside epsilon.
NEXT_TO_NOTHING = 1e-36


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Adam's constants."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Of matrices, decoupled and before the step, kept entries and others alike."""
    clip: float = 1.0
    """Largest norm of all gradients together; 0: no limit."""


class MaskedAdam:
    """Takes the steps of a whole model.

    Args:
        sparse: The weights that are to be sparse, by name.
        others: All other trained parameters, by name: AdamW, weight decay on matrices only.
        rule: How entries off the mask are treated.
        settings: The constants.
        sum_shards: Replaces a tensor by its sum over all processes, where parameters are sharded
            over these by rows (as `fully_shard` does); what is here are then the rows of this one.

    Raises:
        NumericalError: A mask does not fit its weight.
    """

    def __init__(
        self,
        sparse: Mapping[str, SparseWeight],
        others: Mapping[str, torch.nn.Parameter],
        rule: Rule,
        settings: Settings,
        sum_shards: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._sum_shards = sum_shards
        self.sparse = dict(sparse)
        self.others = dict(others)
        self.rule = rule
        self.settings = settings
        self.steps = 0
        """Steps taken."""
        for name, weight in self.sparse.items():
            _require_mask(name, weight)
        self._first = {name: pack_bits(weight.mask) for name, weight in self.sparse.items()}
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}
        for name, weight in self.sparse.items():
            self._moments[name] = _zeros(weight.weight)
            if weight.scale is not None:
                self._moments[name + SCALE] = _zeros(weight.scale)
        self._moments |= {name: _zeros(local(p.data)) for name, p in self.others.items()}

    @torch.no_grad()
    def step(self, rate: float, done: float) -> float:
        """Take one step with the gradients that the parameters hold, and drop them.

        Args:
            rate: The learning rate.
            done: Share of all steps that lie before this one.

        Returns:
            The norm of all gradients before clipping.

        Raises:
            NumericalError: The norm is NaN or Inf; nothing was changed.
        """
        gradients = self._gradients()
        norm = self._norm(gradients)
        if not norm < float("inf"):
            raise NumericalError(
                f"the gradient's norm is {norm}",
                "a smaller --lr may do",
            )
        clip = self.settings.clip
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        self.steps += 1
        for name, weight in self.sparse.items():
            self._step_sparse(name, weight, gradients, factor, rate, done)
        for name, parameter in self.others.items():
            decay = self.settings.weight_decay if parameter.ndim >= 2 else 0.0
            self._adam(name, local(parameter.data), gradients[name], factor, rate, decay)
        for parameter in (*(w.parameter for w in self.sparse.values()), *self.others.values()):
            parameter.grad = None
        return norm

    def refresh(self) -> int:
        """Select the largest entries of every weight anew; gives how many changed sides."""
        flips = sum(weight.refresh() for weight in self.sparse.values())
        if self.rule.masks_forward:
            for weight in self.sparse.values():
                weight.publish(masks_forward=True)
        return int(self.total(flips)[0])

    def flipped(self, name: str) -> int:
        """How many entries of a mask are not what they were before the first step."""
        weight = self.sparse[name]
        first = unpack_bits(self._first[name], weight.mask.shape[1]).bool()
        return int(self.total(int((weight.mask ^ first).sum()))[0])

    def total(self, *values: float) -> list[float]:
        """Sums over the sparse weights of this process, as sums over those of all."""
        found = torch.tensor(values, dtype=torch.float64)
        if self._sum_shards is not None:
            device = next(iter(self.sparse.values())).weight.device
            found = found.to(device)
            self._sum_shards(found)
        return found.tolist()

    def whole_gradients(self) -> list[Tensor]:
        """The gradients of parameters that every process has, in an order that is always the same.

        Those of sharded parameters have been summed over the processes in the backward pass.
        """
        parameters = [*(w.parameter for w in self.sparse.values()), *self.others.values()]
        return [p.grad for p in parameters if p.grad is not None and not is_sharded(p)]

    def fingerprint(self) -> str:
        """The sha256 of all masks."""
        digest = hashlib.sha256()
        for name, weight in self.sparse.items():
            digest.update(name.encode())
            digest.update(pack_bits(weight.mask).cpu().numpy().tobytes())
        return digest.hexdigest()

    def masked_mean(self) -> float:
        """Root mean square of the averaged gradient over all entries off the masks."""
        total, count = 0.0, 0
        for name, weight in self.sparse.items():
            mean = self._moments[name][0][~weight.mask]
            total += mean.square().sum(dtype=torch.float64).item()
            count += len(mean)
        total, count = self.total(total, count)
        return math.sqrt(total / max(1, count)) / (1 - self.settings.beta1**self.steps)

    def state(self) -> dict[str, Tensor]:
        """Everything that a step depends on, by name; masks as packed bits."""
        found: dict[str, Tensor] = {}
        for name, weight in self.sparse.items():
            found[f"{name}.weight"] = weight.weight
            found[f"{name}.mask"] = pack_bits(weight.mask)
            if weight.scale is not None:
                found[f"{name}{SCALE}.weight"] = weight.scale
        found |= {f"{name}.weight": local(p.data) for name, p in self.others.items()}
        for name, (mean, square) in self._moments.items():
            found |= {f"{name}.mean": mean, f"{name}.square": square}
        return found

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Go on from an earlier `state`, after so many steps.

        Raises:
            NumericalError: The state does not fit.
        """
        own = self.state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [
            name for name in own.keys() & state.keys() if own[name].shape != state[name].shape
        ]
        if wrong:
            raise NumericalError(f"the saved state does not fit this run: {wrong[0]}")
        for name, tensor in own.items():
            if not name.endswith(".mask"):
                tensor.copy_(state[name])
        for name, weight in self.sparse.items():
            mask = unpack_bits(state[f"{name}.mask"], weight.mask.shape[1]).bool()
            weight.mask = mask.to(weight.weight.device)
            weight.publish(masks_forward=self.rule.masks_forward)
        self.steps = steps

    def _gradients(self) -> dict[str, Tensor]:
        """By name the gradient of everything that is trained, `[out, in]` where it is sparse."""
        found: dict[str, Tensor] = {}
        for name, weight in self.sparse.items():
            gradient = weight.gradient
            if weight.scale is not None:
                spans = gradient.unflatten(1, (weight.scale.shape[1], -1))
                found[name + SCALE] = (spans * weight.weight.view_as(spans)).sum(-1)
                spans.mul_(weight.scale[:, :, None])
            found[name] = gradient if self.rule.updates_pruned else gradient.mul_(weight.mask)
        for name, parameter in self.others.items():
            if parameter.grad is None:
                raise NumericalError(f"{name} has no gradient: the loss does not depend on it")
            found[name] = local(parameter.grad)
        return found

    def _norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of all gradients together, over all processes."""
        sharded = {n for n, w in self.sparse.items() if is_sharded(w.parameter)}
        sharded |= {name + SCALE for name in sharded}
        sharded |= {name for name, p in self.others.items() if is_sharded(p)}
        first = next(iter(gradients.values()))
        sums = torch.zeros(2, device=first.device)  # of what all have, and of what each has a part
        for name, gradient in gradients.items():
            sums[int(name in sharded)] += torch.linalg.vector_norm(gradient).square()
        if self._sum_shards is not None:
            self._sum_shards(sums[1:])
        return sums.sum().sqrt().item()

    def _step_sparse(
        self,
        name: str,
        weight: SparseWeight,
        gradients: Mapping[str, Tensor],
        factor: float,
        rate: float,
        done: float,
    ) -> None:
        """One step of a sparse weight and its scale."""
        decay = self.settings.weight_decay
        self._adam(name, weight.weight, gradients[name], factor, rate, decay, weight.mask, done)
        if weight.scale is not None:
            self._adam(name + SCALE, weight.scale, gradients[name + SCALE], factor, rate, 0.0)
        weight.publish(masks_forward=self.rule.masks_forward)

    def _adam(
        self,
        name: str,
        weight: Tensor,  # changed in place
        gradient: Tensor,  # the same
        factor: float,
        rate: float,
        decay: float,
        mask: Tensor | None = None,
        done: float = 0.0,
    ) -> None:
        """One step of one tensor, on a CPU a piece after the other."""
        beta1, beta2, rule = self.settings.beta1, self.settings.beta2, self.rule
        for piece in _pieces(weight):
            mean, square = (moment[piece] for moment in self._moments[name])
            w, g = weight[piece], gradient[piece]
            kept = None if mask is None else mask[piece]
            if factor < 1:
                g.mul_(factor)
            if kept is not None:
                g = rule.on_gradient(g, w, kept, done)
            if decay:
                w.mul_(1 - rate * decay)
            mean.lerp_(g, 1 - beta1)
            mixed = mean if kept is None else rule.mix(mean, w, kept, done)
            squared = mixed if kept is not None and rule.second_moment_of_mixed else g
            square.mul_(beta2).addcmul_(squared, squared, value=1 - beta2)
            size = (square / (1 - beta2**self.steps)).add_(NEXT_TO_NOTHING).sqrt_()
            size += self.settings.epsilon
            w.addcdiv_(mixed, size, value=-rate / (1 - beta1**self.steps))


def _require_mask(name: str, weight: SparseWeight) -> None:
    """Refuse a mask that does not fit its weight.

    Raises:
        NumericalError: Names the weight.
    """
    mask, values = weight.mask, weight.weight
    if mask.shape != values.shape or mask.device != values.device or mask.dtype != torch.bool:
        raise NumericalError(
            f"{name}: a mask of {mask.dtype} {tuple(mask.shape)} on {mask.device} does not fit "
            f"a weight {tuple(values.shape)} on {values.device}"
        )


def _pieces(tensor: Tensor) -> list[slice | EllipsisType]:
    """What indexes the pieces of a tensor that are worked on one after the other."""
    if tensor.is_cuda or tensor.numel() <= IN_CACHE:
        return [...]
    rows = max(1, IN_CACHE // tensor[0].numel())
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments of a weight, before the first step."""
    return torch.zeros_like(weight), torch.zeros_like(weight)
