"""Memory needs of training."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError
from sparsekit.memory import available_memory
from sparsekit.model.architecture import Target
from sparsekit.recovery.config import SHORTEST, RecoverConfig
from sparsekit.recovery.methods import Recoverer

# Lower bound of the estimated activations: layers that share an input keep it once.
SURE = 2 / 3


def require_memory(
    config: RecoverConfig,
    source: Checkpoint,
    teacher: Checkpoint | None,
    recoverer: Recoverer,
    device: torch.device,
    hint: str = "",
    *,
    shards: bool = False,
) -> None:
    """Refuse a model whose weights, gradients and moments do not fit, whatever the batch size.

    With `shards` only the weights count, which each process holds before sharding.

    Raises:
        DataError: Names the memory needed and available.
    """
    needed = _float32_bytes(source) if shards else training_bytes(config, source, None, recoverer)
    contents = f"weights{'' if shards else ', gradients and two moments'} in float32"
    if teacher is not None:
        needed += _teacher_bytes(config, teacher)
        contents += ", and the teacher" + (" in bfloat16" if _halved(config) else "")
    needed *= _sharing(device)
    if needed > (free := _free(device)):
        raise DataError(
            f"training {source.path} needs {needed / 1e9:.1f} GB of memory for {contents}, "
            f"plus activations; {free / 1e9:.1f} GB are available",
            hint
            or "shard it over several GPUs or machines (accelerate launch --use_fsdp "
            "--fsdp_version 2)"
            + (", or leave out the teacher with --kl-weight 0" if teacher else ""),
            code="not-enough-memory",
        )


def require_pass(
    config: RecoverConfig,
    source: Checkpoint,
    teacher: Checkpoint | None,
    linear: Sequence[Target],
    recoverer: Recoverer,
    device: torch.device,
) -> None:
    """Refuse a batch whose activations do not fit into memory.

    Raises:
        DataError: Suggests a batch size or length that may fit.
    """
    row = pass_bytes(config, linear) // config.batch
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    held, contents = training_bytes(config, source, teacher, recoverer), "weights, moments"
    if config.accumulate == processes:  # gradients replace activations during the backward pass
        held -= _float32_bytes(source)
    else:
        contents = "weights, gradients, moments"
    left = max(0, _free(device) // _sharing(device) - held)
    if SURE * config.batch * row <= left:
        return
    rows, tokens = int(left // row), int(left * config.length // row)
    parts = config.batch * config.accumulate / processes  # rows per step and process
    if rows:
        hint = f"--batch {rows} --accumulate {math.ceil(parts / rows) * processes} at most"
    elif tokens >= SHORTEST:
        more = math.ceil(parts * config.length / tokens) * processes
        hint = f"--batch 1 --length {tokens} --accumulate {more} at most"
    else:
        hint = "train it where there is more memory"
    raise DataError(
        f"a pass over {config.batch} rows of {config.length} tokens keeps "
        f"about {config.batch * row / 1e9:.1f} GB of activations, {left / 1e9:.1f} GB are left "
        f"next to {held / 1e9:.1f} GB of {contents}" + (" and the teacher" if teacher else ""),
        hint,
        code="not-enough-memory",
    )


def pass_bytes(config: RecoverConfig, linear: Sequence[Target]) -> int:
    """Estimated bytes of activations: the inputs and outputs of all linear layers."""
    return 4 * config.batch * config.length * sum(sum(target.shape) for target in linear)


def _free(device: torch.device) -> int:
    """Bytes of available memory."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()


def _sharing(device: torch.device) -> int:
    """Number of processes that share this memory: on a CPU, those of the machine."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def training_bytes(
    config: RecoverConfig, source: Checkpoint, teacher: Checkpoint | None, recoverer: Recoverer
) -> int:
    """Bytes of weights, gradients, moments and teacher, whatever the batch size.

    In mixed precision a pass also keeps a 16-bit copy of the weights.
    """
    halves = 10 if recoverer.rule(0.0).masks_forward or recoverer.spans else 8
    halves += config.mixed_precision == "bf16"
    teacher_bytes = _teacher_bytes(config, teacher) if teacher else 0
    return halves * _float32_bytes(source) // 2 + teacher_bytes


def _teacher_bytes(config: RecoverConfig, teacher: Checkpoint) -> int:
    """Bytes of the teacher's weights in its compute dtype."""
    return _float32_bytes(teacher) // (2 if _halved(config) else 1)


def _halved(config: RecoverConfig) -> bool:
    """Whether the teacher has 16-bit weights, which it has not if its probabilities are cached."""
    return config.mixed_precision == "bf16" and config.teacher_top is None


def state_bytes(source: Checkpoint) -> int:
    """Bytes of the saved states while a new one replaces an old one."""
    return 2 * 3 * _float32_bytes(source)  # weights and two moments; the masks are small


def _float32_bytes(source: Checkpoint) -> int:
    """Bytes of all weights in float32."""
    floats = [p for p in source.places.values() if p.dtype.is_floating_point]
    return sum(4 * math.prod(place.shape) for place in floats)
