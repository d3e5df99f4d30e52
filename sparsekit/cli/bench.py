"""The verb `bench`: what sparsekit itself costs."""

from pathlib import Path
from typing import Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.showbench import show_bench, show_inference, show_race, show_train_speed
from sparsekit.cli.console import SHORTER_ROWS, Terminal
from sparsekit.cli.options import (
    Debug,
    Device,
    Dtype,
    Initial,
    Json,
    Length,
    Method,
    MixedPrecision,
    Model,
    Options,
    PatternText,
    Preset,
    Propagate,
    Quiet,
    Reconstruct,
    Samples,
    Seed,
    Source,
    named,
)
from sparsekit.errors import UsageError
from sparsekit.models.calibration import Calibration
from sparsekit.stages.trainconfig import RecoverConfig
from sparsekit.stages.words import prune_config

app = typer.Typer(
    help="Measure what sparsekit itself costs.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("prune")
def bench_prune(
    model: Model,
    method: Method = None,
    pattern: PatternText = None,
    option: Options = [],  # noqa: B006  (typer's form of a repeatable option)
    preset: Preset = None,
    initial: Initial = None,
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = 0,
    reconstruct: Reconstruct = "none",
    propagate: Propagate = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    repeat: Annotated[int, typer.Option(help="Runs of each; medians count.")] = 3,
    floor: Annotated[
        bool, typer.Option(help="Also run the plain forward (needs the model in memory).")
    ] = True,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the deleted output.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time pruning against one plain forward over the same rows, and measure its peak memory.

    Example: sparsekit bench prune demo --samples 32 --length 512
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        config = prune_config(
            method=method,
            pattern=pattern,
            option=option,
            preset=preset,
            initial=initial,
            calibration=calibration,
            samples=samples,
            length=length,
            seed=seed,
            skip=[],
            reconstruct=reconstruct,
            propagate=propagate,
            device=device,
            dtype=dtype,
        )
        from sparsekit.stages.bench import bench_prune as stage

        name = named(model)
        result = stage(config, name, repeat=repeat, floor=floor, scratch=scratch, progress=progress)
        show_bench(terminal, result)


@app.command("generate")
def bench_generate(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    blocks: Annotated[int, typer.Option(help="Decoder blocks.")] = 132,
    hidden: Annotated[int, typer.Option(help="Hidden size; 132 blocks of 1024 are 3.2 GB.")] = 1024,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a Llama checkpoint of random weights for memory benches.

    Example: sparsekit bench generate -o random-3gb; then sparsekit bench prune random-3gb
    --calibration random-3gb/rows.safetensors --no-floor --repeat 1
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        from sparsekit.stages.bench import generate

        path = generate(out, blocks=blocks, hidden=hidden, seed=seed)
        terminal.result(path, {"out": str(path)})


@app.command("armor")
def bench_armor(
    model: Model = "demo",
    weights: Annotated[
        str, typer.Option(help="Modules of the decoder block, comma-separated.")
    ] = "self_attn.k_proj,self_attn.q_proj,mlp.up_proj",
    blocks: Annotated[str, typer.Option(help="Sides of the blocks, comma-separated.")] = "32,64",
    decoder_block: Annotated[int, typer.Option(help="Number of the decoder block.")] = 10,
    iterations: Annotated[int, typer.Option(help="Published iterations to run.")] = 1500,
    calibration: Source = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration rows. Default: 8 of builtin.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(help="Tokens of a row. Default: 512 of builtin.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Race ARMOR's two solvers: Adam as published, and coordinate descent to the same loss.

    Example: sparsekit bench armor demo
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        try:
            sides = [int(side) for side in blocks.split(",")]
        except ValueError as error:
            raise UsageError(f"--blocks takes numbers, not {blocks!r}") from error
        if calibration is None:
            samples = 8 if samples is None else samples
            length = 512 if length is None else length
        rows = Calibration(source=calibration or "builtin", samples=samples, length=length)
        rows.check()
        name = named(model)
        from sparsekit.stages.race import race as stage

        result = stage(
            name,
            weights=[weight.strip() for weight in weights.split(",")],
            blocks=sides,
            decoder_block=decoder_block,
            iterations=iterations,
            calibration=rows,
            progress=progress,
        )
        show_race(terminal, result)


@app.command("recover")
def bench_recover(
    model: Model = "demo",
    method: Annotated[
        str, typer.Option(help="fixed, ast or cast.", autocompletion=complete.names("recoverers"))
    ] = "fixed",
    batch: Annotated[int, typer.Option(help="Rows in one forward pass.")] = 2,
    length: Annotated[int, typer.Option(help="Tokens in a row.")] = 512,
    steps: Annotated[int, typer.Option(help="Steps that are timed; the median counts.")] = 6,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model. Default: what MODEL was made from.")
    ] = None,
    mixed_precision: MixedPrecision = "no",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time training against the machine's rate of matrix products, and tell what it holds.

    Example: sparsekit bench recover demo
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(takes_less=SHORTER_ROWS) as progress:
        config = RecoverConfig(
            method=method,
            tokens=batch * length,
            batch=batch,
            length=length,
            teacher=None if teacher is None else named(teacher),
            mixed_precision=mixed_precision,  # type: ignore[arg-type]  (check() refuses other words)
            device=device,
        )
        config.check()
        name = named(model)
        from sparsekit.stages.trainspeed import bench_recover as stage

        show_train_speed(terminal, stage(config, name, steps=steps, progress=progress))


@app.command("infer")
def bench_infer(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids or 'demo'.")],
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens that are generated, one at a time.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts in one pass.")] = 1,
    resident: Annotated[
        str,
        typer.Option(
            help="packed: as on disk; expand: dense once they are loaded.",
            autocompletion=complete.words("packed", "expand"),
        ),
    ] = "packed",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time loading, prompt and generation of MODELS, and tell what memory they take.

    Example: sparsekit bench infer pruned packed
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(takes_less="fewer --prompt or --batch") as progress:
        names = [named(name) for name in models]
        from sparsekit.stages.infer import InferConfig
        from sparsekit.stages.infer import bench_infer as stage

        config = InferConfig(
            prompt=prompt,
            new=new,
            batch=batch,
            resident=resident,  # type: ignore[arg-type]  (check() refuses other words)
            device=device,
        )
        show_inference(terminal, stage(config, names, progress))
