"""Selection of the weights to work on, and their patterns."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sparsekit.errors import DataError, UsageError, did_you_mean
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.weights.patterns import Pattern


@dataclass(frozen=True, kw_only=True)
class WeightPatterns:
    """The pattern of each weight: one for all, with exceptions by name."""

    base: Pattern
    """The pattern of weights without their own."""
    own: Mapping[str, Pattern] = field(default_factory=dict)
    """Exceptions, by name of the weight."""

    def of(self, target: Target) -> Pattern:
        """The pattern of a weight."""
        return self.own.get(target.name, self.base)


def family_notes(stream: BlockStream) -> list[str]:
    """A note for untested model families."""
    if stream.tested:
        return []
    return [
        f"{stream.source.config.model_type!r} is not among the tested families: compare the "
        "output's perplexity with the source's"
    ]


def select(stream: BlockStream, skip: Sequence[str]) -> tuple[list[Target], list[dict[str, str]]]:
    """The weights to work on, and the weights that stay dense, each with the reason."""
    linear = {target.name: target for target in stream.targets()}
    if not linear:
        message = f"{stream.source.path} has no linear weights in decoder blocks"
        raise DataError(message, code="no-weights")
    reasons = skipped(linear, skip)
    targets = [target for name, target in linear.items() if name not in reasons]
    if not targets:
        raise UsageError("--skip leaves no weights", "skip fewer weights", code="no-weights")
    reasons |= {
        name: "no linear weight of a decoder block"
        for name, place in stream.source.places.items()
        if len(place.shape) >= 2 and name not in linear
    }
    return targets, [{"name": name, "reason": reason} for name, reason in reasons.items()]


def skipped(names: Iterable[str], skip: Sequence[str]) -> dict[str, str]:
    """The names that globs match, each with the reason.

    Raises:
        UsageError: A glob matches none.
    """
    names, reasons = list(names), {}
    for glob in skip:
        matched = [name for name in names if _matches(name, glob)]
        if not matched:
            message = f"--skip {glob!r} matches no weight"
            raise UsageError(message, _globs_like(glob, names), code="no-match")
        reasons = dict.fromkeys(matched, f"--skip {glob}") | reasons
    return reasons


def _matches(name: str, glob: str) -> bool:
    """Whether a glob matches the name or any sequence of its dot-separated parts."""
    return any(fnmatch.fnmatchcase(run, glob) for run in _runs(name))


def _runs(name: str) -> Iterator[str]:
    """All sequences of a name's dot-separated parts."""
    parts = name.split(".")
    for start in range(len(parts)):
        for stop in range(start + 1, len(parts) + 1):
            yield ".".join(parts[start:stop])


def _globs_like(glob: str, names: Iterable[str]) -> str:
    """A suggestion for a glob that matches no weight."""
    first = next(iter(names))
    known = {run for name in names for run in _runs(name) if not run.isdigit()}
    kind = first.removesuffix(".weight").rpartition(".")[2]
    form = f"write a name, e.g. {first}, or a part, e.g. {kind}; * and ? are wildcards"
    return did_you_mean(glob, known, otherwise=form)
