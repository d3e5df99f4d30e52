"""What pruning costs: time against one plain forward pass, and peak memory."""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import INDEX
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import UsageError
from sparsekit.memory import peak_memory
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.model.full_model import load_whole, require_memory
from sparsekit.model.skeleton import build_without_weights
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.text.calibration import Calibration
from sparsekit.text.rows import TokenRows

# A generated shard is written when it has grown to this size.
SHARD_BYTES = 1 << 28
# Why the floor needs the whole model in memory, and what can be had without.
NEED = {"purpose": "the plain forward", "way_out": "leave it out with --no-floor"}
# Random token rows beside a generated model, which has no tokenizer.
ROWS = "rows.safetensors"


def bench_prune(
    config: PruneConfig,
    model: str,
    *,
    repeat: int = 3,
    floor: bool = True,
    scratch: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time whole `prune` runs (reading, checking and writing included) against the floor.

    The floor is one plain forward of the model's decoder, as transformers loads it, over the
    same calibration rows in the same process and compute type, run right after each `prune`; the
    ratio is the median over these pairs, since a machine's speed drifts. Memory is the peak of the
    first run, before anything else is loaded, above the process with its libraries imported.

    Args:
        config: What to prune with.
        model: A folder, hub id or `demo`.
        repeat: Runs of each; the medians count.
        floor: Whether to run the floor, for which the whole model must fit into memory.
        scratch: Folder for the output, which is deleted; None takes the system's.
        progress: Told of each block.
    """
    if repeat < 1:
        raise UsageError(f"--repeat must be at least 1, not {repeat}")
    if scratch is not None and not scratch.is_dir():
        raise UsageError(f"--scratch {scratch} is no folder", "make it, or leave the option out")
    source = Checkpoint.open(resolve(model, progress))
    if floor:
        dtype = compute_dtype(config.dtype, pick_device(config.device), source)
        require_memory(source, dtype, **NEED)
    rows = (config.rows or Calibration()).rows(source, progress)
    build_without_weights(source, torch.float32)  # transformers' code of this family is loaded
    before = psutil.Process().memory_info().rss
    seconds: list[float] = []
    floors: list[float] = []
    peak = 0
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            started = time.perf_counter()
            report = prune(config, model, Path(folder) / "out", progress=progress)
            seconds.append(time.perf_counter() - started)
        peak = peak or max(0, peak_memory() - before)
        if floor:
            floors.append(_forward_seconds(source, rows, report.entry["recipe"]))
    ratios = [pruned / plain for pruned, plain in zip(seconds, floors, strict=False)]
    return {
        "model": model,
        "method": config.title,
        "pattern": report.entry["recipe"]["pattern"],
        "rows": list(rows.tokens.shape),
        "model_bytes": source.n_bytes,
        "blocks": source.config.get_text_config().num_hidden_layers,
        "prune_seconds": seconds,
        "floor_seconds": floors,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "solve_seconds": sum(row["seconds"] for row in report.entry["weights"]),
        "peak_bytes_above_start": peak,
        "threads": torch.get_num_threads(),
        "device": report.entry["recipe"]["device"],
        "dtype": report.entry["recipe"]["dtype"],
    }


@torch.no_grad()
def _forward_seconds(source: Checkpoint, rows: TokenRows, recipe: Mapping[str, Any]) -> float:
    """Seconds of the plain forward, on the device and in the type that pruning used."""
    dtype, device = getattr(torch, recipe["dtype"]), recipe["device"]
    model = load_whole(source, dtype, **NEED).to(device)
    tokens, decoder = rows.tokens.to(device), model.base_model
    decoder(input_ids=tokens[:1], use_cache=False)  # not timed: first-call set-up
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for row in tokens:
        decoder(input_ids=row[None], use_cache=False)
    wait()
    return time.perf_counter() - started


def generate(out: Path, *, blocks: int, hidden: int, seed: int = 0, vocabulary: int = 4096) -> Path:
    """Write a Llama checkpoint of random bfloat16 weights, shard by shard, for memory benches.

    Token rows to calibrate on lie beside the weights, in `rows.safetensors`.

    Args:
        out: The folder to make.
        blocks: Number of decoder blocks.
        hidden: Hidden size, a multiple of 64; a block has about 25 bytes for each hidden².
        seed: Seeds the weights.
        vocabulary: Number of tokens.

    Raises:
        UsageError: The folder exists or a size does not fit.
    """
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    if out.exists():
        raise UsageError(f"the output {out} exists", "choose another folder")
    if blocks < 1 or hidden < 64 or hidden % 64:
        raise UsageError("--blocks must be at least 1 and --hidden a multiple of 64")
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
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    shapes = list(_llama_shapes(config))
    number = 1
    for name, shape in shapes:
        tensor = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        shard[name] = (tensor if len(shape) == 2 else torch.ones(shape)).bfloat16()
        weight_map[name] = f"model-{number:05d}.safetensors"
        if sum(t.nbytes for t in shard.values()) > SHARD_BYTES or name == shapes[-1][0]:
            save_file(shard, out / weight_map[name], metadata={"format": "pt"})
            shard = {}
            number += 1
    config.save_pretrained(out)
    rows = torch.randint(vocabulary, (8, 256), generator=generator)
    save_file({"tokens": rows}, out / ROWS)
    (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def _llama_shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint's tensors."""
    hidden, wide = config.hidden_size, config.intermediate_size
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        block = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", (hidden,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}.self_attn.{name}.weight", (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            yield f"{block}.mlp.{name}.weight", (wide, hidden)
        yield f"{block}.mlp.down_proj.weight", (hidden, wide)
    yield "model.norm.weight", (hidden,)
