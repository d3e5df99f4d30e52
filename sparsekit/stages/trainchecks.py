"""What a recover run is refused for: heads, patterns, teachers and memory that do not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch

from sparsekit.errors import DataError, UsageError
from sparsekit.memory import available_memory
from sparsekit.models.architecture import Target
from sparsekit.models.calibration import tokenizer_key
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.recoverers import Recoverer, Scale
from sparsekit.stages.chain import Patterns
from sparsekit.stages.opening import refuse_packed
from sparsekit.stages.trainconfig import SHORTEST, RecoverConfig

# What a configuration may ask for after the output layer, and the value that asks for nothing.
PLAIN_HEAD = {"final_logit_softcapping": 0.0, "logit_scale": 1.0, "logits_scaling": 1.0}
# A model with a larger share of zeros than this is no dense one.
DENSE_ZEROS = 0.05
# Of what a pass is expected to keep, what it surely does: layers that share an input keep one.
SURE = 2 / 3


def refuse_other_heads(source: Checkpoint) -> None:
    """Refuse a model that scales or caps its logits.

    Raises:
        DataError: Names what its configuration asks for.
    """
    config = source.config.get_text_config()
    for key, plain in PLAIN_HEAD.items():
        value = getattr(config, key, None)
        if value not in (None, plain):
            raise DataError(
                f"{source.path}: its logits are changed after the output layer ({key} {value})",
                "such models cannot be trained yet; prune alone works",
            )


def refuse_misfits(
    targets: Sequence[Target], patterns: Patterns, recoverer: Recoverer, config: RecoverConfig
) -> None:
    """Refuse a pattern, spans of scales or of branches that do not divide a weight's inputs."""
    width = config.slorb
    if width is not None and recoverer.settles:
        raise UsageError(
            f"--slorb does not go with {config.method}: it computes with all entries until the end",
            "take --method ast",
        )
    for target in targets:
        columns, pattern, spans = target.shape[1], patterns.of(target), recoverer.spans
        if reason := pattern.misfit(columns):
            raise UsageError(f"{target.name}: {reason}", "another --pattern fits")
        if spans and (columns % spans or (pattern.group and columns // spans % pattern.group)):
            raise UsageError(
                f"{target.name}: {columns} inputs do not divide into {spans} spans of whole "
                f"groups of {pattern.group or 1}",
                "-O spans=0 trains without scales",
            )
        if width and columns % width:
            raise UsageError(
                f"{target.name}: --slorb {width} does not divide {columns} inputs",
                "16 divides those of most models",
            )


def refuse_cuts(targets: Sequence[Target], patterns: Patterns, config: RecoverConfig) -> None:
    """Refuse what shards of rows would cut into pieces that no longer match.

    Raises:
        UsageError: Names it.
    """
    way = "train it without shards, as with --multi_gpu"
    for target in targets:
        if target.transposed:
            raise UsageError(
                f"{target.name} is stored as [in, out]: its shards would cut groups of inputs", way
            )
        if patterns.of(target).scope == "tensor":
            raise UsageError(f"{patterns.of(target)} needs whole weights, not shards", way)
    if config.slorb is not None:
        raise UsageError("--slorb needs whole weights, not shards", way)
    if config.teacher_top is not None:
        raise UsageError("--teacher-top needs a whole teacher: only some rows pass through it", way)


def refuse_silent_teacher(
    config: RecoverConfig, recoverer: Recoverer, source: Checkpoint, teacher: Checkpoint
) -> None:
    """Refuse a teacher that the model equals at first, where a choice goes by the gradients then.

    A method that hides what is off the mask begins with another model than the teacher.

    Raises:
        UsageError: Says what to give instead.
    """
    chosen = recoverer.needs_gradient and recoverer.decay_of(Scale(parameters=0)) == 0
    hides = recoverer.rule(0.0).hides
    if chosen and not hides and config.share == 1 and source.path == teacher.path:
        raise UsageError(
            "--share 1: at first the model is its own teacher and the loss has no gradient, by "
            "whose size the decay would be chosen",
            "give a smaller --share, or -O decay=1e-4",
        )


def refuse_other_teacher(source: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose logits mean other tokens.

    Raises:
        DataError: Says what differs.
    """
    refuse_packed(teacher)
    if teacher.factored:
        raise DataError(f"the teacher {teacher.path} holds factors only", "name the dense model")
    sizes = [c.config.get_text_config().vocab_size for c in (source, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the teacher {teacher.path} has a vocabulary of {sizes[1]}, the model one of "
            f"{sizes[0]}",
            "a teacher must be of the same family: name the dense model with --teacher",
        )
    known = [bool(tokenizer_key(checkpoint)) for checkpoint in (source, teacher)]
    kinds = [checkpoint.config.model_type for checkpoint in (source, teacher)]
    if not all(known) and kinds[0] != kinds[1]:
        raise DataError(
            f"the teacher {teacher.path} is a {kinds[1]!r}, the model a {kinds[0]!r}, and without "
            "tokenizers beside both nothing tells whether their tokens are the same",
            "a teacher must be of the same family: name the dense model with --teacher",
        )
    if all(known):
        ours, theirs = (c.tokenizer().get_vocab() for c in (source, teacher))
        if ours != theirs:
            raise DataError(
                f"the tokenizer of the teacher {teacher.path} gives other ids than the model's",
                "a teacher must be of the same family: name the dense model with --teacher",
            )


def refuse_sparse_teacher(
    config: RecoverConfig, source: Checkpoint, teacher: Checkpoint, targets: Sequence[Target]
) -> None:
    """Refuse a sparse model as a teacher that was not named.

    Raises:
        DataError: It is sparse.
    """
    places = [target for target in targets if target.name in teacher.places]
    if not places or zero_share(teacher, places) <= DENSE_ZEROS:
        return
    hint = "name the dense model with --teacher"
    if config.share != 0:
        hint += ", or train without one: --share 0"
    if teacher.path == source.path:
        raise DataError(
            f"{source.path} is sparse and does not say which dense model it was made from", hint
        )
    raise DataError(f"{teacher.path}, which {source.path} was made from, is sparse too", hint)


def zero_share(source: Checkpoint, targets: Sequence[Target]) -> float:
    """The share of zeros in some weights."""
    zeros = size = 0
    for target in targets:
        weight = source.read([target.name])[target.name]
        zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    return zeros / size


def refuse_more_than_the_vocabulary(config: RecoverConfig, teacher: Checkpoint) -> None:
    """Refuse to look at more probabilities than there are.

    Raises:
        UsageError: Says how many there are.
    """
    size = teacher.config.get_text_config().vocab_size
    if config.teacher_top is not None and config.teacher_top > size:
        raise UsageError(
            f"--teacher-top {config.teacher_top} is more than the vocabulary of {size}",
            "leave it out to look at all of it",
        )


def require_memory(
    config: RecoverConfig,
    source: Checkpoint,
    teacher: Checkpoint | None,
    recoverer: Recoverer,
    device: torch.device,
    way_out: str = "",
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
            way_out
            or "shard it over several GPUs or machines (accelerate launch --use_fsdp "
            "--fsdp_version 2)"
            + (", or leave out the teacher with --share 0" if teacher else ""),
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
    halves = 10 if recoverer.rule(0.0).hides or recoverer.spans else 8
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
