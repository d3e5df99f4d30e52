"""A Llama checkpoint of random weights of any size, for tests of memory and time."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def random_llama(folder: Path, *, blocks: int, hidden: int, vocabulary: int = 4096) -> Path:
    """Write bfloat16 weights, a file a block, with token rows beside them in `rows.safetensors`.

    One block is in memory at a time. A block has about 25 bytes for each hidden², so that 132
    blocks of 1024 are 3.2 GB.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in LlamaForCausalLM(config).named_parameters()}
    generator, parts = torch.Generator().manual_seed(0), {}
    for name in shapes:
        place = name.split(".")
        parts.setdefault(place[2] if place[1] == "layers" else "rest", []).append(name)
    folder.mkdir(parents=True)
    weight_map = {}
    for part, names in parts.items():
        tensors = {n: torch.randn(shapes[n], generator=generator) for n in names}
        tensors = {
            n: t / t.shape[-1] ** 0.5 if t.ndim == 2 else torch.ones_like(t)
            for n, t in tensors.items()
        }
        file = f"model-{part}.safetensors"
        save_file(
            {n: t.bfloat16() for n, t in tensors.items()}, folder / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    config.save_pretrained(folder)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = torch.randint(vocabulary, (8, 256), generator=generator)
    save_file({"tokens": rows}, folder / "rows.safetensors")
    return folder
