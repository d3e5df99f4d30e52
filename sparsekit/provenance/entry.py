"""The outcome of a stage: rows for people and scripts, and the entry in `sparsekit.json`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.entry import Entry
from sparsekit.checkpoint.entry_parts import SolvedWeight, SparseTotals, Weight

# Raised with every change that alters the bytes a stage writes for the same inputs.
NUMERICS = 7


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a stage that writes a checkpoint."""

    out: Path
    entry: Entry
    """This run's entry of the history."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"out": str(self.out), **self.entry.to_json()}


def sparse_totals(weights: Sequence[Weight]) -> SparseTotals:
    """Sums over pruned weights."""
    zeros, size = sum(row.zeros for row in weights), sum(row.size for row in weights)
    factored = [row for row in weights if row.bits is not None]
    bits = sum(row.bits * row.size for row in factored)
    return SparseTotals(
        weights=len(weights),
        zeros=zeros,
        size=size,
        sparsity=zeros / size if size else 0.0,
        mean_error=mean_error(weights),
        bits_per_weight=bits / sum(row.size for row in factored) if factored else None,
    )


def mean_error(weights: Iterable[Weight]) -> float | None:
    """Mean output error; None without calibration."""
    errors = [row.error for row in weights if row.error is not None]
    return sum(errors) / len(errors) if errors else None


def damping_notes(weights: Iterable[SolvedWeight], asked: float, key: str = "damping") -> list[str]:
    """A note if Gram matrices needed more damping than was asked for, recorded under a key."""
    used = [row.numbers[key] for row in weights if key in row.numbers]
    raised = sum(damping > asked for damping in used)
    if not raised:
        return []
    return [
        f"{raised} weights needed their damping raised, up to {max(used):g}: "
        "more calibration rows would help"
    ]
