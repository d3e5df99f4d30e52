"""Means with their standard errors, alone and as differences over the same samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekit.errors import DataError


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean of a difference over the same samples."""

    value: float
    stderr: float
    """NaN for fewer than two samples."""
    n: int


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> PairedDifference:
    """The mean of `ours - theirs` with its standard error over the pairs.

    Raises:
        DataError: They differ in length, or are empty.
    """
    if len(ours) != len(theirs):
        message = f"cannot pair {len(ours)} samples with {len(theirs)}"
        raise DataError(message, code="other-samples")
    if not ours:
        raise DataError("there are no samples to pair", code="no-samples")
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    stderr = mean_stderr(differences)
    return PairedDifference(
        value=math.fsum(differences) / len(differences),
        stderr=math.nan if stderr is None else stderr,
        n=len(differences),
    )


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of the mean, from the sample variance; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number with its standard error."""

    value: float
    stderr: float | None


def mean(figures: Sequence[Figure]) -> Figure:
    """Mean of independent figures; without a standard error if one of them has none."""
    errors = [figure.stderr for figure in figures if figure.stderr is not None]
    return Figure(
        value=math.fsum(figure.value for figure in figures) / len(figures),
        stderr=math.hypot(*errors) / len(figures) if len(errors) == len(figures) else None,
    )
