"""Linear layers that compute with the factors of their weight, and never build it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import factor_name
from sparsekit.errors import DataError, FactorsError
from sparsekit.memory import available_memory
from sparsekit.weights.factored import PARTS, Factored
from sparsekit.weights.packed import check_shapes, mask_of, unpack
from sparsekit.weights.packed_codes import SCALE, check_codes, unpack_grid
from sparsekit.weights.patterns import Pattern


class FactoredLinear(nn.Module):
    """y = x (A S B + L R)ᵀ + bias, product by product; the core S stays packed between calls.

    A core of codes and scales is computed in the scales' type on disk, as where it is not packed.
    Its parameters begin on the meta device, with the shapes and types that they have on disk.
    """

    def __init__(self, source: Checkpoint, name: str, old: nn.Module) -> None:
        super().__init__()
        self.weight_name = name
        self._checked = False  # its weight never changes, so that the first call's check is enough
        self.pattern = Pattern.parse(source.factor_patterns[name])
        self.form = source.factor_codes.get(name)
        self.transposed = not isinstance(old, nn.Linear)  # GPT-2's Conv1D
        self.dtype = old.weight.dtype  # that the model computes in
        shape = old.weight.shape
        self.out_features, self.in_features = shape[::-1] if self.transposed else shape
        for part in (*PARTS, SCALE):
            place = source.factors.get(factor_name(name, part))
            if place is None:
                self.register_parameter(part, None)
                continue
            empty = torch.empty(place.shape, dtype=place.dtype, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("weight", None)  # until `expand`
        self.stored = self.values.dtype if self.form is None else self.form.dtype
        self.register_parameter("bias", old.bias)

    @property
    def stored_names(self) -> list[str]:
        """The names on disk of all that stands for its weight."""
        parts = (part for part in (*PARTS, SCALE) if getattr(self, part) is not None)
        return [factor_name(self.weight_name, part) for part in parts]

    @property
    def composed(self) -> bool:
        """Whether it has factors beside the core."""
        return any(getattr(self, part) is not None for part in PARTS[2:])

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.weight is None:
            core = self._core().to(x.dtype)
        else:
            core = self.weight.T if self.transposed else self.weight
        if self.form is not None and self.form.grid.activations:
            x = self.form.grid.round_inputs(x)
        if not self.composed:  # as nn.Linear, to the same bits
            return nn.functional.linear(x, core, self.bias)
        inner = x if self.right is None else _by_blocks(x, self.right)  # x Bᵀ
        outer = inner @ core.T
        if self.left is not None:
            outer = _by_blocks(outer, self.left)
        if self.up is not None and self.down is not None:
            outer = outer + x @ self.down.T @ self.up.T
        return outer if self.bias is None else outer + self.bias

    def expand(self) -> None:
        """Hold the product in the place of what it is made of: it takes the memory of a dense one.

        A weight without factors beside the core computes the same bits as before. It has the shape
        that the layer has in a plain model, so that it can be saved as that of one.
        """
        core = self._core()
        if self.composed:
            sides = {p: f.float() for p in PARTS[2:] if (f := getattr(self, p)) is not None}
            core = Factored(core=core.float(), mask=core != 0, **sides).dense()
        core = core.to(self.dtype)
        self.weight = nn.Parameter(core.T if self.transposed else core, requires_grad=False)
        for part in (*PARTS, SCALE):
            setattr(self, part, None)

    def _core(self) -> Tensor:
        """S `[out, in]`.

        Raises:
            FactorsError: A place lies outside its group.
        """
        try:
            if self.form is not None:
                parts = {"values": self.values, "indices": self.indices, SCALE: self.scale}
                packed = parts, self.pattern, self.in_features, self.form
                core = unpack_grid(*packed, check=not self._checked).dense()
            else:
                packed = self.values, self.indices, self.pattern, self.in_features
                if not self._checked:
                    mask_of(*packed)
                core = unpack(*packed)
        except DataError as error:
            raise FactorsError(f"{self.weight_name}: {error.message}", error.hint) from error
        self._checked = True
        return core


def expand(model: nn.Module) -> None:
    """Let all layers that keep factors hold their products, one after the other.

    Raises:
        DataError: They do not fit into memory.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FactoredLinear)]
    needed = sum(
        layer.out_features * layer.in_features * layer.dtype.itemsize
        - sum(part.nbytes for part in layer.parameters() if part is not layer.bias)
        for layer in layers
        if layer.indices.device.type == "cpu"
    )
    if needed > (free := available_memory()):
        raise DataError(
            f"expanded, the weights take {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are "
            "available",
            "keep them packed",
        )
    for layer in layers:
        layer.expand()


def _by_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """`[..., columns]` times the transpose of a block-diagonal matrix `[blocks, b, b]`."""
    parts = x.reshape(-1, blocks.shape[0], blocks.shape[1]).transpose(0, 1)
    return (parts @ blocks.mT).transpose(0, 1).reshape(x.shape)


def use_factors(model: nn.Module, source: Checkpoint) -> None:
    """Replace the linear layers whose weight a checkpoint keeps as factors only.

    Raises:
        FactorsError: A factor is missing, has another shape, or has no layer in the model.
    """
    for weight in source.factor_patterns:
        missing = [p for p in PARTS[:2] if factor_name(weight, p) not in source.factors]
        if missing:
            raise FactorsError(f"{source.path}: {weight} lacks its factor {missing[0]!r}")
        shapes = {
            part: source.factors[name].shape
            for part in (*PARTS, SCALE)
            if (name := factor_name(weight, part)) in source.factors
        }
        path = weight.removesuffix(".weight")
        if not _has(model, path):  # a checkpoint of a bare base model lacks its prefix
            path = f"{model.base_model_prefix}.{path}"
        if not _has(model, path):
            raise FactorsError(f"{source.path} has factors of {weight}, which the model lacks")
        parent, _, last = path.rpartition(".")
        old = model.get_submodule(path)
        rows, columns = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
        pattern = Pattern.parse(source.factor_patterns[weight])
        try:
            if weight in source.factor_codes:
                check_codes(shapes, columns, pattern, source.factor_codes[weight])
            else:
                check_shapes(shapes, rows, columns, pattern)
            if shapes["indices"][0] != rows:
                raise DataError(f"its factors have {shapes['indices'][0]} rows, not {rows}")
        except DataError as error:
            raise FactorsError(f"{source.path}: {weight}: {error.message}", error.hint) from error
        layer = FactoredLinear(source, weight, old)
        setattr(model.get_submodule(parent), last, layer)


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
