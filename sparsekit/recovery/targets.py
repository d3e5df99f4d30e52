"""The sparse weights of a recovery run, and their patterns."""

from __future__ import annotations

from collections.abc import Sequence

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.errors import DataError, PatternError, UsageError
from sparsekit.model.architecture import Target
from sparsekit.pipeline.selection import WeightPatterns, skipped
from sparsekit.recovery.checks import DENSE_ZEROS, zero_share
from sparsekit.recovery.config import RecoverConfig
from sparsekit.weights.patterns import Pattern


def sparse_targets(
    config: RecoverConfig, source: Checkpoint, linear: Sequence[Target]
) -> tuple[list[Target], list[dict[str, str]]]:
    """The weights to train sparse, and the weights that stay dense, each with the reason.

    Raises:
        UsageError: A weight that `--skip` leaves dense is sparse.
        DataError: There are no weights.
    """
    recorded = recorded_patterns(source)
    reasons = skipped([target.name for target in linear], config.skip)
    if sparse := [name for name in reasons if name in recorded]:
        name = sparse[0]
        raise UsageError(
            f"{reasons[name]} would fill the zeros of {name}, which is {recorded[name]}",
            "leave it out: weights that were left dense stay dense",
            code="would-fill-zeros",
        )
    if recorded:
        left = [target.name for target in linear if target.name not in recorded]
        reasons |= dict.fromkeys(left, "left dense when it was pruned")
    targets = [target for target in linear if target.name not in reasons]
    if not targets:
        message = f"{source.path} has no linear weights in decoder blocks"
        raise DataError(message, code="no-weights")
    return targets, [{"name": name, "reason": reason} for name, reason in reasons.items()]


def patterns_of(
    config: RecoverConfig, source: Checkpoint, targets: Sequence[Target]
) -> WeightPatterns:
    """The requested patterns, those of the history, or 2:4 for a dense model.

    Raises:
        UsageError: No pattern was requested, and the model does not have the pattern it should.
    """
    if config.pattern is not None:
        return WeightPatterns(base=config.pattern)
    recorded = recorded_patterns(source)
    if recorded:
        base = Pattern.parse(source.pruned()[-1].settings.pattern)
        by_name = {name: Pattern.parse(text) for name, text in recorded.items()}
        exceptions = {name: pattern for name, pattern in by_name.items() if pattern != base}
        patterns = WeightPatterns(base=base, own=exceptions)
    else:
        patterns = WeightPatterns(base=Pattern(keep=2, group=4))
    missing = ""
    for target in targets:
        weight = source.read([target.name])[target.name]
        weight = target.from_disk(weight)
        try:
            patterns.of(target).check(weight, target.name)
        except PatternError as error:
            missing = missing or error.message
    if missing and (recorded or zero_share(source, targets) > DENSE_ZEROS):
        raise UsageError(
            f"{source.path} is sparse, but not {patterns.base}: {missing}",
            "pass the pattern it has or should get with --pattern; --skip dense weights",
            code="not-this-pattern",
        )
    return patterns


def recorded_patterns(source: Checkpoint) -> dict[str, str]:
    """The pattern that each weight was last pruned to, by name."""
    return {row.name: row.pattern for entry in source.pruned() for row in entry.weights}
