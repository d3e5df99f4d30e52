"""Verbs `pack`, `unpack` and `convert`, which write a checkpoint in another form."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparsekit.cli.console import Terminal
from sparsekit.cli.options import (
    Debug,
    DryRun,
    Json,
    Model,
    Out,
    Overwrite,
    Quiet,
    named,
    refuse_early,
)
from sparsekit.cli.plan import show_plan

if TYPE_CHECKING:
    from sparsekit.checkpoint.entry_parts import PackedWeight
    from sparsekit.provenance.entry import Report


def pack(
    model: Model,
    out: Out,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write MODEL with its sparse weights packed, without loss.

    Example: sparsekit pack pruned -o packed
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "pack", "pack", show_packed
    if dry_run:
        module, stage, shown = "dry_run", "plan_pack", show_plan
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
    """Write the checkpoint that a packed MODEL was made from, with the same bytes.

    Example: sparsekit unpack packed -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "unpack", "unpack", show_unpacked
    if dry_run:
        module, stage, shown = "dry_run", "plan_unpack", show_plan
    _write(terminal, module, stage, shown, model, out, overwrite=overwrite)


def convert(
    model: Model,
    out: Out,
    form: Annotated[
        Literal["plain", "packed"], typer.Option("--format", help="Format of the output.")
    ] = "plain",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert MODEL from sparse-24-bitmask, sparse-bitmask or marlin-24 to a current format.

    Example: sparsekit convert old -o plain
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    module, stage, shown = "convert", "convert", show_converted
    if dry_run:
        module, stage, shown = "dry_run", "plan_convert", show_plan
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
    """Import and call a stage, and show its report."""
    with terminal.working(resumable=True) as progress:
        name = named(model)
        refuse_early(name, out, overwrite=how["overwrite"])
        run = getattr(importlib.import_module(f"sparsekit.packing.{module}"), stage)
        shown(terminal, run(name, out, **how, progress=progress))


def show_packed(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `pack` by pattern."""
    by_pattern: dict[str, list[PackedWeight]] = {}
    for row in report.entry.weights:
        kind = row.pattern if ":" in row.pattern else "bit mask"
        kind = f"{kind} {row.grid}" if row.grid else kind
        by_pattern.setdefault(kind, []).append(row)
    rows = []
    for pattern, group in by_pattern.items():
        size = sum(row.size for row in group)
        names = ("value_bits", "place_bits", "bits", "share")
        mean = {n: sum(getattr(row, n) * row.size for row in group) / size for n in names}
        with_places = mean["value_bits"] + mean["place_bits"]
        rest = max(0.0, mean["bits"] - with_places)
        smaller = (32 / bits for bits in (mean["value_bits"], with_places, mean["bits"]))
        rows.append(
            (
                pattern,
                len(group),
                f"{sum(row.zeros for row in group) / size:.2%}",
                f"{mean['value_bits']:.3f} + {mean['place_bits']:.3f} + {rest:.3f}",
                f"{mean['bits']:.3f}",
                f"{mean['share']:.4f}",
                ", ".join(f"{times:.1f}x" for times in smaller),
            )
        )
    totals = report.entry.totals
    terminal.table(
        f"{totals.bytes / 1e6:.1f} MB instead of {totals.bytes_before / 1e6:.1f} MB",
        (
            "pattern",
            "weights",
            "zeros",
            "bits: values + places + rest",
            "together",
            "share of size",
            "against float32: values, with places, with all",
        ),
        rows,
    )
    terminal.result(report.out, report.to_json())


def show_unpacked(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `unpack`."""
    terminal.result(report.out, report.to_json())


def show_converted(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `convert`."""
    entry = report.entry
    totals = entry.totals
    terminal.table(
        f"{entry.settings.form} in {entry.seconds:.0f} s",
        ("weights", "zeros"),
        [(totals.weights, f"{totals.zeros / totals.size:.2%}")],
    )
    terminal.result(report.out, report.to_json())
