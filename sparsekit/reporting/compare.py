"""Comparison of checkpoints: method, size, cost and quality."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.resolve import local_folder
from sparsekit.errors import DataError
from sparsekit.reporting.model_row import Row, baseline_row, is_checkpoint, read_row
from sparsekit.scoring.quality import (
    Measured,
    Quality,
    TaskSet,
    Windows,
    headings,
    metric_of,
    perplexity_of,
)
from sparsekit.scoring.saved_scores import SCORES


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Models, with notes on their figures."""

    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def windows(self) -> list[Windows]:
        """Keys of perplexities, one column each."""
        return [key for key in self._measured() if isinstance(key, Windows)]

    @property
    def task_sets(self) -> list[TaskSet]:
        """Keys of mean accuracies, one column each."""
        return [key for key in self._measured() if isinstance(key, TaskSet)]

    def baselines(self, key: Measured) -> list[str]:
        """Models that differences under a key refer to."""
        differences = [row.quality[key].differences for row in self.rows if key in row.quality]
        return list(dict.fromkeys(name for names in differences for name in names))

    def best(self, windows: Windows) -> list[bool]:
        """Whether each row is Pareto-optimal in perplexity and size."""
        return self._best(windows, [row.n_bytes for row in self.rows])

    def best_by_time(self, windows: Windows) -> list[bool]:
        """Whether each row is Pareto-optimal in perplexity and seconds of all stages."""
        return self._best(windows, [row.seconds for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON, without the histories."""
        best = {windows: self.best(windows) for windows in self.windows}
        return {
            "models": [
                _row_json(row, {key: marks[index] for key, marks in best.items()})
                for index, row in enumerate(self.rows)
            ],
            "notes": list(self.notes),
        }

    def _best(self, windows: Windows, costs: Sequence[float | None]) -> list[bool]:
        """Whether each row is Pareto-optimal in perplexity and a cost."""
        return pareto(
            [
                (cost, row.quality[windows].figure.value)
                if cost is not None and windows in row.quality
                else None
                for cost, row in zip(costs, self.rows, strict=True)
            ]
        )

    def _measured(self) -> list[Measured]:
        return list(dict.fromkeys(key for row in self.rows for key in row.quality))


def compare(folders: Sequence[Path]) -> Comparison:
    """Comparison of the models in folders, in the given order.

    Args:
        folders: Checkpoints, or folders that directly contain checkpoints. Of a containing folder,
            models with scores only, such as the dense one, come first, then its checkpoints by
            name. Files are ignored, so that `study/*` names the models of a run.

    Raises:
        DataError: A folder is not a checkpoint and holds none, or a file in one is damaged.
    """
    places: dict[Path, Path] = {}
    for folder in [f for f in folders if not f.is_file()] or folders:
        for place in _places(folder):
            places.setdefault(place.resolve(), place)
    rows = _named(_with_baselines([read_row(place) for place in places.values()]))
    return Comparison(rows=rows, notes=_notes(rows))


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Whether each point is Pareto-optimal: no other is at most equal in both and lower in one.

    Equal points have equal results; None is never optimal.
    """
    optimal: set[tuple[float, float]] = set()
    lowest = math.inf
    for first, second in sorted({point for point in points if point is not None}):
        if second < lowest:
            optimal.add((first, second))
            lowest = second
    return [point in optimal for point in points]


def _places(folder: Path) -> list[Path]:
    """Model folders that a folder contains, or itself."""
    if is_checkpoint(folder) or (folder / SCORES).is_file():
        return [folder]
    if not folder.is_dir():
        hint = "name a checkpoint, or a folder of them"
        raise DataError(f"no such folder: {folder}", hint, code="no-such-model")
    inside = sorted(
        place
        for place in folder.iterdir()
        if place.is_dir() and not place.name.startswith(".") and place.suffix != ".partial"
    )
    checkpoints = [place for place in inside if is_checkpoint(place)]
    scored = [place for place in inside if (place / SCORES).is_file() and place not in checkpoints]
    if not checkpoints and not scored:
        raise DataError(
            f"{folder} is not a checkpoint and holds none",
            "name a folder that sparsekit wrote, or one that holds such folders",
            code="no-checkpoint",
        )
    return [*scored, *checkpoints]


def _with_baselines(rows: Sequence[Row]) -> list[Row]:
    """The rows, preceded by their baselines as far as they are known.

    A baseline that is a row already gets the figures that its own scores lack.
    """
    known: dict[str, dict[Measured, Quality]] = {}
    for row in rows:
        for key, quality in row.quality.items():
            for name, figure in quality.baselines.items():
                known.setdefault(name, {})[key] = Quality(
                    figure=figure, differences={}, dtype=quality.dtype
                )
    completed, added = list(rows), []
    for name, qualities in known.items():
        matching = [index for index, row in enumerate(rows) if _is_model(row, name)]
        for index in matching:
            row = completed[index]
            completed[index] = replace(row, quality={**qualities, **row.quality})
        if not matching:
            added.append(baseline_row(name, qualities))
    return [*added, *completed]


def _is_model(row: Row, name: str) -> bool:
    """Whether a row is the model that `eval` was given under a name."""
    if not row.stored:
        return any(entry.model == name for entry in row.scores)
    folder = local_folder(name)
    return folder is not None and folder.resolve() == row.path.resolve()


def _named(rows: Sequence[Row]) -> list[Row]:
    """The rows; those that share a name are named by their paths."""
    count = Counter(row.name for row in rows)
    return [row if count[row.name] == 1 else replace(row, name=str(row.path)) for row in rows]


def _notes(rows: Sequence[Row]) -> list[str]:
    """Notes on all figures."""
    notes = [note for row in rows for note in _notes_of(row)]
    compared = Comparison(rows=rows)
    for metric, keys in (("perplexity", compared.windows), ("zero-shot", compared.task_sets)):
        if len(keys) > 1:
            on = "; ".join(headings(keys))
            notes.append(
                f"{metric} was not measured on the same data for all models: the {len(keys)} "
                f"columns are not comparable ({on})"
            )
    for windows in compared.windows:
        types = sorted({r.quality[windows].dtype for r in rows if windows in r.quality})
        if len(types) > 1:
            notes.append(f"perplexity on {windows.title} was computed in {' and '.join(types)}")
    return notes


def _notes_of(row: Row) -> list[str]:
    """Notes on the figures of one model."""
    notes = []
    if row.stale:
        notes.append(
            f"{row.name}: {row.stale} scores in {SCORES} are of other weights and are ignored; "
            "measure again with sparsekit eval --save"
        )
    if not row.quality and not row.scores:
        notes.append(f"{row.name} has no scores; measure with sparsekit eval --save")
    parts = {entry.stage for entry in row.history if entry.resumed_blocks}
    if parts:
        notes.append(
            f"{row.name}: {' and '.join(sorted(parts))} resumed after an interruption; the seconds "
            "are those of the last part"
        )
    if row.stored and not row.history:
        notes.append(f"{row.name} has no history, so its method is unknown")
    tasks = [task for entry in row.scores for task in entry.tasks]
    without = sorted({task.task for task in tasks if metric_of(task) is None})
    if without:
        notes.append(f"{row.name}: {', '.join(without)} has no accuracy for the mean")
    return notes


def _row_json(row: Row, best: Mapping[Windows, bool]) -> dict[str, Any]:
    """A row as JSON, without its history."""
    measurements = row.quality.items()
    return {
        "name": row.name,
        "path": str(row.path),
        "method": row.method,
        "pattern": row.pattern,
        "bytes": row.n_bytes,
        "bits_per_weight": row.bits,
        "perplexity": [
            {**_perplexity_json(key, quality), "best": best[key]}
            for key, quality in measurements
            if isinstance(key, Windows)
        ],
        "zero_shot": [_mean_json(key, q) for key, q in measurements if isinstance(key, TaskSet)],
        "seconds": row.seconds,
        "tokens": row.tokens,
        "peak_memory_bytes": row.peak_bytes,
    }


def _perplexity_json(windows: Windows, quality: Quality) -> dict[str, Any]:
    value = perplexity_of(quality.figure.value)
    return {
        **asdict(windows),
        "dtype": quality.dtype,
        "value": value if value < math.inf else None,
        "log_perplexity": quality.figure.value,
        "log_stderr": quality.figure.stderr,
        "log_differences": {name: asdict(d) for name, d in quality.differences.items()},
    }


def _mean_json(tasks: TaskSet, quality: Quality) -> dict[str, Any]:
    return {
        **asdict(quality.figure),
        "differences": {name: asdict(d) for name, d in quality.differences.items()},
        "tasks": [{**asdict(task), **asdict(quality.tasks[task.task])} for task in tasks.tasks],
    }
