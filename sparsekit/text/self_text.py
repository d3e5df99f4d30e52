"""Token rows sampled from the dense model itself.

All rows have the requested length: the end-of-text token does not end a row, just as it does not
end a window of concatenated documents.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.errors import DataError
from sparsekit.memory import MemoryUse
from sparsekit.progress import SILENT, Progress
from sparsekit.text import cache_file

if TYPE_CHECKING:
    from torch import Tensor

    from sparsekit.checkpoint.checkpoint import Checkpoint


# Fixed, because the random numbers of a row depend on the other rows of its batch.
BATCH = 8
SAMPLING = MemoryUse("text of 'self'", hint="use builtin or a file instead")


def require_memory(checkpoint: Checkpoint) -> None:
    """Refuse a model whose float32 weights do not fit into the available memory.

    Raises:
        DataError: They do not.
    """
    import torch

    from sparsekit.model import full_model

    full_model.require_memory(checkpoint, torch.float32, SAMPLING)


def sample_rows(
    checkpoint: Checkpoint,
    samples: int,
    length: int,
    seed: int,
    progress: Progress = SILENT,
    *,
    kept: Path | None = None,
) -> Tensor:
    """Sample token ids [samples, length] from the model, in float32 on the CPU.

    Plain ancestral sampling: temperature 1, no top-k, no top-p, none of the checkpoint's own
    generation settings. A row starts with the BOS token of tokenizer or config, else with EOS, else
    with a random id. The global random generators are not changed. With `kept` every batch is
    stored in this file, from which an interrupted run resumes with the same rows.

    Raises:
        DataError: The float32 model does not fit into the available memory.
        StorageError: A batch cannot be kept.
    """
    import torch
    from transformers import GenerationConfig

    from sparsekit.model.full_model import load_whole

    model = load_whole(checkpoint, torch.float32, SAMPLING)
    sampling = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - 1
    )
    # generate() takes unset options from the model's own settings, EOS among them.
    model.generation_config = sampling
    start = start_token(checkpoint)
    vocabulary = checkpoint.config.get_text_config().vocab_size
    stored = cache_file.read_or_remove(kept) if kept else None
    rows = stored["rows"] if stored else torch.empty(0, length, dtype=torch.int64)
    progress.begin("sampling rows from the model", -(-samples // BATCH), len(rows) // BATCH)
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the CUDA generators, which are not restored.
        torch.default_generator.manual_seed(seed)
        if stored:
            torch.default_generator.set_state(stored["state"])
        while len(rows) < samples:
            first = torch.randint(vocabulary, (min(BATCH, samples - len(rows)), 1))
            if start is not None:
                first.fill_(start)
            mask = torch.ones_like(first)
            drawn = model.generate(first, attention_mask=mask, generation_config=sampling)
            rows = torch.cat([rows, drawn])
            if kept:
                state = torch.default_generator.get_state()
                cache_file.write(kept, {"rows": rows, "state": state})
            progress.step(f"{len(rows)} of {samples} rows")
    progress.end()
    return rows


def start_token(checkpoint: Checkpoint) -> int | None:
    """The first id of every row: BOS, else EOS; None if tokenizer and config have neither."""
    config = checkpoint.config.get_text_config()
    try:
        holders = [checkpoint.tokenizer(), config]
    except DataError:
        holders = [config]  # sampling needs only ids, not a tokenizer
    for field in ("bos_token_id", "eos_token_id"):
        for holder in holders:
            token = getattr(holder, field, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int) and 0 <= token < config.vocab_size:
                return token
    return None
