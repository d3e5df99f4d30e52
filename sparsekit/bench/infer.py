"""Time and memory of loading and running checkpoints."""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError, UsageError
from sparsekit.memory import MemoryUse, peak_memory
from sparsekit.model.device import pick_device
from sparsekit.model.form_linear import expand
from sparsekit.model.full_model import RESIDENT, Resident, load_whole, new_cache, own_dtype
from sparsekit.pipeline.options import one_of
from sparsekit.progress import SILENT, Progress

BENCH_INFER = MemoryUse("bench infer", hint="sparsekit eval streams it")


@dataclass(frozen=True, kw_only=True)
class InferConfig:
    """Options of `bench infer`; the flags have the same names and defaults."""

    prompt: int = 256
    """Tokens per prompt."""
    new: int = 32
    """Tokens to generate, one at a time."""
    batch: int = 1
    resident: Resident = "packed"
    """Whether packed weights and factors stay packed in memory or are expanded on loading."""
    device: str = "auto"

    def check(self) -> None:
        """Check the options.

        Raises:
            UsageError: A number is too small, or `resident` is unknown.
        """
        for name, least in (("prompt", 1), ("new", 2), ("batch", 1)):
            if getattr(self, name) < least:
                message = f"--{name} must be at least {least}, not {getattr(self, name)}"
                raise UsageError(message, code="out-of-range")
        one_of("--resident", self.resident, RESIDENT)


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """Measurements of one checkpoint in its own process."""

    model: str
    disk_bytes: int
    load_seconds: float
    resident_bytes: int
    """Growth of the process's host memory through loading and a first forward pass.

    On a GPU the weights are not in host memory.
    """
    peak_bytes: int
    """Peak growth of host memory."""
    device_bytes: int
    """GPU memory that torch has allocated after the first forward pass; 0 without a GPU."""
    device_peak_bytes: int
    """Peak GPU memory that torch has allocated."""
    prefill: float
    """Prompt tokens per second."""
    decode: float
    """Generated tokens per second."""
    tokens: list[int]
    """Tokens generated from the first prompt, the same for the same model."""


def bench_infer(
    config: InferConfig, models: Sequence[str], progress: Progress = SILENT
) -> dict[str, Any]:
    """Load and run checkpoints, each in its own process, and measure time and memory.

    Loading includes a first forward pass, in which some forms unpack or expand their weights.
    All models generate greedily from the same prompts.

    Args:
        config: Prompt, tokens and batch.
        models: Folders, hub ids or `demo`.
        progress: Reports each model.

    Raises:
        UsageError: A number is too small.
        DataError: A model cannot be read, does not fit into memory, or its process was killed.
    """
    config.check()
    paths = [(name, Checkpoint.open(resolve(name, progress)).path) for name in models]
    progress.begin("load and run", len(paths))
    rows = []
    for name, path in paths:
        rows.append(_in_a_process(config, name, str(path), torch.get_num_threads()))
        progress.step(name)
    progress.end()
    return {
        "prompt": config.prompt,
        "new": config.new,
        "batch": config.batch,
        "resident": config.resident,
        "device": pick_device(config.device),
        "threads": torch.get_num_threads(),
        "models": [asdict(row) for row in rows],
        "same_tokens": len({tuple(row.tokens) for row in rows}) == 1,
    }


def _in_a_process(config: InferConfig, name: str, path: str, threads: int) -> Inferred:
    """Measure in a fresh interpreter, so that the memory is that of this model only."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_measure, config, name, path, threads).result()
        except BrokenProcessPool:
            raise DataError(
                f"{name}: the process that measures it ended without a result",
                "it may have been killed for memory: try a smaller --batch or --prompt",
                code="process-died",
            ) from None


@torch.no_grad()
def _measure(config: InferConfig, name: str, path: str, threads: int) -> Inferred:
    """Load one checkpoint and run it."""
    torch.set_num_threads(threads)
    device, process = pick_device(config.device), psutil.Process()
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    source = Checkpoint.open(resolve(path))
    vocabulary = source.config.get_text_config().vocab_size
    prompt = torch.arange(config.batch * config.prompt).view(config.batch, -1) % vocabulary
    prompt = prompt.to(device)
    before, started = process.memory_info().rss, time.perf_counter()
    model = load_whole(source, own_dtype(source), BENCH_INFER).to(device)
    if config.resident == "expand":
        expand(model)
    model(input_ids=prompt[:, :1], use_cache=False)
    wait()
    load_seconds, resident = time.perf_counter() - started, process.memory_info().rss - before
    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    cache = new_cache(model)
    started = time.perf_counter()
    token = model(input_ids=prompt, **cache, use_cache=True).logits[:, -1:].argmax(-1)
    wait()
    prefill = prompt.numel() / (time.perf_counter() - started)
    tokens = [token]
    started = time.perf_counter()
    for _ in range(config.new - 1):
        output = model(input_ids=tokens[-1], **cache, use_cache=True)
        tokens.append(output.logits[:, -1:].argmax(-1))
    wait()
    decode = config.batch * (config.new - 1) / (time.perf_counter() - started)
    return Inferred(
        model=name,
        disk_bytes=source.n_bytes,
        load_seconds=load_seconds,
        resident_bytes=resident,
        peak_bytes=peak_memory() - before,
        device_bytes=allocated,
        device_peak_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        prefill=prefill,
        decode=decode,
        tokens=torch.cat(tokens, 1)[0].tolist(),
    )
