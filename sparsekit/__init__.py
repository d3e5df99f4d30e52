"""Prune Hugging Face language-model checkpoints on disk, and know what it cost."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from sparsekit.api import evaluate, prune, quantize, recover, run
    from sparsekit.model.full_model import Resident
    from sparsekit.recovery.masked import Masked


__all__ = ["evaluate", "load", "masked", "prune", "quantize", "recover", "run"]


def __getattr__(name: str) -> Any:
    """The verbs, imported when they are asked for."""
    if name in ("evaluate", "prune", "quantize", "recover", "run"):
        from sparsekit import api

        return getattr(api, name)
    if name == "__version__":
        return importlib.metadata.version("sparsekit")
    raise AttributeError(f"module 'sparsekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return [*__all__, "__version__"]


def load(path: str | Path, dtype: str = "auto", resident: Resident = "packed") -> PreTrainedModel:
    """A checkpoint as a transformers model on the CPU, also one that is packed or factors.

    Args:
        path: The folder; a hub id or `demo` does too.
        dtype: `float32`, `bfloat16`, `float16`; auto: the type on disk.
        resident: `packed` keeps packed weights and factors as they are, and each layer unpacks its
            own when it is called; `expand` holds dense ones, which is faster and takes more memory.
            Only those can be saved with `save_pretrained`.

    Raises:
        UsageError: Another word for `dtype` or `resident`.
        DataError: It cannot be read, is quantized in another way than ours, lacks weights, or does
            not fit into memory.
    """
    from sparsekit.model.full_model import load

    return load(path, dtype, resident)


def masked(model: nn.Module) -> Masked:
    """Keep the zeros of a model's matrices while anything else trains it.

    A context manager: `with sparsekit.masked(model): trainer.train()`. The entries that are zero
    now are zero after every step of a torch optimizer, and when it is left, so that adapters which
    were merged in between have not filled them.

    Raises:
        UsageError: The model has no zeros, or is no module.
    """
    from sparsekit.recovery.masked import Masked

    return Masked(model)
