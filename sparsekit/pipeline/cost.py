"""Time and memory that a run was expected to take, and took."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from sparsekit.memory import peak_memory, resident, watch_peak


class Cost:
    """What a run takes, and what it was expected to take.

    The time is expected from the first block or weight that is computed, as the others are taken to
    last as long, by their sizes; or from what `expect` is told.

    Args:
        clock: Gives the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.started = self._begun = clock()
        watch_peak()
        self._room = 0
        self._sizes: Mapping[str, int] = {}
        self._expected: float | None = None

    def prepared(self, room: int) -> None:
        """Take note that the libraries are loaded and no weight is held.

        Args:
            room: The memory that is expected above that of the process, in bytes.
        """
        self._room = resident() + room

    def begin(self, sizes: Mapping[str, int], finished: Collection[str]) -> None:
        """Take note that the first block or weight comes now.

        Args:
            sizes: How many numbers each has, by name.
            finished: Names of those that an earlier run has computed; then nothing is expected
                of the time, since what is left of such a run is not like the whole.
        """
        self._sizes = {} if finished else sizes
        self._begun = self._clock()

    def done(self, name: str) -> None:
        """Take note that a block or weight is computed and written."""
        if self._expected is None and self._sizes:
            first = self._clock() - self._begun
            self.expect(first * (sum(self._sizes.values()) / self._sizes[name] - 1))

    def expect(self, left: float) -> None:
        """Take note that the run is expected to take so many more seconds from now on."""
        self._expected = self._clock() - self.started + left

    def told(self) -> dict[str, Any]:
        """Seconds and bytes for the entry of the run, until now."""
        expected = None if self._expected is None else round(self._expected, 3)
        return {
            "seconds": round(self._clock() - self.started, 3),
            "peak_memory_bytes": peak_memory(),
            "estimated": {"seconds": expected, "peak_memory_bytes": self._room},
        }
