"""Zero-shot scores of a checkpoint, through lm-eval in this process.

Differs from the `lm_eval` command: no bootstrap (a standard error comes from the closed form or not
at all), groups and tags are resolved to their tasks, and nothing is asked of the hub but the data
sets of stock tasks.
"""

import contextlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.errors import DataError, UsageError, did_you_mean
from sparsekit.files import sha256_json
from sparsekit.stages.paired import PairedDifference, mean_stderr, paired_difference

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric of a task over all its samples."""

    value: float
    stderr: float | None
    """Standard error of a mean; None for other aggregations and for fewer than two samples."""
    higher_is_better: bool | None
    """None where the task does not say."""


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """What one task says about one checkpoint."""

    task: str
    version: str
    """lm-eval's version of the task."""
    n: int
    """Samples scored."""
    n_shot: int
    metrics: Mapping[str, Metric]
    """By name; a metric read through a named filter is called `metric,filter`."""
    samples: Mapping[str, tuple[float, ...]]
    """One number per sample, in the order of the data, for each metric that is their mean."""
    sample_hashes: tuple[str, ...]
    """lm-eval's hash of each document, in the same order."""

    def to_json(self) -> dict[str, Any]:
        """The score for a report: without the samples, with one hash over their documents."""
        return {
            "task": self.task,
            "version": self.version,
            "n": self.n,
            "n_shot": self.n_shot,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "samples_sha256": sha256_json(list(self.sample_hashes)),
        }


def check_tasks(tasks: Sequence[str], include_path: Path | None) -> None:
    """Check that lm-eval knows every task, group or tag; no data set is loaded.

    Raises:
        UsageError: A name is unknown, none is given, or `include_path` is no folder.
    """
    with _quiet(logging.ERROR):
        _task_manager(tasks, include_path)


def score_tasks(
    path: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str = "float32",
    seed: int = 0,
) -> list[TaskScore]:
    """The scores of a checkpoint on each task; groups and tags stand for all of their tasks.

    Args:
        path: Folder of a Hugging Face checkpoint with its tokenizer.
        tasks: Names that lm-eval knows.
        include_path: Folder of further task files; they win over stock tasks of the same name.
        limit: Score only the first samples of each task.
        batch_size: Sequences per forward pass.
        device: Where the model runs.
        dtype: The floating-point type that the model is loaded in.
        seed: Seeds Python's, numpy's and torch's generators and the choice of few-shot examples.

    Raises:
        UsageError: A name is unknown, or an option cannot be carried out.
        DataError: The checkpoint, its tokenizer or a data set cannot be had.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit of {limit} samples leaves nothing to score")
    with _seeded(seed), _quiet(logging.ERROR):
        manager = _task_manager(tasks, include_path)
        # A tokenizer is quickly read; data sets may be a download, so they come second.
        tokenizer = _load_tokenizer(path)
        loaded = _load_tasks(manager, tasks, seed)
        model = _load_model(path, tokenizer, batch_size=batch_size, device=device, dtype=dtype)
        # Warnings of the run itself (a prompt that does not fit) concern the scores: they stay.
        with _quiet(logging.WARNING):
            results = _evaluate(model, loaded, limit)
    return [_task_score(name, task, results) for name, task in loaded.items()]


def compare_tasks(ours: TaskScore, baseline: TaskScore) -> Mapping[str, PairedDifference]:
    """By metric, how far `ours` is above `baseline` on the same samples.

    Raises:
        DataError: The two were not scored on the same samples of the same task.
    """
    for field in ("task", "version", "n_shot", "n", "sample_hashes"):
        if getattr(ours, field) != getattr(baseline, field):
            raise DataError(
                f"{ours.task}: cannot compare with {baseline.task}: {_mismatch(field)}",
                "score both checkpoints with the same tasks and the same limit",
            )
    return {
        name: paired_difference(values, baseline.samples[name])
        for name, values in ours.samples.items()
        if name in baseline.samples
    }


def _mismatch(field: str) -> str:
    """What it means that a field of two scores differs."""
    return "not the same samples" if field == "sample_hashes" else f"`{field}` differs"


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> "TaskManager":
    """lm-eval's index of the tasks, which holds every name asked for."""
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise UsageError("no task is named", "give at least one")
    if include_path is not None:
        if not include_path.is_dir():
            raise UsageError(f"{include_path} is not a folder of lm-eval tasks")
        local = TaskManager(include_path=include_path, include_defaults=False)
        # Reading the thousands of stock files takes 10 s; a local task needs none of them, but a
        # group or a tag may have members there.
        if set(tasks) <= set(local.all_subtasks):
            return local
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.task_index]
    if unknown:
        raise UsageError(
            f"lm-eval knows no task {' or '.join(repr(name) for name in unknown)}",
            "; ".join(did_you_mean(name, manager.all_tasks) for name in unknown),
        )
    return manager


def _load_tasks(manager: "TaskManager", names: Sequence[str], seed: int) -> dict[str, "Task"]:
    """The tasks behind the names, with their data, each once and in the order asked for."""
    from datasets.exceptions import DatasetsError

    tasks: dict[str, Task] = {}
    for name in names:
        # What a task draws while it loads does not depend on the tasks before it.
        _seed(seed)
        try:
            found = manager.load([name])["tasks"]
        except (OSError, DatasetsError) as error:
            raise DataError(
                f"the data of task '{name}' cannot be had: {error}",
                "stock tasks load their data from the Hugging Face hub; without it, put task "
                "files that read local data in a folder and name it with --include-path",
            ) from error
        except (ImportError, ValueError) as error:
            raise DataError(f"task '{name}' cannot be loaded: {error}") from error
        for leaf, task in found.items():
            _add_task(tasks, leaf, task)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return tasks


def _add_task(tasks: dict[str, "Task"], name: str, task: "Task") -> None:
    """Add a task that is not there yet."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"task '{name}' runs code that the model writes", "use lm_eval itself")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"task '{name}' is not a task on text alone", "use lm_eval itself")
    # A group may set options of its members.
    if name in tasks and tasks[name].dump_config() != task.dump_config():
        raise UsageError(f"task '{name}' is asked for twice, with different options")
    tasks.setdefault(name, task)


def _load_model(
    path: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    batch_size: int,
    device: str,
    dtype: str,
) -> "HFLM":
    """The checkpoint as lm-eval runs it."""
    from lm_eval.models.huggingface import HFLM

    # HFLM gets loaded objects: from a path it takes another device in silence when it does not
    # know the one named, and asks the hub about the path.
    model = _load_weights(path, dtype)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot be put on device '{device}': {error}") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _load_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    hint = "tasks are text and need one; perplexity on token rows needs none"
    if not (path / "config.json").is_file():
        raise DataError(f"{path} is not a checkpoint folder: it has no config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path} has no usable tokenizer ({_first_line(error)})", hint) from error
    # For several architectures transformers 5 builds a tokenizer without any file, and it has no
    # words: every prompt would be empty.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise DataError(f"{path} has no tokenizer: its vocabulary is empty", hint)
    return tokenizer


def _load_weights(path: Path, dtype: str) -> "PreTrainedModel":
    """The model of a checkpoint with all of its weights."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"unknown dtype '{dtype}'", "use float32, bfloat16 or float16")
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path} cannot be loaded: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers fills them with random numbers and goes on.
        raise DataError(f"{path} lacks {len(missing)} weights, the first is {missing[0]}")
    return model


def _first_line(error: Exception) -> str:
    """The first line of an error's text; the libraries' own advice follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _evaluate(
    model: "HFLM", tasks: Mapping[str, "Task"], limit: int | None
) -> Mapping[str, Mapping[str, Any]]:
    """lm-eval's results, with every sample."""
    # Not `simple_evaluate`: around this call it starts git and pip to describe the machine, and
    # it seeds after tasks that are already loaded have shuffled their choices.
    from lm_eval import evaluate

    # A bootstrap takes minutes; without it lm-eval also drops the closed forms, hence
    # `mean_stderr` here.
    return evaluate(
        lm=model,
        task_dict={"tasks": dict(tasks), "groups": {}},
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
    )


def _task_score(name: str, task: "Task", results: Mapping[str, Mapping[str, Any]]) -> TaskScore:
    """The part of lm-eval's results that belongs to one task."""
    # The name comes as an argument: reading `task.task_name` draws from Python's generator.
    from lm_eval.api.metrics import mean

    rows_by_filter: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(results["samples"][name], key=lambda row: row["doc_id"]):
        rows_by_filter.setdefault(row["filter"], []).append(row)
    metrics: dict[str, Metric] = {}
    samples: dict[str, tuple[float, ...]] = {}
    for key, value in results["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if metric.endswith("_stderr") or filter_name not in rows_by_filter:
            continue  # not a metric: the task's name, its alias, an error left out
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


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that lm-eval and its tasks draw from; restore them after."""
    import numpy as np
    import torch

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        _seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _seed(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Show only messages of this level on, and send what lm-eval prints to stderr."""
    # Both set their level when they are first imported.
    import lm_eval
    import transformers

    loggers = [logging.getLogger(module.__name__) for module in (lm_eval, transformers)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(level)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for logger, old in zip(loggers, levels, strict=True):
            logger.setLevel(old)
