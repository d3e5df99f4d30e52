"""Verb `recover`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit.cli.console import SHORTER_ROWS, Terminal
from sparsekit.cli.options import (
    Debug,
    DryRun,
    Json,
    Model,
    Out,
    Overwrite,
    Quiet,
    Timed,
    named,
    refuse_early,
    refuse_timed,
)
from sparsekit.cli.plan import show_plan
from sparsekit.cli.verb import read, takes
from sparsekit.progress import Progress
from sparsekit.recovery.config import RecoverConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@takes(RecoverConfig)
def recover(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Train MODEL against its dense parent and keep its exact pattern.

    Example: sparsekit recover pruned -o recovered --tokens 100K
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True, takes_less=SHORTER_ROWS) as progress:
        config = read(RecoverConfig, words)
        command = _verb(dry_run=dry_run, timed=timed)
        command(terminal, config, named(model), out, overwrite=overwrite, progress=progress)


def _verb(*, dry_run: bool, timed: bool) -> Callable[..., None]:
    """The run, or its plan."""
    refuse_timed(dry_run=dry_run, timed=timed)
    return partial(_plan, timed=timed) if dry_run else _run


def _run(
    terminal: Terminal,
    config: RecoverConfig,
    model: str,
    out: Path,
    *,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Run, and show the outcome in the main process."""
    refuse_early(model, out, overwrite=overwrite)
    from sparsekit.recovery.recover import recover as stage

    report = stage(config, model, out, overwrite=overwrite, progress=progress)
    if report is not None:
        show_recovered(terminal, report)


def _plan(terminal: Terminal, config: RecoverConfig, *where: Any, **how: Any) -> None:
    """Show the plan of a run; arguments are those of `_run`."""
    refuse_early(*where, overwrite=how["overwrite"])
    from sparsekit.recovery.dry_run import plan_recover

    show_plan(terminal, plan_recover(config, *where, **how))


def show_recovered(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `recover`."""
    entry = report.entry
    flipped = sum(row.flipped for row in entry.weights) / entry.totals.size
    terminal.table(
        f"{entry.settings.method} {entry.settings.pattern} in {entry.seconds:.0f} s",
        ("weights", "steps", "tokens", "zeros", "mask changes"),
        [
            (
                entry.totals.weights,
                entry.plan.steps,
                entry.tokens,
                f"{entry.totals.sparsity:.2%}",
                f"{flipped:.2%}",
            )
        ],
    )
    if (kept := entry.kept_mass) is not None:
        terminal.note(f"the loss covered {kept:.2%} of the teacher's probability")
    terminal.result(report.out, report.to_json())
