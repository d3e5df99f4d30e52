"""A limit on the time of a run, spent on the weights whose loss falls fastest."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sparsekit.pruning.refiners import ShouldContinue

# A weight gets at most so many times the even share of the time that is left.
MOST_SHARE = 3.0
# How the least rate of fall that is worth a further sweep follows the clock, after each weight.
ADJUST = 1.1
# That rate is never 0, from which it could not rise.
LEAST = 1e-6


class TimeBudget:
    """Shares out a time limit over weights that are solved one after the other.

    In the first block every weight gets its even share by size. From the rates at which the losses
    still fell then, the least rate worth a sweep is known: a later weight goes on while its loss
    falls faster, and that rate is raised when the run is late and lowered when it is early. What
    the loop does besides solving is taken from the blocks before.

    Args:
        seconds: The limit for the whole run, from now on.
        sizes: For each block in turn, how many numbers its weights have together.
        clock: Gives the time in seconds.
    """

    def __init__(
        self, seconds: float, sizes: Sequence[int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()
        self._ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        """How many numbers are done when each block is."""
        self._done = 0
        self._solving = 0.0
        self._least: float | None = None
        self._rates: list[tuple[float, int]] = []

    @contextmanager
    def weight(self, size: int) -> Iterator[ShouldContinue]:
        """Solve a weight of this many numbers; what is given decides on each of its sweeps."""
        began = last = self._clock()
        share = max(0.0, self._for_solving()) * size / max(1, self._ends[-1] - self._done)
        limit = share if self._least is None else MOST_SHARE * share
        rate = 0.0

        def should_continue(fall: float | None) -> bool:
            nonlocal last, rate
            if fall is None:
                return share > 0
            now = self._clock()
            took, last = now - last, now
            rate = fall * size / max(took, 1e-9)
            slow = self._least is not None and rate < self._least
            # A sweep of which more than half would lie beyond the limit is not begun.
            return not slow and now - began + took / 2 < limit

        yield should_continue
        self._done += size
        self._solving += self._clock() - began
        self._learn(rate, size, late=self._clock() - began > share)

    def _for_solving(self) -> float:
        """Seconds left, without what the other work on the blocks to come will take."""
        now = self._clock()
        left = self.seconds - (now - self._started)
        passed = sum(end <= self._done for end in self._ends)
        to_come = sum(end > self._done for end in self._ends) - 1
        if passed:
            left -= (now - self._started - self._solving) / passed * to_come
        return left

    def _learn(self, rate: float, size: int, *, late: bool) -> None:
        """Set the least rate after the first block, and let it follow the clock later."""
        if self._least is not None:
            self._least *= ADJUST if late else 1 / ADJUST
            return
        self._rates.append((rate, size))
        if self._done in self._ends:
            total = sum(n for _, n in self._rates)
            self._least = max(sum(max(r, 0.0) * n for r, n in self._rates) / total, LEAST)
