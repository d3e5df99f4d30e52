"""Preparation of a recovery run: all checks and choices that need no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.entry import RecoverEntry
from sparsekit.checkpoint.entry_parts import Source
from sparsekit.checkpoint.layout import Layout, factor_types
from sparsekit.checkpoint.output_folder import refuse_source
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError, StorageError, UsageError
from sparsekit.model.architecture import Target
from sparsekit.model.block_stream import BlockStream
from sparsekit.model.device import pick_device, product_seconds
from sparsekit.pipeline.selection import WeightPatterns, family_notes
from sparsekit.pipeline.source import open_source, require_disk
from sparsekit.progress import SILENT, Progress
from sparsekit.recovery.checks import (
    refuse_cuts,
    refuse_more_than_the_vocabulary,
    refuse_other_heads,
    refuse_other_teacher,
    refuse_patterns,
    refuse_silent_teacher,
    refuse_sparse_teacher,
)
from sparsekit.recovery.config import AUTO, RecoverConfig
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.memory_needs import (
    require_memory,
    require_pass,
    state_bytes,
    training_bytes,
)
from sparsekit.recovery.methods import Recoverer
from sparsekit.recovery.targets import patterns_of, recorded_patterns, sparse_targets
from sparsekit.text.rows import cap_length
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.packed import factor_shapes

ALONE = Processes()
# The method of `--method auto`.
BEST = "ast"


@dataclass(frozen=True, kw_only=True)
class RecoverJob:
    """A checked configuration with everything that training needs."""

    config: RecoverConfig
    recoverer: Recoverer
    source: Checkpoint
    teacher: Checkpoint | None
    """The dense model; None when nothing needs it."""
    teacher_name: str
    """Its name according to the user or the history; empty without a teacher."""
    linear: list[Target]
    """All linear weights of the blocks."""
    targets: list[Target]
    patterns: WeightPatterns
    skipped: list[dict[str, str]]
    layout: Layout
    device: torch.device
    notes: list[str]

    @property
    def loaded(self) -> Checkpoint | None:
        """The teacher that stays in memory; None if the model is not needed all the time."""
        needed = self.config.kl_weight != 0 and self.config.teacher_top is None
        return self.teacher if needed else None

    @property
    def held(self) -> int:
        """Bytes of weights, gradients, moments and teacher, without activations."""
        return training_bytes(self.config, self.source, self.loaded, self.recoverer)


def prepare_recover(
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    processes: Processes = ALONE,
    saves: bool = True,
    progress: Progress = SILENT,
) -> RecoverJob:
    """Check a configuration against a model, its teacher and an output folder.

    Args:
        config: The options.
        model: A folder, hub id or `demo`.
        out: The folder to make.
        overwrite: Whether it may replace an earlier output.
        processes: The processes that train together.
        saves: Whether to check disk space for saved states too.
        progress: Receives downloads.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: A model cannot be read, or the teacher does not fit the model.
        StorageError: The disk has no room for the output.
    """
    source = _open_model(model, out, overwrite=overwrite, progress=progress)
    config, recoverer, notes = _completed(config, source)
    saved = state_bytes(source) if saves else 0
    if config.slorb is None:  # before patterns are searched in the weights, which takes minutes
        _require_disk(out, Layout.of(source), saved, config, source, recoverer)
    device = pick_device(config.device)
    stream = BlockStream(source, device=device, dtype=torch.float32)
    linear = stream.targets()
    targets, left = sparse_targets(config, source, linear)
    patterns = patterns_of(config, source, targets)
    refuse_patterns(targets, patterns, recoverer, config)
    if processes.shards:
        refuse_cuts(targets, patterns, config)
    layout = _layout(config, source, targets, patterns)
    _require_disk(out, layout, saved, config, source, recoverer)
    teacher, teacher_name = None, _teacher_name(config, source, model)
    if teacher_name:
        teacher = _open_teacher(config, recoverer, source, targets, teacher_name, out, progress)
    job = RecoverJob(
        config=config,
        recoverer=recoverer,
        source=source,
        teacher=teacher,
        teacher_name=teacher_name,
        linear=linear,
        targets=targets,
        patterns=patterns,
        skipped=left,
        layout=layout,
        device=torch.device(device),
        notes=notes + _notes(config, source, stream),
    )
    _require_memory(job, processes)
    return job


def _require_disk(
    out: Path,
    layout: Layout,
    saved: int,
    config: RecoverConfig,
    source: Checkpoint,
    recoverer: Recoverer,
) -> None:
    """Refuse a run that does not fit on the disk, and name the memory that it would need.

    Raises:
        StorageError: Names the disk space needed and available.
    """
    try:
        require_disk(out, layout, saved)
    except StorageError as error:
        needed = training_bytes(config, source, None, recoverer) / 1e9
        raise StorageError(
            error.message,
            f"{error.hint}; training also needs {needed:.2f} GB of memory, besides the teacher and "
            "the activations",
            code=error.code,
        ) from error


def _open_model(model: str, out: Path, *, overwrite: bool, progress: Progress) -> Checkpoint:
    """Open the model, after checking that it can be trained."""
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("recover")
    refuse_other_heads(source)
    return source


def _require_memory(job: RecoverJob, processes: Processes) -> None:
    """Refuse a run that does not fit into memory.

    Raises:
        DataError: Names the memory needed and available.
    """
    require_memory(
        job.config, job.source, job.loaded, job.recoverer, job.device, shards=processes.shards
    )
    if not processes.shards:
        require_pass(job.config, job.source, job.loaded, job.linear, job.recoverer, job.device)


def _completed(
    config: RecoverConfig, source: Checkpoint
) -> tuple[RecoverConfig, Recoverer, list[str]]:
    """Resolve length, method and schedule; also returns notes for the user."""
    length, capping = cap_length(config.length, source.config)
    config, notes = config.model_copy(update={"length": length}), list(capping)
    if config.method == AUTO:
        config, why = chosen(config)
        notes.append(why)
    recoverer = methods.load("recoverers", config.method, config.option)
    selects = recoverer.refresh or config.pattern is not None or not recorded_patterns(source)
    if config.metric != "magnitude" and not selects:
        raise UsageError(
            f"--metric {config.metric} has no effect: the mask of {source.path} is kept",
            "leave it out, or prune with --method wanda first",
            code="no-effect",
        )
    if config.schedule == AUTO:
        config = config.model_copy(update={"schedule": recoverer.schedule})
    return config, recoverer, notes


def _teacher_name(config: RecoverConfig, source: Checkpoint, model: str) -> str:
    """The dense model as the user or the history names it; empty when nothing needs it."""
    if config.kl_weight == 0 and config.slorb is None and config.data != "self":
        return ""
    dense = _dense(source)
    return config.teacher or (dense and dense.path) or model


def _open_teacher(
    config: RecoverConfig,
    recoverer: Recoverer,
    source: Checkpoint,
    targets: Sequence[Target],
    teacher_name: str,
    out: Path,
    progress: Progress,
) -> Checkpoint:
    """Open the dense model.

    Raises:
        UsageError: The output folder holds it, `--teacher-top` exceeds its vocabulary, or the loss
            has no gradient.
        DataError: It cannot be read, or does not fit the model.
    """
    try:
        teacher = Checkpoint.open(resolve(teacher_name, progress))
    except (DataError, UsageError) as error:
        message = f"the teacher cannot be read: {error.message}"
        hint = "name the dense model with --teacher"
        raise DataError(message, hint, code="no-teacher") from error
    refuse_source(out, teacher.path)
    refuse_other_teacher(source, teacher)
    refuse_more_than_the_vocabulary(config, teacher)
    if config.teacher is None:
        refuse_sparse_teacher(config, source, teacher, targets)
    refuse_silent_teacher(config, recoverer, source, teacher)
    return teacher


def _dense(source: Checkpoint) -> Source | None:
    """The history's record of the dense model; None without a history.

    That is the model that was pruned; if the history starts with training, the first teacher, or
    the model that was trained without one.
    """
    history = source.pruned()
    if not history:
        return None
    first, trained = history[0], [e for e in history if isinstance(e, RecoverEntry)]
    teachers = [entry.teacher for entry in trained if entry.teacher]
    return teachers[0] if isinstance(first, RecoverEntry) and teachers else first.source


def require_parent(job: RecoverJob, fingerprint: str) -> None:
    """Refuse a changed teacher, unless it was named with `--teacher`.

    Raises:
        DataError: Its weights differ from those in the history.
    """
    recorded = _dense(job.source)
    if job.config.teacher is None and recorded and recorded.fingerprint != fingerprint:
        raise DataError(
            f"the weights in {job.teacher_name} are not those that {job.source.path} was made from",
            "name the dense model with --teacher to use it anyway",
            code="teacher-changed",
        )


def _layout(
    config: RecoverConfig, source: Checkpoint, targets: Sequence[Target], patterns: WeightPatterns
) -> Layout:
    """The files of the output: those of the source, and one for branches if there are any."""
    if config.slorb is None:
        return Layout.of(source)
    parts = {
        t.name: factor_types(
            factor_shapes(*t.shape, patterns.of(t), rank=t.shape[1] // config.slorb),
            source.places[t.name].dtype,
        )
        for t in targets
    }
    cores = {t.name: CoreFormat(pattern=patterns.of(t)) for t in targets}
    return Layout.with_factors(source, parts, cores, alone=config.format == "factored")


def _notes(config: RecoverConfig, source: Checkpoint, stream: BlockStream) -> list[str]:
    """Notes for the user before the run."""
    notes = []
    requested = None if config.pattern is None else str(config.pattern)
    others = sorted(set(recorded_patterns(source).values()) - {requested})
    if requested is not None and others:
        earlier = " and ".join(others) if len(others) < 4 else f"{len(others)} patterns"
        notes.append(
            f"{source.path} was pruned to {earlier}: new masks keep its largest weights at "
            f"{requested}"
        )
    if config.slorb is not None:
        notes.append(
            "the branches of --slorb cannot be folded into the sparse weights, and a model trained "
            "with them is much worse without"
        )
    if config.mixed_precision == "bf16" and stream.device.type == "cpu":
        times = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
        if times > 1:
            notes.append(
                f"products in bfloat16 take {times:.1f} times as long as in float32 on this "
                "machine: --mixed-precision no is faster"
            )
    return [*notes, *family_notes(stream)]


def chosen(config: RecoverConfig) -> tuple[RecoverConfig, str]:
    """Replace the method `auto`; also returns a note for the user."""
    return config.model_copy(update={"method": BEST}), f"--method auto is {BEST}"
