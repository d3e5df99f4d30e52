"""Prune Hugging Face language-model checkpoints on disk, and know what it cost."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from sparsekit.api.evaluate import evaluate
    from sparsekit.api.prune import prune
    from sparsekit.api.quantize import quantize
    from sparsekit.api.recover import recover
    from sparsekit.api.run import run
    from sparsekit.model.full_model import Resident
    from sparsekit.recovery.masked import Masked


__all__ = ["evaluate", "load", "masked", "prune", "quantize", "recover", "run"]


def __getattr__(name: str) -> Any:
    """Public names, imported on first use."""
    if name in ("evaluate", "prune", "quantize", "recover", "run"):
        return getattr(importlib.import_module(f"sparsekit.api.{name}"), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("sparsekit")
    raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names."""
    return [*__all__, "__version__"]


def load(path: str | Path, dtype: str = "auto", resident: Resident = "packed") -> PreTrainedModel:
    """Load a checkpoint, packed and factored ones too, as a transformers model on the CPU.

    Args:
        path: Folder, hub id or `demo`.
        dtype: `float32`, `bfloat16`, `float16`; auto: the type on disk.
        resident: `packed` keeps packed weights and factors in memory, and each layer unpacks its
            weight on every call. `expand` makes dense weights, which is faster and takes more
            memory; only these can be saved with `save_pretrained`.

    Raises:
        UsageError: `dtype` or `resident` is unknown.
        DataError: The checkpoint cannot be read, has a foreign quantization, lacks weights, or does
            not fit into memory.
    """
    from sparsekit.model.full_model import load

    return load(path, dtype, resident)


def masked(model: nn.Module) -> Masked:
    """Context manager that keeps the zeros of a model while any trainer trains it.

    `with sparsekit.masked(model): trainer.train()`. The entries that are zero on entry are reset to
    zero after every step of a torch optimizer, and on exit, so that adapters merged in between do
    not fill them.

    Raises:
        UsageError: The model has no zeros, or is not a module.
    """
    from sparsekit.recovery.masked import Masked

    return Masked(model)
