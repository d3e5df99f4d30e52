"""What is chosen before the first step: steps, rate, and strength of the decay."""

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
from sparsekit.recovery.student import PROBED, Student
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.rows import TokenRows
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Share of the time that is left that measuring may take, but for its first step.
PROBING = 0.15
# Of the way that gradients may take a weight from zero, what a pull must be able to take it back
# that is weaker than the one that would be chosen.
BACK = 0.25
# Of the 99th percentile of what is off the mask, the way that a pull should have (section 4.3).
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
    """Steps, rates and strengths, some of them measured on steps that change nothing.

    Args:
        job: What to do.
        student: The model to train.
        teacher: The dense one.
        rows: What to train on.
        windows: What perplexities are measured on; None: nothing is.
        processes: The processes that share the work.
        started: When the run began, in seconds of `time.perf_counter`.
        progress: Told of the choices.

    Raises:
        UsageError: There is no time for one step, or the decay cannot do its work.
    """
    config, recoverer = job.config, job.recoverer
    steps, (perplexity, evaluation) = config.steps(), _first(job, student, windows, progress)
    scale = student.scale(0.0)
    share = recoverer.default_kl_weight(scale) if config.kl_weight is None else config.kl_weight
    rate = config.lr or recoverer.default_lr(scale)
    gradient = 0.0
    if config.max_time is not None or recoverer.needs_gradient:
        limit = math.inf if config.max_time is None else started + config.max_time
        step, saving, gradient = _probe(
            job, student, teacher, rows, share, limit, processes, progress
        )
    if config.max_time is not None:
        left = limit - time.perf_counter()
        steps = processes.broadcast(steps_within(config, left, step, evaluation, saving))
        if steps < 1:
            raise _no_time(left, step, closing_seconds(saving, evaluation))
        progress.note(f"{steps} steps of {step:.2f} s in the time that is left")
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
        f", {share:.2f} of the loss is the divergence from the teacher"
        + (f", decay {decay:.3g}" if decay else "")
    )
    if recoverer.dense_until_end:
        _require_budget(config, student, plan, progress)
    return plan


def _no_time(left: float, step: float, end: float) -> UsageError:
    """What to raise where the time that is left does for no step, in seconds."""
    return UsageError(
        f"--max-time: one step takes {step:.1f} s, {max(0.0, left):.0f} s are left, and about "
        f"{end:.0f} s of them are for the end",
        "give it more time, or a smaller --batch, --length or --accumulate",
    )


def _first(
    job: RecoverJob, student: Student, windows: TokenRows | None, progress: Progress
) -> tuple[float | None, float]:
    """Perplexity before training, if any is wanted, and the seconds that it took."""
    if windows is None:
        return None, 0.0
    begun, rule = time.perf_counter(), job.recoverer.rule(0.0)
    found = measure(student.model, student.sparse, rule, windows.tokens)
    progress.note(f"perplexity {found:.2f} of the sparse model before training, on {windows.title}")
    return found, time.perf_counter() - begun


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
    """Take some steps that change nothing, fewer when the time of the run (`limit`) ends before.

    Returns:
        Seconds of a step, its part of a selection included; seconds of a saved state; and the root
        mean square of the averaged gradient off the masks.
    """
    recoverer = job.recoverer
    plan = TrainingPlan(steps=1 << 40, rate=0.0, share=share, decay=0.0, masked_gradient=0.0)
    if isinstance(teacher, TopTeacher) and job.config.max_time is not None:
        teacher = teacher.measured()
    optimizer = student.optimizer(recoverer.rule(0.0))
    trial = Training(student.model, teacher, optimizer, rows, job.config, plan, 0, processes)
    progress.begin("measuring speed and gradients", PROBED)
    seconds, begun = [], time.perf_counter()
    for _ in range(PROBED):
        try:
            seconds.append(trial.step().seconds)
        except NumericalError as error:
            raise NumericalError(
                f"before training: {error.message}",
                "no learning rate helps, as no weight was changed: look at MODEL, at its teacher "
                "and at the text",
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
    """Refuse a pull that cannot bring the entries off the mask to zero in the steps there are.

    Raises:
        UsageError: Says by how much.
    """
    distance = decay_budget(config.schedule, plan)
    mean, high = student.off_mask()
    progress.note(
        f"decay budget: a weight off the mask can travel {distance:.4g}; they measure {mean:.4g} "
        f"on average, the largest 99th percentile of a weight is {high:.4g}"
        + ("; three times that would be safe" if distance < SAFE * high else "")
    )
    if distance < 1.5 * mean:
        length = "--tokens" if config.tokens is not None else "--max-time"
        hint = "start from a pruned model, or take --method ast"
        if plan.decay < plan.masked_gradient:  # weaker than what would have been chosen
            hint = f"leave out -O decay: it would be {plan.masked_gradient:.2g}"
        elif distance:
            times = math.ceil(15 * mean / distance) / 10
            hint = f"{times:g} times the {length} or --lr would do, or {hint}"
        raise UsageError(
            f"in {plan.steps} steps the decay moves a weight by {distance:.4g}, those off the mask "
            f"measure {mean:.4g} on average",
            hint,
        )
    outward = decay_budget(config.schedule, plan, outward=True)
    if plan.decay < plan.masked_gradient and distance < BACK * outward:
        raise UsageError(
            f"in {plan.steps} steps gradients may move a weight off the mask by {outward:.4g}, and "
            f"the decay moves it back by {distance:.4g}",
            f"leave out -O decay: it would be {plan.masked_gradient:.2g}",
        )


def decay_budget(schedule: Schedule, plan: TrainingPlan, *, outward: bool = False) -> float:
    """How far the pull can move a weight in all steps together (specification, section 4.3).

    Args:
        schedule: Of the learning rate.
        plan: Its steps, rate, and strengths.
        outward: How far gradients could move it instead, if they always pointed to one side.
    """
    size, total = plan.masked_gradient, 0.0
    for step in range(plan.steps):
        share = step / plan.steps
        pull, noise = share * plan.decay, (1 - share) * size
        length, moving = math.hypot(pull, noise), noise if outward else pull
        rate = plan.rate * rate_at(schedule, step, plan.steps)
        total += rate * moving / length if length else 0.0
    return total
