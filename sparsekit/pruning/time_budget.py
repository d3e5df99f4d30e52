"""Time limit of a run, spent on the weights whose loss falls fastest."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sparsekit.pruning.methods import ShouldContinue

# Largest share of a weight, as a multiple of its even share of the time left.
MOST_SHARE = 3.0
# Factor by which the smallest worthwhile rate of improvement is adjusted after each weight.
ADJUST = 1.1
# Lower limit of that rate: from 0 it could not rise.
LEAST = 1e-6


class TimeBudget:
    """Distributes a time limit over weights that are solved one after the other.

    In the first block every weight gets its even share by size. The rates at which their losses
    still fell at the end give the smallest rate worth a sweep: later weights continue while their
    loss falls faster. That rate is raised when the run is late and lowered when it is early. The
    time for other work is estimated from the blocks so far.

    Args:
        seconds: The limit for the whole run, from now on.
        sizes: Number of entries of the weights of each block, in order.
        clock: Returns the time in seconds.
    """

    def __init__(
        self, seconds: float, sizes: Sequence[int], clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self._started = clock()
        self._ends = [sum(sizes[: n + 1]) for n in range(len(sizes))]
        """Entries done at the end of each block."""
        self._done = 0
        self._solving = 0.0
        self._least: float | None = None
        self._rates: list[tuple[float, int]] = []

    @contextmanager
    def weight(self, size: int) -> Iterator[ShouldContinue]:
        """Context in which a weight of `size` entries is solved; yields its `ShouldContinue`."""
        began = last = self._clock()
        share = max(0.0, self._for_solving()) * size / max(1, self._ends[-1] - self._done)
        limit = share if self._least is None else MOST_SHARE * share
        rate = 0.0

        def should_continue(loss_drop: float | None) -> bool:
            nonlocal last, rate
            if loss_drop is None:
                return share > 0
            now = self._clock()
            took, last = now - last, now
            rate = loss_drop * size / max(took, 1e-9)
            slow = self._least is not None and rate < self._least
            # No sweep starts if more than half of it would exceed the limit.
            return not slow and now - began + took / 2 < limit

        yield should_continue
        self._done += size
        self._solving += self._clock() - began
        self._learn(rate, size, late=self._clock() - began > share)

    def _for_solving(self) -> float:
        """Seconds left for solving, without other work on the remaining blocks."""
        now = self._clock()
        left = self.seconds - (now - self._started)
        passed = sum(end <= self._done for end in self._ends)
        to_come = sum(end > self._done for end in self._ends) - 1
        if passed:
            left -= (now - self._started - self._solving) / passed * to_come
        return left

    def _learn(self, rate: float, size: int, *, late: bool) -> None:
        """Set the least rate after the first block, and adjust it to the clock later."""
        if self._least is not None:
            self._least *= ADJUST if late else 1 / ADJUST
            return
        self._rates.append((rate, size))
        if self._done in self._ends:
            total = sum(n for _, n in self._rates)
            self._least = max(sum(max(r, 0.0) * n for r, n in self._rates) / total, LEAST)
