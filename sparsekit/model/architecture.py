"""The architecture of a model: its decoder blocks, the names on disk and the prunable weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError


@dataclass(frozen=True, slots=True)
class Target:
    """A prunable weight: its name on disk, its module, and its shape as `[out, in]`."""

    name: str
    module: str  # within the block
    transposed: bool  # stored as [in, out] (GPT-2's Conv1D)
    shape: tuple[int, int]

    @classmethod
    def of(cls, name: str, module: str, layer: nn.Module) -> Target:
        """The weight of a linear layer."""
        rows, columns = layer.weight.shape
        if isinstance(layer, nn.Linear):
            return cls(name, module, False, (rows, columns))
        return cls(name, module, True, (columns, rows))

    @property
    def disk_shape(self) -> tuple[int, int]:
        """The shape on disk."""
        return self.shape[::-1] if self.transposed else self.shape

    def from_disk(self, tensor: Tensor) -> Tensor:
        """The weight `[out, in]`, a view of the tensor on disk."""
        return tensor.T if self.transposed else tensor

    def to_disk(self, weight: Tensor) -> Tensor:
        """The tensor on disk, a view of the weight `[out, in]`."""
        return weight.T if self.transposed else weight


def find_blocks(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The name of the list of decoder blocks, and the blocks.

    Raises:
        DataError: The model has no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise DataError(
            f"{model.config.model_type!r} has no list of {count} decoder blocks",
            code="unsupported-model",
        )
    # Lists inside a block have longer names than the decoder's.
    name, modules = min(lists, key=lambda item: item[0].count("."))
    return name, list(modules)


def match_names(model: nn.Module, source: Checkpoint) -> dict[str, str]:
    """The name on disk of each parameter and stored buffer of the model.

    Checkpoints of a bare base model lack its prefix; of tied weights only one is on disk.

    Raises:
        DataError: A parameter is missing on disk or has another shape.
    """
    prefix = model.base_model_prefix + "."
    tied = getattr(model, "all_tied_weights_keys", {})
    matched, missing = {}, []
    for name in model.state_dict():
        origin = tied.get(name, name)
        alike = (origin, *(n for n, tied_to in tied.items() if tied_to == origin))
        places = (place for n in alike for place in (n, n.removeprefix(prefix)))
        on_disk = next((place for place in places if place in source.places), None)
        if on_disk is not None:
            matched[name] = on_disk
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
            code="unsupported-model",
        )
    for name, on_disk in matched.items():
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        if shape != source.places[on_disk].shape:
            raise DataError(
                f"{source.path}: {on_disk} has the shape {source.places[on_disk].shape}, "
                f"config.json asks for {shape}",
                code="shape-mismatch",
            )
    return matched


def find_targets(module: nn.Module, prefix: str, names: Mapping[str, str]) -> list[Target]:
    """The linear weights of a block, in the order of its modules.

    Args:
        module: The block.
        prefix: Its name in the model.
        names: The names on disk by the names in the model.
    """
    targets = []
    for name, child in module.named_modules():
        if is_linear(child):
            targets.append(Target.of(names[f"{prefix}.{name}.weight"], name, child))
    return targets


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer."""
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


def families(names: Iterable[str]) -> str:
    """Names with their numbers replaced by a star: `layers.*.experts.*.w1.weight (64)`."""
    counts: dict[str, int] = {}
    for name in names:
        folded = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        counts[folded] = counts.get(folded, 0) + 1
    return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())
