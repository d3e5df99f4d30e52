"""Metrics keyed by the data they were measured on; only equal keys are comparable."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from sparsekit.scoring.score_entry import SavedFigure, SavedTask, ScoreEntry
from sparsekit.scoring.standard_error import Figure, mean

# The first of these that a task has goes into the mean.
ACCURACIES = ("acc_norm", "acc")
# exp of more than this overflows.
LARGEST_LOG = 709.0


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Key of a perplexity: its text and windows."""

    text: str
    windows: int
    length: int
    fingerprint: str
    """Of the tokens."""

    @property
    def title(self) -> str:
        """Title for people; different keys may share it."""
        return f"{Path(self.text).name}, {self.windows} × {self.length} tokens"

    @property
    def mark(self) -> str:
        """Short hash that distinguishes keys with the same title."""
        return self.fingerprint[:8]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Key of a task's metric: its version and samples."""

    task: str
    version: str
    n_shot: int
    n: int
    digest: str
    """Of the documents."""
    metric: str


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """Key of a mean accuracy: its tasks."""

    tasks: tuple[Samples, ...]
    """Sorted by name."""

    @property
    def title(self) -> str:
        """Title for people; different keys may share it."""
        return ", ".join(
            f"{t.task} v{t.version} ({t.metric}, {t.n_shot}-shot, {t.n} samples)"
            for t in self.tasks
        )

    @property
    def mark(self) -> str:
        """Short hash that distinguishes keys with the same title."""
        return "+".join(task.digest[:8] for task in self.tasks)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measurement of one model under one key."""

    figure: Figure
    """The logarithm of the perplexity, or the mean accuracy."""
    differences: Mapping[str, Figure]
    """Paired differences to other models, by their names."""
    baselines: Mapping[str, Figure] = field(default_factory=dict)
    """Values of those models themselves, if they were saved."""
    tasks: Mapping[str, Figure] = field(default_factory=dict)
    """Accuracy of each task."""
    dtype: str = ""
    """Compute type of a perplexity."""


Measured = Windows | TaskSet


def qualities(entries: Iterable[ScoreEntry]) -> dict[Measured, Quality]:
    """Latest measurement of each key; differences to several models are merged."""
    measured: dict[Measured, Quality] = {}
    for entry in entries:
        for key, quality in _of_entry(entry):
            before = measured.get(key)
            if before is not None and before.figure == quality.figure:
                quality = replace(
                    quality,
                    differences={**before.differences, **quality.differences},
                    baselines={**before.baselines, **quality.baselines},
                )
            measured[key] = quality
    return measured


def _of_entry(entry: ScoreEntry) -> Iterable[tuple[Measured, Quality]]:
    """Perplexity and mean accuracy of one score."""
    baseline = entry.baseline or "the baseline"
    difference = {key: _figure(value) for key, value in entry.difference.items()}
    before = {k: _figure(v.baseline) for k, v in entry.difference.items() if v.baseline}
    if found := entry.perplexity:
        windows = Windows(
            text=found.text,
            windows=found.windows,
            length=found.length,
            fingerprint=found.fingerprint,
        )
        log = Figure(value=found.log_perplexity, stderr=found.log_stderr)
        change, of_baseline = difference.get("log_perplexity"), before.get("log_perplexity")
        yield (
            windows,
            Quality(
                figure=log,
                differences={} if change is None else {baseline: change},
                baselines={} if of_baseline is None else {baseline: of_baseline},
                dtype=found.dtype,
            ),
        )
    tasks = {_samples(task): task for task in entry.tasks if metric_of(task) is not None}
    ordered = sorted(tasks, key=lambda samples: samples.task)
    if not ordered:
        return
    figures = {s.task: _figure(tasks[s].metrics[s.metric]) for s in ordered}
    names = [f"{s.task}.{s.metric}" for s in ordered]
    yield (
        TaskSet(tasks=tuple(ordered)),
        Quality(
            figure=mean(list(figures.values())),
            differences=_mean_of(baseline, names, difference),
            baselines=_mean_of(baseline, names, before),
            tasks=figures,
        ),
    )


def _mean_of(name: str, keys: Sequence[str], values: Mapping[str, Figure]) -> dict[str, Figure]:
    """Mean of the values of all keys, by a model's name; empty if one is missing."""
    return {name: mean([values[key] for key in keys])} if set(keys) <= set(values) else {}


def metric_of(task: SavedTask) -> str | None:
    """Name of the accuracy of a task that goes into the mean; None if it has none."""
    return next((name for name in ACCURACIES if name in task.metrics), None)


def headings(keys: Sequence[Measured]) -> list[str]:
    """Unique titles of keys; the short hash is appended where two are alike."""
    count = Counter(key.title for key in keys)
    return [k.title if count[k.title] == 1 else f"{k.title}, {k.mark}" for k in keys]


def perplexity_of(log: float) -> float:
    """Perplexity of a mean loss in nats; infinite if a float cannot hold it."""
    return math.exp(log) if log < LARGEST_LOG else math.inf


def _samples(task: SavedTask) -> Samples:
    return Samples(
        task=task.task,
        version=task.version,
        n_shot=task.n_shot,
        n=task.n,
        digest=task.samples_sha256,
        metric=str(metric_of(task)),
    )


def _figure(value: SavedFigure) -> Figure:
    return Figure(value=value.value, stderr=value.stderr)
