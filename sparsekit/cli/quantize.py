"""Verb `quantize`."""

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
from sparsekit.cli.plan import show_plan
from sparsekit.cli.verb import read, takes
from sparsekit.quantization.config import QuantizeConfig

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


@takes(QuantizeConfig)
def quantize(
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
    """Quantize the weights of MODEL and keep every zero.

    Example: sparsekit quantize pruned -o small --method gptq --grid int4-g64 --samples 32
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = read(QuantizeConfig, words)
        name = named(model)
        refuse_timed(dry_run=dry_run, timed=timed)
        refuse_early(name, out, overwrite=overwrite)
        how = {"overwrite": overwrite, "progress": progress}
        if dry_run:
            from sparsekit.quantization.dry_run import plan_quantize

            return show_plan(terminal, plan_quantize(config, name, out, timed=timed, **how))
        from sparsekit.quantization.quantize import quantize as stage

        show_quantized(terminal, stage(config, name, out, **how))


def show_quantized(terminal: Terminal, report: "Report") -> None:
    """Show the outcome of `quantize` by kind of weight."""
    entry = report.entry
    rows = [kind_row(name, group) for name, group in by_kind(entry.weights).items()]
    rows.append(kind_row("all", entry.weights))
    terminal.table(
        f"{entry.settings.method} {entry.settings.grid} in {entry.seconds:.0f} s, "
        f"{entry.totals.bits_per_weight:.2f} bits per weight",
        ("weights", "count", "zeros", "output error", "max", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())
