"""Prune Hugging Face language-model checkpoints on disk, and know what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

__version__ = "0.1.0"


def load(path: str | Path, dtype: str = "auto") -> PreTrainedModel:
    """A checkpoint as a transformers model on the CPU, also one that is kept as factors.

    Args:
        path: The folder.
        dtype: `float32`, `bfloat16`, `float16`; auto: the type on disk.

    Raises:
        DataError: It cannot be read, lacks weights, or does not fit into memory.
    """
    from sparsekit.models.whole import load

    return load(path, dtype)
