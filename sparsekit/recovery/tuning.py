"""Choices before the first step: number of steps, learning rate, strength of the decay."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING

from sparsekit.errors import NumericalError, UsageError
from sparsekit.progress import Progress
from sparsekit.recovery.config import RecoverConfig, Schedule, rate_at
from sparsekit.recovery.deadline import (
    closing_seconds,
    saving_seconds,
    selection_seconds,
    steps_within,
)
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.loop import Training, TrainingPlan
from sparsekit.recovery.loss import measure
from sparsekit.recovery.prepare import RecoverJob
from sparsekit.recovery.student import Student, probe_steps
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.rows import TokenRows
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Largest share of the remaining time for measuring steps after the first one.
PROBING = 0.15
# A decay below the automatic one must be able to undo this share of the distance that gradients may
# move a weight.
BACK = 0.25
# Safe decay budget, as a multiple of the 99th percentile of the entries off the mask.
SAFE = 3


def make_plan(
    job: RecoverJob,
    student: Student,
    teacher: PreTrainedModel | TopTeacher | None,
    rows: TrainingRows,
    windows: TokenRows | None,
    processes: Processes,
    started: float,
    progress: Progress,
) -> TrainingPlan:
    """Choose steps, learning rate and decay, if necessary by measuring steps that change nothing.

    Args:
        job: The run.
        student: The model to train.
        teacher: The dense model.
        rows: Training rows.
        windows: Evaluation windows; None: no evaluation.
        processes: The processes that share the work.
        started: When the run began, in seconds of `time.perf_counter`.
        progress: Receives the choices.

    Raises:
        UsageError: There is no time for one step, or the decay is too weak.
    """
    config, recoverer = job.config, job.recoverer
    steps, (perplexity, evaluation) = config.steps(), _first(job, student, windows, progress)
    scale = student.scale(0.0)
    share = recoverer.default_kl_weight(scale) if config.kl_weight is None else config.kl_weight
    rate = config.lr or recoverer.default_lr(scale)
    gradient = 0.0
    if probe_steps(config, recoverer):
        limit = math.inf if config.max_time is None else started + config.max_time
        step, saving, gradient = _probe(
            job, student, teacher, rows, share, limit, processes, progress
        )
    if config.max_time is not None:
        left = limit - time.perf_counter()
        steps = processes.broadcast(steps_within(config, left, step, evaluation, saving))
        if steps < 1:
            raise _no_time(left, step, closing_seconds(saving, evaluation))
        progress.note(f"{steps} steps of {step:.2f} s fit into the remaining time")
    decay = recoverer.decay_of(student.scale(gradient))
    plan = TrainingPlan(
        steps=steps,
        rate=rate,
        share=share,
        decay=decay,
        masked_gradient=gradient,
        perplexity=perplexity,
        evaluation_seconds=evaluation,
    )
    progress.note(
        f"{steps} steps of {config.step_tokens} tokens, learning rate {rate:g} ({config.schedule})"
        f", KL weight {share:.2f}" + (f", decay {decay:.3g}" if decay else "")
    )
    if recoverer.dense_until_end:
        _require_budget(config, student, plan, progress)
    return plan


def _no_time(left: float, step: float, end: float) -> UsageError:
    """The error if no step fits into the remaining time; all times in seconds."""
    return UsageError(
        f"--max-time: one step takes {step:.1f} s, {max(0.0, left):.0f} s are left, and writing "
        f"takes about {end:.0f} s",
        "allow more time, or pass a smaller --batch, --length or --accumulate",
        code="no-time",
    )


def _first(
    job: RecoverJob, student: Student, windows: TokenRows | None, progress: Progress
) -> tuple[float | None, float]:
    """Perplexity before training, if it is evaluated, and the seconds that it took."""
    if windows is None:
        return None, 0.0
    begun, rule = time.perf_counter(), job.recoverer.rule(0.0)
    value = measure(student.model, student.sparse, rule, windows.tokens)
    progress.note(f"perplexity {value:.2f} of the sparse model before training, on {windows.title}")
    return value, time.perf_counter() - begun


def _probe(
    job: RecoverJob,
    student: Student,
    teacher: PreTrainedModel | TopTeacher | None,
    rows: TrainingRows,
    share: float,
    limit: float,
    processes: Processes,
    progress: Progress,
) -> tuple[float, float, float]:
    """Take measuring steps that change nothing, fewer if the time `limit` of the run is near.

    Returns:
        Seconds of a step, including the mean time of mask selection; seconds of saving a state; and
        the root mean square of the averaged gradient off the masks.
    """
    recoverer, count = job.recoverer, probe_steps(job.config, job.recoverer)
    plan = TrainingPlan(steps=1 << 40, rate=0.0, share=share, decay=0.0, masked_gradient=0.0)
    if isinstance(teacher, TopTeacher) and job.config.max_time is not None:
        teacher = teacher.measured()
    optimizer = student.optimizer(recoverer.rule(0.0))
    trial = Training(student.model, teacher, optimizer, rows, job.config, plan, 0, processes)
    purposes = [
        *(["the time per step, for --max-time"] if job.config.max_time is not None else []),
        *(["the gradients, which set the decay"] if recoverer.needs_gradient else []),
    ]
    at_most = "up to " if job.config.max_time is not None else ""
    progress.note(
        f"before training, {at_most}{count} steps that change nothing measure "
        + " and ".join(purposes)
    )
    progress.begin("measuring steps", count)
    seconds, begun = [], time.perf_counter()
    for _ in range(count):
        try:
            seconds.append(trial.step().seconds)
        except NumericalError as error:
            raise NumericalError(
                f"before training: {error.message}",
                "no weight was changed, so the learning rate is not the cause: check MODEL, its "
                "teacher and the text",
                code=error.code,
            ) from error
        progress.step(f"{seconds[-1]:.1f} s a step")
        if processes.broadcast(time.perf_counter() > begun + PROBING * (limit - begun)):
            break
    progress.end()
    step = median(seconds)
    if job.config.max_time is not None:
        step += selection_seconds(optimizer, recoverer.refresh)
    return step, saving_seconds(optimizer), optimizer.masked_mean()


def _require_budget(
    config: RecoverConfig, student: Student, plan: TrainingPlan, progress: Progress
) -> None:
    """Refuse a decay that cannot bring the entries off the mask to zero within the steps.

    Raises:
        UsageError: Names the distances.
    """
    distance = decay_budget(config.schedule, plan)
    mean, high = student.off_mask()
    progress.note(
        f"decay budget: an entry off the mask can move by {distance:.4g}; their mean size is "
        f"{mean:.4g}, the largest 99th percentile of a weight {high:.4g}"
        + (f"; a budget of {SAFE} times that would be safe" if distance < SAFE * high else "")
    )
    if distance < 1.5 * mean:
        length = "--tokens" if config.tokens is not None else "--max-time"
        hint = "start from a pruned model, or use --method ast"
        if plan.decay < plan.masked_gradient:  # weaker than the automatic one
            hint = f"leave out -O decay: it would be {plan.masked_gradient:.2g}"
        elif distance:
            times = math.ceil(15 * mean / distance) / 10
            hint = f"pass {times:g} times the {length} or --lr, or {hint}"
        raise UsageError(
            f"in {plan.steps} steps the decay moves a weight by {distance:.4g}, the mean size off "
            f"the mask is {mean:.4g}",
            hint,
            code="decay-too-weak",
        )
    outward = decay_budget(config.schedule, plan, outward=True)
    if plan.decay < plan.masked_gradient and distance < BACK * outward:
        raise UsageError(
            f"in {plan.steps} steps gradients may move a weight off the mask by {outward:.4g}, and "
            f"the decay moves it back by {distance:.4g}",
            f"leave out -O decay: it would be {plan.masked_gradient:.2g}",
            code="decay-too-weak",
        )


def decay_budget(schedule: Schedule, plan: TrainingPlan, *, outward: bool = False) -> float:
    """The distance that the decay can move a weight in all steps together.

    Args:
        schedule: Schedule of the learning rate.
        plan: Steps, learning rate, decay and gradient.
        outward: Return the distance of gradients that always have the same sign instead.
    """
    size, total = plan.masked_gradient, 0.0
    for step in range(plan.steps):
        share = step / plan.steps
        pull, noise = share * plan.decay, (1 - share) * size
        length, moving = math.hypot(pull, noise), noise if outward else pull
        rate = plan.rate * rate_at(schedule, step, plan.steps)
        total += rate * moving / length if length else 0.0
    return total
