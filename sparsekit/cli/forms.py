"""The verbs that write a checkpoint in another form: `pack`, `unpack` and `convert`."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparsekit.cli.showplan import show_plan
from sparsekit.cli.showforms import show_converted, show_packed, show_unpacked
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, DryRun, Json, Model, Overwrite, Quiet, named, refuse_early

Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]


def pack(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the sparse weights of MODEL as values and places, without loss.

    Example: sparsekit pack pruned -o packed
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "pack", "pack", show_packed
    if dry_run:
        module, stage, shown = "dryrun", "plan_pack", show_plan
    _write(terminal, module, stage, shown, model, out, overwrite=overwrite)


def unpack(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what a packed MODEL was made from: plain weights and codes to the same bytes.

    Example: sparsekit unpack packed -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "unpack", "unpack", show_unpacked
    if dry_run:
        module, stage, shown = "dryrun", "plan_unpack", show_plan
    _write(terminal, module, stage, shown, model, out, overwrite=overwrite)


def convert(
    model: Model,
    out: Out,
    form: Annotated[
        Literal["plain", "packed"], typer.Option("--format", help="Form of the output.")
    ] = "plain",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write MODEL, in sparse-24-bitmask, sparse-bitmask or marlin-24, as a checkpoint of today.

    Example: sparsekit convert old -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "convert", "convert", show_converted
    if dry_run:
        module, stage, shown = "dryrun", "plan_convert", show_plan
    elif form == "packed":
        stage, shown = "convert_packed", show_packed
    how = {"packs": form == "packed"} if dry_run else {}
    _write(terminal, module, stage, shown, model, out, overwrite=overwrite, **how)


def _write(
    terminal: Terminal,
    module: str,
    stage: str,
    shown: Callable[[Terminal, Any], None],
    model: str,
    out: Path,
    **how: bool,
) -> None:
    """Call a stage, whose module is imported only now, and show its report."""
    with terminal.working(resumable=True) as progress:
        name = named(model)
        refuse_early(name, out, overwrite=how["overwrite"])
        run = getattr(importlib.import_module(f"sparsekit.stages.{module}"), stage)
        shown(terminal, run(name, out, **how, progress=progress))
