"""Output of a command: progress, tables and errors on stderr, one result on stdout."""

import json
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparsekit.cli.progress import progress_display
from sparsekit.errors import SparsekitError
from sparsekit.memory import is_out_of_memory
from sparsekit.progress import SILENT, Progress

if TYPE_CHECKING:
    from sparsekit.checkpoint.entry_parts import SolvedWeight

INTERRUPTED = 130
# Version of the objects that --json writes.
SCHEMA = 1
# The running command, which errors name so that a failing pipe shows where.
VERB: ContextVar[str] = ContextVar("verb", default="")
FEWER_ROWS = "fewer --samples or a shorter --length take less"
SHORTER_ROWS = "a smaller --batch or --length takes less"
# Columns of a table that goes to a file or pipe.
FILE_WIDTH = 160
# Least width of a column of longer text, and the gap between columns.
TEXT_WIDTH, GAP = 14, 2
# A numeric cell: with sign, unit or standard error, a pattern N:M, or empty.
NUMBER = re.compile(r"([+-]?\d[\d.,:]*(e[+-]?\d+)?( ?[%A-Za-z/]+)?( ± [\d.e-]+)?|[-*]|)")


class Terminal:
    """The two streams of one command.

    Args:
        json: Whether the result is JSON.
        quiet: Whether to leave out progress, notes and tables; errors are always shown.
        debug: Whether to show the traceback of an error.
    """

    def __init__(self, *, json: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.debug = debug
        self.stderr = Console(stderr=True, highlight=False, soft_wrap=True)
        if not self.stderr.is_terminal:
            self.stderr.width = FILE_WIDTH

    def result(self, text: Any, value: Mapping[str, Any]) -> None:
        """Write the result to stdout: `value` with --json, else `text`.

        Objects carry the version of the schema, which recipes/README.md documents.
        """
        self.document(text, {"schema": SCHEMA, **value})

    def document(self, text: Any, value: Any) -> None:
        """Write a document with its own schema, such as a recipe, to stdout."""
        print(json.dumps(value, ensure_ascii=False) if self.json else text, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Print a table on stderr, with numbers right-aligned and without empty columns.

        A table that is too wide for the terminal is split into several, each with the first column.
        Text may wrap, numbers do not.
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
        """Print a line on stderr."""
        if not self.quiet:
            self.stderr.print(text, markup=False)

    @contextmanager
    def working(
        self, *, resumable: bool = False, takes_less: str = FEWER_ROWS
    ) -> Iterator[Progress]:
        """Context with a progress display, which reports an error in one line.

        Args:
            resumable: Whether the same command resumes after an interruption.
            takes_less: Hint for an error of memory.
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
            hint = "run the same command again to resume" if resumable else ""
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
    """Split columns into tables that fit a width."""
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
    """Least width of a column: that of its numbers, or of its longest word."""
    longest = max(map(len, cells), default=0)
    word = max((len(word) for word in title.split()), default=0)
    return max(word, longest if _is_numeric(cells) else min(longest, TEXT_WIDTH))


def _is_numeric(cells: Sequence[str]) -> bool:
    return all(NUMBER.fullmatch(cell) for cell in cells)


def quiet_libraries() -> None:
    """Turn off progress bars and advice of the libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()


def by_kind(weights: "Sequence[SolvedWeight]") -> "dict[str, list[SolvedWeight]]":
    """Weights by the last part of their names."""
    kinds: dict[str, list[SolvedWeight]] = {}
    for row in weights:
        kinds.setdefault(row.name.removesuffix(".weight").rpartition(".")[2], []).append(row)
    return kinds


def kind_row(name: str, rows: "Sequence[SolvedWeight]") -> tuple[Any, ...]:
    """Count, sparsity, output errors and seconds of one kind of weight."""
    errors = [row.error for row in rows if row.error is not None]
    zeros = sum(row.zeros for row in rows) / sum(row.size for row in rows)
    return (
        name,
        len(rows),
        f"{zeros:.2%}",
        f"{sum(errors) / len(errors):.4f}" if errors else "-",
        f"{max(errors):.4f}" if errors else "-",
        f"{sum(row.seconds for row in rows):.1f}",
    )


def paired_text(difference: dict[str, Any] | None) -> str:
    """A paired difference with its standard error; empty for None."""
    if difference is None:
        return ""
    stderr = difference["stderr"]
    return f"{difference['value']:+.4f} ± " + ("-" if stderr is None else f"{stderr:.4f}")
