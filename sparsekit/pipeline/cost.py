"""Time and memory of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sparsekit.memory import peak_memory, watch_peak


class Cost:
    """Time and memory that a run takes from now on.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.started = clock()
        watch_peak()

    def to_json(self) -> dict[str, Any]:
        """Seconds and peak memory so far, for the entry of the run."""
        return {
            "seconds": round(self._clock() - self.started, 3),
            "peak_memory_bytes": peak_memory(),
        }
