"""The verbs that look at a checkpoint: `inspect` and `verify`."""

from typing import Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.show import show_inspection, show_verified
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Json, Model, Quiet, named
from sparsekit.tensors.patterns import Pattern


def inspect(
    model: Model,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show sparsity, pattern, size and history by block and weight type.

    Example: sparsekit inspect pruned
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        name = named(model)
        from sparsekit.stages.inspect import inspect as stage

        show_inspection(terminal, stage(name, progress))


def verify(
    model: Model,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="As in prune. Default: the history's pattern.", autocompletion=complete.patterns
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Re-check every tensor from its bytes; exit code 1 names the first offender.

    Example: sparsekit verify pruned --pattern 2:4
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        if pattern is not None:
            Pattern.parse(pattern)
        name = named(model)
        from sparsekit.stages.inspect import verify as stage

        show_verified(terminal, stage(name, pattern, progress))
