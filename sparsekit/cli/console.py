"""What the user sees: progress, tables and errors on stderr, one result on stdout, exit codes."""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsekit.cli.progress import progress_display
from sparsekit.errors import SparsekitError
from sparsekit.memory import is_out_of_memory
from sparsekit.progress import SILENT, Progress

INTERRUPTED = 130
# The command that runs, which its errors name: in a pipe of several one sees which failed.
VERB: ContextVar[str] = ContextVar("verb", default="")
FEWER_ROWS = "fewer --samples or a shorter --length take less"
SHORTER_ROWS = "a smaller --batch or --length takes less"
# Columns of a table that goes to a file or pipe.
FILE_WIDTH = 160
# What a column of text is wide at least, if it has that much, and what is between columns.
TEXT_WIDTH, GAP = 14, 2
# A cell of numbers: with a sign, a unit, a standard error, as a pattern N:M, or of nothing.
NUMBER = re.compile(r"([+-]?\d[\d.,:]*(e[+-]?\d+)?( ?[%A-Za-z/]+)?( ± [\d.e-]+)?|[-*]|)")


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
        """A table on stderr; columns of numbers are right-aligned, columns of nothing left out.

        What is too wide for the terminal becomes several tables, each with the first column: text
        may break, a number never does.
        """
        if self.quiet:
            return
        cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
        filled = [i for i in range(len(columns)) if any(row[i] for row in cells)]
        columns = [columns[i] for i in filled]
        cells = [[row[i] for i in filled] for row in cells]
        for part in _parts(columns, cells, self.stderr.width):
            table = Table(
                title=Text(title),
                title_justify="left",
                title_style="bold",
                box=None,
                pad_edge=False,
                show_header=any(columns),
            )
            for index in part:
                numeric = _is_numeric([row[index] for row in cells])
                table.add_column(
                    Text(columns[index]),
                    justify="right" if numeric else "left",
                    overflow="fold",
                    no_wrap=numeric,
                )
            for row in cells:
                table.add_row(*(Text(row[index]) for index in part))
            self.stderr.print(table, soft_wrap=False)
            title = ""

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
        display = SILENT if self.quiet else progress_display(self.stderr)
        try:
            quiet_libraries()
            yield display
        except SparsekitError as error:
            display.end()
            self._fail(f"error: {error.message}", error.hint, error.exit_code, error.code)
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

    def _fail(self, message: str, hint: str, exit_code: int, code: str = "") -> None:
        if self.debug:
            traceback.print_exc(file=sys.stderr)
        message = f"{VERB.get()}: {message}" if VERB.get() else message
        line = f"{message}; {hint}" if hint else message
        self.stderr.print(f"{line} [{code}]" if code else line, markup=False)
        raise typer.Exit(exit_code)


def _parts(columns: Sequence[str], cells: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each of the tables that a table is shown as, so that all fit a width."""
    needed = [
        _narrowest(column, [row[index] for row in cells]) for index, column in enumerate(columns)
    ]
    parts: list[list[int]] = [[]]
    for index in range(len(columns)):
        taken = sum(needed[i] + GAP for i in parts[-1])
        if taken + needed[index] > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(index)
    return parts


def _narrowest(title: str, cells: Sequence[str]) -> int:
    """The fewest characters that a column can be shown in: those of its numbers, or some text."""
    longest = max(map(len, cells), default=0)
    word = max((len(word) for word in title.split()), default=0)
    return max(word, longest if _is_numeric(cells) else min(longest, TEXT_WIDTH))


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(NUMBER.fullmatch(cell) for cell in cells)


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
