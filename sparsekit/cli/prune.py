"""The verb `prune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsekit.cli.console import Terminal, by_kind, kind_row
from sparsekit.cli.options import (
    Allocate,
    BudgetText,
    Compensate,
    Debug,
    Dense,
    Device,
    DryRun,
    Dtype,
    Form,
    Initial,
    Json,
    Length,
    Method,
    Model,
    Options,
    Overwrite,
    PatternText,
    Preset,
    Propagate,
    Quiet,
    Rank,
    Reconstruct,
    Refine,
    Samples,
    Seed,
    Skip,
    Source,
    Then,
    Timed,
    named,
    refuse_early,
    refuse_timed,
)
from sparsekit.cli.plan import show_plan
from sparsekit.pruning.config import PruneConfig, prune_config

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


def prune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    method: Method = None,
    pattern: PatternText = None,
    option: Options = [],  # noqa: B006  (typer's form of a repeatable option)
    preset: Preset = None,
    initial: Initial = None,
    refine: Refine = None,
    dense: Dense = None,
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = 0,
    skip: Skip = [],  # noqa: B006  (the same)
    reconstruct: Reconstruct = "none",
    propagate: Propagate = None,
    allocate: Allocate = "none",
    compensate: Compensate = "none",
    rank: Rank = None,
    form: Form = "dense",
    budget: BudgetText = None,
    then: Then = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL and write a Hugging Face checkpoint.

    Example: sparsekit prune demo -o pruned --method sparsegpt --samples 32 --length 512
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = prune_config(
            method=method,
            pattern=pattern,
            option=option,
            preset=preset,
            initial=initial,
            refine=refine,
            dense=None if dense is None else named(dense),
            allocate=allocate,
            compensate=compensate,
            rank=rank,
            format=form,
            budget=budget,
            then=then,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            skip=skip,
            reconstruct=reconstruct,
            propagate=propagate,
            device=device,
            dtype=dtype,
        )
        name = named(model)
        refuse_timed(dry_run=dry_run, timed=timed)
        refuse_early(name, out, overwrite=overwrite)
        how = {"overwrite": overwrite, "progress": progress}
        if dry_run:
            _plan(terminal, config, name, out, timed=timed, **how)
        else:
            _prune(terminal, config, name, out, **how)


def _plan(terminal: Terminal, config: PruneConfig, *where: Any, **how: Any) -> None:
    """Show what a run would do."""
    from sparsekit.pruning.dry_run import plan as stage

    show_plan(terminal, stage(config, *where, **how))


def _prune(terminal: Terminal, config: PruneConfig, *where: Any, **how: Any) -> None:
    """Make the run, and show what came of it."""
    from sparsekit.pruning.prune import prune as stage

    show_pruned(terminal, stage(config, *where, **how))


def show_pruned(terminal: Terminal, report: "Report") -> None:
    """The outcome of `prune`, by kind of weight."""
    kinds = by_kind(report.entry["weights"])
    rows = [kind_row(name, group) for name, group in kinds.items()]
    rows.append(kind_row("all", report.entry["weights"]))
    recipe = report.entry["recipe"]
    if (bits := report.entry["totals"]["bits_per_weight"]) is not None:
        terminal.note(
            f"{bits:.2f} bits a weight as factors; zeros are those of the cores"
            + ("" if recipe["format"] == "factored" else ": the products on disk are not sparse")
        )
    terminal.table(
        f"{recipe['method']} {recipe['pattern']} {recipe['then'] or ''}".rstrip()
        + f" in {report.entry['seconds']:.0f} s",
        ("weights", "count", "zeros", "relative error", "worst", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())
