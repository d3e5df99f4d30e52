"""Quality of checkpoints: perplexity, zero-shot scores, and paired differences to a baseline."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.resolve import display_name, resolve
from sparsekit.errors import DataError
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import compute_dtype, pick_device
from sparsekit.model.full_model import require_memory
from sparsekit.progress import SILENT, Progress
from sparsekit.scoring.config import BATCH_SIZE, EvalConfig
from sparsekit.scoring.harness import SCORING_TASKS, load_tasks
from sparsekit.scoring.perplexity import Perplexity, perplexity
from sparsekit.scoring.standard_error import PairedDifference, mean_stderr, paired_difference
from sparsekit.scoring.tasks import TaskScore, compare_tasks, score_tasks
from sparsekit.text.calibration import evaluation_rows
from sparsekit.text.rows import TokenRows

if TYPE_CHECKING:
    from lm_eval.api.task import Task


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of one model."""

    model: str
    perplexity: Perplexity | None
    tasks: Sequence[TaskScore]
    difference: dict[str, dict[str, Any]] = field(default_factory=dict)
    """This model's value minus the baseline's, by `log_perplexity` and `TASK.METRIC`, each with the
    baseline's own value."""

    def __str__(self) -> str:
        figures = [f"perplexity {self.perplexity.value:.3f}"] if self.perplexity else []
        for task in self.tasks:
            figures += [f"{task.task} {m} {task.metrics[m].value:.4f}" for m in task.metrics]
        return f"{self.model}: {', '.join(figures)}"

    def to_json(self) -> dict[str, Any]:
        """The score as JSON."""
        return {
            "model": self.model,
            "perplexity": self.perplexity.to_json() if self.perplexity else None,
            "tasks": [task.to_json() for task in self.tasks],
            "difference": self.difference,
        }


def evaluate(
    config: EvalConfig,
    models: Sequence[str],
    baseline: str | None = None,
    progress: Progress = SILENT,
) -> list[Score]:
    """Scores of models, the baseline first.

    Args:
        config: What to measure.
        models: Folders, hub ids or `demo`.
        baseline: The model that paired differences are reported to.
        progress: Reports each block and model.

    Raises:
        UsageError: A task is unknown or an option is invalid.
        DataError: A model or text cannot be read, or models were scored on different samples.
    """
    scores: list[Score] = []
    try:
        for score in evaluations(config, models, baseline, progress):
            scores.append(score)
    except BaseException:
        # Scores of earlier models took long to measure; keep them in the log.
        for score in scores:
            progress.note(f"measured before: {score}")
        raise
    return scores


def evaluations(
    config: EvalConfig,
    models: Sequence[str],
    baseline: str | None = None,
    progress: Progress = SILENT,
) -> Iterator[Score]:
    """Scores of models as they are measured, the baseline first.

    Arguments and errors are those of `evaluate`.
    """
    if config.length is not None and config.windows_of is None:
        progress.note("--length has no effect on tasks; add --text builtin to measure perplexity")
    names = [*([baseline] if baseline else []), *models]
    subjects = [_subject(config, name, progress) for name in names]
    tasks = load_tasks(config.tasks, config.include_path, config.seed) if config.tasks else {}
    if baseline:
        for subject in subjects[1:]:
            _refuse_other_windows(subject, subjects[0])
    for subject in subjects:
        subject.source.scan(progress)
    first: Score | None = None
    for subject in subjects:
        measured = _perplexity(config, subject, progress)
        score = Score(model=subject.name, perplexity=measured, tasks=[])
        try:
            score = replace(score, tasks=_tasks(config, subject, tasks, progress))
        except BaseException:
            if measured:
                progress.note(f"measured before: {score}")
            raise
        if baseline and first is None:
            first = score
            yield score
        else:
            yield _compared(score, first) if first else score


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model to measure, with the windows for its perplexity."""

    name: str
    source: Checkpoint
    rows: TokenRows | None


def _subject(config: EvalConfig, name: str, progress: Progress) -> _Subject:
    """A model, after all checks that need no weights."""
    device = pick_device(config.device)
    source = Checkpoint.open(resolve(name, progress))
    dtype = compute_dtype(config.dtype, device, source)
    if config.tasks:
        source.tokenizer()
        require_memory(source, dtype, SCORING_TASKS)
    rows = None
    if config.windows_of is not None:
        # Refuses models that cannot be streamed, in little time and memory.
        BlockStream(source, device=device, dtype=dtype)
        rows = evaluation_rows(config.windows_of, source, length=config.length, limit=config.limit)
        for note in rows.notes:
            progress.note(f"{display_name(name)}: {note}")
    return _Subject(name=name, source=source, rows=rows)


def _refuse_other_windows(subject: _Subject, baseline: _Subject) -> None:
    """Refuse models whose perplexities cannot be compared window by window."""
    ours, theirs = subject.rows, baseline.rows
    if ours is None or theirs is None:
        return
    length, other = ours.tokens.shape[1], theirs.tokens.shape[1]
    if length != other:
        raise DataError(
            f"{subject.name} would be measured on windows of {length} tokens, {baseline.name} of "
            f"{other}",
            f"give both the same: --length {min(length, other)}",
            code="other-windows",
        )
    if ours.fingerprint != theirs.fingerprint:
        raise DataError(
            f"{subject.name} and {baseline.name} cut {ours.source} into different tokens",
            "models with different tokenizers cannot be compared window by window",
            code="other-windows",
        )


def _perplexity(config: EvalConfig, subject: _Subject, progress: Progress) -> Perplexity | None:
    if subject.rows is None:
        return None
    device = pick_device(config.device)
    dtype = compute_dtype(config.dtype, device, subject.source)
    label = display_name(subject.name)
    return perplexity(
        subject.source, subject.rows, device=device, dtype=dtype, label=label, progress=progress
    )


def _tasks(
    config: EvalConfig, subject: _Subject, tasks: "Mapping[str, Task]", progress: Progress
) -> list[TaskScore]:
    if not tasks:
        return []
    device = pick_device(config.device)
    dtype = compute_dtype(config.dtype, device, subject.source)
    progress.begin(f"tasks of {display_name(subject.name)}", 1)
    scores = score_tasks(
        subject.source.path,
        tasks,
        limit=config.limit,
        batch_size=config.batch_size or BATCH_SIZE,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        seed=config.seed,
    )
    progress.step(", ".join(score.task for score in scores))
    progress.end()
    return scores


def _compared(score: Score, baseline: Score) -> Score:
    """The score with its paired differences to the baseline."""
    difference: dict[str, dict[str, Any]] = {}
    ours, theirs = score.perplexity, baseline.perplexity
    if ours and theirs:
        paired = paired_difference(ours.losses, theirs.losses)
        difference["log_perplexity"] = _json(paired, theirs.log, mean_stderr(theirs.losses))
    for mine, other in zip(score.tasks, baseline.tasks, strict=True):
        for metric, paired in compare_tasks(mine, other).items():
            before = other.metrics[metric]
            difference[f"{mine.task}.{metric}"] = _json(paired, before.value, before.stderr)
    return Score(model=score.model, perplexity=ours, tasks=score.tasks, difference=difference)


def _json(paired: PairedDifference, value: float, stderr: float | None) -> dict[str, Any]:
    """A difference as JSON, with the baseline's value and standard error."""
    baseline = {"value": value, "stderr": stderr}
    return {**asdict(paired), "stderr": _number(paired.stderr), "baseline": baseline}


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if math.isnan(value) else value
