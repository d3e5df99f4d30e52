"""The outcome of a stage: rows for people and scripts, and the entry in `sparsekit.json`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Raised with every change that alters the bytes a stage writes for the same inputs.
NUMERICS = 6


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """The result for one weight."""

    name: str
    shape: tuple[int, int]
    pattern: str
    zeros: int
    size: int
    error: float | None
    """‖X(W−Ŵ)ᵀ‖² / ‖XWᵀ‖² on sampled calibration tokens; None without calibration."""
    seconds: float
    """Of weights that were solved as one, the share by size."""
    bits: float | None = None
    """On disk, for each number of a weight that is kept as factors: values, indices, both sides."""
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The outcome of a stage that writes a checkpoint."""

    out: Path
    entry: Mapping[str, Any]
    """This run's entry of the history."""

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {"out": str(self.out), **self.entry}


def as_given(model: str, words: Mapping[str, Any]) -> dict[str, Any]:
    """The words of a run, verbatim, for its entry.

    Args:
        model: The name of the model.
        words: The options that were given, as they were written.
    """
    return {"model": model, "words": json.loads(json.dumps(dict(words), default=str))}


def totals(rows: Iterable[Mapping[str, Any]]) -> dict[str, float | None]:
    """Zeros, size and sparsity over weights, mean output error, bits of those with factors."""
    rows = list(rows)
    zeros, size = (sum(row[key] for row in rows) for key in ("zeros", "size"))
    errors = [row["error"] for row in rows if row["error"] is not None]
    factored = [row for row in rows if row.get("bits") is not None]
    bits = sum(row["bits"] * row["size"] for row in factored)
    return {
        "weights": len(rows),
        "zeros": zeros,
        "size": size,
        "sparsity": zeros / size if size else 0.0,
        "mean_error": sum(errors) / len(errors) if errors else None,
        "bits_per_weight": bits / sum(row["size"] for row in factored) if factored else None,
    }


def damping_notes(
    rows: Iterable[Mapping[str, Any]], asked: float, key: str = "damping"
) -> list[str]:
    """A note if Gram matrices needed more damping than was asked for, recorded under a key."""
    used = [row["numbers"][key] for row in rows if key in row["numbers"]]
    raised = sum(damping > asked for damping in used)
    if not raised:
        return []
    return [
        f"{raised} weights needed their damping raised, up to {max(used):g}: "
        "more calibration rows would help"
    ]


def row_json(row: WeightRow) -> dict[str, Any]:
    """A row as JSON."""
    return {**asdict(row), "shape": list(row.shape)}
