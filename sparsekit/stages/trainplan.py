"""What is chosen before the first step: steps, rate, and strength of the decay."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsekit.errors import (
    UsageError,
)
from sparsekit.models.corpus import TrainingRows
from sparsekit.progress import Progress
from sparsekit.stages.ranks import Ranks
from sparsekit.stages.recovery import Recovery
from sparsekit.stages.teacher import TopTeacher
from sparsekit.stages.trainconfig import rate_at
from sparsekit.stages.training import (
    Plan,
    Training,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from sparsekit.stages.student import PROBED, Student

# Share of the time that is planned for, and seconds kept for writing.
PLANNED, WRITING = 0.95, 10.0


def make_plan(
    job: Recovery,
    student: Student,
    teacher: PreTrainedModel | TopTeacher | None,
    rows: TrainingRows,
    ranks: Ranks,
    started: float,
    progress: Progress,
) -> Plan:
    """Steps, rates and strengths, some of them measured on steps that change nothing."""
    config, recoverer = job.config, job.recoverer
    steps = config.steps()
    scale = student.scale(0.0)
    share = recoverer.share_of(scale) if config.share is None else config.share
    rate = config.lr or recoverer.rate_of(scale)
    gradient = 0.0
    if config.max_time is not None or recoverer.needs_gradient:
        still = Plan(steps=1 << 40, rate=0.0, share=share, decay=0.0, masked_gradient=0.0)
        if isinstance(teacher, TopTeacher) and config.max_time is not None:
            teacher = teacher.measured()
        optimizer = student.optimizer(recoverer.rule(0.0))
        trial = Training(student.model, teacher, optimizer, rows, config, still, 0, ranks)
        progress.begin("measuring speed and gradients", PROBED)
        seconds = []
        for _ in range(PROBED):
            seconds.append(trial.step().seconds)
            progress.step("")
        progress.end()
        gradient = optimizer.masked_mean()
        if config.max_time is not None:
            left = config.max_time - (time.perf_counter() - started) - WRITING
            steps = ranks.of_main(math.floor(PLANNED * left / median(seconds)))
            if steps < 1:
                raise UsageError(
                    f"--max-time: one step takes {median(seconds):.1f} s, {left:.0f} s are left",
                    "give it more time, or a smaller --batch, --length or --accumulate",
                )
            progress.note(f"{steps} steps of {median(seconds):.2f} s in the time that is left")
    decay = recoverer.decay_of(student.scale(gradient))
    plan = Plan(steps=steps, rate=rate, share=share, decay=decay, masked_gradient=gradient)
    progress.note(
        f"{steps} steps of {config.step_tokens} tokens, learning rate {rate:g} ({config.schedule})"
        f", {share:.2f} of the loss is the divergence from the teacher"
        + (f", decay {decay:.3g}" if decay else "")
    )
    _require_budget(job, student, plan, progress)
    return plan


def _require_budget(job: Recovery, student: Student, plan: Plan, progress: Progress) -> None:
    """Refuse a pull that cannot bring the entries off the mask to zero in the steps there are.

    Raises:
        UsageError: Says by how much.
    """
    if not job.recoverer.settles:
        return
    distance = decay_budget(job.config.schedule, plan)
    sizes = [w.weight[~w.mask].abs() for w in student.sparse.values()]
    count = sum(map(len, sizes))
    mean = sum(s.sum(dtype=torch.float64).item() for s in sizes) / max(1, count)
    high = max((_quantile(s, 0.99) for s in sizes if len(s)), default=0.0)
    progress.note(
        f"decay budget: a weight off the mask can travel {distance:.4g}; they measure {mean:.4g} "
        f"on average, the largest 99th percentile of a weight is {high:.4g}"
    )
    if distance < 1.5 * mean:
        raise UsageError(
            f"in {plan.steps} steps the decay moves a weight by {distance:.4g}, those off the mask "
            f"measure {mean:.4g} on average",
            f"{1.5 * mean / max(distance, 1e-12):.1f} times the --tokens or --lr would do, or "
            "start from a pruned model, or take --method ast",
        )


def decay_budget(schedule: str, plan: Plan) -> float:
    """How far the pull can move a weight in all steps together (specification, section 4.3)."""
    size, total = plan.masked_gradient, 0.0
    for step in range(plan.steps):
        share = step / plan.steps
        pull, noise = share * plan.decay, (1 - share) * size
        length = math.hypot(pull, noise)
        total += plan.rate * rate_at(schedule, step, plan.steps) * (pull / length if length else 0)
    return total


def _quantile(values: Tensor, share: float) -> float:
    """A quantile of a tensor of any size."""
    return values.kthvalue(max(1, math.ceil(share * len(values)))).values.item()
