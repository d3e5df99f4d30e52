"""Verbs `inspect`, `verify` and `deploy`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import Debug, Device, Json, Model, Quiet, named
from sparsekit.weights.patterns import Pattern

if TYPE_CHECKING:
    from sparsekit.inspection.deploy import DeployReport
    from sparsekit.inspection.inspect import Inspection


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
        from sparsekit.inspection.inspect import inspect as stage

        show_inspection(terminal, stage(name, progress))


def verify(
    model: Model,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Pattern to check, e.g. 2:4. Default: that of the history.",
            autocompletion=complete.patterns,
        ),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check every tensor from its bytes; exit code 1 if one fails, which is named.

    Example: sparsekit verify pruned --pattern 2:4
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        if pattern is not None:
            Pattern.parse(pattern)
        name = named(model)
        from sparsekit.inspection.verify import verify as stage

        show_verified(terminal, stage(name, pattern, progress))


def deploy(
    model: Model,
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show which runtimes load MODEL, and whether it is smaller or faster there.

    Example: sparsekit deploy pruned
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        name = named(model)
        from sparsekit.inspection.deploy import deploy as stage

        show_deployment(terminal, stage(name, device, progress))


def show_inspection(terminal: Terminal, report: "Inspection") -> None:
    """Show sparsity by block and by weight type, and the history."""
    columns = ("", "weights", "zeros", "sparsity", "pattern")
    for title, rows in (("by block", report.blocks), ("by weight type", report.types)):
        terminal.table(title, columns, [_sparsity_row(row) for row in [*rows, report.total]])
    steps = [
        (
            entry.stage,
            " ".join(filter(None, (settings.method, settings.pattern, settings.grid))),
            f"{entry.seconds:.0f} s",
            entry.source.path,
        )
        for entry in report.history
        for settings in (entry.settings,)
    ]
    if steps:
        terminal.table("history", ("stage", "settings", "time", "source"), steps)
    terminal.note(f"{report.model}: {report.n_bytes / 1e6:.1f} MB of weights")
    terminal.result(report.model, report.to_json())


def _sparsity_row(row: dict[str, Any]) -> tuple[Any, ...]:
    zeros = f"{row['zeros']:,}"
    return (row["name"], f"{row['size']:,}", zeros, f"{row['sparsity']:.2%}", row["pattern"])


def show_verified(terminal: Terminal, result: dict[str, Any]) -> None:
    """Show a passed check."""
    pattern = result["pattern"]
    patterns = pattern if isinstance(pattern, str) else ", ".join(pattern)
    terminal.note(
        f"{result['model']}: {result['weights']} weights are {patterns}, {result['zeros']:,} of "
        f"{result['size']:,} zero; {result['tensors']} tensors are finite"
    )
    terminal.result(result["model"], result)


def show_deployment(terminal: Terminal, report: "DeployReport") -> None:
    """Show runtimes; stdout has one line per runtime with the three answers."""
    form = report.form
    terminal.table(
        f"{report.model}: {form.stored_as}, {form.pattern}"
        + (f", {form.grid}" if form.grid else ""),
        ("runtime", "version", "loads", "smaller", "faster", "reason"),
        [(n, seen, v.loads, v.smaller, v.faster, v.reason) for n, seen, v in report.runtimes],
    )
    if report.speeds:
        terminal.table(
            "torch's 2:4 kernels on this GPU",
            ("batch", "pass", "dense ms", "sparse ms", "speed-up"),
            [
                (
                    speed.batch,
                    speed.phase,
                    *(f"{1e3 * s:.2f}" if s else "-" for s in (speed.dense, speed.sparse)),
                    f"{speed.gain:.2f}" if speed.gain else "out of memory",
                )
                for speed in report.speeds
            ],
        )
    else:
        terminal.note(f"torch's 2:4 kernels were not measured: {report.unmeasured}")
    lines = ("\t".join((n, v.loads, v.smaller, v.faster)) for n, _, v in report.runtimes)
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        terminal.result("\n".join(lines), report.to_json())
