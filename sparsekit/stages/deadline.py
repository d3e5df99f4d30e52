"""Whether a run with a time limit still ends in time, and how many steps do when it does not."""

from __future__ import annotations

import time

# Steps whose pace says how long those that are left will take.
WATCHED = 10


class Deadline:
    """Watches the pace of the steps, with all that comes between them.

    Args:
        limit: When the output must stand, in seconds of `time.perf_counter`; None: there is no
            limit.
        closing: Seconds that the output takes after the last step.
    """

    def __init__(self, limit: float | None, closing: float) -> None:
        self._limit = limit
        self._closing = closing
        self._ends: list[float] = []

    def steps(self, done: int, planned: int) -> int:
        """How many steps there should be, when `done` of those that are planned are taken.

        Fewer than planned only where the pace of the last steps would miss the limit, and always
        one more than are done.
        """
        self._ends.append(time.perf_counter())
        if self._limit is None or len(self._ends) <= WATCHED:
            return planned
        pace = (self._ends[-1] - self._ends[-1 - WATCHED]) / WATCHED
        left = int((self._limit - self._closing - self._ends[-1]) / pace)
        if planned - done <= max(1, left):
            return planned
        self._ends = self._ends[-1:]
        return done + max(1, left)
