"""Lets transformers load packed checkpoints: `import sparsekit.hf` registers the loader.

After it `AutoModelForCausalLM.from_pretrained` takes them; `sparsekit.load` needs no import.
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
    """What config.json says of a packed checkpoint: its method's name and nothing else."""

    def __init__(self, quant_method: str = PACKED_METHOD, **_: Any) -> None:
        self.quant_method = quant_method


@register_quantizer(PACKED_METHOD)
class PackedLoader(HfQuantizer):
    """Puts layers that compute with values and places where the model has linear ones."""

    requires_calibration = True

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Name the weight files; a loader that does not know of us finds none, and says so."""
        config.transformers_weights = PACKED_INDEX
        return config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        source = Checkpoint.open(Path(model.config.name_or_path))
        use_forms(model, source)
        with torch.device("cpu"):  # transformers is building on meta
            source.scan()
        for module in model.modules():
            # GPT-2's would be initialised by the `weight` of layers that have none any more.
            if any(isinstance(child, FormLinear) for child in module.children()):
                module._is_hf_initialized = True

    @property
    def is_trainable(self) -> bool:
        """Layers whose values are packed are not."""
        return False

    def is_serializable(self) -> bool:
        """Only `sparsekit pack` writes this form."""
        return False
