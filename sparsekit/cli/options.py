"""Arguments and flags shared by commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.checkpoint.output_folder import refuse_output, refuse_source
from sparsekit.checkpoint.resolve import check_reference
from sparsekit.cli import complete
from sparsekit.errors import DataError, UsageError
from sparsekit.pipeline.options import DEVICES, WHERE

# Hint for `-`, and the longest path.
ONE_PATH = "write one path to it, e.g. `sparsekit prune … | sparsekit eval -`"
PATH_LENGTH = 4096
Model = Annotated[
    str,
    typer.Argument(help="Folder, hub id (org/name), 'demo' (SmolLM2-135M), or - for stdin."),
]
RUNNING = "Running"
Out = Annotated[
    Path,
    typer.Option("--out", "-o", help="Folder to write.", rich_help_panel=WHERE),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Write the result to stdout as JSON.", rich_help_panel=RUNNING),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show errors only.", rich_help_panel=RUNNING)
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUNNING)
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to compute.",
        metavar=f"[{'|'.join(DEVICES)}]",
        autocompletion=complete.devices,
        rich_help_panel=WHERE,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(help="Replace an earlier output of sparsekit.", rich_help_panel=WHERE),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the options and show the plan; nothing is written.",
        rich_help_panel=RUNNING,
    ),
]
Timed = Annotated[
    bool,
    typer.Option(
        "--time",
        help="With --dry-run: estimate the duration from one block or a few steps.",
        rich_help_panel=RUNNING,
    ),
]


def refuse_timed(*, dry_run: bool, timed: bool) -> None:
    """Refuse --time without --dry-run."""
    if timed and not dry_run:
        message = "--time has no effect without --dry-run"
        raise UsageError(message, "add it, or leave out --time", code="no-effect")


def named(name: str) -> str:
    """The given model, checked without torch; `-` is read from stdin.

    Raises:
        UsageError: stdin has no name, or several.
        DataError: The model folder does not exist.
    """
    if name == "-":
        return _piped()
    check_reference(name)
    return name


def _piped() -> str:
    """The model that the previous command of the pipe wrote.

    Raises:
        UsageError: stdin has no line, several, or one that is not a path.
        DataError: The model folder does not exist.
    """
    try:
        lines = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError("stdin is not text", ONE_PATH, code="not-text") from error
    if not lines:
        message = "no model on stdin: the command before the pipe failed or wrote no path"
        raise UsageError(message, code="empty-stdin")
    if lines[0].startswith(('{"', '["', "[{")):
        raise UsageError(
            "stdin holds JSON, not a path",
            "leave out --json in the command before the pipe",
            code="json-on-stdin",
        )
    if len(lines) > 1:
        message = f"stdin has {len(lines)} lines, not one"
        raise UsageError(message, ONE_PATH, code="several-lines")
    if len(lines[0]) > PATH_LENGTH:
        message = f"stdin has a line of {len(lines[0])} characters"
        raise UsageError(message, ONE_PATH, code="path-too-long")
    try:
        check_reference(lines[0])
    except DataError as error:
        message = f"{error.message} (read from stdin)"
        raise DataError(message, error.hint, code=error.code) from error
    return lines[0]


def refuse_early(model: str, out: Path, *, overwrite: bool) -> None:
    """Check the output before the seconds that a stage needs for imports.

    Raises:
        UsageError: The output is the model itself or exists.
    """
    if folder := check_reference(model):
        refuse_source(out, folder)
    refuse_output(out, overwrite=overwrite)
