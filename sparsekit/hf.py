"""Loader of packed checkpoints for transformers, registered by `import sparsekit.hf`.

Afterwards `AutoModelForCausalLM.from_pretrained` loads them; `sparsekit.load` needs no import.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import PACKED_INDEX, PACKED_METHOD
from sparsekit.model.form_linear import FormLinear, use_forms

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@register_quantization_config(PACKED_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Quantization configuration of a packed checkpoint: the name of the method only."""

    def __init__(self, quant_method: str = PACKED_METHOD, **_: Any) -> None:
        self.quant_method = quant_method


@register_quantizer(PACKED_METHOD)
class PackedLoader(HfQuantizer):
    """Replaces linear layers with layers that compute with packed weights."""

    requires_calibration = True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Name the weight files; a loader without sparsekit reports that there are none."""
        config.transformers_weights = PACKED_INDEX
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        source = Checkpoint.open(Path(model.config.name_or_path))
        use_forms(model, source)
        with torch.device("cpu"):  # transformers is building on meta
            source.scan()
        for module in model.modules():
            # GPT-2 would initialise the `weight` of layers, which packed layers do not have.
            if any(isinstance(child, FormLinear) for child in module.children()):
                module._is_hf_initialized = True

    @property
    def is_trainable(self) -> bool:
        """Packed layers are not trainable."""
        return False

    def is_serializable(self) -> bool:
        """Only `sparsekit pack` writes this format."""
        return False
