"""Train a sparse model against its dense parent, from disk to disk."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sparsekit.checkpoint.entry import RecoverEntry
from sparsekit.checkpoint.writer import CheckpointWriter
from sparsekit.errors import (
    CheckFailedError,
    MemoryShortError,
    NumericalError,
    SparsekitError,
    StorageError,
)
from sparsekit.files import KEPT, read_json, write_json
from sparsekit.pipeline.output import Output
from sparsekit.progress import SILENT, Progress
from sparsekit.provenance.entry import Report, sparse_totals
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.deadline import Deadline, saving_seconds
from sparsekit.recovery.export import finish, write_tensors
from sparsekit.recovery.inputs import TrainingInputs
from sparsekit.recovery.log import PROGRESS, TrainingLog
from sparsekit.recovery.loop import Training, TrainingPlan, explain_out_of_memory
from sparsekit.recovery.loss import measure, sparsity_measure
from sparsekit.recovery.saved_state import (
    POINTER,
    SAVE_SECONDS,
    forget_states,
    load_state,
    save_state,
)
from sparsekit.recovery.student import Student, load_teacher
from sparsekit.recovery.tuning import decay_budget, make_plan
from sparsekit.text.rows import TokenRows

PLAN = ".sparsekit-plan.json"
# What to do where weights, moments or a selection need more memory than there is.
BESIDE = "train it where there is more: a smaller --batch or --length changes little here"


def recover(
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> Report | None:
    """Write a trained copy of a model, with exactly its pattern, to the folder `out`.

    Args:
        config: The options.
        model: A folder, hub id or `demo`; sparse from any pruner, or dense.
        out: The output folder; it appears when it is complete.
        overwrite: Replace an earlier output of sparsekit.
        progress: Reports each step.

    Returns:
        What was done; None in a process that trains along with the main one.

    Raises:
        UsageError: The configuration does not fit the model, or `out` is in use.
        DataError: The model, its teacher or the text cannot be read or do not fit together.
        NumericalError: The loss is not finite; the last saved state is kept.
        CheckFailedError: The decay has not brought the entries off the mask to zero.
        StorageError: The output cannot be written.
    """
    output = Output("recover", model, out, config.words, overwrite=overwrite, progress=progress)
    work = TrainingInputs.read(
        config, model, out, output.cost, overwrite=overwrite, progress=progress
    )
    job, processes = work.job, work.processes
    writing = output.writing(job.source, work.settings, layout=job.layout, key=work.key)
    with writing if processes.main else contextlib.nullcontext() as writer:
        processes.wait()
        try:
            with explain_out_of_memory("outside the training passes", BESIDE):
                student = Student.load(job, work.rows, processes)
                training = _training(work, student)
                log = _train(work, training)
                finished = finish(training, work.progress)
                _require_same_masks(training)
                weights = write_tensors(job, writer, student, training.optimizer)
        except SparsekitError as error:
            if writer is not None:
                _leave(writer, error)
            raise
        if writer is None:
            processes.leave()
            return None
        log.publish(writer.partial)
        totals, recorded = sparse_totals(weights), _recorded(work, training, log)
        report = output.publish(
            RecoverEntry, finished=finished, totals=totals, weights=weights, **recorded
        )
        _forget(out)  # only now: a run that is killed before resumes from it
    processes.leave()
    return report


def _leave(writer: CheckpointWriter, error: SparsekitError) -> None:
    """Keep of a failed run only what the same command can resume from, and say so."""
    if not (writer.partial / POINTER).is_file():
        writer.abandon()  # another try may differ
        if isinstance(error, StorageError) and error.hint == KEPT:
            error.hint = "make room; nothing was saved before"
    elif isinstance(error, NumericalError | MemoryShortError | CheckFailedError):
        kept = f"the last saved state is in {writer.partial}"
        other = "for other options take another -o or delete it"
        error.hint = "; ".join(filter(None, (error.hint, kept, other)))


def _forget(out: Path) -> None:
    """Remove from an output what only an interrupted run needs."""
    forget_states(out)
    for file in (PLAN, PROGRESS):
        (out / file).unlink(missing_ok=True)


def _recorded(work: TrainingInputs, training: Training, log: TrainingLog) -> dict[str, Any]:
    """The fields of the entry that describe the training."""
    job, windows, cost = work.job, work.windows, work.cost.to_json()
    return {
        "teacher": None
        if job.teacher is None
        else {"path": job.teacher_name, "fingerprint": job.teacher.fingerprint},
        "text": job.config.data,
        "evaluated_on": windows and windows.title,
        "plan": asdict(training.plan),
        "tokens": training.plan.steps * job.config.step_tokens,
        "processes": training.processes.size,
        "kept_mass": log.kept_mass,
        "skipped": job.skipped,
        **cost,
        "seconds": round(cost["seconds"] + log.earlier_seconds, 3),
    }


def _training(work: TrainingInputs, student: Student) -> Training:
    """The training as far as an interrupted run had come, or its beginning."""
    job, rows, top, processes = work.job, work.rows, work.top, work.processes
    config, folder, progress = job.config, work.folder, work.progress
    teacher = top or load_teacher(job, processes)
    if processes.broadcast((folder / PLAN).is_file()):
        plan = TrainingPlan(**read_json(folder / PLAN))
    else:
        begun = work.cost.started
        plan = make_plan(job, student, teacher, rows, work.windows, processes, begun, progress)
        if processes.main:
            write_json(folder / PLAN, asdict(plan))
    if top is not None and config.tokens is None:  # else it was shown before
        top.announce(plan.steps * config.batch * config.accumulate, progress)
    optimizer = student.optimizer(job.recoverer.rule(plan.decay))
    training = Training(
        student.model, teacher, optimizer, rows, config, plan, job.recoverer.refresh, processes
    )
    if load_state(folder, optimizer, processes):
        progress.note(f"going on after {optimizer.steps} steps in {folder}")
    return training


def _train(work: TrainingInputs, training: Training) -> TrainingLog:
    """Take the steps that are left; gives the log of all steps."""
    config, windows, folder = work.job.config, work.windows, work.folder
    progress, processes, optimizer = work.progress, work.processes, training.optimizer
    log = TrainingLog(folder, optimizer.steps, writes=processes.main)
    first = training.plan.perplexity
    if not log.rows and windows is not None and first is not None:
        before = {"perplexity": first, "evaluated_on": windows.title}
        log.rows.append({"step": 0, "tokens": 0, **before})
    processes.wait()
    log.begin()
    selected = ""
    progress.begin(_title(work), training.plan.steps, optimizer.steps)
    limit = None if config.max_time is None else work.cost.started + config.max_time
    measured = training.plan.evaluation_seconds
    deadline = Deadline(config, limit, saving_seconds(optimizer), measured)
    saved, kept = time.perf_counter(), optimizer.steps
    while not training.done:
        try:
            done = training.step()
        except (NumericalError, MemoryShortError) as error:  # no weight was changed
            alone = processes.size == 1 or isinstance(error, NumericalError)  # else others go on
            if optimizer.steps > kept and alone:
                save_state(folder, optimizer, processes)
            raise
        row, now = done.to_json(), optimizer.steps
        if done.sparsity is not None:
            selected = f", {done.flips} flips, {done.sparsity:.2%} of |W| kept"
        if windows is not None and (now % config.eval_every == 0 or training.done):
            row |= _evaluated(training, windows, deadline)
            progress.note(f"step {now}: perplexity {row['perplexity']:.2f} of the sparse model")
        log.add(row)
        late = processes.broadcast(time.perf_counter() - saved > SAVE_SECONDS)
        if training.done or (now % config.save_every == 0 if config.save_every else late):
            begun = time.perf_counter()
            _require_same_masks(training)
            save_state(folder, optimizer, processes)
            saved, kept = time.perf_counter(), now
            deadline.saved(saved - begun)
        steps = processes.broadcast(deadline.steps(now, training.plan.steps))
        if not training.done and steps < training.plan.steps:
            begun, saves = time.perf_counter(), now > kept
            _shorten(work, training, steps, saves=saves)
            if saves:
                saved, kept = time.perf_counter(), now
                deadline.saved(saved - begun)
        rate = config.step_tokens / row["seconds"]
        progress.step(
            f"loss {row['loss']:.3f} (KL {row['divergence']:.3f}, CE {row['entropy']:.3f})"
            f"{selected}, {rate:.0f} tokens/s"
        )
    progress.end()
    return log


def _evaluated(training: Training, windows: TokenRows, deadline: Deadline) -> dict[str, Any]:
    """The quality of the sparse model now, for the log; the training is not disturbed."""
    optimizer, begun = training.optimizer, time.perf_counter()
    perplexity = measure(training.student, optimizer.sparse, optimizer.rule, windows.tokens)
    deadline.evaluated(time.perf_counter() - begun)
    quality = {"perplexity": perplexity, "evaluated_on": windows.title}
    return quality | {"sparsity": sparsity_measure(optimizer)}


def _title(work: TrainingInputs) -> str:
    """The title of the run, for people."""
    return f"recover {work.job.config.method} {work.job.patterns.base}"


def _shorten(work: TrainingInputs, training: Training, steps: int, *, saves: bool) -> None:
    """Plan fewer steps, so that the run ends in time; what was done is saved under the new plan.

    A state that is saved already (not `saves`) is not written over.
    """
    progress, optimizer, plan = work.progress, training.optimizer, training.plan
    if saves:
        _require_same_masks(training)
        save_state(work.folder, optimizer, work.processes)
    training.plan = replace(plan, steps=steps)
    if work.processes.main:
        write_json(work.folder / PLAN, asdict(training.plan))
    progress.note(
        f"steps take longer than was measured: {steps} instead of {plan.steps}, so that "
        "--max-time is kept"
    )
    if work.job.recoverer.dense_until_end:
        before, now = (decay_budget(work.job.config.schedule, p) for p in (plan, training.plan))
        progress.note(f"decay budget: {now:.4g} instead of {before:.4g}")
    progress.begin(_title(work), steps, optimizer.steps)


def _require_same_masks(training: Training) -> None:
    """Refuse to go on when processes that all hold the whole model have come apart."""
    if training.processes.size > 1 and not training.processes.shards:
        training.processes.require_same(training.optimizer.fingerprint(), "masks")
