"""Number of training steps that fit into a time limit."""

from __future__ import annotations

import math
import time
from statistics import median

from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.loss import sparsity_measure
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.saved_state import SAVE_SECONDS

# Share of the time to plan for; seconds for starting to write and reading back; assumed write speed
# of the disk in bytes per second.
PLANNED, CLOSING, WRITTEN = 0.95, 5.0, 200e6
# Number of last steps whose median predicts the duration of the remaining ones.
WATCHED = 10


class Deadline:
    """Watches the pace of the steps; evaluations and saved states between them count separately.

    Args:
        config: How often to evaluate and to save.
        limit: When the output must be complete, in seconds of `time.perf_counter`; None: no limit.
        saving: Expected seconds of saving a state, until one was saved.
        evaluation: Expected seconds of an evaluation, until one was made.
    """

    def __init__(
        self, config: RecoverConfig, limit: float | None, saving: float, evaluation: float = 0.0
    ) -> None:
        self._config = config
        self._limit = limit
        self._seconds: list[float] = []
        self._saving = saving
        self._evaluation = evaluation
        self._other = 0.0  # since the last step
        self._last = time.perf_counter()

    def evaluated(self, seconds: float) -> None:
        """Record the seconds of an evaluation after the last step."""
        self._evaluation = seconds
        self._other += seconds

    def saved(self, seconds: float) -> None:
        """Record the seconds of saving a state after the last step."""
        self._saving = seconds
        self._other += seconds

    def steps(self, done: int, planned: int) -> int:
        """The new number of planned steps.

        Less than planned only if the pace of the last steps would miss the limit, and always at
        least one more than done.

        Args:
            done: Steps taken.
            planned: Steps planned so far.
        """
        now = time.perf_counter()
        self._seconds = [*self._seconds, now - self._last - self._other][-WATCHED:]
        self._last, self._other = now, 0.0
        if self._limit is None or len(self._seconds) < WATCHED:
            return planned
        pace, left = median(self._seconds), self._limit - now
        others = self._evaluation, self._saving
        if planned - done <= max(1, steps_within(self._config, left, pace, *others, planned=1.0)):
            return planned
        self._seconds = []
        # With the usual reserve, and time to save a state of the new plan.
        return done + max(1, steps_within(self._config, left - self._saving, pace, *others))


def saving_seconds(optimizer: MaskedAdam) -> float:
    """Expected seconds of saving a state."""
    return sum(tensor.nbytes for tensor in optimizer.state().values()) / WRITTEN


def selection_seconds(optimizer: MaskedAdam, refresh: int) -> float:
    """Mean seconds per step for mask selection, measured on one; 0 without."""
    if not refresh:
        return 0.0
    begun = time.perf_counter()
    optimizer.refresh()
    sparsity_measure(optimizer)
    return (time.perf_counter() - begun) / refresh


def closing_seconds(saving: float, evaluation: float) -> float:
    """Seconds of the end of a run: the last state and evaluation, and the output."""
    return CLOSING + 2 * saving + evaluation


def steps_within(
    config: RecoverConfig,
    left: float,
    step: float,
    evaluation: float,
    saving: float,
    planned: float = PLANNED,
) -> int:
    """Number of steps that fit into a time, with their evaluations and saved states.

    Args:
        config: How often to evaluate and to save.
        left: Seconds until the output must be complete.
        step: Seconds of a step.
        evaluation: Seconds of an evaluation.
        saving: Seconds of saving a state; one is saved at the end, and writing the output takes at
            most as long.
        planned: Share of the time to plan for.
    """
    left -= closing_seconds(saving, evaluation)
    step += evaluation / config.eval_every if config.eval_every else 0.0
    if config.save_every:
        step += saving / config.save_every
    else:
        left *= SAVE_SECONDS / (SAVE_SECONDS + saving)
    return math.floor(planned * left / step)
