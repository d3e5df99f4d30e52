"""Which weights a recover run keeps sparse or makes so, and in which pattern."""

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
    """The weights that are sparse or are to be, and those that stay dense with the reason.

    Raises:
        UsageError: A weight that is to stay dense is sparse.
        DataError: There are none.
    """
    told = told_patterns(source)
    reasons = skipped([target.name for target in linear], config.skip)
    if sparse := [name for name in reasons if name in told]:
        raise UsageError(
            f"{reasons[sparse[0]]} would fill the zeros of {sparse[0]}, which is {told[sparse[0]]}",
            "leave it out: what pruning has left dense stays so",
        )
    if told:
        left = [target.name for target in linear if target.name not in told]
        reasons |= dict.fromkeys(left, "left dense when it was pruned")
    targets = [target for target in linear if target.name not in reasons]
    if not targets:
        raise DataError(f"{source.path} has no linear weight in its blocks to train")
    return targets, [{"name": name, "reason": reason} for name, reason in reasons.items()]


def patterns_of(
    config: RecoverConfig, source: Checkpoint, targets: Sequence[Target]
) -> WeightPatterns:
    """The pattern that was asked for, that of the history, or 2:4 for a dense model.

    Raises:
        UsageError: The model does not have the pattern that it should have, and none was named.
    """
    if config.pattern is not None:
        return WeightPatterns(base=config.pattern)
    told = told_patterns(source)
    if told:
        base = Pattern.parse(source.pruned()[-1]["recipe"]["pattern"])
        own = {name: Pattern.parse(text) for name, text in told.items()}
        patterns = WeightPatterns(base=base, own={n: one for n, one in own.items() if one != base})
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
    if missing and (told or zero_share(source, targets) > DENSE_ZEROS):
        raise UsageError(
            f"{source.path} is sparse, but not {patterns.base}: {missing}",
            "name the pattern that it has, or is to have, with --pattern; --skip what is dense",
        )
    return patterns


def told_patterns(source: Checkpoint) -> dict[str, str]:
    """The pattern that each weight was last pruned to, by name."""
    return {row["name"]: row["pattern"] for e in source.pruned() for row in e["weights"]}
