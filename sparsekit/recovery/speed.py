"""Speed of training relative to the machine's matrix products, and its memory."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from sparsekit.errors import UsageError
from sparsekit.memory import peak_memory
from sparsekit.progress import SILENT, Progress
from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.deadline import selection_seconds
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.loop import Training, TrainingPlan
from sparsekit.recovery.loss import products_of
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.prepare import RecoverJob, prepare_recover
from sparsekit.recovery.student import Student, load_teacher

# Products to time for each shape; the median counts.
TIMED = 7


def bench_recover(
    config: RecoverConfig, model: str, *, steps: int = 6, progress: Progress = SILENT
) -> dict[str, Any]:
    """Time training steps, and matrix products of the shapes of the model.

    A token costs 8 floating-point operations per active parameter: 2 in the student's forward pass,
    4 in its backward pass and 2 in the teacher. Active parameters are the weights of linear layers
    and of the output head. Attention and other operations come on top, so a share of 1 cannot be
    reached. The machine's rate is that of products of a batch of tokens with each of these weights,
    in the compute dtype, weighted by their work.

    Args:
        config: The options of training; `tokens` is ignored.
        model: A folder, hub id or `demo`.
        steps: Number of steps to time, after a warm-up step; the median counts, plus the mean time
            of mask selection.
        progress: Receives each step.
    """
    if steps < 1:
        raise UsageError(f"--steps must be at least 1, not {steps}", code="out-of-range")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job = prepare_recover(config, model, Path(folder) / "out", saves=False, progress=progress)
    config = job.config
    rows = config.corpus((steps + 1) * config.step_tokens).rows(job.source, job.teacher, progress)
    before = psutil.Process().memory_info().rss
    student = Student.load(job, rows, Processes())
    teacher = load_teacher(job, Processes())
    plan = _plan(job, student, steps + 1)
    optimizer = student.optimizer(job.recoverer.rule(plan.decay))
    training = Training(student.model, teacher, optimizer, rows, config, plan, 0, Processes())
    loading = time.perf_counter() - begun
    progress.begin("training steps", steps + 1)
    seconds = []
    for _ in range(steps + 1):
        seconds.append(training.step().seconds)
        progress.step(f"{config.step_tokens / seconds[-1]:.1f} tokens/s")
    progress.end()
    step = median(seconds[1:]) + selection_seconds(optimizer, job.recoverer.refresh)
    peak, speed = peak_memory(), config.step_tokens / step
    head = student.model.get_output_embeddings().weight.shape
    shapes = [*(torch.Size(target.shape) for target in job.linear), head]
    active = sum(rows * columns for rows, columns in shapes)
    rate = matrix_rate(shapes, config.batch * config.length, job.device, products_of(config))
    work = 8 if plan.share else 6
    return {
        "model": model,
        "method": config.method,
        "batch": [config.batch, config.length],
        "mixed_precision": config.mixed_precision,
        "loading_seconds": round(loading, 3),
        "tokens_per_second": speed,
        "active_parameters": active,
        "flop_per_token": work * active,
        "matrix_gflops": rate / 1e9,
        "share_of_the_possible": speed * work * active / rate,
        "threads": torch.get_num_threads(),
        "peak_bytes": peak,
        "bytes": _held(optimizer, teacher, before, peak),
    }


def _plan(job: RecoverJob, student: Student, steps: int) -> TrainingPlan:
    """The plan of a run, with a gradient that is assumed instead of measured."""
    config, recoverer, scale = job.config, job.recoverer, student.scale(1e-6)
    share = recoverer.default_kl_weight(scale) if config.kl_weight is None else config.kl_weight
    return TrainingPlan(
        steps=steps,
        rate=config.lr or recoverer.default_lr(scale),
        share=share,
        decay=recoverer.decay_of(scale),
        masked_gradient=scale.masked_gradient,
    )


def _held(
    optimizer: MaskedAdam, teacher: torch.nn.Module | None, before: int, peak: int
) -> dict[str, int]:
    """Parts of the peak memory in bytes; `activations and the rest` is the remainder."""
    state = optimizer.state()
    parameters = [w.parameter for w in optimizer.sparse.values()] + [*optimizer.others.values()]
    weights = sum(parameter.nbytes for parameter in parameters)
    copies = [w for w in optimizer.sparse.values() if w.weight.data_ptr() != w.view.data_ptr()]
    parts = {
        "libraries": before,
        "weights": weights,
        "weights beside the model's": sum(w.weight.nbytes for w in copies),
        "gradients": weights,
        "moments": sum(t.nbytes for n, t in state.items() if n.endswith((".mean", ".square"))),
        "masks": sum(weight.mask.nbytes for weight in optimizer.sparse.values()),
        "teacher": sum(p.nbytes for p in teacher.parameters()) if teacher else 0,
    }
    parts["activations and the rest"] = peak - sum(parts.values())
    parts["masks at rest"] = sum(t.nbytes for n, t in state.items() if n.endswith(".mask"))
    return parts


def matrix_rate(
    shapes: list[torch.Size], tokens: int, device: torch.device, dtype: torch.dtype
) -> float:
    """Floating-point operations per second of `[tokens, in] @ [in, out]` over these weights."""
    work = spent = 0.0
    for rows, columns in set(shapes):
        x = torch.randn(tokens, columns, device=device).to(dtype)
        weight = torch.randn(rows, columns, device=device).to(dtype)
        out = torch.empty(tokens, rows, device=device, dtype=dtype)
        times = []
        for _ in range(TIMED):
            started = time.perf_counter()
            torch.mm(x, weight.T, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        count = shapes.count(torch.Size((rows, columns)))
        work += count * 2.0 * tokens * rows * columns
        spent += count * median(times)
    return work / spent
