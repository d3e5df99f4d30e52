"""The verb `convert`."""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import show
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Model, Overwrite, Quiet, named, refuse_early


def convert(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write MODEL, in sparse-24-bitmask, sparse-bitmask or marlin-24, as a plain checkpoint.

    Example: sparsekit convert old -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        name = named(model)
        refuse_early(name, out, overwrite=overwrite)
        from sparsekit.stages.convert import convert as stage

        show.converted(terminal, stage(name, out, overwrite=overwrite, progress=progress))
