"""Time of pruning relative to one plain forward pass, and peak memory."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry_parts import PruneSettings
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import UsageError
from sparsekit.memory import MemoryUse, peak_memory
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.model.full_model import load_whole, require_memory
from sparsekit.model.skeleton import build_without_weights
from sparsekit.progress import SILENT, Progress
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.prune import prune
from sparsekit.text.calibration import Calibration
from sparsekit.text.rows import TokenRows

# The floor needs the whole model in memory.
PLAIN_FORWARD = MemoryUse("the plain forward", hint="leave it out with --no-floor")


def bench_prune(
    config: PruneConfig,
    model: str,
    *,
    repeat: int = 3,
    floor: bool = True,
    scratch: Path | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Time `prune` runs, including reading, checking and writing, relative to the floor.

    The floor is one plain forward pass of the model's decoder in transformers, over the same
    calibration rows in the same process and compute type, right after each `prune`. The ratio is
    the median over these pairs, since a machine's speed drifts. Memory is the peak of the first run
    above the process with its libraries imported.

    Args:
        config: Options of `prune`.
        model: A folder, hub id or `demo`.
        repeat: Runs of each; the result is the median.
        floor: Whether to run the floor, which needs the whole model in memory.
        scratch: Folder for the temporary output; None: the system's.
        progress: Reports each block.
    """
    _check(repeat, scratch)
    source = Checkpoint.open(resolve(model, progress))
    if floor:
        dtype = compute_dtype(config.dtype, pick_device(config.device), source)
        require_memory(source, dtype, PLAIN_FORWARD)
    rows = (config.rows or Calibration()).rows(source, progress)
    build_without_weights(source, torch.float32)  # loads transformers' code of this family
    before = psutil.Process().memory_info().rss
    seconds, floors, peak = [], [], 0
    for _ in range(repeat):
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            started = time.perf_counter()
            entry = prune(config, model, Path(folder) / "out", progress=progress).entry
            seconds.append(time.perf_counter() - started)
        peak = peak or max(0, peak_memory() - before)
        if floor:
            floors.append(_forward_seconds(source, rows, entry.settings))
    ratios = [pruned / plain for pruned, plain in zip(seconds, floors, strict=False)]
    return {
        "model": model,
        "method": config.title,
        "pattern": entry.settings.pattern,
        "rows": list(rows.tokens.shape),
        "model_bytes": source.n_bytes,
        "blocks": source.config.get_text_config().num_hidden_layers,
        "prune_seconds": seconds,
        "floor_seconds": floors,
        "ratio": statistics.median(ratios) if ratios else None,
        "ratios": ratios,
        "solve_seconds": sum(row.seconds for row in entry.weights),
        "peak_bytes_above_start": peak,
        "threads": torch.get_num_threads(),
        "device": entry.settings.device,
        "dtype": entry.settings.dtype,
    }


def _check(repeat: int, scratch: Path | None) -> None:
    """Refuse unusable options.

    Raises:
        UsageError: `repeat` is too small, or `scratch` is not a folder.
    """
    if repeat < 1:
        raise UsageError(f"--repeat must be at least 1, not {repeat}", code="out-of-range")
    if scratch is not None and not scratch.is_dir():
        hint = "make it, or leave out the option"
        raise UsageError(f"--scratch {scratch} is not a folder", hint, code="not-a-folder")


@torch.no_grad()
def _forward_seconds(source: Checkpoint, rows: TokenRows, settings: PruneSettings) -> float:
    """Seconds of the plain forward pass, with the device and type of pruning."""
    dtype, device = getattr(torch, settings.dtype), settings.device
    model = load_whole(source, dtype, PLAIN_FORWARD).to(device)
    tokens, decoder = rows.tokens.to(device), model.base_model
    decoder(input_ids=tokens[:1], use_cache=False)  # not timed: first-call set-up
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for row in tokens:
        decoder(input_ids=row[None], use_cache=False)
    wait()
    return time.perf_counter() - started
