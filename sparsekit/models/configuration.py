"""A model's configuration, and why it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import DataError
from sparsekit.files import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_config(path: Path) -> PretrainedConfig:
    """The configuration in a model's folder.

    Raises:
        DataError: It cannot be read, needs code of its own, or is unknown to transformers.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    raw = read_json(path / "config.json")
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    broken = (ValueError, KeyError, OSError, TypeError, ArithmeticError, StrictDataclassError)
    try:
        return transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except broken as error:
        if isinstance(raw, dict) and "auto_map" in raw:
            reason, hint = "it needs remote code, which sparsekit does not run", ""
        elif kind and kind not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
            reason = f"transformers {transformers.__version__} does not know it"
            hint = "a newer one may: pip install -U transformers"
        else:
            reason, hint = " ".join(str(error).split()), ""
        raise DataError(f"{path}: model type {kind!r} cannot be loaded: {reason}", hint) from error
