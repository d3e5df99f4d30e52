"""Weights in forms that every library has dropped, as dense ones.

The layouts are those of compressed-tensors 0.10 to 0.14, which were the last to write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BITMASKS, MARLIN = ("sparse-24-bitmask", "sparse-bitmask"), "marlin-24"
# The last parts of the names of what a weight consists of; the first tells that it has the form.
LEGACY_PARTS = {
    "sparse-24-bitmask": ("bitmask", "compressed", "shape"),
    "sparse-bitmask": ("bitmask", "compressed", "shape", "row_offsets"),
    MARLIN: ("meta", "weight_packed", "scale_packed"),
}


def compression(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a config.json says of how its weights are stored, under its present or its old name."""
    told = config.get("quantization_config") or config.get("compression_config")
    return told if isinstance(told, Mapping) else {}


def legacy_format(config: Mapping[str, Any]) -> str | None:
    """Which of the dropped forms a config.json names; None when it is another."""
    told = compression(config)
    sparsity = told.get("sparsity_config")
    inner = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    return next((form for form in (inner, told.get("format")) if form in LEGACY_PARTS), None)


def named_format(config: Mapping[str, Any]) -> str:
    """How a config.json names a format that is not ours, as ` (gptq)`; empty when it does not."""
    told = compression(config)
    form = legacy_format(config) or told.get("format")
    words = [str(word) for word in (told.get("quant_method"), form) if word]
    return f" ({' '.join(', '.join(words).split())})" if words else ""
