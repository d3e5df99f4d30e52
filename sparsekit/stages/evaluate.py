"""What a checkpoint is worth: perplexity, zero-shot scores, and the difference to a baseline."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from sparsekit.errors import DataError, NumericalError
from sparsekit.memory import available_memory
from sparsekit.models.blocks import BlockStream
from sparsekit.models.calibration import evaluation_rows
from sparsekit.models.checkpoint import Checkpoint
from sparsekit.models.reference import resolve, title
from sparsekit.models.rows import TokenRows
from sparsekit.models.whole import require_memory
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.config import BATCH_SIZE, EvalConfig
from sparsekit.stages.device import compute_dtype, pick_device
from sparsekit.stages.harness import NEED, load_tasks
from sparsekit.stages.measured import perplexity_of
from sparsekit.stages.paired import PairedDifference, mean_stderr, paired_difference
from sparsekit.stages.tasks import TaskScore, compare_tasks, score_tasks

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# Share of the free memory that the hidden states of all windows may take; more windows than fit
# are measured in several passes over the blocks.
HIDDEN_SHARE = 0.4


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Perplexity on non-overlapping windows."""

    text: str
    windows: int
    length: int
    dtype: str
    """Compute type."""
    device: str
    fingerprint: str
    """Of the token rows; figures compare only when it is the same."""
    losses: tuple[float, ...]
    """Mean loss of each window's length − 1 predictions, in nats."""

    @property
    def log(self) -> float:
        """Mean of the window means."""
        return sum(self.losses) / len(self.losses)

    @property
    def value(self) -> float:
        """The perplexity; infinite beyond what a float holds."""
        return perplexity_of(self.log)

    def to_json(self) -> dict[str, Any]:
        """Everything but the single losses."""
        return {
            "text": self.text,
            "windows": self.windows,
            "length": self.length,
            "dtype": self.dtype,
            "device": self.device,
            "fingerprint": self.fingerprint,
            "perplexity": self.value if self.value < math.inf else None,
            "log_perplexity": self.log,
            "log_stderr": mean_stderr(self.losses),
        }


@dataclass(frozen=True, kw_only=True)
class Score:
    """All that was measured of one model."""

    model: str
    perplexity: Perplexity | None
    tasks: Sequence[TaskScore]
    difference: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Ours minus the baseline's, by `log_perplexity` and `TASK.METRIC`; with each the figure of the
    baseline itself."""

    def __str__(self) -> str:
        figures = [f"perplexity {self.perplexity.value:.3f}"] if self.perplexity else []
        for task in self.tasks:
            figures += [f"{task.task} {m} {task.metrics[m].value:.4f}" for m in task.metrics]
        return f"{self.model}: {', '.join(figures)}"

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
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
    """Measure models, the baseline first.

    Args:
        config: What to measure.
        models: Folders, hub ids or `demo`.
        baseline: The model that differences are taken to, sample by sample.
        progress: Told of each block and model.

    Raises:
        UsageError: A task is unknown or an option cannot be carried out.
        DataError: A model or text cannot be read, or models were scored on different samples.
    """
    scores: list[Score] = []
    try:
        for score in evaluations(config, models, baseline, progress):
            scores.append(score)
    except BaseException:
        # What took long to measure is not lost with what failed.
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
    """The scores of models as they are found, the baseline's first.

    Arguments and errors as of `evaluate`.
    """
    config.check()
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
        found = _perplexity(config, subject, progress)
        score = Score(model=subject.name, perplexity=found, tasks=[])
        try:
            score = replace(score, tasks=_tasks(config, subject, tasks, progress))
        except BaseException:
            if found:
                progress.note(f"measured before: {score}")
            raise
        if baseline and first is None:
            first = score
            yield score
        else:
            yield _compared(score, first) if first else score


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """A model that is to be measured, with the windows for its perplexity."""

    name: str
    source: Checkpoint
    rows: TokenRows | None


def _subject(config: EvalConfig, name: str, progress: Progress) -> _Subject:
    """A model, checked as far as that needs no weights."""
    device = pick_device(config.device)
    source = Checkpoint.open(resolve(name, progress))
    dtype = compute_dtype(config.dtype, device, source)
    if config.tasks:
        source.tokenizer()
        require_memory(source, dtype, **NEED)
    rows = None
    if config.windows_of is not None:
        # Refuses what cannot be streamed; that takes a moment and little memory.
        BlockStream(source, device=device, dtype=dtype)
        rows = evaluation_rows(config.windows_of, source, length=config.length, limit=config.limit)
        for note in rows.notes:
            progress.note(f"{title(name)}: {note}")
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
        )
    if ours.fingerprint != theirs.fingerprint:
        raise DataError(
            f"{subject.name} and {baseline.name} cut {ours.source} into different tokens",
            "models with different tokenizers cannot be compared window by window",
        )


def perplexity(
    source: Checkpoint,
    rows: TokenRows,
    *,
    device: str,
    dtype: torch.dtype,
    label: str,
    progress: Progress = SILENT,
) -> Perplexity:
    """Perplexity of a model on token rows, streamed block by block whatever the model's size."""
    stream = BlockStream(source, device=device, dtype=dtype)
    count, length = rows.tokens.shape
    each = length * source.config.get_text_config().hidden_size * dtype.itemsize
    fitting = max(1, int(available_memory() * HIDDEN_SHARE) // each)
    passes = range(0, count, fitting)
    progress.begin(f"perplexity of {label}", len(passes) * len(stream))
    losses: list[float] = []
    for start in passes:
        tokens = rows.tokens[start : start + fitting]
        stream.feed(tokens)
        for block in stream:
            block.load()
            block.advance()
            progress.step(block.name)
        losses += stream.losses(tokens).tolist()
    progress.end()
    if not all(map(math.isfinite, losses)):
        raise NumericalError(
            f"{source.path}: the loss is not a number on window "
            f"{next(i for i, loss in enumerate(losses) if not math.isfinite(loss))}",
            "compute in a wider type (--dtype float32), or the model is broken",
        )
    return Perplexity(
        text=rows.source,
        windows=count,
        length=length,
        dtype=str(dtype).removeprefix("torch."),
        device=device,
        fingerprint=rows.fingerprint,
        losses=tuple(losses),
    )


def _perplexity(config: EvalConfig, subject: _Subject, progress: Progress) -> Perplexity | None:
    if subject.rows is None:
        return None
    device = pick_device(config.device)
    dtype = compute_dtype(config.dtype, device, subject.source)
    label = title(subject.name)
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
    progress.begin(f"tasks of {title(subject.name)}", 1)
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
    """The score with its sample-by-sample difference to the baseline."""
    difference: dict[str, dict[str, Any]] = {}
    ours, theirs = score.perplexity, baseline.perplexity
    if ours and theirs:
        paired = paired_difference(ours.losses, theirs.losses)
        difference["log_perplexity"] = _told(paired, theirs.log, mean_stderr(theirs.losses))
    for mine, other in zip(score.tasks, baseline.tasks, strict=True):
        for metric, paired in compare_tasks(mine, other).items():
            own = other.metrics[metric]
            difference[f"{mine.task}.{metric}"] = _told(paired, own.value, own.stderr)
    return Score(model=score.model, perplexity=ours, tasks=score.tasks, difference=difference)


def _told(paired: PairedDifference, value: float, stderr: float | None) -> dict[str, Any]:
    """A difference as JSON, with the value and standard error of the baseline itself."""
    own = {"value": value, "stderr": stderr}
    return {**asdict(paired), "stderr": _number(paired.stderr), "baseline": own}


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if math.isnan(value) else value
