"""The verbs `pack` and `unpack`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import show
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Model, Overwrite, Quiet, named, refuse_early

Out = Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")]


def pack(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the sparse weights of MODEL as values and places, without loss.

    Example: sparsekit pack pruned -o packed
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        name = named(model)
        refuse_early(name, out, overwrite=overwrite)
        from sparsekit.stages.pack import pack as stage

        show.packed(terminal, stage(name, out, overwrite=overwrite, progress=progress))


def unpack(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a packed MODEL as a plain checkpoint, with the same bytes of every tensor.

    Example: sparsekit unpack packed -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        name = named(model)
        refuse_early(name, out, overwrite=overwrite)
        from sparsekit.stages.pack import unpack as stage

        report = stage(name, out, overwrite=overwrite, progress=progress)
        terminal.result(report.out, report.to_json())
