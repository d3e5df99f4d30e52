"""Checkpoints side by side: how each was made, what it takes, and what it is worth."""

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
    """Models, and what has to be known before their figures are read."""

    rows: Sequence[Row]
    notes: Sequence[str] = field(default_factory=list)

    @property
    def windows(self) -> list[Windows]:
        """What perplexities were measured on, each a column of its own."""
        return [key for key in self._measured() if isinstance(key, Windows)]

    @property
    def task_sets(self) -> list[TaskSet]:
        """What mean accuracies were measured on, each a column of its own."""
        return [key for key in self._measured() if isinstance(key, TaskSet)]

    def baselines(self, key: Measured) -> list[str]:
        """The models that differences are to, on some windows or tasks."""
        told = [row.quality[key].differences for row in self.rows if key in row.quality]
        return list(dict.fromkeys(name for names in told for name in names))

    def best(self, windows: Windows) -> list[bool]:
        """For each row whether no other is as good and as small, and better in one of the two."""
        return self._best(windows, [row.n_bytes for row in self.rows])

    def best_by_time(self, windows: Windows) -> list[bool]:
        """The same by the seconds of all stages; a model that was not made here has none."""
        return self._best(windows, [row.seconds for row in self.rows])

    def to_json(self) -> dict[str, Any]:
        """Everything but the histories."""
        best = {windows: self.best(windows) for windows in self.windows}
        return {
            "models": [
                _row_json(row, {key: marks[index] for key, marks in best.items()})
                for index, row in enumerate(self.rows)
            ],
            "notes": list(self.notes),
        }

    def _best(self, windows: Windows, taken: Sequence[float | None]) -> list[bool]:
        """For each row whether no other is as good and took as little, and better in one."""
        return pareto(
            [
                (takes, row.quality[windows].figure.value)
                if takes is not None and windows in row.quality
                else None
                for takes, row in zip(taken, self.rows, strict=True)
            ]
        )

    def _measured(self) -> list[Measured]:
        return list(dict.fromkeys(key for row in self.rows for key in row.quality))


def compare(folders: Sequence[Path]) -> Comparison:
    """The models in folders, in the order given.

    Args:
        folders: Each a checkpoint, or a folder that holds checkpoints: those directly in it count,
            by name, and before them models that are only scored, such as the dense one. Files
            among the folders are left out, so that `study/*` names the models of a run.

    Raises:
        DataError: A folder is no checkpoint and holds none, or a file in one is damaged.
    """
    places: dict[Path, Path] = {}
    for folder in [f for f in folders if not f.is_file()] or folders:
        for place in _places(folder):
            places.setdefault(place.resolve(), place)
    rows = _named(_with_baselines([read_row(place) for place in places.values()]))
    return Comparison(rows=rows, notes=_notes(rows))


def pareto(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Which points no other one dominates: lower or equal in both, and lower in one.

    Equal points stand or fall together; what has no point is not among them.
    """
    left: set[tuple[float, float]] = set()
    lowest = math.inf
    for first, second in sorted({point for point in points if point is not None}):
        if second < lowest:
            left.add((first, second))
            lowest = second
    return [point in left for point in points]


def _places(folder: Path) -> list[Path]:
    """The folders of the models that a folder stands for."""
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
    found = [place for place in inside if is_checkpoint(place)]
    scored = [place for place in inside if (place / SCORES).is_file() and place not in found]
    if not found and not scored:
        raise DataError(
            f"{folder} is not a checkpoint and holds none",
            "name a folder that sparsekit wrote, or one that holds such folders",
            code="no-checkpoint",
        )
    return [*scored, *found]


def _with_baselines(rows: Sequence[Row]) -> list[Row]:
    """The rows after those of the models that they were compared with, as far as these are known.

    A baseline that is a row already gets the figures that it has no scores of its own for.
    """
    known: dict[str, dict[Measured, Quality]] = {}
    for row in rows:
        for key, quality in row.quality.items():
            for name, figure in quality.baselines.items():
                known.setdefault(name, {})[key] = Quality(
                    figure=figure, differences={}, dtype=quality.dtype
                )
    found, added = list(rows), []
    for name, qualities in known.items():
        own = [index for index, row in enumerate(rows) if _is_model(row, name)]
        for index in own:
            found[index] = replace(found[index], quality={**qualities, **found[index].quality})
        if not own:
            added.append(baseline_row(name, qualities))
    return [*added, *found]


def _is_model(row: Row, name: str) -> bool:
    """Whether a row is of the model that `eval` knew by a name."""
    if not row.stored:
        return any(entry.get("model") == name for entry in row.scores)
    folder = local_folder(name)
    return folder is not None and folder.resolve() == row.path.resolve()


def _named(rows: Sequence[Row]) -> list[Row]:
    """The rows, those that share a name by their whole paths."""
    count = Counter(row.name for row in rows)
    return [row if count[row.name] == 1 else replace(row, name=str(row.path)) for row in rows]


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the figures has to know."""
    notes = [note for row in rows for note in _notes_of(row)]
    compared = Comparison(rows=rows)
    for what, keys in (("perplexity", compared.windows), ("zero-shot", compared.task_sets)):
        if len(keys) > 1:
            on = "; ".join(headings(keys))
            notes.append(
                f"{what} was not measured on the same for all models: the {len(keys)} columns do "
                f"not compare with each other ({on})"
            )
    for windows in compared.windows:
        types = sorted({r.quality[windows].dtype for r in rows if windows in r.quality})
        if len(types) > 1:
            notes.append(f"perplexity on {windows.title} was computed in {' and '.join(types)}")
    return notes


def _notes_of(row: Row) -> list[str]:
    """What a reader of one model's figures has to know."""
    notes = []
    if row.stale:
        notes.append(
            f"{row.name}: {row.stale} scores in {SCORES} are of other weights, and left out: "
            "sparsekit eval --save takes new ones"
        )
    if not row.quality and not row.scores:
        notes.append(f"{row.name} has no scores: sparsekit eval --save keeps them")
    parts = {str(entry.get("stage")) for entry in row.history if entry.get("resumed_blocks")}
    if parts:
        notes.append(
            f"{row.name}: {' and '.join(sorted(parts))} went on after an interruption; its seconds "
            "are those of the last part"
        )
    if row.stored and not row.history:
        notes.append(f"{row.name} has no history: how it was made is not known")
    tasks = [task for entry in row.scores for task in entry["tasks"]]
    without = sorted({task["task"] for task in tasks if metric_of(task) is None})
    if without:
        notes.append(f"{row.name}: {', '.join(without)} has no accuracy to go into the mean")
    return notes


def _row_json(row: Row, best: Mapping[Windows, bool]) -> dict[str, Any]:
    """A row as JSON, without its history."""
    measured = row.quality.items()
    return {
        "name": row.name,
        "path": str(row.path),
        "method": row.method,
        "pattern": row.pattern,
        "bytes": row.n_bytes,
        "bits_per_weight": row.bits,
        "perplexity": [
            {**_perplexity_json(key, quality), "best": best[key]}
            for key, quality in measured
            if isinstance(key, Windows)
        ],
        "zero_shot": [_mean_json(key, q) for key, q in measured if isinstance(key, TaskSet)],
        "seconds": row.seconds,
        "tokens": row.tokens,
        "peak_memory_bytes": row.peak_bytes,
    }


def _perplexity_json(windows: Windows, quality: Quality) -> dict[str, Any]:
    value = perplexity_of(quality.figure.value)
    return {
        **asdict(windows),
        "dtype": quality.dtype,
        "perplexity": value if value < math.inf else None,
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
