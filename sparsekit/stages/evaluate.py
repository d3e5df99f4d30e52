"""What a checkpoint is worth: perplexity, zero-shot scores, and the difference to a baseline."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch

from sparsekit.errors import DataError, NumericalError
from sparsekit.models.blocks import BlockStream
from sparsekit.models.calibration import TokenRows, evaluation_rows
from sparsekit.models.checkpoint import Checkpoint, resolve
from sparsekit.progress import SILENT, Progress
from sparsekit.stages.config import EvalConfig
from sparsekit.stages.device import compute_dtype, pick_device
from sparsekit.stages.paired import PairedDifference, mean_stderr, paired_difference
from sparsekit.stages.tasks import TaskScore, check_tasks, compare_tasks, score_tasks

# Share of the free memory that the hidden states of all windows may take; more windows than fit
# are measured in several passes over the blocks.
HIDDEN_SHARE = 0.4
# exp of more than this is no float.
LARGEST_LOG = 709.0


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
        return math.exp(self.log) if self.log < LARGEST_LOG else math.inf

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
    """Ours minus the baseline's, by `log_perplexity` and `TASK.METRIC`."""

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
        models: Folders or hub ids.
        baseline: The model that differences are taken to, sample by sample.
        progress: Told of each block and model.

    Raises:
        UsageError: A task is unknown or an option cannot be carried out.
        DataError: A model or text cannot be read, or models were scored on different samples.
    """
    config.check()
    if config.tasks:
        check_tasks(config.tasks, config.include_path)
    names = [*([baseline] if baseline else []), *models]
    checkpoints = [Checkpoint.open(resolve(name)) for name in names]
    scores: list[Score] = []
    for name, source in zip(names, checkpoints, strict=True):
        source.scan()
        score = Score(
            model=name,
            perplexity=_perplexity(config, source, progress),
            tasks=_tasks(config, source, progress),
        )
        if baseline and scores:
            score = _compared(score, scores[0])
        scores.append(score)
    return scores


def perplexity(
    source: Checkpoint,
    rows: TokenRows,
    *,
    device: str,
    dtype: torch.dtype,
    progress: Progress = SILENT,
) -> Perplexity:
    """Perplexity of a model on token rows, streamed block by block whatever the model's size."""
    stream = BlockStream(source, device=device, dtype=dtype)
    count, length = rows.tokens.shape
    each = length * source.config.get_text_config().hidden_size * dtype.itemsize
    fitting = max(1, int(psutil.virtual_memory().available * HIDDEN_SHARE) // each)
    passes = range(0, count, fitting)
    progress.begin(f"perplexity of {source.path.name}", len(passes) * len(stream))
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


def _perplexity(config: EvalConfig, source: Checkpoint, progress: Progress) -> Perplexity | None:
    if config.windows_of is None:
        return None
    rows = evaluation_rows(config.windows_of, source, length=config.length, limit=config.limit)
    for note in rows.notes:
        progress.note(f"{source.path.name}: {note}")
    device = pick_device(config.device)
    dtype = compute_dtype(config.dtype, device, source)
    return perplexity(source, rows, device=device, dtype=dtype, progress=progress)


def _tasks(config: EvalConfig, source: Checkpoint, progress: Progress) -> list[TaskScore]:
    if not config.tasks:
        return []
    device = pick_device(config.device)
    dtype = compute_dtype(config.dtype, device, source)
    progress.begin(f"tasks of {source.path.name}", 1)
    scores = score_tasks(
        source.path,
        config.tasks,
        include_path=config.include_path,
        limit=config.limit,
        batch_size=config.batch_size,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        seed=config.seed,
    )
    progress.step(", ".join(score.task for score in scores))
    progress.end()
    return scores


def _compared(score: Score, baseline: Score) -> Score:
    """The score with its sample-by-sample difference to the baseline."""
    difference: dict[str, PairedDifference] = {}
    ours, theirs = score.perplexity, baseline.perplexity
    if ours and theirs:
        if ours.length != theirs.length:
            raise DataError(
                f"{score.model} was measured on windows of {ours.length} tokens, {baseline.model} "
                f"of {theirs.length}",
                f"give both the same: --length {min(ours.length, theirs.length)}",
            )
        if ours.fingerprint != theirs.fingerprint:
            raise DataError(
                f"{score.model} and {baseline.model} cut {ours.text} into different tokens",
                "models with different tokenizers cannot be compared window by window",
            )
        difference["log_perplexity"] = paired_difference(ours.losses, theirs.losses)
    for mine, other in zip(score.tasks, baseline.tasks, strict=True):
        for metric, value in compare_tasks(mine, other).items():
            difference[f"{mine.task}.{metric}"] = value
    plain = {key: {**asdict(d), "stderr": _number(d.stderr)} for key, d in difference.items()}
    return Score(model=score.model, perplexity=ours, tasks=score.tasks, difference=plain)


def _number(value: float) -> float | None:
    """NaN is not JSON."""
    return None if math.isnan(value) else value
