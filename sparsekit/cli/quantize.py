"""The verb `quantize`: its flags, and the configuration that they spell."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import Terminal, by_kind, kind_row
from sparsekit.cli.options import (
    Debug,
    Device,
    DryRun,
    Dtype,
    Json,
    Length,
    Model,
    Options,
    Overwrite,
    Quiet,
    Samples,
    Seed,
    Skip,
    Source,
    Timed,
    named,
    refuse_early,
    refuse_timed,
)
from sparsekit.cli.plan import show_plan
from sparsekit.quantization.config import quantize_config

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report


Method = Annotated[
    str,
    typer.Option(help="rtn (no data), gptq or awq.", autocompletion=complete.names("quantizers")),
]
GridText = Annotated[
    str,
    typer.Option(
        help="int4-g128 (a scale for 128 inputs), int8 (weights only), w8a8 or fp8 (inputs too).",
        autocompletion=complete.grids,
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        "--format",
        help="compressed-tensors (codes), or dense (the numbers that they stand for).",
        autocompletion=complete.storages,
    ),
]


def quantize(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    method: Method = "gptq",
    grid: GridText = "int4-g128",
    option: Options = [],  # noqa: B006  (typer's form of a repeatable option)
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = 0,
    skip: Skip = [],  # noqa: B006  (the same)
    form: Storage = "compressed-tensors",
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put the weights of MODEL on a grid, and keep every zero.

    Example: sparsekit quantize pruned -o small --method gptq --grid int4-g64 --samples 32
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = quantize_config(
            method=method,
            grid=grid,
            option=option,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            skip=skip,
            format=form,
            device=device,
            dtype=dtype,
        )
        name = named(model)
        refuse_timed(dry_run=dry_run, timed=timed)
        refuse_early(name, out, overwrite=overwrite)
        how = {"overwrite": overwrite, "progress": progress}
        if dry_run:
            from sparsekit.quantization.dry_run import plan_quantize

            found = plan_quantize(config, name, out, timed=timed, **how)
            return show_plan(terminal, found)
        from sparsekit.quantization.quantize import quantize as stage

        show_quantized(terminal, stage(config, name, out, **how))


def show_quantized(terminal: Terminal, report: "Report") -> None:
    """The outcome of `quantize`, by kind of weight."""
    entry = report.entry
    rows = [kind_row(name, group) for name, group in by_kind(entry["weights"]).items()]
    rows.append(kind_row("all", entry["weights"]))
    terminal.table(
        f"{entry['recipe']['method']} {entry['recipe']['grid']} in {entry['seconds']:.0f} s, "
        f"{entry['totals']['bits_per_weight']:.2f} bits a weight",
        ("weights", "count", "zeros", "relative error", "worst", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())
