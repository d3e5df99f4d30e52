"""Adam for models with sparse weights; a rule defines how pruned entries are updated.

The model computes with ordinary parameters, so forward and backward passes and reductions over
processes are those of any model. The trained weight may differ from the parameter:

- a rule with `masks_forward` makes the model compute with `mask * weight` while the other entries
  of the weight are kept; the gradient of the parameter is then the straight-through gradient, for
  all entries;
- with scales the parameter is `weight * scale`, one scale for each of a few spans of a row.

Source: AdamW; SR-STE of AST (Huang et al., AAAI 2025, section "Annealing SR-STE"); AdamS of CAST
(arXiv 2509.25996, algorithm 1). All three are the same step with different rules.
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

# Suffix of the name of a weight's scale.
SCALE = ".scale"
# Entries of a part of a tensor that fits the CPU cache.
IN_CACHE = 1 << 18
# Added to second moments before the square root, which takes twenty times as long for 0 on some
# processors; negligible next to epsilon.
NEXT_TO_NOTHING = 1e-36


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Adam's constants."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices, kept and pruned entries alike."""
    clip: float = 1.0
    """Largest norm of all gradients; 0: no clipping."""


class MaskedAdam:
    """Optimizer of a whole model.

    Args:
        sparse: The sparse weights, by name.
        others: All other trained parameters, by name: AdamW, weight decay on matrices only.
        rule: Defines how entries off the mask are updated.
        settings: The constants.
        sum_shards: Replaces a tensor by its sum over all processes, for parameters sharded by rows
            (`fully_shard`), of which each process holds its own rows.

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
        """Take one step with the gradients of the parameters, and clear them.

        Args:
            rate: The learning rate.
            done: Share of all steps taken before this one.

        Returns:
            The norm of all gradients before clipping.

        Raises:
            NumericalError: The norm is NaN or Inf; no weight was changed.
        """
        gradients = self._gradients()
        norm = self._norm(gradients)
        if not norm < float("inf"):
            raise NumericalError(
                f"the norm of the gradient is {norm}",
                "try a smaller --lr",
                code="not-finite",
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
        """Select the masks again; returns the number of changed entries."""
        flips = sum(weight.refresh() for weight in self.sparse.values())
        if self.rule.masks_forward:
            for weight in self.sparse.values():
                weight.publish(masks_forward=True)
        return int(self.total(flips)[0])

    def flipped(self, name: str) -> int:
        """Number of mask entries that differ from the initial mask."""
        weight = self.sparse[name]
        first = unpack_bits(self._first[name], weight.mask.shape[1]).bool()
        return int(self.total(int((weight.mask ^ first).sum()))[0])

    def total(self, *values: float) -> list[float]:
        """Sums over all processes of values of this process's sparse weights."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self._sum_shards is not None:
            device = next(iter(self.sparse.values())).weight.device
            sums = sums.to(device)
            self._sum_shards(sums)
        return sums.tolist()

    def whole_gradients(self) -> list[Tensor]:
        """The gradients of parameters that are not sharded, in a fixed order.

        Gradients of sharded parameters are reduced over the processes in the backward pass.
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
        """Root mean square of the averaged gradient over the entries off the masks."""
        total, count = 0.0, 0
        for name, weight in self.sparse.items():
            mean = self._moments[name][0][~weight.mask]
            total += mean.square().sum(dtype=torch.float64).item()
            count += len(mean)
        total, count = self.total(total, count)
        return math.sqrt(total / max(1, count)) / (1 - self.settings.beta1**self.steps)

    def state(self) -> dict[str, Tensor]:
        """All tensors that a step depends on, by name; masks as packed bits."""
        state: dict[str, Tensor] = {}
        for name, weight in self.sparse.items():
            state[f"{name}.weight"] = weight.weight
            state[f"{name}.mask"] = pack_bits(weight.mask)
            if weight.scale is not None:
                state[f"{name}{SCALE}.weight"] = weight.scale
        state |= {f"{name}.weight": local(p.data) for name, p in self.others.items()}
        for name, (mean, square) in self._moments.items():
            state |= {f"{name}.mean": mean, f"{name}.square": square}
        return state

    def load_state(self, state: Mapping[str, Tensor], steps: int) -> None:
        """Resume from an earlier `state`, saved after `steps` steps.

        Raises:
            NumericalError: The state does not fit.
        """
        current = self.state()
        wrong = sorted(current.keys() ^ state.keys())
        shared = current.keys() & state.keys()
        wrong += [name for name in shared if current[name].shape != state[name].shape]
        if wrong:
            message = f"the saved state does not fit this run: {wrong[0]}"
            raise NumericalError(message, code="state-does-not-fit")
        for name, tensor in current.items():
            if not name.endswith(".mask"):
                tensor.copy_(state[name])
        for name, weight in self.sparse.items():
            mask = unpack_bits(state[f"{name}.mask"], weight.mask.shape[1]).bool()
            weight.mask = mask.to(weight.weight.device)
            weight.publish(masks_forward=self.rule.masks_forward)
        self.steps = steps

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients of all trained tensors by name, `[out, in]` for sparse weights."""
        gradients: dict[str, Tensor] = {}
        for name, weight in self.sparse.items():
            gradient = weight.gradient
            if weight.scale is not None:
                spans = gradient.unflatten(1, (weight.scale.shape[1], -1))
                gradients[name + SCALE] = (spans * weight.weight.view_as(spans)).sum(-1)
                spans.mul_(weight.scale[:, :, None])
            if not self.rule.updates_pruned:
                gradient.mul_(weight.mask)
            gradients[name] = gradient
        for name, parameter in self.others.items():
            if parameter.grad is None:
                message = f"{name} has no gradient: the loss does not depend on it"
                raise NumericalError(message, code="no-gradient")
            gradients[name] = local(parameter.grad)
        return gradients

    def _norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of all gradients together, over all processes."""
        sharded = {n for n, w in self.sparse.items() if is_sharded(w.parameter)}
        sharded |= {name + SCALE for name in sharded}
        sharded |= {name for name, p in self.others.items() if is_sharded(p)}
        first = next(iter(gradients.values()))
        sums = torch.zeros(2, device=first.device)  # of replicated and of sharded parameters
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
        gradient: Tensor,  # changed in place
        factor: float,
        rate: float,
        decay: float,
        mask: Tensor | None = None,
        done: float = 0.0,
    ) -> None:
        """One step of one tensor, in parts on a CPU."""
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
            f"a weight {tuple(values.shape)} on {values.device}",
            code="mask-does-not-fit",
        )


def _pieces(tensor: Tensor) -> list[slice | EllipsisType]:
    """Slices of the parts of a tensor that are processed one after the other."""
    if tensor.is_cuda or tensor.numel() <= IN_CACHE:
        return [...]
    rows = max(1, IN_CACHE // tensor[0].numel())
    return [slice(start, start + rows) for start in range(0, len(tensor), rows)]


def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments of a tensor before the first step."""
    return torch.zeros_like(weight), torch.zeros_like(weight)
