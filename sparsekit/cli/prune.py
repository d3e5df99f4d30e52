"""Verb `prune`."""

from typing import TYPE_CHECKING, Any

from sparsekit.cli.console import Terminal, by_kind, kind_row
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
from sparsekit.cli.verb import read, takes
from sparsekit.pruning.config import PruneConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@takes(PruneConfig)
def prune(
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
    """Prune MODEL and write a Hugging Face checkpoint.

    Example: sparsekit prune demo -o pruned --method sparsegpt --samples 32 --length 512
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = read(PruneConfig, words)
        name = named(model)
        refuse_timed(dry_run=dry_run, timed=timed)
        refuse_early(name, out, overwrite=overwrite)
        how = {"overwrite": overwrite, "progress": progress}
        if dry_run:
            _plan(terminal, config, name, out, timed=timed, **how)
        else:
            _prune(terminal, config, name, out, **how)


def _plan(terminal: Terminal, config: PruneConfig, *where: Any, **how: Any) -> None:
    """Show the plan of a run."""
    from sparsekit.cli.plan import show_plan
    from sparsekit.pruning.dry_run import plan as stage

    show_plan(terminal, stage(config, *where, **how))


def _prune(terminal: Terminal, config: PruneConfig, *where: Any, **how: Any) -> None:
    """Run, and show the outcome."""
    from sparsekit.pruning.prune import prune as stage

    show_pruned(terminal, stage(config, *where, **how))


def show_pruned(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `prune` by kind of weight."""
    entry = report.entry
    kinds = by_kind(entry.weights)
    rows = [kind_row(name, group) for name, group in kinds.items()]
    rows.append(kind_row("all", entry.weights))
    settings = entry.settings
    if (bits := entry.totals.bits_per_weight) is not None:
        terminal.note(
            f"{bits:.2f} bits per weight as factors; zeros are those of the cores"
            + ("" if settings.format == "factored" else ": the products on disk are not sparse")
        )
    terminal.table(
        f"{settings.method} {settings.pattern} {settings.then or ''}".rstrip()
        + f" in {entry.seconds:.0f} s",
        ("weights", "count", "zeros", "output error", "max", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())
