"""Whether a run with a time limit still ends in time, and how many steps do when it does not."""

from __future__ import annotations

import math
import time
from statistics import median

from sparsekit.recovery.config import RecoverConfig
from sparsekit.recovery.loss import sparsity_measure
from sparsekit.recovery.optimizer import MaskedAdam
from sparsekit.recovery.saved_state import SAVE_SECONDS

# Share of the time that is planned for; seconds that starting to write and reading back take; and
# bytes a second that a disk is taken to write.
PLANNED, CLOSING, WRITTEN = 0.95, 5.0, 200e6
# Steps of which the median says how long those that are left will take.
WATCHED = 10


class Deadline:
    """Watches the pace of the steps; what comes between them is counted by its own length.

    Args:
        config: Says how often is evaluated and saved.
        limit: When the output must stand, in seconds of `time.perf_counter`; None: there is no
            limit.
        saving: Seconds that a saved state is taken to need, until one was written.
        evaluation: The same of measuring a perplexity.
    """

    def __init__(
        self, config: RecoverConfig, limit: float | None, saving: float, evaluation: float = 0.0
    ) -> None:
        self._config = config
        self._limit = limit
        self._seconds: list[float] = []
        self._saving = saving
        self._evaluation = evaluation
        self._beside = 0.0  # since the last step
        self._last = time.perf_counter()

    def evaluated(self, seconds: float) -> None:
        """Take note that a perplexity was measured after the last step."""
        self._evaluation = seconds
        self._beside += seconds

    def saved(self, seconds: float) -> None:
        """Take note that a state was saved after the last step."""
        self._saving = seconds
        self._beside += seconds

    def steps(self, done: int, planned: int) -> int:
        """How many steps there should be, when `done` of those that are planned are taken.

        Fewer than planned only where the pace of the last steps would miss the limit, and always
        one more than are done.

        Args:
            done: Steps taken.
            planned: Steps that there are to be.
        """
        now = time.perf_counter()
        self._seconds = [*self._seconds, now - self._last - self._beside][-WATCHED:]
        self._last, self._beside = now, 0.0
        if self._limit is None or len(self._seconds) < WATCHED:
            return planned
        pace, left = median(self._seconds), self._limit - now
        beside = self._evaluation, self._saving
        if planned - done <= max(1, steps_within(self._config, left, pace, *beside, planned=1.0)):
            return planned
        self._seconds = []
        # With the room that every plan has, after a state under the new one.
        return done + max(1, steps_within(self._config, left - self._saving, pace, *beside))


def saving_seconds(optimizer: MaskedAdam) -> float:
    """How long a saved state is taken to need."""
    return sum(tensor.nbytes for tensor in optimizer.state().values()) / WRITTEN


def selection_seconds(optimizer: MaskedAdam, refresh: int) -> float:
    """The part of a step in the selections of the largest entries; makes one, if there are such."""
    if not refresh:
        return 0.0
    begun = time.perf_counter()
    optimizer.refresh()
    sparsity_measure(optimizer)
    return (time.perf_counter() - begun) / refresh


def closing_seconds(saving: float, evaluation: float) -> float:
    """How long the end of a run takes: the last state and evaluation, and the output."""
    return CLOSING + 2 * saving + evaluation


def steps_within(
    config: RecoverConfig,
    left: float,
    step: float,
    evaluation: float,
    saving: float,
    planned: float = PLANNED,
) -> int:
    """How many steps fit into a time, with their evaluations and saved states.

    Args:
        config: Says how often is evaluated and saved.
        left: Seconds until the output must stand.
        step: Seconds of a step.
        evaluation: Seconds of an evaluation.
        saving: Seconds of a saved state, one of which comes last, and of the output at most.
        planned: Share of the time that is planned for.
    """
    left -= closing_seconds(saving, evaluation)
    step += evaluation / config.eval_every if config.eval_every else 0.0
    if config.save_every:
        step += saving / config.save_every
    else:
        left *= SAVE_SECONDS / (SAVE_SECONDS + saving)
    return math.floor(planned * left / step)
