"""Speed of torch's 2:4 kernels on this machine's GPU, compared with dense weights.

The tests run on a CPU with dense weights instead of the kernels.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.memory import MemoryUse
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.full_model import load_whole, new_cache, own_dtype
from sparsekit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


BATCHES = (1, 16, 256)
# Tokens per prompt, warm-up passes, and timed passes.
PROMPT, WARM, TIMED = 128, 3, 10
MEASURING = MemoryUse("measuring the 2:4 kernels", hint="--device cpu examines the form only")
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time of a pass over a batch, with dense and with sparse weights."""

    batch: int
    phase: Phase
    """A prompt of `PROMPT` tokens, or one token after it."""
    dense: float | None
    """Seconds; None: out of memory."""
    sparse: float | None

    @property
    def gain(self) -> float | None:
        """Speed-up of the sparse weights."""
        return self.dense / self.sparse if self.dense and self.sparse else None


@torch.no_grad()
def measure_kernels(
    source: Checkpoint,
    device: str,
    progress: Progress,
    convert: Callable[[Tensor], Tensor] = torch.sparse.to_sparse_semi_structured,
) -> list[Speed]:
    """Time the whole model, then the same with its linear layers on 2:4 kernels.

    Args:
        source: A plain checkpoint whose weights are all 2:4.
        device: Where to run it.
        progress: Reports each pass.
        convert: Converts a dense weight to a sparse one.

    Raises:
        DataError: The model does not fit into memory.
        RuntimeError: The kernels do not run here, or do not support all weights.
    """
    dtype = own_dtype(source)
    dtype = torch.float16 if dtype == torch.float32 else dtype  # the kernels need 16 bits
    names = {t.name for t in BlockStream(source, device="cpu", dtype=torch.float32).targets()}
    model = load_whole(source, dtype, MEASURING).to(device)
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and _on_disk(name, names, model.base_model_prefix)
    ]
    if len(layers) != len(names):
        raise RuntimeError(f"{len(layers)} of {len(names)} sparse weights belong to nn.Linear")
    progress.begin("measure 2:4 kernels", 2 * len(BATCHES))
    dense = _passes(model, device, progress)
    for layer in layers:
        layer.weight = nn.Parameter(convert(layer.weight.detach()), requires_grad=False)
    sparse = _passes(model, device, progress)
    progress.end()
    return [
        Speed(batch=batch, phase=phase, dense=dense[batch, phase], sparse=sparse[batch, phase])
        for batch, phase in dense
    ]


def _on_disk(module: str, names: set[str], prefix: str) -> bool:
    """Whether a layer's weight is among these; checkpoints of a bare base model lack its prefix."""
    return bool({f"{module}.weight", f"{module.removeprefix(prefix + '.')}.weight"} & names)


def _passes(
    model: PreTrainedModel, device: str, progress: Progress
) -> dict[tuple[int, Phase], float | None]:
    """Seconds of a prompt and of one token after it, for each batch."""
    seconds: dict[tuple[int, Phase], float | None] = {}
    for batch in BATCHES:
        try:
            prefill, decode = _pass(model, device, batch)
        except torch.OutOfMemoryError:
            prefill = decode = None
            torch.cuda.empty_cache()
        seconds[batch, "prefill"], seconds[batch, "decode"] = prefill, decode
        progress.step(f"batch {batch}")
    return seconds


def _pass(model: PreTrainedModel, device: str, batch: int) -> tuple[float, float]:
    """Seconds of a batch's prompt, and of one token some places after it."""
    vocabulary = model.config.get_text_config().vocab_size
    prompt = (torch.arange(batch * PROMPT, device=device) % vocabulary).view(batch, PROMPT)
    cache = {}
    known = inspect.signature(type(model).forward).parameters
    keep = {"logits_to_keep": 1} if "logits_to_keep" in known else {}

    def prefill() -> None:
        cache.update(new_cache(model))
        model(prompt, **cache, use_cache=True, **keep)

    def decode() -> None:
        model(prompt[:, :1], **cache, use_cache=True)

    return _seconds(prefill, device), _seconds(decode, device)


def _seconds(run: Callable[[], None], device: str) -> float:
    """Median time of a call after warm-up."""
    times: Sequence[float] = [_once(run, device) for _ in range(WARM + TIMED)]
    return median(times[WARM:])


def _once(run: Callable[[], None], device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started
