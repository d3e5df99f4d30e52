"""The verb `quantize`: its flags, and the configuration that they spell."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import showforms
from sparsekit.cli.console import Terminal
from sparsekit.cli.options import (
    Debug,
    Device,
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
    named,
    parsed,
    refuse_early,
)
from sparsekit.errors import UsageError
from sparsekit.models.calibration import Calibration
from sparsekit.stages.quantconfig import QuantizeConfig

Method = Annotated[str, typer.Option(help="rtn (no data), gptq or awq.")]
GridText = Annotated[
    str,
    typer.Option(
        help="int4-g128 (a scale for 128 inputs), int8 (weights only), w8a8 or fp8 (inputs too)."
    ),
]
Storage = Annotated[
    str,
    typer.Option(
        "--format", help="compressed-tensors (codes), or dense (the numbers that they stand for)."
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
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Put the weights of MODEL on a grid, and keep every zero.

    Example: sparsekit quantize pruned -o small --method gptq --grid int4-g64 --samples 32
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = QuantizeConfig(
            method=method,
            grid=grid,
            options=parsed(option),
            skip=skip,
            format=form,  # type: ignore[arg-type]  (check() refuses other words)
            device=device,
            dtype=dtype,
        )
        config = _with_rows(config, calibration, samples, length, seed)
        name = named(model)
        refuse_early(name, out, overwrite=overwrite)
        from sparsekit.stages.quantize import quantize as stage

        showforms.quantized(
            terminal, stage(config, name, out, overwrite=overwrite, progress=progress)
        )


def _with_rows(
    config: QuantizeConfig,
    source: str | None,
    samples: int | None,
    length: int | None,
    seed: int,
) -> QuantizeConfig:
    """The checked configuration with its calibration rows, if it reads any."""
    if source is not None:
        rows = Calibration(source=source, samples=samples, length=length, seed=seed)
        config = replace(config, calibration=rows)
    config.check()
    if source is None and config.rows is not None:
        rows = Calibration(samples=samples, length=length, seed=seed)
        rows.check()
        return replace(config, calibration=rows)
    if source is None and not (samples is length is None and seed == 0):
        raise UsageError(
            f"{config.method} reads no calibration: --samples, --length and --seed have no effect",
            "leave them out, or pass --calibration to have the output error measured",
        )
    return config
