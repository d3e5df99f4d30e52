"""Checks of a recovery run: output heads, patterns and teachers that do not fit."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, UsageError
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import WeightPatterns
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.methods import Recoverer, Scale
from sparsekit.text.calibration import tokenizer_key

# Options of a model configuration that change logits, and their neutral values.
PLAIN_HEAD = {"final_logit_softcapping": 0.0, "logit_scale": 1.0, "logits_scaling": 1.0}
# A model with a larger share of zeros than this is not dense.
DENSE_ZEROS = 0.05


def refuse_other_heads(source: Checkpoint) -> None:
    """Refuse a model that scales or caps its logits.

    Raises:
        DataError: Names the option of its configuration.
    """
    config = source.config.get_text_config()
    for key, plain in PLAIN_HEAD.items():
        value = getattr(config, key, None)
        if value not in (None, plain):
            raise DataError(
                f"{source.path} changes its logits after the output layer ({key} {value})",
                "such models cannot be trained yet; pruning works",
                code="changed-logits",
            )


def refuse_patterns(
    targets: Sequence[Target], patterns: WeightPatterns, recoverer: Recoverer, config: RecoverConfig
) -> None:
    """Refuse patterns, scales and branches that do not divide the inputs of a weight."""
    width = config.slorb
    if width is not None and recoverer.dense_until_end:
        raise UsageError(
            f"--slorb cannot be combined with {config.method}, which is dense until the end",
            "use --method ast",
            code="conflicting-options",
        )
    for target in targets:
        columns, pattern, spans = target.shape[1], patterns.of(target), recoverer.spans
        if reason := pattern.mismatch(columns):
            message = f"{target.name}: {reason}"
            raise UsageError(message, "choose another --pattern", code="pattern-does-not-divide")
        if spans and (columns % spans or (pattern.group and columns // spans % pattern.group)):
            raise UsageError(
                f"{target.name}: {columns} inputs do not divide into {spans} spans of whole "
                f"groups of {pattern.group or 1}",
                "-O spans=0 trains without scales",
                code="spans-do-not-divide",
            )
        if width and columns % width:
            raise UsageError(
                f"{target.name}: --slorb {width} does not divide {columns} inputs",
                "16 works for most models",
                code="slorb-does-not-divide",
            )


def refuse_cuts(targets: Sequence[Target], patterns: WeightPatterns, config: RecoverConfig) -> None:
    """Refuse weights and options that do not work with weights sharded by rows.

    Raises:
        UsageError: Names the weight or the option.
    """
    hint, code = "train without shards, e.g. with --multi_gpu", "needs-whole-weights"
    for target in targets:
        if target.transposed:
            message = f"{target.name} is stored as [in, out]: its shards would cut groups of inputs"
            raise UsageError(message, hint, code=code)
        if patterns.of(target).scope == "tensor":
            message = f"{patterns.of(target)} needs whole weights, not shards"
            raise UsageError(message, hint, code=code)
    if config.slorb is not None:
        raise UsageError("--slorb needs whole weights, not shards", hint, code=code)
    if config.teacher_top is not None:
        message = "--teacher-top needs a whole teacher, not shards"
        raise UsageError(message, hint, code=code)


def refuse_silent_teacher(
    config: RecoverConfig, recoverer: Recoverer, source: Checkpoint, teacher: Checkpoint
) -> None:
    """Refuse a loss without gradient at the start when the decay is chosen by the gradient's size.

    That is the case when the model is its own teacher, the loss is KL alone, and the method does
    not mask the forward pass.

    Raises:
        UsageError: Says which options to pass instead.
    """
    chosen = recoverer.needs_gradient and recoverer.decay_of(Scale(parameters=0)) == 0
    masks_forward = recoverer.rule(0.0).masks_forward
    if chosen and not masks_forward and config.kl_weight == 1 and source.path == teacher.path:
        raise UsageError(
            "--kl-weight 1: the model starts as its own teacher, so the loss has no gradient, by "
            "whose size the decay is chosen",
            "pass a smaller --kl-weight, or -O decay=1e-4",
            code="no-gradient",
        )


def refuse_other_teacher(source: Checkpoint, teacher: Checkpoint) -> None:
    """Refuse a teacher whose logits are about other tokens.

    Raises:
        DataError: Names the difference.
    """
    teacher.require("recover --teacher")
    sizes = [c.config.get_text_config().vocab_size for c in (source, teacher)]
    if sizes[0] != sizes[1]:
        raise DataError(
            f"the teacher {teacher.path} has a vocabulary of {sizes[1]}, the model one of "
            f"{sizes[0]}",
            "a teacher must be of the same family: name the dense model with --teacher",
            code="other-vocabulary",
        )
    known = [bool(tokenizer_key(checkpoint)) for checkpoint in (source, teacher)]
    kinds = [checkpoint.config.model_type for checkpoint in (source, teacher)]
    if not all(known) and kinds[0] != kinds[1]:
        raise DataError(
            f"the teacher {teacher.path} is a {kinds[1]!r}, the model a {kinds[0]!r}, and without "
            "both tokenizers their vocabularies cannot be compared",
            "a teacher must be of the same family: name the dense model with --teacher",
            code="other-family",
        )
    if all(known):
        ours, theirs = (c.tokenizer().get_vocab() for c in (source, teacher))
        if ours != theirs:
            raise DataError(
                f"the tokenizer of the teacher {teacher.path} has other ids than the model's",
                "a teacher must be of the same family: name the dense model with --teacher",
                code="other-vocabulary",
            )


def refuse_sparse_teacher(
    config: RecoverConfig, source: Checkpoint, teacher: Checkpoint, targets: Sequence[Target]
) -> None:
    """Refuse a sparse teacher, unless it was named with `--teacher`.

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
        message = f"{source.path} is sparse and does not record which dense model it was made from"
        raise DataError(message, hint, code="no-dense-model")
    message = f"{teacher.path}, which {source.path} was made from, is sparse too"
    raise DataError(message, hint, code="no-dense-model")


def zero_share(source: Checkpoint, targets: Sequence[Target]) -> float:
    """The share of zeros in the weights."""
    zeros = size = 0
    for target in targets:
        weight = source.read([target.name])[target.name]
        zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    return zeros / size


def refuse_more_than_the_vocabulary(config: RecoverConfig, teacher: Checkpoint) -> None:
    """Refuse a `--teacher-top` above the size of the vocabulary.

    Raises:
        UsageError: Names the size.
    """
    size = teacher.config.get_text_config().vocab_size
    if config.teacher_top is not None and config.teacher_top > size:
        raise UsageError(
            f"--teacher-top {config.teacher_top} is more than the vocabulary of {size}",
            "leave it out to use all probabilities",
            code="out-of-range",
        )
