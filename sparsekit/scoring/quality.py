"""Figures of quality, each under what it was measured on: only those of the same compare."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsekit.scoring.standard_error import Figure, mean

# Of a task the first of these that it has goes into the mean.
ACCURACIES = ("acc_norm", "acc")
# exp of more than this is no float.
LARGEST_LOG = 709.0


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The windows of a perplexity."""

    text: str
    windows: int
    length: int
    fingerprint: str
    """Of the tokens."""

    @property
    def title(self) -> str:
        """In words, which two that differ may share."""
        return f"{Path(self.text).name}, {self.windows} × {self.length} tokens"

    @property
    def mark(self) -> str:
        """What tells apart those that share a title."""
        return self.fingerprint[:8]


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a task, and what is measured on each."""

    task: str
    version: str
    n_shot: int
    n: int
    digest: str
    """Of the documents."""
    metric: str


@dataclass(frozen=True, kw_only=True)
class TaskSet:
    """The tasks that a mean goes over."""

    tasks: tuple[Samples, ...]
    """By name."""

    @property
    def title(self) -> str:
        """In words, which two that differ may share."""
        return ", ".join(
            f"{t.task} v{t.version} ({t.metric}, {t.n_shot}-shot, {t.n} samples)"
            for t in self.tasks
        )

    @property
    def mark(self) -> str:
        """What tells apart those that share a title."""
        return "+".join(task.digest[:8] for task in self.tasks)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What was measured of one model on some windows or tasks."""

    figure: Figure
    """The logarithm of the perplexity, or the mean accuracy."""
    differences: Mapping[str, Figure]
    """To other models by their names, over the same windows or samples."""
    baselines: Mapping[str, Figure] = field(default_factory=dict)
    """What those models have themselves, where that was kept."""
    tasks: Mapping[str, Figure] = field(default_factory=dict)
    """The accuracy in each task."""
    dtype: str = ""
    """The type that a perplexity was computed in."""


Measured = Windows | TaskSet


def qualities(entries: Iterable[Mapping[str, Any]]) -> dict[Measured, Quality]:
    """All that scores tell, the latest of each; differences to several models stay together."""
    found: dict[Measured, Quality] = {}
    for entry in entries:
        for key, quality in _of_entry(entry):
            before = found.get(key)
            if before is not None and before.figure == quality.figure:
                quality = replace(
                    quality,
                    differences={**before.differences, **quality.differences},
                    baselines={**before.baselines, **quality.baselines},
                )
            found[key] = quality
    return found


def _of_entry(entry: Mapping[str, Any]) -> Iterable[tuple[Measured, Quality]]:
    """The perplexity and the mean of one score."""
    baseline = entry.get("baseline") or "the baseline"
    difference = {key: _figure(value) for key, value in entry["difference"].items()}
    told_of = {key: value.get("baseline") for key, value in entry["difference"].items()}
    before = {key: _figure(value) for key, value in told_of.items() if value is not None}
    if told := entry["perplexity"]:
        windows = Windows(**{k: told[k] for k in ("text", "windows", "length", "fingerprint")})
        log = Figure(value=told["log_perplexity"], stderr=told.get("log_stderr"))
        own, of_baseline = difference.get("log_perplexity"), before.get("log_perplexity")
        yield (
            windows,
            Quality(
                figure=log,
                differences={} if own is None else {baseline: own},
                baselines={} if of_baseline is None else {baseline: of_baseline},
                dtype=told["dtype"],
            ),
        )
    tasks = {_samples(task): task for task in entry["tasks"] if metric_of(task) is not None}
    ordered = sorted(tasks, key=lambda samples: samples.task)
    if not ordered:
        return
    figures = {s.task: _figure(tasks[s]["metrics"][s.metric]) for s in ordered}
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


def _mean_of(name: str, keys: Sequence[str], told: Mapping[str, Figure]) -> dict[str, Figure]:
    """The mean of what is told of all keys, by a model's name; nothing where one is not told."""
    return {name: mean([told[key] for key in keys])} if set(keys) <= set(told) else {}


def metric_of(task: Mapping[str, Any]) -> str | None:
    """The accuracy of a task that goes into the mean; None when it has none."""
    return next((name for name in ACCURACIES if name in task["metrics"]), None)


def headings(keys: Sequence[Measured]) -> list[str]:
    """The titles of what was measured, told apart where two are alike."""
    count = Counter(key.title for key in keys)
    return [k.title if count[k.title] == 1 else f"{k.title}, {k.mark}" for k in keys]


def perplexity_of(log: float) -> float:
    """The perplexity of a mean loss in nats; infinite beyond what a float holds."""
    return math.exp(log) if log < LARGEST_LOG else math.inf


def _samples(task: Mapping[str, Any]) -> Samples:
    return Samples(
        task=task["task"],
        version=task["version"],
        n_shot=task["n_shot"],
        n=task["n"],
        digest=str(task.get("samples_sha256", "")),
        metric=str(metric_of(task)),
    )


def _figure(value: Mapping[str, Any]) -> Figure:
    return Figure(value=value["value"], stderr=value.get("stderr"))
