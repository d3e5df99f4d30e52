"""Tasks and models of lm-eval, loaded without its side effects."""

import contextlib
import functools
import logging
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.folder import load_tokenizer
from sparsekit.errors import DataError, UsageError, did_you_mean
from sparsekit.memory import MemoryUse
from sparsekit.model.full_model import load_whole

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager


# Tasks need the whole model in memory; perplexity does not.
SCORING_TASKS = MemoryUse(
    "scoring lm-eval tasks",
    hint="a narrower --dtype takes less; perplexity (--text) is measured block by block",
)


def load_tasks(
    names: Sequence[str], include_path: Path | None = None, seed: int = 0
) -> "dict[str, Task]":
    """Tasks by name, with their data, each once and in the given order.

    Args:
        names: Tasks, groups or tags that lm-eval knows.
        include_path: Folder with further task files; they override stock tasks of the same name.
        seed: Seed of random choices that a task makes while it loads.

    Raises:
        UsageError: A name is unknown, none is given, or `include_path` is not a folder.
        DataError: A task's data is not available.
    """
    with seeded(seed), quiet(logging.ERROR):
        manager = _task_manager(names, include_path)
        tasks: dict[str, Task] = {}
        for name in names:
            # The random choices of a task do not depend on the tasks before it.
            _seed(seed)
            for leaf, task in _load(manager, name).items():
                _add_task(tasks, leaf, task)
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
    return tasks


def _task_manager(names: Sequence[str], include_path: Path | None) -> "TaskManager":
    """lm-eval's task index, which has every given name."""
    from lm_eval.tasks import TaskManager

    if not names:
        raise UsageError("no task is named", "name at least one", code="no-task")
    if include_path is not None:
        if not include_path.is_dir():
            message = f"{include_path} is not a folder of lm-eval tasks"
            raise UsageError(message, code="not-a-folder")
        local = TaskManager(include_path=include_path, include_defaults=False)
        # Reading the thousands of stock files takes 10 s. A local task needs none of them, but a
        # group or a tag may have members there.
        if set(names) <= set(local.all_subtasks):
            return local
    manager = _stock() if include_path is None else TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise UsageError(
            f"lm-eval has no task {' or '.join(repr(name) for name in unknown)}",
            "; ".join(did_you_mean(name, manager.all_tasks) for name in unknown),
            code="no-such-task",
        )
    return manager


@functools.cache
def _stock() -> "TaskManager":
    """Index of the stock tasks, which takes 10 s to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(manager: "TaskManager", name: str) -> "Mapping[str, Task]":
    """Tasks of one name, with their data."""
    from datasets.exceptions import DatasetsError

    try:
        return manager.load([name])["tasks"]
    except (OSError, DatasetsError) as error:
        raise DataError(
            f"the data of task '{name}' is not available: {error}",
            "stock tasks load their data from the Hugging Face hub; without it, put task "
            "files that read local data in a folder and pass it as --include-path",
            code="no-task-data",
        ) from error
    except (ImportError, ValueError) as error:
        message = f"task '{name}' cannot be loaded: {error}"
        raise DataError(message, code="invalid-task") from error


def _add_task(tasks: dict[str, "Task"], name: str, task: "Task") -> None:
    """Add a task unless it is there already."""
    if getattr(task, "UNSAFE_CODE", False):
        message = f"task '{name}' runs code that the model writes"
        raise UsageError(message, "use lm_eval itself", code="unsupported-task")
    if getattr(task, "MULTIMODAL", False):
        message = f"task '{name}' is not a task on text alone"
        raise UsageError(message, "use lm_eval itself", code="unsupported-task")
    # A group may set options of its members.
    if name in tasks and tasks[name].dump_config() != task.dump_config():
        message = f"task '{name}' is named twice, with different options"
        raise UsageError(message, code="given-twice")
    tasks.setdefault(name, task)


def load_model(path: Path, *, batch_size: int, device: str, dtype: str) -> "HFLM":
    """The checkpoint as lm-eval runs it.

    Raises:
        UsageError: The device or dtype does not exist.
        DataError: The checkpoint lacks weights or a tokenizer, or cannot be read.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(path)
    # HFLM gets loaded objects: given a path, it silently falls back to another device when it does
    # not know the one named, and asks the hub about the path.
    wanted = getattr(torch, dtype, None)
    if not isinstance(wanted, torch.dtype):
        hint = "use float32, bfloat16 or float16"
        raise UsageError(f"unknown dtype '{dtype}'", hint, code="not-a-choice")
    model = load_whole(Checkpoint.open(path), wanted, SCORING_TASKS)
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        message = f"the model cannot be put on device '{device}': {error}"
        raise UsageError(message, code="no-such-device") from error
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators that lm-eval and its tasks use; restore them afterwards."""
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
def quiet(level: int) -> Iterator[None]:
    """Show only messages of at least this level, and send lm-eval's output to stderr."""
    # Both set their level on their first import.
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
