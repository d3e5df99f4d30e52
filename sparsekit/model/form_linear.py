"""The linear layer for a weight that is more than one plain matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.stored_form import StoredForm
from sparsekit.errors import DataError, FactorsError
from sparsekit.memory import available_memory
from sparsekit.model.architecture import Target
from sparsekit.weights.core import Values
from sparsekit.weights.form import PARTS, Form


class FormLinear(nn.Module):
    """y = x Wᵀ + bias with a weight in its parts; a packed core stays packed between calls.

    Codes and scales are multiplied in the scales' type on disk, as where they are not packed. The
    parameters begin on the meta device, with the shapes and types that they have on disk.

    Args:
        stored: How the weight is stored.
        old: The layer that this one replaces.
        module: The name of that layer in the model.
    """

    def __init__(self, stored: StoredForm, old: nn.Module, module: str) -> None:
        super().__init__()
        self.stored = stored
        self.target = Target.of(stored.name, module, old)
        self.dtype = old.weight.dtype  # that the model computes in
        self._checked = False  # its weight never changes, so that the first call's check is enough
        for part in PARTS:
            place = stored.places.get(part)
            if place is None:
                self.register_parameter(part, None)
                continue
            empty = torch.empty(place.shape, dtype=place.dtype, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("weight", None)  # until `expand`
        self.register_parameter("bias", old.bias)

    @property
    def parts(self) -> dict[str, nn.Parameter]:
        """What its weight consists of, by name."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    @property
    def form(self) -> Form:
        """Its weight; the first time, after a check.

        Raises:
            FactorsError: The parts do not fit together.
        """
        if self.weight is not None:
            return Form(core=Values(self.target.from_disk(self.weight)))
        form = Form.from_stored(self.parts, self.stored.format, self.target.shape)
        if not self._checked:
            try:
                form.check()
            except DataError as error:
                raise FactorsError(f"{self.target.name}: {error.message}", error.hint) from error
            self._checked = True
        return form

    @property
    def more_bytes(self) -> int:
        """How many bytes more its dense weight takes than its parts."""
        rows, columns = self.target.shape
        parts = sum(part.nbytes for part in self.parts.values())
        return rows * columns * self.dtype.itemsize - parts

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        grid = self.stored.format.grid
        if grid is not None and grid.activations:
            x = grid.round_inputs(x)
        return self.form.multiply(x, self.bias)

    def expand(self) -> None:
        """Hold the dense weight instead of its parts: it takes the memory of a dense one.

        A weight without factors around its core computes the same bits as before. It has the shape
        that the layer has in a plain model, so that it can be saved as that of one.
        """
        dense = self.form.dense().to(self.dtype)
        self.weight = nn.Parameter(self.target.to_disk(dense), requires_grad=False)
        for part in PARTS:
            setattr(self, part, None)


def use_forms(model: nn.Module, source: Checkpoint) -> None:
    """Replace the linear layers whose weight a checkpoint keeps in parts only.

    Raises:
        FactorsError: A part is missing, has another shape, or has no layer in the model.
    """
    for name, stored in source.packed.items():
        stored.require(f"{source.path} lacks")
        path = name.removesuffix(".weight")
        if not _has(model, path):  # a checkpoint of a bare base model lacks its prefix
            path = f"{model.base_model_prefix}.{path}"
        if not _has(model, path):
            raise FactorsError(f"{source.path} has factors of {name}, which the model lacks")
        parent, _, last = path.rpartition(".")
        layer = FormLinear(stored, model.get_submodule(path), path)
        try:
            shapes = {part: place.shape for part, place in stored.places.items()}
            stored.format.check(shapes, layer.target.shape)
        except DataError as error:
            raise FactorsError(f"{source.path}: {name}: {error.message}", error.hint) from error
        setattr(model.get_submodule(parent), last, layer)


def form_layers(module: nn.Module) -> list[FormLinear]:
    """The layers below a module that keep their weight in parts."""
    return [layer for layer in module.modules() if isinstance(layer, FormLinear)]


def expand(model: nn.Module) -> None:
    """Let all layers that keep their weight in parts hold it dense, one after the other.

    Raises:
        DataError: The dense weights do not fit into memory.
    """
    layers = [layer for layer in form_layers(model) if layer.weight is None]
    needed = sum(layer.more_bytes for layer in layers if layer.indices.device.type == "cpu")
    if needed > (free := available_memory()):
        raise DataError(
            f"expanded, the weights take {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are "
            "available",
            "keep them packed",
        )
    for layer in layers:
        layer.expand()


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
