"""Progress on stderr: a bar on a terminal, a few lines in a log."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from sparsekit.memory import peak_memory
from sparsekit.progress import Progress

# Least share of the work and seconds between two lines of a log.
LINE_SHARE, LINE_SECONDS = 0.1, 30.0


def progress_display(console: Console) -> Progress:
    """Progress display for a console."""
    return _Bars(console) if console.is_terminal else _Lines(console)


class _Bars(Progress):
    """One bar per task, removed when the task ends."""

    def __init__(self, console: Console) -> None:
        self._bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[memory]}  {task.fields[label]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = None

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self.end()
        self._bars.start()
        self._task = self._bars.add_task(
            title, total=total, completed=done, label="", memory=_memory()
        )

    def step(self, label: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=1, label=label, memory=_memory())

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", markup=False)

    def end(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task)
            self._bars.stop()
            self._task = None


class _Lines(Progress):
    """Plain lines: one per tenth of the work, at least 30 seconds apart.

    The last step of a task always has its line.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._title = ""
        self._total = self._done = self._before = self._shown = 0
        self._started = self._last = 0.0

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total = title, total
        self._done = self._before = self._shown = done
        self._started = self._last = self._clock()

    def step(self, label: str) -> None:
        self._done += 1
        now = self._clock()
        finished = self._done == self._total
        due = self._done - self._shown >= LINE_SHARE * self._total
        if not finished and not (due and now - self._last >= LINE_SECONDS):
            return
        self._last, self._shown = now, self._done
        spent = now - self._started
        left = spent / (self._done - self._before) * (self._total - self._done)
        self._print(
            f"{self._title}: {self._done}/{self._total} {label}, "
            f"{spent:.0f} s, {left:.0f} s left, {_memory()}"
        )

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    def end(self) -> None:
        self._total = 0

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)


def _memory() -> str:
    return f"{peak_memory() / 1e6:.0f} MB peak"
