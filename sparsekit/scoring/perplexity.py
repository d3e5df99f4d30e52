"""Perplexity, block by block."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import NumericalError
from sparsekit.memory import available_memory
from sparsekit.model.block_stream import BlockStream
from sparsekit.progress import SILENT, Progress
from sparsekit.scoring.quality import perplexity_of
from sparsekit.scoring.standard_error import mean_stderr
from sparsekit.text.rows import TokenRows

# Share of free memory for the hidden states of all windows. Windows that do not fit are measured
# in further passes over the blocks.
HIDDEN_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on non-overlapping windows."""

    text: str
    windows: int
    length: int
    dtype: str
    """Compute type."""
    device: str
    fingerprint: str
    """Of the token rows; perplexities are comparable only if it is equal."""
    losses: tuple[float, ...]
    """Mean loss per window over its length − 1 predictions, in nats."""

    @property
    def log(self) -> float:
        """Mean of the window means."""
        return sum(self.losses) / len(self.losses)

    @property
    def value(self) -> float:
        """Perplexity; infinite if a float cannot hold it."""
        return perplexity_of(self.log)

    def to_json(self) -> dict[str, Any]:
        """Everything except the losses."""
        return {
            "text": self.text,
            "windows": self.windows,
            "length": self.length,
            "dtype": self.dtype,
            "device": self.device,
            "fingerprint": self.fingerprint,
            "value": self.value if self.value < math.inf else None,
            "log_perplexity": self.log,
            "log_stderr": mean_stderr(self.losses),
        }


def perplexity(
    source: Checkpoint,
    rows: TokenRows,
    *,
    device: str,
    dtype: torch.dtype,
    label: str,
    progress: Progress = SILENT,
) -> Perplexity:
    """Perplexity of a model on token rows, streamed block by block."""
    stream = BlockStream(source, device=device, dtype=dtype)
    count, length = rows.tokens.shape
    each = length * source.config.get_text_config().hidden_size * dtype.itemsize
    fitting = max(1, int(available_memory() * HIDDEN_SHARE) // each)
    passes = range(0, count, fitting)
    progress.begin(f"perplexity of {label}", len(passes) * len(stream))
    losses: list[float] = []
    for start in passes:
        tokens = rows.tokens[start : start + fitting]
        stream.feed(tokens)
        for block in stream:
            block.load()
            block.advance()
            progress.step(block.name)
        losses += stream.losses(tokens).tolist()
    progress.end()
    if not all(map(math.isfinite, losses)):
        raise NumericalError(
            f"{source.path}: the loss is not a number on window "
            f"{next(i for i, loss in enumerate(losses) if not math.isfinite(loss))}",
            "compute in a wider type (--dtype float32), or the model is broken",
            code="not-finite",
        )
    return Perplexity(
        text=rows.source,
        windows=count,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        fingerprint=rows.fingerprint,
        losses=tuple(losses),
    )
