"""Training loop: batches, teacher, learning rate and masks; a method is a rule of the optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from sparsekit.errors import MemoryShortError, NumericalError
from sparsekit.memory import is_out_of_memory
from sparsekit.recovery.config import SHORTEST, RecoverConfig, rate_at
from sparsekit.recovery.distributed import Processes
from sparsekit.recovery.loss import model_losses, products_of, sparsity_measure
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.teacher_cache import TopTeacher
from sparsekit.text.training_rows import TrainingRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """The log row of one step."""

    step: int
    """Number of steps taken."""
    tokens: int
    """Tokens trained on so far."""
    loss: float
    divergence: float
    """KL from the teacher, in nats per token."""
    entropy: float
    """CE with the text, in nats per token."""
    rate: float
    norm: float
    """Norm of all gradients, before clipping."""
    flips: int
    """Mask entries that this step's selection changed."""
    flipped: int | None = None
    """Mask entries that differ from the initial mask; None without a selection."""
    seconds: float
    sparsity: float | None = None
    """Σ|m W| / Σ|W| after this step's selection; None without one."""
    kept_mass: float | None = None
    """Mean share of the teacher's probability in the loss; None: all of it."""

    def to_json(self) -> dict[str, float]:
        """All values except None, as JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Choices made before the first step, and kept when a run resumes."""

    steps: int
    rate: float
    share: float
    decay: float
    masked_gradient: float
    perplexity: float | None = None
    """Perplexity of the sparse model before training, with `--eval-every`."""
    evaluation_seconds: float = 0.0
    """Seconds of that evaluation."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """Mean values over the tokens of a step."""

    loss: float
    divergence: float
    entropy: float
    kept_mass: float
    """Share of the teacher's probability in the loss; 1: all of it."""


class Training:
    """A student, its teacher and its optimizer, step by step.

    Args:
        student: The model to train, in float32.
        teacher: The dense model, or its cached probabilities; None when the loss needs none.
        optimizer: Optimizer of the student's parameters.
        rows: Training rows.
        config: Batch size, accumulation, schedule and temperature.
        plan: Steps, learning rate and weights of the loss.
        refresh: Steps between mask selections; 0: none.
        processes: The processes that share the batches of a step.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | TopTeacher | None,
        optimizer: MaskedAdam,
        rows: TrainingRows,
        config: RecoverConfig,
        plan: TrainingPlan,
        refresh: int,
        processes: Processes,
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.optimizer = optimizer
        self.rows = rows
        self.config = config
        self.plan = plan
        self.refresh = refresh
        self.processes = processes

    @property
    def done(self) -> bool:
        """Whether all steps are taken."""
        return self.optimizer.steps >= self.plan.steps

    def step(self) -> StepRow:
        """Take the next step.

        Raises:
            NumericalError: The loss or a gradient is NaN or Inf; no weight was changed.
        """
        started = time.perf_counter()
        optimizer, plan = self.optimizer, self.plan
        step = optimizer.steps
        rate = plan.rate * rate_at(self.config.schedule, step, plan.steps)
        masks_forward, last = optimizer.rule.masks_forward, step == plan.steps - 1
        selects = bool(self.refresh) and (step % self.refresh == 0 or (masks_forward and last))
        # A dense model selects its mask before the step, a masked one after it.
        flips = optimizer.refresh() if selects and not masks_forward else 0
        means = self.gradients(step)
        if not math.isfinite(means.loss):
            raise NumericalError(
                f"step {step + 1}: the loss is {means.loss}",
                "try a smaller --lr",
                code="not-finite",
            )
        try:
            norm = optimizer.step(rate, step / plan.steps)
        except NumericalError as error:
            message = f"step {step + 1}: {error.message}"
            raise NumericalError(message, error.hint, code=error.code) from error
        if selects and masks_forward:
            flips = optimizer.refresh()
        sparsity = sparsity_measure(optimizer) if selects else None
        flipped = sum(map(optimizer.flipped, optimizer.sparse)) if selects else None
        return StepRow(
            step=optimizer.steps,
            tokens=optimizer.steps * self.config.step_tokens,
            loss=means.loss,
            divergence=means.divergence,
            entropy=means.entropy,
            rate=rate,
            norm=norm,
            flips=flips,
            flipped=flipped,
            seconds=time.perf_counter() - started,
            sparsity=sparsity,
            kept_mass=means.kept_mass if isinstance(self.teacher, TopTeacher) else None,
        )

    def gradients(self, step: int) -> Means:
        """Accumulate the gradients of one step in the parameters.

        Every process computes its part of the batches and gets the sum of all.

        Raises:
            MemoryShortError: A forward and backward pass does not fit into memory.
        """
        where = f"in a pass over {self.config.batch} rows of {self.config.length} tokens"
        with explain_out_of_memory(where, _smaller(self.config)):
            return self._gradients(step)

    def _gradients(self, step: int) -> Means:
        """Accumulate gradients, as in `gradients`."""
        config, processes = self.config, self.processes
        # FSDP averages gradients of shards over the processes; the others are summed.
        shards = processes.size if processes.shards else 1
        sums = torch.zeros(4, dtype=torch.float64)
        for part in processes.parts(config.accumulate):
            first = (step * config.accumulate + part) * config.batch
            tokens = self.rows.take(first, config.batch).to(self.student.device)
            teacher, kept = self.teacher, torch.ones((), device=tokens.device)
            if isinstance(teacher, TopTeacher):
                teacher = teacher.probabilities(self.rows.numbers(first, config.batch), tokens)
                kept = teacher.mass().view(tokens.shape)[:, :-1].mean()  # the last has no label
            losses = model_losses(
                self.student,
                teacher,
                tokens,
                share=self.plan.share,
                temperature=config.temperature,
                products=products_of(config),
            )
            (losses.total * shards / config.accumulate).backward()
            values = [losses.total.detach(), losses.divergence, losses.entropy, kept]
            sums += torch.stack([value.double() for value in values]).cpu() / config.accumulate
        if processes.size > 1:
            whole = self.optimizer.whole_gradients()
            processes.sum_(whole)
            for gradient in whole if processes.shards else ():
                gradient /= shards
            sums = sums.to(self.student.device)
            processes.sum_([sums])
        loss, divergence, entropy, kept = sums.tolist()
        return Means(loss=loss, divergence=divergence, entropy=entropy, kept_mass=kept)


@contextlib.contextmanager
def explain_out_of_memory(where: str, hint: str) -> Iterator[None]:
    """Turn a failed allocation into an error that says where it happened, with a hint.

    Raises:
        MemoryShortError: An allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryShortError(f"out of memory {where}", hint, code="out-of-memory") from error


def _smaller(config: RecoverConfig) -> str:
    """Options with which a pass takes about half of the memory."""
    accumulate = f"--accumulate {2 * config.accumulate}"
    if config.batch > 1:
        half, odd = divmod(config.batch, 2)
        share = f"{half}/{config.batch} of it" if odd else "half of it for the same steps"
        return f"--batch {half} {accumulate} takes {share}"
    if config.length // 2 >= SHORTEST:
        return f"--length {config.length // 2} {accumulate} takes half of it"
    return "train it where there is more memory: no pass is smaller"
