"""The linear layer for weights in packed or factored form."""

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
    """y = x Wᵀ + bias with a weight in parts; a packed core stays packed between calls.

    Codes are dequantized in the dtype of the scales on disk, as in an unpacked model. The
    parameters start on the meta device, with their shapes and dtypes on disk.

    Args:
        stored: The stored form of the weight.
        old: The layer that this one replaces.
        module: The name of that layer in the model.
    """

    def __init__(self, stored: StoredForm, old: nn.Module, module: str) -> None:
        super().__init__()
        self.stored = stored
        self.target = Target.of(stored.name, module, old)
        self.dtype = old.weight.dtype  # in which the model computes
        self._checked = False  # the weight never changes: one check is enough
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
        """The parts of the weight, by name."""
        parts = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def form(self) -> Form:
        """The form of the weight; checked the first time.

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
                message = f"{self.target.name}: {error.message}"
                raise FactorsError(message, error.hint, code=error.code) from error
            self._checked = True
        return form

    @property
    def more_bytes(self) -> int:
        """The number of bytes that the dense weight takes beyond its parts."""
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
        """Replace the parts by the dense weight, which takes the memory of a dense layer.

        Without factors around the core the layer computes the same bits as before. The weight has
        the shape that it has in a plain model, so the model can be saved as one.
        """
        dense = self.form.dense().to(self.dtype)
        self.weight = nn.Parameter(self.target.to_disk(dense), requires_grad=False)
        for part in PARTS:
            setattr(self, part, None)


def use_forms(model: nn.Module, source: Checkpoint) -> None:
    """Replace the linear layers whose weight a checkpoint stores in parts only.

    Raises:
        FactorsError: A part is missing, has another shape, or has no layer in the model.
    """
    for name, stored in source.packed.items():
        stored.require(f"{source.path} lacks")
        path = name.removesuffix(".weight")
        if not _has(model, path):  # a checkpoint of a bare base model lacks its prefix
            path = f"{model.base_model_prefix}.{path}"
        if not _has(model, path):
            raise FactorsError(
                f"{source.path} has factors of {name}, which the model lacks",
                code="unexpected-tensor",
            )
        parent, _, last = path.rpartition(".")
        layer = FormLinear(stored, model.get_submodule(path), path)
        try:
            shapes = {part: place.shape for part, place in stored.places.items()}
            stored.format.check(shapes, layer.target.shape)
        except DataError as error:
            message = f"{source.path}: {name}: {error.message}"
            raise FactorsError(message, error.hint, code=error.code) from error
        setattr(model.get_submodule(parent), last, layer)


def form_layers(module: nn.Module) -> list[FormLinear]:
    """The layers of a module whose weight is in parts."""
    return [layer for layer in module.modules() if isinstance(layer, FormLinear)]


def expand(model: nn.Module) -> None:
    """Replace the parts of all layers by dense weights, one layer after the other.

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
            code="not-enough-memory",
        )
    for layer in layers:
        layer.expand()


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
