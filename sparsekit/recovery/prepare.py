"""What a recover run will do: every check and every choice that needs no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsekit import registry as methods
from sparsekit.checkpoint.checkpoint import Checkpoint
from sparsekit.checkpoint.layout import Layout, factor_types
from sparsekit.checkpoint.output_folder import refuse_source
from sparsekit.checkpoint.resolve import resolve
from sparsekit.errors import DataError, UsageError
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
from sparsekit.recovery.targets import patterns_of, sparse_targets, told_patterns
from sparsekit.text.rows import cap_length
from sparsekit.weights.core_format import CoreFormat
from sparsekit.weights.packed import factor_shapes

# What `auto` stands for.
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
    """What the user or the history calls it; empty without one."""
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
        """The teacher that is in memory all the time; None: it may do without the model."""
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
    processes: Processes | None = None,
    saves: bool = True,
    progress: Progress = SILENT,
) -> RecoverJob:
    """Check a configuration against a model, its teacher and an output folder.

    Args:
        config: What to do.
        model: A folder, hub id or `demo`.
        out: The folder to make.
        overwrite: Whether it may replace an earlier output.
        processes: The processes that train together; None: this one.
        saves: Whether room for saved states is needed too.
        progress: Told of downloads.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: A model cannot be read, or the teacher is not one for this student.
        StorageError: The disk has no room for the output.
    """
    processes = processes or Processes()
    source = open_source(model, out, overwrite=overwrite, progress=progress)
    source.require("recover")
    refuse_other_heads(source)
    device = torch.device(pick_device(config.device))
    config, recoverer, notes = _completed(config, source)
    stream = BlockStream(source, device=str(device), dtype=torch.float32)
    linear = stream.targets()
    targets, left = sparse_targets(config, source, linear)
    patterns = patterns_of(config, source, targets)
    refuse_patterns(targets, patterns, recoverer, config)
    if processes.shards:
        refuse_cuts(targets, patterns, config)
    layout = _layout(config, source, targets, patterns)
    require_disk(out, layout, state_bytes(source) if saves else 0)
    teacher, teacher_name = None, ""
    if config.kl_weight != 0 or config.slorb is not None or config.data == "self":
        teacher_name = config.teacher or _parent(source) or model
        teacher = _open_teacher(config, source, targets, teacher_name, out, progress)
        refuse_silent_teacher(config, recoverer, source, teacher)
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
        device=device,
        notes=notes + _notes(config, source, stream),
    )
    _require_memory(job, processes)
    return job


def _require_memory(job: RecoverJob, processes: Processes) -> None:
    """Refuse what cannot fit into memory.

    Raises:
        DataError: Says what is needed, and what there is.
    """
    require_memory(
        job.config, job.source, job.loaded, job.recoverer, job.device, shards=processes.shards
    )
    if not processes.shards:
        require_pass(job.config, job.source, job.loaded, job.linear, job.recoverer, job.device)


def _completed(
    config: RecoverConfig, source: Checkpoint
) -> tuple[RecoverConfig, Recoverer, list[str]]:
    """A length that the model takes, a method and its schedule; and what to tell of them."""
    length, notes = cap_length(config.length, source.config)
    config, told = config.model_copy(update={"length": length}), list(notes)
    if config.method == AUTO:
        config, why = chosen(config)
        told.append(why)
    recoverer = methods.load("recoverers", config.method, config.option)
    moves = recoverer.refresh or config.pattern is not None or not told_patterns(source)
    if config.metric != "magnitude" and not moves:
        raise UsageError(
            f"--metric {config.metric} has no effect: the mask that {source.path} has stays",
            "leave it out, or prune with --method wanda first",
        )
    if config.schedule == AUTO:
        config = config.model_copy(update={"schedule": recoverer.schedule})
    return config, recoverer, told


def _open_teacher(
    config: RecoverConfig,
    source: Checkpoint,
    targets: Sequence[Target],
    teacher_name: str,
    out: Path,
    progress: Progress,
) -> Checkpoint:
    """The dense model.

    Raises:
        UsageError: The output folder holds it, or it has fewer tokens than are to be looked at.
        DataError: It cannot be read, or is not one for this student.
    """
    try:
        teacher = Checkpoint.open(resolve(teacher_name, progress))
    except (DataError, UsageError) as error:
        raise DataError(
            f"the teacher cannot be read: {error.message}", "name the dense model with --teacher"
        ) from error
    refuse_source(out, teacher.path)
    refuse_other_teacher(source, teacher)
    refuse_more_than_the_vocabulary(config, teacher)
    if config.teacher is None:
        refuse_sparse_teacher(config, source, teacher, targets)
    return teacher


def _parent(source: Checkpoint) -> str | None:
    """The dense model that the history of a sparse one begins with, where that can be reached."""
    return _dense(source).get("path")


def _dense(source: Checkpoint) -> Mapping[str, str]:
    """What the history says of the dense model.

    It is what was pruned; where the history begins with training, what taught first, or without a
    teacher what was trained.
    """
    history = source.pruned()
    if not history:
        return {}
    teachers = [entry["teacher"] for entry in history if entry.get("teacher")]
    trained = history[0]["stage"] == "recover"
    return teachers[0] if trained and teachers else history[0]["source"]


def require_parent(job: RecoverJob, fingerprint: str) -> None:
    """Refuse a teacher that was not named and is no longer what the history says.

    Raises:
        DataError: Its weights are others.
    """
    told = _dense(job.source).get("fingerprint")
    if job.config.teacher is None and told not in (None, fingerprint):
        raise DataError(
            f"the weights in {job.teacher_name} are not those that {job.source.path} was made from",
            "name the dense model with --teacher, if they are to teach all the same",
        )


def _layout(
    config: RecoverConfig, source: Checkpoint, targets: Sequence[Target], patterns: WeightPatterns
) -> Layout:
    """The files of the output: the source's, and one for the branches if there are such."""
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
    """What the user should know before the run."""
    found = []
    asked = None if config.pattern is None else str(config.pattern)
    others = sorted(set(told_patterns(source).values()) - {asked})
    if asked is not None and others:
        told = " and ".join(others) if len(others) < 4 else f"{len(others)} patterns"
        found.append(
            f"{source.path} was pruned to {told}: what is kept is chosen anew, the largest "
            f"weights, {asked}"
        )
    if config.slorb is not None:
        found.append(
            "the branches of --slorb cannot be folded into the sparse weights, and a model that "
            "was trained with them is much worse without"
        )
    if config.mixed_precision == "bf16" and stream.device.type == "cpu":
        times = product_seconds(torch.bfloat16) / product_seconds(torch.float32)
        if times > 1:
            found.append(
                f"products in bfloat16 take {times:.1f} times as long as in float32 on this "
                "machine: --mixed-precision no is faster"
            )
    return [*found, *family_notes(stream)]


def chosen(config: RecoverConfig) -> tuple[RecoverConfig, str]:
    """A configuration with a method in the place of `auto`, and what to tell of it."""
    return config.model_copy(update={"method": BEST}), f"--method auto is {BEST}"
