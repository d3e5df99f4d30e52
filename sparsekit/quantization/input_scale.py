"""Fold AWQ's input scales into the preceding norm or linear layer.

The preceding layer is not known by name: each norm and linear layer of the block that may be it is
tried, and kept only if all other linear layers of the block keep their outputs. (Comparing the
output of the block is not enough: a few layers may contribute little next to the outliers of its
residual stream.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block

# Largest relative change of outputs, as a mean over tokens: 16-bit rounding changes them less, a
# scale in the wrong place more.
SAME = 0.02


@dataclass(frozen=True, kw_only=True)
class Folded:
    """A scale that was folded into the preceding layer."""

    scale: Tensor
    """The factor of the weights' inputs, `[in]` float32."""
    rows_of: Target | None = None
    """The weight whose rows must be divided by it; None: a norm, already divided in the block."""


@dataclass(frozen=True)
class _Producer:
    """A layer whose output may be the input."""

    module: nn.Module
    name: str  # within the block
    offset: float = 0.0  # a norm multiplies by offset + weight


def fold_scale(
    block: Block, targets: Sequence[Target], scale: Tensor, able: Sequence[Target]
) -> Folded | None:
    """Divide the layer that produces the weights' input by a scale; None if no layer can absorb it.

    The block then computes with the scaled weights. Of the stored tensors only norms and biases
    change; the caller changes the weights.

    Args:
        block: A loaded block, with hidden states of at least one row.
        targets: All weights that read this input.
        scale: `[in]` float32, above 0.
        able: Weights whose rows may be divided.
    """
    before = _outputs(block)
    for producer in _producers(block, targets):
        rows_of = None
        if isinstance(producer.module, nn.Linear):
            rows_of = next(
                (t for t in able if t.module == producer.name and t not in targets), None
            )
            if rows_of is None:
                continue
            exact, changed = scale, _bias_over(block, producer, scale)
        else:
            exact, changed = _norm_over(block, producer, scale)
        if _computes_the_same(block, targets, rows_of, exact, changed, before):
            for name, tensor in changed.items():
                block.put(name, tensor)
            return Folded(scale=exact, rows_of=rows_of)
    return None


def _producers(block: Block, targets: Sequence[Target]) -> Iterator[_Producer]:
    """Norms whose output is the input, then linear layers with as many outputs."""
    width = targets[0].shape[1]
    inputs: list[Tensor] = []
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    first = block.module.get_submodule(targets[0].module)
    handles = [first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):

            def record(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                if not inputs:
                    outputs.append((name, module, output))

            handles.append(module.register_forward_hook(record))
    try:
        block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, output in outputs:
        if module.weight.ndim == 1 and output is inputs[0]:
            yield _Producer(module, name)
            yield _Producer(module, name, offset=1.0)
    for name, module, output in outputs:
        if isinstance(module, nn.Linear) and output.shape[-1] == width:
            yield _Producer(module, name)


def _norm_over(
    block: Block, producer: _Producer, scale: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale that a norm can absorb exactly in its stored dtype, and its new tensors."""
    weight = block.stored(f"{producer.name}.weight")
    factor = producer.offset + weight.float()
    new = (factor / scale.cpu() - producer.offset).to(weight.dtype)
    divided = producer.offset + new.float()
    whole = (divided != 0) & (factor != 0)
    exact = torch.where(whole, factor / torch.where(whole, divided, 1.0), 1.0)
    changed = {f"{producer.name}.weight": torch.where(whole, new, weight)}
    return exact.to(scale.device), changed | _bias_over(block, producer, exact)


def _bias_over(block: Block, producer: _Producer, scale: Tensor) -> dict[str, Tensor]:
    """The bias of a norm or layer, divided by a scale; empty without one."""
    if getattr(producer.module, "bias", None) is None:
        return {}
    bias = block.stored(f"{producer.name}.bias")
    return {f"{producer.name}.bias": (bias.float() / scale.cpu()).to(bias.dtype)}


def _computes_the_same(
    block: Block,
    targets: Sequence[Target],
    rows_of: Target | None,
    scale: Tensor,
    changed: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> bool:
    """Whether outputs stay the same with scaled weights; if not, the weights are restored."""
    held: list[tuple[nn.Parameter, Tensor]] = []

    def put(parameter: nn.Parameter, tensor: Tensor) -> None:
        held.append((parameter, parameter.data))
        parameter.data = tensor.to(parameter.device, parameter.dtype)

    for target in targets:
        weight = block.module.get_submodule(target.module).weight
        put(weight, weight.data * target.to_disk(scale[None]))
    if rows_of is not None:
        weight = block.module.get_submodule(rows_of.module).weight
        put(weight, weight.data / scale[:, None])
    for name, tensor in changed.items():
        put(block.module.get_parameter(name), tensor)
    after = _outputs(block)
    divided = rows_of.module if rows_of is not None else None
    if all(_change(after[name], before[name]) < SAME for name in before if name != divided):
        return True
    for parameter, tensor in reversed(held):
        parameter.data = tensor
    return False


def _outputs(block: Block) -> dict[str, Tensor]:
    """Outputs of a block's linear layers for one row, by module; of the block itself under ``."""
    outputs: dict[str, Tensor] = {}
    handles = []
    for target in block.targets:

        def record(_: nn.Module, __: object, output: Tensor, name: str = target.module) -> None:
            outputs[name] = output

        handles.append(block.module.get_submodule(target.module).register_forward_hook(record))
    try:
        outputs[""] = block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _change(after: Tensor, before: Tensor) -> float:
    """Relative change of an output, as a mean over tokens."""
    before = before.float()
    size = torch.linalg.vector_norm(before, dim=-1)
    moved = torch.linalg.vector_norm(after.float() - before, dim=-1)
    return float((moved / size.clamp_min(torch.finfo(size.dtype).tiny)).mean())
