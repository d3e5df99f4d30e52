"""The verb `quantize`: its flags, and the configuration that they spell."""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.showplan import show_plan
from sparsekit.cli.showforms import show_quantized
from sparsekit.cli.console import Terminal
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
from sparsekit.stages.words import quantize_config

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
            from sparsekit.stages.dryrun import plan_quantize

            found = plan_quantize(config, name, out, timed=timed, **how)
            return show_plan(terminal, found)
        from sparsekit.stages.quantize import quantize as stage

        show_quantized(terminal, stage(config, name, out, **how))
