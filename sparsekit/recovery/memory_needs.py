"""Memory that training needs."""

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

# Of what a pass is expected to keep, what it surely does: layers that share an input keep one.
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
    """Refuse a model whose weights, gradients and moments do not fit, whatever the batch is.

    With `shards` it is the weights alone, which each process holds before it gives parts away.

    Raises:
        DataError: Says what is needed, and what there is.
    """
    needed = _float32_bytes(source) if shards else training_bytes(config, source, None, recoverer)
    told = f"weights{'' if shards else ', gradients and two moments'} in float32"
    if teacher is not None:
        needed += _teacher_bytes(config, teacher)
        told += ", and the teacher" + (" in bfloat16" if _halved(config) else "")
    needed *= _sharing(device)
    if needed > (free := _free(device)):
        raise DataError(
            f"training {source.path} needs {needed / 1e9:.1f} GB of memory for {told}, "
            f"besides the activations; {free / 1e9:.1f} GB are available",
            hint
            or "shard it over several GPUs or machines (accelerate launch --use_fsdp "
            "--fsdp_version 2)"
            + (", or leave out the teacher with --kl-weight 0" if teacher else ""),
        )


def require_pass(
    config: RecoverConfig,
    source: Checkpoint,
    teacher: Checkpoint | None,
    linear: Sequence[Target],
    recoverer: Recoverer,
    device: torch.device,
) -> None:
    """Refuse a batch whose backward pass cannot fit beside the weights.

    Raises:
        DataError: Says which batch or length may fit.
    """
    row = pass_bytes(config, linear) // config.batch
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    held, told = training_bytes(config, source, teacher, recoverer), "weights, moments"
    if config.accumulate == processes:  # gradients come while what was kept goes
        held -= _float32_bytes(source)
    else:
        told = "weights, gradients, moments"
    left = max(0, _free(device) // _sharing(device) - held)
    if SURE * config.batch * row <= left:
        return
    rows, tokens = int(left // row), int(left * config.length // row)
    parts = config.batch * config.accumulate / processes  # rows of a step, for each of them
    if rows:
        hint = f"--batch {rows} --accumulate {math.ceil(parts / rows) * processes} at most"
    elif tokens >= SHORTEST:
        more = math.ceil(parts * config.length / tokens) * processes
        hint = f"--batch 1 --length {tokens} --accumulate {more} at most"
    else:
        hint = "train it where there is more memory"
    raise DataError(
        f"a pass over {config.batch} rows of {config.length} tokens keeps "
        f"about {config.batch * row / 1e9:.1f} GB, {left / 1e9:.1f} GB are left beside the "
        f"{held / 1e9:.1f} GB of {told}" + (" and the teacher" if teacher else ""),
        hint,
    )


def pass_bytes(config: RecoverConfig, linear: Sequence[Target]) -> int:
    """About what a forward pass keeps for its way back: what enters and leaves each linear layer.

    SmolLM2-135M: 1.22 MB a token, where `bench recover` finds 1.3 to 1.6 with all that comes and
    goes.
    """
    return 4 * config.batch * config.length * sum(sum(target.shape) for target in linear)


def _free(device: torch.device) -> int:
    """Bytes of memory that can be taken."""
    return torch.cuda.mem_get_info()[0] if device.type == "cuda" else available_memory()


def _sharing(device: torch.device) -> int:
    """How many processes take of the same memory: on a CPU those of the machine."""
    return 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def training_bytes(
    config: RecoverConfig, source: Checkpoint, teacher: Checkpoint | None, recoverer: Recoverer
) -> int:
    """Bytes of weights, gradients, moments and teacher, whatever the batch is.

    In mixed precision a pass also keeps the weights as it multiplied them, in 16 bits.
    """
    halves = 10 if recoverer.rule(0.0).masks_forward or recoverer.spans else 8
    halves += config.mixed_precision == "bf16"
    taught = _teacher_bytes(config, teacher) if teacher else 0
    return halves * _float32_bytes(source) // 2 + taught


def _teacher_bytes(config: RecoverConfig, teacher: Checkpoint) -> int:
    """Bytes of the teacher's weights in the type in which it computes."""
    return _float32_bytes(teacher) // (2 if _halved(config) else 1)


def _halved(config: RecoverConfig) -> bool:
    """Whether the teacher holds 16-bit weights; not where its probabilities are kept."""
    return config.mixed_precision == "bf16" and config.teacher_top is None


def state_bytes(source: Checkpoint) -> int:
    """Bytes of the saved states at the moment when a new one takes the place of an old one."""
    return 2 * 3 * _float32_bytes(source)  # weights and two moments; the masks are small


def _float32_bytes(source: Checkpoint) -> int:
    """Bytes of all weights in float32."""
    floats = [p for p in source.places.values() if p.dtype.is_floating_point]
    return sum(4 * math.prod(place.shape) for place in floats)
