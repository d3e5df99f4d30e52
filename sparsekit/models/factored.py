"""Linear layers that compute with the factors of their weight, and never build it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.folder import factor_name
from sparsekit.tensors.factored import PARTS, check_shapes, mask_of, unpack
from sparsekit.tensors.patterns import Pattern


class FactoredLinear(nn.Module):
    """y = x (A S B + L R)ᵀ + bias, product by product; the core S stays packed between calls.

    Its parameters begin on the meta device, with the shapes and types that they have on disk.
    """

    def __init__(self, source: Checkpoint, name: str, old: nn.Module) -> None:
        super().__init__()
        self.weight_name = name
        self._checked = False  # its weight never changes, so that the first call's check is enough
        self.pattern = Pattern.parse(source.factor_patterns[name])
        transposed = not isinstance(old, nn.Linear)  # GPT-2's Conv1D
        self.in_features = old.weight.shape[0 if transposed else 1]
        for part in PARTS:
            place = source.factors.get(factor_name(name, part))
            if place is None:
                self.register_parameter(part, None)
                continue
            empty = torch.empty(place.shape, dtype=place.dtype, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", old.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        packed = self.values, self.indices, self.pattern, self.in_features
        if not self._checked:
            mask_of(*packed)
            self._checked = True
        core = unpack(*packed)
        inner = x if self.right is None else _by_blocks(x, self.right)  # x Bᵀ
        outer = inner @ core.T
        if self.left is not None:
            outer = _by_blocks(outer, self.left)
        if self.up is not None and self.down is not None:
            outer = outer + x @ self.down.T @ self.up.T
        return outer if self.bias is None else outer + self.bias


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """`[..., columns]` times the transpose of a block-diagonal matrix `[blocks, b, b]`."""
    parts = x.reshape(-1, blocks.shape[0], blocks.shape[1]).transpose(0, 1)
    return (parts @ blocks.mT).transpose(0, 1).reshape(x.shape)


def use_factors(model: nn.Module, source: Checkpoint) -> None:
    """Replace the linear layers whose weight a checkpoint keeps as factors only.

    Raises:
        DataError: A factor is missing, or has no layer in the model.
    """
    for weight in source.factor_patterns:
        missing = [p for p in PARTS[:2] if factor_name(weight, p) not in source.factors]
        if missing:
            raise DataError(f"{source.path}: {weight} lacks its factor {missing[0]!r}")
        shapes = {
            part: source.factors[name].shape
            for part in PARTS
            if (name := factor_name(weight, part)) in source.factors
        }
        path = weight.removesuffix(".weight")
        if not _has(model, path):  # a checkpoint of a bare base model lacks its prefix
            path = f"{model.base_model_prefix}.{path}"
        if not _has(model, path):
            raise DataError(f"{source.path} has factors of {weight}, which the model lacks")
        parent, _, last = path.rpartition(".")
        old = model.get_submodule(path)
        rows, columns = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
        try:
            check_shapes(shapes, rows, columns, Pattern.parse(source.factor_patterns[weight]))
        except DataError as error:
            raise DataError(f"{source.path}: {weight}: {error.message}", error.hint) from error
        layer = FactoredLinear(source, weight, old)
        setattr(model.get_submodule(parent), last, layer)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
