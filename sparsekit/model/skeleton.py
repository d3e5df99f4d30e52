"""A model without weights, into which those needed at the moment are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError
from sparsekit.memory import steady_heap, trim_heap
from sparsekit.model.architecture import families, find_blocks, is_linear, match_names

# Free heap memory is returned to the system after this many bytes of weights.
TRIM_BYTES = 24 << 20


class Skeleton:
    """The model of a checkpoint with its parameters on the meta device.

    Creating one changes how glibc's allocator treats large chunks, for the whole process.

    Args:
        source: The checkpoint.
        device: The device of the weights.
        dtype: The compute dtype of the weights.

    Raises:
        DataError: The architecture cannot be streamed; the message names every weight that would
            be skipped.
    """

    def __init__(self, source: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.model = build_without_weights(source, dtype)
        self.prefix, self.blocks = find_blocks(self.model)
        self.on_disk = match_names(self.model, source)
        """The name on disk of each parameter and stored buffer."""
        refuse_hidden_weights(self.model, self.blocks, self.prefix, source)
        self._round_inputs()
        self._reused: dict[str, Tensor] = {}
        self._passed = 0
        steady_heap()

    def _round_inputs(self) -> None:
        """Let layers on a grid with `activations` round their inputs."""
        grid = self.source.grid
        if grid is None or not grid.activations:
            return
        for name, on_disk in self.on_disk.items():
            if on_disk in self.source.quantized:
                layer = self.model.get_submodule(name.removesuffix(".weight"))
                layer.register_forward_pre_hook(lambda _, args: grid.round_inputs(args[0]))

    def hold(self, module: str, tensors: Mapping[str, Tensor]) -> None:
        """Load weights of one block to the device.

        They reuse the memory of the block before, since new memory costs page faults and fragments
        the heap.

        Args:
            module: The name of the block.
            tensors: The values by their names in the model.
        """
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not self._fits(tensor):
                inner = name.removeprefix(module)
                held = self._reused.get(inner)
                if held is None or held.shape != tensor.shape:
                    held = torch.empty(tensor.shape, dtype=self.dtype, device=self.device)
                    self._reused[inner] = held
                tensor = held.copy_(tensor)
            self._set(name, tensor.to(self.device))
        self._place_buffers(module)

    def drop(self, names: Iterable[str]) -> None:
        """Free weights by their names in the model."""
        for name in names:
            old = self.model.get_parameter_or_buffer(name)
            self._set(name, torch.empty_like(old, device="meta"))

    def passed(self, n_bytes: int) -> None:
        """Count bytes of freed weights, and trim the heap every `TRIM_BYTES`."""
        self._passed += n_bytes
        if self._passed >= TRIM_BYTES:
            self._passed = 0
            trim_heap()

    def forget_memory(self) -> None:
        """Free the memory that `hold` keeps for the next block."""
        self._reused.clear()

    @contextmanager
    def resident(self, names: Iterable[str]) -> Iterator[None]:
        """Load these weights and all buffers to the device for the duration of the context."""
        names = list(names)
        disk = self.source.read({self.on_disk[name] for name in names})
        for name in names:
            tensor = disk[self.on_disk[name]]
            wide = tensor.is_floating_point()
            self._set(name, tensor.to(self.device, self.dtype if wide else tensor.dtype))
        self._place_buffers("")
        try:
            yield
        finally:
            self.drop(names)

    def fill(self) -> nn.Module:
        """The model with all of its weights."""
        for name, on_disk in self.on_disk.items():
            tensor = self.source.read([on_disk])[on_disk]
            wide = tensor.is_floating_point()
            self._set(name, tensor.to(self.device, self.dtype if wide else tensor.dtype))
        self._place_buffers("")
        self.model.tie_weights()
        return self.model

    def before_blocks(self) -> list[str]:
        """Names of the weights outside blocks that a forward pass needs up to the last block."""
        head = self.model.get_output_embeddings()
        unused = None if head is None else self._name_of(head) + ".weight"
        return [name for name in self._outside() if name != unused]

    def after_blocks(self) -> list[str]:
        """Names of the weights that turn hidden states into logits."""
        unused = self._name_of(self.model.get_input_embeddings()) + ".weight"
        return [name for name in self._outside() if name != unused]

    def _outside(self) -> list[str]:
        return [name for name in self.on_disk if not name.startswith(self.prefix + ".")]

    def _name_of(self, module: nn.Module) -> str:
        return next(name for name, other in self.model.named_modules() if other is module)

    def _fits(self, tensor: Tensor) -> bool:
        return tensor.device == self.device and tensor.dtype == self.dtype

    def _place_buffers(self, module: str) -> None:
        """Move a module's buffers to the device: they are computed on the CPU, not read."""
        for name, buffer in self.model.get_submodule(module).named_buffers(prefix=module):
            if buffer.device != self.device and not buffer.is_meta:
                self._set(name, buffer.to(self.device))

    def _set(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter or buffer by name."""
        path, _, last = name.rpartition(".")
        owner = self.model.get_submodule(path)
        if last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[last] = tensor


def build_without_weights(source: Checkpoint, dtype: torch.dtype) -> nn.Module:
    """The model with every parameter on the meta device and every buffer computed.

    Raises:
        DataError: The checkpoint is quantized in an unsupported format, or is not a causal language
            model.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = source.config
    source.require("load")
    try:
        # Real buffers: rotary tables are computed, not stored.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{source.path}: no causal language model for {config.model_type!r}: {reason}",
            code="unsupported-model",
        ) from error
    if source.kind.alone:
        from sparsekit.model.form_linear import use_forms

        use_forms(model, source)
    return model.eval().requires_grad_(False)


def refuse_hidden_weights(
    model: nn.Module, blocks: list[nn.Module], prefix: str, source: Checkpoint
) -> None:
    """Refuse blocks with matrices outside linear layers, which would stay dense unnoticed.

    Raises:
        DataError: Names these matrices.
    """
    hidden = []
    for index, block in enumerate(blocks):
        known = {id(m.weight) for m in block.modules() if is_linear(m)}
        if source.kind.alone:
            from sparsekit.model.form_linear import form_layers

            known |= {id(p) for layer in form_layers(block) for p in layer.parameters()}
        for name, parameter in block.named_parameters():
            if parameter.ndim >= 2 and id(parameter) not in known:
                hidden.append(f"{prefix}.{index}.{name}")
    if hidden:
        raise DataError(
            f"{source.path}: {model.config.model_type!r} keeps weights outside plain linear "
            f"layers, which sparsekit cannot prune yet; would be left alone: {families(hidden)}",
            "mixture-of-experts models and custom linear layers are not supported",
            code="unsupported-model",
        )
