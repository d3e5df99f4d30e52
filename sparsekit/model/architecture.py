"""What a model is made of, before any weight is read: its blocks, names and prunable weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError
from sparsekit.model.factored_linear import FactoredLinear, use_factors


@dataclass(frozen=True, slots=True)
class Target:
    """A prunable weight: its name on disk, its module, and its shape as `[out, in]`."""

    name: str
    module: str  # within the block
    transposed: bool  # stored as [in, out] (GPT-2's Conv1D)
    shape: tuple[int, int]


def build_without_weights(source: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model with every parameter on the meta device and every buffer computed.

    Raises:
        DataError: The checkpoint is quantized in another way than ours, or is no causal language
            model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = source.config
    source.require("load")
    try:
        # Buffers are made for real: rotary tables are computed, not stored.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source.path}: no causal language model for {config.model_type!r}: {reason}"
        ) from error
    if source.kind.alone:
        use_factors(model, source)
    return model.eval().requires_grad_(False)


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The list of decoder blocks, and its name."""
    count = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not found:
        raise DataError(f"{model.config.model_type!r} has no list of {count} decoder blocks")
    # Lists inside a block have longer names; the shortest one is the decoder's own.
    name, modules = min(found, key=lambda item: item[0].count("."))
    return name, list(modules)


def match_names(model: nn.Module, source: Checkpoint) -> dict[str, str]:
    """For each parameter and stored buffer of the model its name on disk.

    Checkpoints of a bare base model lack its prefix; of tied weights one is on disk.
    """
    prefix = model.base_model_prefix + "."
    tied = getattr(model, "all_tied_weights_keys", {})
    matched, missing = {}, []
    for name in model.state_dict():
        origin = tied.get(name, name)
        alike = (origin, *(n for n, tied_to in tied.items() if tied_to == origin))
        places = (place for n in alike for place in (n, n.removeprefix(prefix)))
        found = [place for place in places if place in source.places]
        if found:
            matched[name] = found[0]
        elif name in dict(model.named_parameters(remove_duplicate=False)):
            missing.append(name)
    if missing:
        used = set(matched.values())
        left = [name for name in source.places if name not in used]
        raise DataError(
            f"{source.path}: {model.config.model_type!r} cannot be streamed yet: "
            f"{families(missing)} not on disk under that name"
            + (f"; would be left alone: {families(left)}" if left else ""),
            "packed experts and converted names are not supported",
        )
    for name, on_disk in matched.items():
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        if shape != source.places[on_disk].shape:
            raise DataError(
                f"{source.path}: {on_disk} has the shape {source.places[on_disk].shape}, "
                f"config.json asks for {shape}"
            )
    return matched


def refuse_hidden_weights(
    model: nn.Module, blocks: list[nn.Module], prefix: str, source: Checkpoint
) -> None:
    """Refuse blocks with matrices outside linear layers: they would be left dense unnoticed."""
    left = []
    for index, block in enumerate(blocks):
        known = {id(m.weight) for m in block.modules() if _is_linear(m)}
        layers = (m for m in block.modules() if isinstance(m, FactoredLinear))
        known |= {id(parameter) for layer in layers for parameter in layer.parameters()}
        for name, parameter in block.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in known:
                left.append(f"{prefix}.{index}.{name}")
    if left:
        raise DataError(
            f"{source.path}: {model.config.model_type!r} keeps weights outside plain linear "
            f"layers, which sparsekit cannot prune yet; would be left alone: {families(left)}",
            "mixture-of-experts models and linear layers of their own kind are not supported",
        )


def find_targets(module: nn.Module, prefix: str, names: Mapping[str, str]) -> list[Target]:
    """The linear weights below a block, in the order of its modules.

    Args:
        module: The block.
        prefix: Its name in the model.
        names: For each name in the model the name on disk.
    """
    found = []
    for name, child in module.named_modules():
        if _is_linear(child):
            transposed = not isinstance(child, nn.Linear)
            rows, columns = child.weight.shape
            shape = (columns, rows) if transposed else (rows, columns)
            found.append(Target(names[f"{prefix}.{name}.weight"], name, transposed, shape))
    return found


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def families(names: Iterable[str]) -> str:
    """Names with their numbers folded: `layers.*.experts.*.w1.weight (64)`."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[folded] = counts.get(folded, 0) + 1
    return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())
