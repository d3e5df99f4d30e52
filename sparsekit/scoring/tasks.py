"""Zero-shot scores of a checkpoint, from lm-eval in this process.

Differs from the `lm_eval` command: no bootstrap (standard errors have a closed form or are
omitted), groups and tags are resolved to their tasks, and only the data sets of stock tasks are
requested from the hub.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError, UsageError
from sparsekit.files import sha256_json
from sparsekit.scoring.harness import load_model, quiet, seeded
from sparsekit.scoring.standard_error import PairedDifference, mean_stderr, paired_difference

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a task over all its samples."""

    value: float
    stderr: float | None
    """Standard error of a mean; None for other aggregations and for fewer than two samples."""
    higher_is_better: bool | None
    """None if the task does not define it."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """Scores of one checkpoint on one task."""

    task: str
    version: str
    """lm-eval's version of the task."""
    n: int
    """Samples scored."""
    n_shot: int
    metrics: Mapping[str, Metric]
    """By name; a metric with a named filter is called `metric,filter`."""
    samples: Mapping[str, tuple[float, ...]]
    """Per-sample values, in the order of the data, of each metric that is their mean."""
    sample_hashes: tuple[str, ...]
    """lm-eval's hash of each document, in the same order."""

    def to_json(self) -> dict[str, Any]:
        """The score as JSON, with one hash of the documents instead of the samples."""
        return {
            "task": self.task,
            "version": self.version,
            "n": self.n,
            "n_shot": self.n_shot,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "samples_sha256": sha256_json(list(self.sample_hashes)),
        }


def score_tasks(
    path: Path,
    tasks: "Mapping[str, Task]",
    *,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> list[TaskScore]:
    """Scores of a checkpoint on each task.

    Args:
        path: Folder of a Hugging Face checkpoint with its tokenizer.
        tasks: From `load_tasks`, by name.
        limit: Score only the first samples of each task.
        batch_size: Sequences per forward pass.
        device: Where the model runs.
        dtype: The floating-point type that the model is loaded in.
        seed: Seeds Python's, numpy's and torch's generators and the choice of few-shot examples.

    Raises:
        UsageError: An option is invalid.
        DataError: The checkpoint or its tokenizer cannot be loaded.
    """
    if limit is not None and limit < 1:
        message = f"a limit of {limit} samples leaves nothing to score"
        raise UsageError(message, code="out-of-range")
    with seeded(seed), quiet(logging.ERROR):
        for task in tasks.values():
            task.set_fewshot_seed(seed)
        model = load_model(path, batch_size=batch_size, device=device, dtype=dtype)
        # Warnings of the run itself, e.g. a prompt that does not fit, concern the scores.
        with quiet(logging.WARNING):
            results = _evaluate(model, tasks, limit)
    return [_task_score(name, task, results) for name, task in tasks.items()]


def compare_tasks(ours: TaskScore, baseline: TaskScore) -> Mapping[str, PairedDifference]:
    """Paired differences `ours - baseline` by metric.

    Raises:
        DataError: The two were not scored on the same samples of the same task.
    """
    for field in ("task", "version", "n_shot", "n", "sample_hashes"):
        if getattr(ours, field) != getattr(baseline, field):
            raise DataError(
                f"{ours.task}: cannot compare with {baseline.task}: {_mismatch(field)}",
                "score both checkpoints with the same tasks and the same limit",
                code="other-samples",
            )
    return {
        name: paired_difference(values, baseline.samples[name])
        for name, values in ours.samples.items()
        if name in baseline.samples
    }


def _mismatch(field: str) -> str:
    """Message for a field that differs between two scores."""
    return "not the same samples" if field == "sample_hashes" else f"`{field}` differs"


def _evaluate(
    model: "HFLM", tasks: Mapping[str, "Task"], limit: int | None
) -> Mapping[str, Mapping[str, Any]]:
    """Results of lm-eval with all samples."""
    # Not `simple_evaluate`: it also runs git and pip to describe the machine, and it seeds after
    # the loaded tasks have shuffled their choices.
    from lm_eval import evaluate

    # A bootstrap takes minutes. Without it lm-eval also drops the closed forms, hence
    # `mean_stderr`.
    return evaluate(
        lm=model,
        task_dict={"tasks": dict(tasks), "groups": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )


def _task_score(name: str, task: "Task", results: Mapping[str, Mapping[str, Any]]) -> TaskScore:
    """Score of one task from lm-eval's results."""
    # The name is an argument because reading `task.task_name` draws from Python's generator.
    from lm_eval.api.metrics import mean

    rows_by_filter: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results["samples"][name], key=lambda row: row["doc_id"]):
        rows_by_filter.setdefault(row["filter"], []).append(row)
    metrics: dict[str, Metric] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for key, value in results["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if metric.endswith("_stderr") or filter_name not in rows_by_filter:
            continue  # not a metric: the task's name, its alias, an omitted error
        label = metric if filter_name == "none" else key
        values = [row.get(metric) for row in rows_by_filter[filter_name]]
        is_mean = task.aggregation().get(metric, mean) is mean
        if is_mean and all(isinstance(number, Real) for number in values):
            samples[label] = tuple(float(number) for number in values)
        metrics[label] = Metric(
            value=float(value),
            stderr=mean_stderr(samples[label]) if label in samples else None,
            higher_is_better=results["higher_is_better"][name].get(metric),
        )
    rows = next(iter(rows_by_filter.values()))
    return TaskScore(
        task=name,
        version=str(results["versions"][name]),
        n=len(rows),
        n_shot=int(results["n-shot"][name]),
        metrics=metrics,
        samples=samples,
        sample_hashes=tuple(row["doc_hash"] for row in rows),
    )
