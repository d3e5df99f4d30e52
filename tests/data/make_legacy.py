"""Makes `legacy/` beside this file with a release of compressed-tensors that still wrote the forms.

In an environment of its own: `pip install compressed-tensors==0.14.0`, then
`python make_legacy.py`; 0.10.2 gives the same tensors.
"""

import hashlib
import json
from pathlib import Path

import compressed_tensors
import torch
from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import (
    Sparse24BitMaskCompressor,
)
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskCompressor
from compressed_tensors.compressors.sparse_quantized_compressors.marlin_24 import (
    Marlin24Compressor,
)
from compressed_tensors.config import BitmaskConfig, Sparse24BitMaskConfig
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

OUT = Path(__file__).with_name("legacy")
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=64,
    initializer_range=0.2,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)


def pruned(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of each four inputs."""
    groups = weight.unflatten(1, (-1, 4))
    kept = groups.abs().float().argsort(-1, descending=True)[..., :2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True)
    return groups.masked_fill(~mask, 0).flatten(1).contiguous()


def write(name: str, tensors: dict[str, torch.Tensor], told: dict | None) -> None:
    folder = OUT / name
    folder.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(CONFIG.to_json_string())
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    if told:
        config["quantization_config"] = told
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG).half()
state = {k: v.detach().clone() for k, v in model.state_dict().items() if k != "lm_head.weight"}
linear = [name for name, tensor in state.items() if tensor.ndim == 2 and "embed" not in name]
state |= {name: pruned(state[name]) for name in linear}
write("dense", state, None)

layers = {name.removesuffix(".weight") for name in linear}
for compressor, kind in (
    (Sparse24BitMaskCompressor, Sparse24BitMaskConfig),
    (BitmaskCompressor, BitmaskConfig),
):
    config = kind(targets=["Linear"], ignore=["lm_head"])
    told = {
        "version": compressed_tensors.__version__,
        "quant_method": "compressed-tensors",
        "sparsity_config": json.loads(config.model_dump_json()),
    }
    compressed = compressor(config=config).compress(dict(state), compression_targets=layers)
    write(config.format, compressed, told)

for bits in (4, 8):
    args = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scaled = dict(state)
    for name in linear:
        largest = state[name].float().abs().amax(1, keepdim=True)
        scaled[f"{name}_scale"] = (largest / ((2**bits - 1) / 2)).half()
    packed = Marlin24Compressor().compress(scaled, dict.fromkeys(layers, scheme))
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="marlin-24",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    write(f"marlin-24-int{bits}", packed, json.loads(config.model_dump_json()))

# With groups of inputs: one weight, and what the release itself makes of its codes. In the order of
# the scales, 256 inputs count as one group: half of them are kept.
for inputs in (512, 256):
    weight = pruned(torch.randn(64, inputs).half())
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128, symmetric=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    scale = (weight.float().unflatten(1, (-1, 128)).abs().amax(-1) / 7.5).half()
    codes = quantize(x=weight, scale=scale, zero_point=None, args=args)
    dense = dequantize(x_q=codes, scale=scale, zero_point=None, args=args).half().contiguous()
    dense += 0.0  # no -0.0
    tensors = {"x.weight": weight, "x.weight_scale": scale}
    packed = Marlin24Compressor().compress(tensors, {"x": scheme})
    save_file(
        {name: tensor.contiguous() for name, tensor in packed.items()},
        OUT / f"marlin-24-grouped-{inputs}.safetensors",
        {"sha256": hashlib.sha256(dense.view(torch.uint8).numpy()).hexdigest()},
    )
