"""The inputs of training: a checked job, rows, windows and settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsekit.checkpoint.entry_parts import RecoverSettings
from sparsekit.errors import DataError
from sparsekit.files import sha256_json
from sparsekit.model.device import pick_device
from sparsekit.pipeline.cost import Cost
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import NUMERICS
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.prepare import RecoverJob, prepare_recover, require_parent
from sparsekit.recovery.student import top_teacher
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.calibration import evaluation_rows
from sparsekit.text.rows import TokenRows
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from sparsekit.checkpoint.checkpoint import Checkpoint


# Nominal floating-point operations per second of a CPU core and of a GPU, for --max-time: all
# processes and an interrupted run must arrive at the same number of tokens.
CORE, GPU = 5e10, 2e13
# The fastest machine, as a multiple of the nominal speed, in float32 and in mixed precision.
FASTEST, MIXED = 4.0, 8.0
# Options that do not decide the output's bytes, or are recorded in another form.
UNRECORDED = (
    *("data", "teacher", "pattern", "option"),
    *("save_every", "eval_every", "eval_text", "dtype"),
)
# Windows of an evaluation during training.
EVAL_WINDOWS = 8


@dataclass(frozen=True, kw_only=True)
class TrainingInputs:
    """A checked job with everything that training reads."""

    job: RecoverJob
    rows: TrainingRows
    windows: TokenRows | None
    """Text for perplexities during training; None: no evaluation."""
    top: TopTeacher | None
    """The teacher, if its largest probabilities are cached on disk."""
    settings: RecoverSettings
    """The settings that decide the output's bytes, besides the models."""
    key: Mapping[str, str | None]
    """The other inputs that decide them."""
    processes: Processes
    folder: Path
    """Folder of the unfinished output."""
    cost: Cost
    """Cost since the run began."""
    progress: Progress

    @classmethod
    def read(
        cls,
        config: RecoverConfig,
        model: str,
        out: Path,
        cost: Cost,
        *,
        overwrite: bool,
        progress: Progress,
    ) -> TrainingInputs:
        """Check a configuration and read its inputs, with the errors of `recover`."""
        processes = Processes.current(pick_device(config.device))
        processes.parts(config.accumulate)
        progress = progress if processes.main else SILENT
        job = prepare_recover(
            config, model, out, overwrite=overwrite, processes=processes, progress=progress
        )
        windows = _windows(job)  # before the text, which may be long
        rows = _rows(job, processes, progress)
        job.source.scan(progress)
        if job.teacher is not None:
            require_parent(job, job.teacher.scan(progress))
        own = {name: str(pattern) for name, pattern in job.patterns.own.items()}
        top = top_teacher(job, rows, processes, progress)
        processes.wait()
        return cls(
            job=job,
            rows=rows,
            windows=windows,
            top=top,
            settings=_settings(job, rows, processes),
            key={
                "source": job.source.fingerprint,
                "teacher": job.teacher and job.teacher.fingerprint,
                "own_patterns": sha256_json(own),
            },
            processes=processes,
            folder=out.with_name(out.name + ".partial"),
            cost=cost,
            progress=progress,
        )


def _rows(job: RecoverJob, processes: Processes, progress: Progress) -> TrainingRows:
    """The rows; the main process tokenises the text, the others find it done."""
    tokens = processes.broadcast(tokens_to_read(job.config, job.source, job.device, processes))
    corpus = job.config.corpus(tokens)
    if not processes.main:
        processes.wait()
    rows = corpus.rows(job.source, job.teacher, progress)
    if processes.main:
        processes.wait()
    processes.require_same(f"{rows.fingerprint} {rows.count}", "text")
    for note in (*job.notes, *rows.notes):
        progress.note(note)
    wanted = job.config.batch * job.config.accumulate
    if len(rows) < wanted:
        raise DataError(
            f"{job.config.data} has {len(rows)} rows of {rows.length} tokens, a step takes "
            f"{wanted}",
            "give it more text, or a smaller --batch, --length or --accumulate",
            code="too-few-rows",
        )
    passes = (job.config.tokens or 0) / (len(rows) * rows.length)
    if passes > 1:
        progress.note(f"the text is read {passes:.1f} times")
    return rows


def _windows(job: RecoverJob) -> TokenRows | None:
    """Text for perplexities during training; None: no evaluation."""
    config = job.config
    if config.eval_every is None:
        return None
    source, length = config.eval_text or "builtin", None if config.eval_text else config.length
    return evaluation_rows(source, job.source, length=length, limit=EVAL_WINDOWS)


def _settings(job: RecoverJob, rows: TrainingRows, processes: Processes) -> RecoverSettings:
    """The settings that decide the output's bytes, besides the models."""
    options = {key: value for key, value in job.config if key not in UNRECORDED}
    decided = {
        "options": asdict(job.recoverer),
        "pattern": str(job.patterns.base),
        "data": rows.fingerprint,
        "length": rows.length,
        "device": job.device.type,
    }
    return RecoverSettings(
        numerics=NUMERICS,
        processes=processes.size,
        shards=processes.shards,
        threads=torch.get_num_threads(),
        **options | decided,
    )


def tokens_to_read(
    config: RecoverConfig, source: Checkpoint, device: torch.device, processes: Processes
) -> int:
    """Number of tokens to read: those of the steps or, for --max-time, of the fastest machine."""
    if config.tokens is not None:
        return config.steps() * config.step_tokens
    fastest = FASTEST if config.mixed_precision == "no" else MIXED
    wanted = fastest * _tokens(config, _parameters(source), device, processes)
    return max(1, math.ceil(wanted / config.step_tokens)) * config.step_tokens


def _parameters(source: Checkpoint) -> int:
    return sum(math.prod(place.shape) for place in source.places.values())


def _tokens(
    config: RecoverConfig, parameters: int, device: torch.device, processes: Processes
) -> float:
    """Number of tokens to train on; for --max-time at the nominal speed."""
    if config.max_time is None:
        return float(config.tokens or 0)
    speed = CORE * torch.get_num_threads() if device.type == "cpu" else GPU
    return config.max_time * speed * processes.size / (8 * parameters)
