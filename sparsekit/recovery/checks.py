"""What a recover run is refused for: heads, patterns, teachers and memory that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, UsageError
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import Patterns
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.methods import Recoverer, Scale
from sparsekit.text.calibration import tokenizer_key

# What a configuration may ask for after the output layer, and the value that asks for nothing.
PLAIN_HEAD = {"final_logit_softcapping": 0.0, "logit_scale": 1.0, "logits_scaling": 1.0}
# A model with a larger share of zeros than this is no dense one.
DENSE_ZEROS = 0.05


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
        if reason := pattern.mismatch(columns):
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
    if chosen and not hides and config.kl_weight == 1 and source.path == teacher.path:
        raise UsageError(
            "--kl-weight 1: at first the model is its own teacher and the loss has no gradient, by "
            "whose size the decay would be chosen",
            "give a smaller --kl-weight, or -O decay=1e-4",
        )


def refuse_other_teacher(source: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose logits mean other tokens.

    Raises:
        DataError: Says what differs.
    """
    teacher.require("recover --teacher")
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
    if config.kl_weight != 0:
        hint += ", or train without one: --kl-weight 0"
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
