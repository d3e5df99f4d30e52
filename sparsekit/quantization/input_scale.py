"""A scale for the inputs of some weights, taken back by whatever makes these inputs.

What makes them is not known by name, for any family: each norm and layer of the block that could be
it is tried, and kept only if every other linear layer of the block still gives the same. (Not only
the block: what a few layers add may be little beside the outliers of its residual stream.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import Block

# How much outputs may change, relative to their size for each token: roundings of 16-bit
# computation do less, and a scale in the wrong place does more.
SAME = 0.02


@dataclass(frozen=True, kw_only=True)
class Folded:
    """Where a scale has gone."""

    scale: Tensor
    """What the weights are to be multiplied by: `[in]` float32."""
    rows_of: Target | None = None
    """The weight whose rows are to be divided by it; None: a norm, in the block already."""


@dataclass(frozen=True)
class _Maker:
    """What may make the inputs."""

    module: nn.Module
    name: str  # within the block
    offset: float = 0.0  # of a norm that multiplies by offset + weight


def fold_scale(
    block: Block, targets: Sequence[Target], scale: Tensor, able: Sequence[Target]
) -> Folded | None:
    """Divide what makes the input of weights by a scale; None where nothing can take it back.

    The block then computes with the scaled weights. Only norms and biases change in what goes to
    disk; weights are the caller's.

    Args:
        block: With its weights and with hidden states for one row at least.
        targets: All weights that read this input.
        scale: `[in]` float32, above 0.
        able: Weights whose rows may be divided.
    """
    before = _outputs(block)
    for maker in _makers(block, targets):
        rows_of = None
        if isinstance(maker.module, nn.Linear):
            rows_of = next((t for t in able if t.module == maker.name and t not in targets), None)
            if rows_of is None:
                continue
            made, changed = scale, _bias_over(block, maker, scale)
        else:
            made, changed = _norm_over(block, maker, scale)
        if _computes_the_same(block, targets, rows_of, made, changed, before):
            for name, tensor in changed.items():
                block.put(name, tensor)
            return Folded(scale=made, rows_of=rows_of)
    return None


def _makers(block: Block, targets: Sequence[Target]) -> Iterator[_Maker]:
    """Norms whose output is the input, then layers with as many outputs."""
    width = targets[0].shape[1]
    inputs: list[Tensor] = []
    outputs: list[tuple[str, nn.Module, Tensor]] = []
    first = block.module.get_submodule(targets[0].module)
    handles = [first.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))]
    for name, module in block.module.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):

            def told(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                if not inputs:
                    outputs.append((name, module, output))

            handles.append(module.register_forward_hook(told))
    try:
        block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    for name, module, output in outputs:
        if module.weight.ndim == 1 and output is inputs[0]:
            yield _Maker(module, name)
            yield _Maker(module, name, offset=1.0)
    for name, module, output in outputs:
        if isinstance(module, nn.Linear) and output.shape[-1] == width:
            yield _Maker(module, name)


def _norm_over(block: Block, maker: _Maker, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The scale that a norm can take back in its type on disk, and its tensors then."""
    weight = block.stored(f"{maker.name}.weight")
    factor = maker.offset + weight.float()
    new = (factor / scale.cpu() - maker.offset).to(weight.dtype)
    divided = maker.offset + new.float()
    whole = (divided != 0) & (factor != 0)
    made = torch.where(whole, factor / torch.where(whole, divided, 1.0), 1.0)
    changed = {f"{maker.name}.weight": torch.where(whole, new, weight)}
    return made.to(scale.device), changed | _bias_over(block, maker, made)


def _bias_over(block: Block, maker: _Maker, scale: Tensor) -> dict[str, Tensor]:
    """The bias of a norm or layer, divided by a scale; empty without one."""
    if getattr(maker.module, "bias", None) is None:
        return {}
    bias = block.stored(f"{maker.name}.bias")
    return {f"{maker.name}.bias": (bias.float() / scale.cpu()).to(bias.dtype)}


def _computes_the_same(
    block: Block,
    targets: Sequence[Target],
    rows_of: Target | None,
    scale: Tensor,
    changed: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
) -> bool:
    """Whether outputs stay with scaled weights; if not, they are put back."""
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
    own = rows_of.module if rows_of is not None else None
    if all(_off(after[name], before[name]) < SAME for name in before if name != own):
        return True
    for parameter, tensor in reversed(held):
        parameter.data = tensor
    return False


def _outputs(block: Block) -> dict[str, Tensor]:
    """What the linear layers of a block give for one row, by module, and what the block does."""
    found: dict[str, Tensor] = {}
    handles = []
    for target in block.targets:

        def told(_: nn.Module, __: object, output: Tensor, name: str = target.module) -> None:
            found[name] = output

        handles.append(block.module.get_submodule(target.module).register_forward_hook(told))
    try:
        found[""] = block.run(0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _off(after: Tensor, before: Tensor) -> float:
    """Mean over tokens of how far an output has moved, as a share of its size."""
    before = before.float()
    size = torch.linalg.vector_norm(before, dim=-1)
    moved = torch.linalg.vector_norm(after.float() - before, dim=-1)
    return float((moved / size.clamp_min(torch.finfo(size.dtype).tiny)).mean())
