"""Recognition of quantization formats that sparsekit does not write.

The dropped formats are those of compressed-tensors 0.10 to 0.14, the last versions to write them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BITMASKS, MARLIN = ("sparse-24-bitmask", "sparse-bitmask"), "marlin-24"
# Last parts of the names of a weight's tensors; the first one marks the format.
LEGACY_PARTS = {
    "sparse-24-bitmask": ("bitmask", "compressed", "shape"),
    "sparse-bitmask": ("bitmask", "compressed", "shape", "row_offsets"),
    MARLIN: ("meta", "weight_packed", "scale_packed"),
}


def compression(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantization settings of a config.json, under their present or their old key."""
    settings = config.get("quantization_config") or config.get("compression_config")
    return settings if isinstance(settings, Mapping) else {}


def legacy_format(config: Mapping[str, Any]) -> str | None:
    """The dropped format that a config.json names; None if it names none."""
    settings = compression(config)
    sparsity = settings.get("sparsity_config")
    inner = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    return next((form for form in (inner, settings.get("format")) if form in LEGACY_PARTS), None)


def named_format(config: Mapping[str, Any]) -> str:
    """The name that a config.json gives its format, e.g. ` (gptq)`; empty if it gives none."""
    settings = compression(config)
    form = legacy_format(config) or settings.get("format")
    words = [str(word) for word in (settings.get("quant_method"), form) if word]
    return f" ({' '.join(', '.join(words).split())})" if words else ""
