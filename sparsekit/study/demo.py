"""The main job on a small real model: prune it three ways, score each, leave the checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.resolve import resolve, title
from sparsekit.errors import UsageError
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS
from sparsekit.pruning.config import PruneConfig
from sparsekit.pruning.dry_run import plan
from sparsekit.pruning.prune import prune
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.evaluate import Score, evaluate

METHODS = ("magnitude", "wanda", "sparsegpt")
PATTERN = "2:4"
# Small enough for two cores in a few minutes; the two parts of `builtin` do not overlap.
CALIBRATION: dict[str, Any] = {"samples": 16, "length": 512}
SCORING = EvalConfig(text="builtin", length=512, limit=16)


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One line of the demo's table."""

    name: str
    score: Score
    seconds: float | None
    """Time that pruning took; None for the dense model."""


def demo(model: str, out: Path, progress: Progress = SILENT) -> list[DemoRow]:
    """Prune a model to 2:4 with every method of the demo and score the results.

    A checkpoint that an earlier demo finished is scored again, not made again.

    Args:
        model: A folder, hub id or `demo`.
        out: Folder for the checkpoints.
        progress: Told of each block.

    Returns:
        The dense model first, then one row for each method.
    """
    source = Checkpoint.open(resolve(model, progress))
    for method in METHODS:
        if not _folder(out, method).exists():
            plan(_config(method), model, _folder(out, method))
    entries = [_made(source, method, model, out, progress) for method in METHODS]
    folders = [str(_folder(out, method)) for method in METHODS]
    scores = evaluate(SCORING, folders, baseline=model, progress=progress)
    seconds = [None, *(entry["seconds"] for entry in entries)]
    return [
        DemoRow(name=title(s.model), score=s, seconds=t)
        for s, t in zip(scores, seconds, strict=True)
    ]


def _folder(out: Path, method: str) -> Path:
    return out / f"{method}-{PATTERN.replace(':', 'of')}"


def _config(method: str) -> PruneConfig:
    if methods.describe("pruners", method).data_free:
        return PruneConfig(method=method, pattern=PATTERN)
    return PruneConfig(method=method, pattern=PATTERN, **CALIBRATION)


def _made(
    source: Checkpoint, method: str, model: str, out: Path, progress: Progress
) -> dict[str, Any]:
    """The history entry of a method's checkpoint, made now unless it is there."""
    folder = _folder(out, method)
    if not folder.exists():
        return dict(prune(_config(method), model, folder, progress=progress).entry)
    history = Checkpoint.open(folder).provenance()["history"]
    entry = history[-1] if history else {}
    recipe = entry.get("recipe", {})
    found = [entry.get("source", {}).get("fingerprint")]
    found += [recipe.get(key) for key in ("numerics", "method", "pattern", "calibration")]
    rows = _config(method).rows
    drawn = rows.rows(source, progress).fingerprint if rows else None
    if found != [source.fingerprint, NUMERICS, method, PATTERN, drawn]:
        raise UsageError(f"{folder} was made in another way", "choose another --out")
    progress.note(f"{folder} is there from an earlier demo and is kept")
    return entry
