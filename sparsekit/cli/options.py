"""What several commands take."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.checkpoint.output_folder import refuse_output, refuse_source
from sparsekit.checkpoint.resolve import check
from sparsekit.cli import complete
from sparsekit.errors import DataError, UsageError

# What `-` takes, and what no path is longer than.
ONE_PATH = "write one path to it, as `sparsekit prune … | sparsekit eval -` does"
PATH_LENGTH = 4096
Model = Annotated[
    str,
    typer.Argument(
        help="Folder, hub id (org/name), 'demo' (SmolLM2-135M), or - to read it from stdin."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", autocompletion=complete.devices)]
Dtype = Annotated[
    str,
    typer.Option(
        help="Compute type: auto, float32, bfloat16 or float16.", autocompletion=complete.dtypes
    ),
]
MixedPrecision = Annotated[
    str,
    typer.Option(
        help="bf16: multiply in bfloat16, keep weights in float32. Or no.",
        autocompletion=complete.words("no", "bf16"),
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="See 'sparsekit methods'. Default: wanda.",
        show_default=False,
        autocompletion=complete.names("pruners", "refiners"),
    ),
]
Initial = Annotated[
    str | None,
    typer.Option(
        help="The method that a refining method begins with.",
        autocompletion=complete.names("pruners"),
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A named set of options of the method, as published.", autocompletion=complete.presets
    ),
]
PatternText = Annotated[
    str | None,
    typer.Option(
        help="N:M (N kept of M inputs), 50% (of each row) or 50%/tensor. Default: 2:4.",
        autocompletion=complete.patterns,
    ),
]
Options = Annotated[
    list[str],
    typer.Option(
        "--option", "-O", help="KEY=VALUE of the method, or METHOD.KEY=VALUE; repeatable."
    ),
]
Refine = Annotated[
    str | None,
    typer.Option(
        help="A refinement of what the method makes, as dsnot.",
        autocompletion=complete.names("refiners"),
    ),
]
Source = Annotated[
    str | None,
    typer.Option(
        help="builtin, self, c4, wikitext2, a .txt, .jsonl, .json.gz or .parquet file, or token "
        "rows in a .safetensors file. Default: builtin.",
        autocompletion=complete.sources,
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration rows. Default: 128.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a row. Default: 2048.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Skip = Annotated[
    list[str], typer.Option(help="Glob of weights to leave dense, as down_proj; repeatable.")
]
Reconstruct = Annotated[
    str,
    typer.Option(
        help="none, or cg: least squares on the mask that the method chose.",
        autocompletion=complete.words("none", "cg"),
    ),
]
Propagate = Annotated[
    bool | None,
    typer.Option(
        "--propagate/--no-propagate",
        help="Calibrate on the outputs of the pruned blocks before, or of the dense ones. "
        "Default: as the method's source does.",
    ),
]
Dense = Annotated[
    str | None,
    typer.Option(help="The dense model of a MODEL that is sparse already, to refine its mask."),
]
Allocate = Annotated[
    str,
    typer.Option(
        help="none, or owl: blocks with many outliers keep more weights.",
        autocompletion=complete.words("none", "owl"),
    ),
]
Compensate = Annotated[
    str,
    typer.Option(
        help="none, or lowrank: a low-rank matrix makes up for what is lost.",
        autocompletion=complete.words("none", "lowrank"),
    ),
]
Rank = Annotated[
    str | None,
    typer.Option(help="Rank of --compensate lowrank, as a share of the smaller side. Default: 5%."),
]
Form = Annotated[
    str,
    typer.Option(
        "--format",
        help="dense, or factored: factors only, which is smaller.",
        autocompletion=complete.words("dense", "factored"),
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(help="Time that the run may take, as 10m: armor does its best within it."),
]
Then = Annotated[
    str | None,
    typer.Option(
        help="Put what is kept on a grid in the same pass, as int4-g128, by GPTQ's rule.",
        autocompletion=complete.grids,
    ),
]
Overwrite = Annotated[bool, typer.Option(help="Replace an earlier output of sparsekit.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check and show the plan, on stdout with --json only.")
]
Timed = Annotated[
    bool,
    typer.Option(
        "--time", help="With --dry-run: work on one block, or train a little, to tell the time."
    ),
]


def refuse_timed(*, dry_run: bool, timed: bool) -> None:
    """Refuse to time a run that is made anyway."""
    if timed and not dry_run:
        raise UsageError("--time has no effect without --dry-run", "add it, or leave --time out")


def named(name: str) -> str:
    """The model that a word stands for, checked without torch; `-` is read from stdin.

    Raises:
        UsageError: stdin has no name, or several.
        DataError: There is no such model folder.
    """
    if name == "-":
        return _piped()
    check(name)
    return name


def _piped() -> str:
    """The model that the command before the pipe wrote.

    Raises:
        UsageError: stdin has no line, several, or one that is no path.
        DataError: There is no such model folder.
    """
    try:
        lines = [line.strip() for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise UsageError("stdin is no text", ONE_PATH) from error
    if not lines:
        raise UsageError("no model on stdin: the command before the pipe failed or wrote no path")
    if lines[0].startswith(('{"', '["', "[{")):
        raise UsageError(
            "stdin holds JSON, not a path", "leave out --json in the command before the pipe"
        )
    if len(lines) > 1:
        raise UsageError(f"stdin has {len(lines)} lines, not one", ONE_PATH)
    if len(lines[0]) > PATH_LENGTH:
        raise UsageError(f"stdin has a line of {len(lines[0])} characters", ONE_PATH)
    try:
        check(lines[0])
    except DataError as error:
        raise DataError(f"{error.message} (read from stdin)", error.hint) from error
    return lines[0]


def refuse_early(model: str, out: Path, *, overwrite: bool) -> None:
    """What the stage refuses too, but seconds later, after its imports.

    Raises:
        UsageError: The output cannot be written there.
    """
    if folder := check(model):
        refuse_source(out, folder)
    refuse_output(out, overwrite=overwrite)
