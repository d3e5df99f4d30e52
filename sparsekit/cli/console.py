"""What the user sees: progress, tables and errors on stderr, one result on stdout, exit codes."""

import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from sparsekit.errors import SparsekitError
from sparsekit.memory import is_out_of_memory, peak_memory
from sparsekit.progress import SILENT, Progress

INTERRUPTED = 130
# The command that runs, which its errors name: in a pipe of several one sees which failed.
VERB: ContextVar[str] = ContextVar("verb", default="")
FEWER_ROWS = "fewer --samples or a shorter --length take less"
SHORTER_ROWS = "a smaller --batch or --length takes less"
# Columns of a table that goes to a file or pipe.
FILE_WIDTH = 160
# Plain progress lines come no faster than this.
LINE_SECONDS = 2.0


class Terminal:
    """The two streams of one command.

    Args:
        json: Whether the result is JSON.
        quiet: Whether to leave out progress, notes and tables; errors are always shown.
        debug: Whether an error comes with its traceback.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.debug = debug
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        if not self.stderr.is_terminal:
            self.stderr.width = FILE_WIDTH

    def result(self, text: Any, value: Any) -> None:
        """The command's one result: `value` as JSON when asked for, else `text`, on stdout."""
        print(json.dumps(value, ensure_ascii=False) if self.json else text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table on stderr; columns of numbers are right-aligned, columns of nothing left out."""
        if self.quiet:
            return
        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        filled = [i for i in range(len(columns)) if any(row[i] for row in cells)]
        columns = [columns[i] for i in filled]
        cells = [[row[i] for i in filled] for row in cells]
        table = Table(
            title=Text(title),
            title_justify="left",
            title_style="bold",
            box=None,
            pad_edge=False,
            show_header=any(columns),
        )
        for index, column in enumerate(columns):
            numeric = all(row[index][:1] in "+-0123456789" for row in cells)
            table.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self.stderr.print(table, soft_wrap=False)

    def note(self, text: str) -> None:
        """A line on stderr."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    @contextmanager
    def working(
        self, *, resumable: bool = False, takes_less: str = FEWER_ROWS
    ) -> Iterator[Progress]:
        """A progress display, and one line for an error that ends the work.

        Args:
            resumable: Whether the same command goes on where an interruption stopped it.
            takes_less: What to do when memory was short.
        """
        display = SILENT if self.quiet else _display(self.stderr)
        try:
            quiet_libraries()
            yield display
        except SparsekitError as error:
            display.end()
            self._fail(f"error: {error.message}", error.hint, error.exit_code)
        except KeyboardInterrupt:
            display.end()
            hint = "the same command goes on after what is finished" if resumable else ""
            self._fail("interrupted", hint, INTERRUPTED)
        except Exception as error:
            display.end()
            if is_out_of_memory(error):
                self._fail("error: out of memory", takes_less, 1)
            lines = str(error).strip().split("\n")
            reason = f"{type(error).__name__}: {lines[0]}"
            self._fail(f"error: unexpected {reason}", "--debug shows where", 1)
        else:
            display.end()

    def _fail(self, message: str, hint: str, code: int) -> None:
        if self.debug:
            traceback.print_exc(file=sys.stderr)
        message = f"{VERB.get()}: {message}" if VERB.get() else message
        self.stderr.print(f"{message}; {hint}" if hint else message, markup=False)
        raise typer.Exit(code)


class _Bars(Progress):
    """Progress as a bar that moves, for a terminal."""

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
    """Progress as plain lines, for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._title = ""
        self._total = self._done = self._before = 0
        self._started = self._last = 0.0

    def begin(self, title: str, total: int, done: int = 0) -> None:
        self._title, self._total, self._done, self._before = title, total, done, done
        self._started = time.monotonic()

    def step(self, label: str) -> None:
        self._done += 1
        now = time.monotonic()
        if self._done < self._total and now - self._last < LINE_SECONDS:
            return
        self._last = now
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


def quiet_libraries() -> None:
    """Keep progress bars and advice of the libraries off stderr."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def _display(console: Console) -> Progress:
    return _Bars(console) if console.is_terminal else _Lines(console)


def _memory() -> str:
    return f"{peak_memory() / 1e6:.0f} MB peak"


def by_kind(weights: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of weights by the last part of their names."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in weights:
        kinds.setdefault(row["name"].removesuffix(".weight").rpartition(".")[2], []).append(row)
    return kinds


def kind_row(name: str, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Count, zeros, errors and seconds of the weights of one kind."""
    errors = [row["error"] for row in rows if row["error"] is not None]
    zeros = sum(row["zeros"] for row in rows) / sum(row["size"] for row in rows)
    return (
        name,
        len(rows),
        f"{zeros:.2%}",
        f"{sum(errors) / len(errors):.4f}" if errors else "-",
        f"{max(errors):.4f}" if errors else "-",
        f"{sum(row['seconds'] for row in rows):.1f}",
    )


def paired_text(difference: dict[str, Any] | None) -> str:
    """A paired difference with its standard error; empty without one."""
    if difference is None:
        return ""
    stderr = difference["stderr"]
    return f"{difference['value']:+.4f} ± " + ("-" if stderr is None else f"{stderr:.4f}")
