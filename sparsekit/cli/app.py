"""The verbs of the command line. A command parses, calls one stage, and shows its report."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import sparsekit
from sparsekit.cli import show
from sparsekit.cli.console import Terminal
from sparsekit.errors import UsageError
from sparsekit.models.calibration import Calibration
from sparsekit.progress import Progress
from sparsekit.stages.config import EvalConfig, PruneConfig
from sparsekit.tensors.patterns import Pattern

app = typer.Typer(
    help="Prune Hugging Face language-model checkpoints on disk, and know what it cost.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Measure what sparsekit itself costs.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(bench_app, name="bench")

Model = Annotated[
    str,
    typer.Argument(
        help="Folder, hub id (org/name), 'demo' (SmolLM2-135M), or - to read it from stdin."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="Compute type: auto, float32, bfloat16 or float16.")]
Method = Annotated[str, typer.Option(help="See 'sparsekit methods'.")]
PatternText = Annotated[
    str, typer.Option(help="N:M (N kept of M inputs), 50% (of each row) or 50%/tensor.")
]
Options = Annotated[
    list[str], typer.Option("--option", "-O", help="KEY=VALUE of the method; repeatable.")
]
Source = Annotated[
    str | None,
    typer.Option(
        help="builtin, self, c4, wikitext2, a .txt, .jsonl, .json.gz or .parquet file, or token "
        "rows in a .safetensors file. Default: builtin."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration rows. Default: 128.")]
Length = Annotated[int | None, typer.Option(help="Tokens of a row. Default: 2048.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
Skip = Annotated[
    list[str], typer.Option(help="Glob of weights to leave dense, as down_proj; repeatable.")
]
Reconstruct = Annotated[
    str, typer.Option(help="none, or cg: least squares on the mask that the method chose.")
]
Propagate = Annotated[
    bool | None,
    typer.Option(
        "--propagate/--no-propagate",
        help="Calibrate on the outputs of the pruned blocks before, or of the dense ones. "
        "Default: as the method's source does.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(sparsekit.__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    method: Method = "wanda",
    pattern: PatternText = "2:4",
    option: Options = [],  # noqa: B006  (typer's form of a repeatable option)
    calibration: Source = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = 0,
    skip: Skip = [],  # noqa: B006
    reconstruct: Reconstruct = "none",
    propagate: Propagate = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    overwrite: Annotated[
        bool, typer.Option(help="Replace an earlier output of sparsekit.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and show the plan only.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL and write a plain Hugging Face checkpoint.

    Example: sparsekit prune demo -o pruned --method sparsegpt --samples 32 --length 512
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        config = _prune_config(
            method=method,
            pattern=pattern,
            option=option,
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
        name = _model(model, progress)
        from sparsekit.stages import prune as stage

        if dry_run:
            plan = stage.plan(config, name, out, overwrite=overwrite)
            show.plan(terminal, plan)
        else:
            report = stage.prune(config, name, out, overwrite=overwrite, progress=progress)
            show.pruned(terminal, report)


@app.command("eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids, 'demo' or - (stdin).")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: builtin (its held-out part), c4, wikitext2, a text file, or "
            "token rows in a .safetensors file. Default: builtin when no task is named."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a window. Default: 2048.")] = None,
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated.")] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of further task files.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many windows, and samples of a task.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Model to take paired differences to.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a task in one forward pass.")] = 8,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity and zero-shot scores of one or more models.

    Example: sparsekit eval pruned --baseline demo --text builtin --length 512 --limit 16
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        config = EvalConfig(
            text=text,
            length=length,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        config.check()
        names = [_model(name, progress) for name in models]
        base = _model(baseline, progress) if baseline else None
        from sparsekit.stages.evaluate import evaluate as stage

        show.scores(terminal, stage(config, names, base, progress), names)


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, or - for stdin.")],
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show sparsity, pattern, size and history by block and weight type.

    Example: sparsekit inspect pruned
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        path = Path(_model(folder, progress))
        from sparsekit.stages.inspect import inspect as stage

        show.inspection(terminal, stage(path, progress))


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A checkpoint folder, or - for stdin.")],
    pattern: Annotated[
        str | None, typer.Option(help="As in prune. Default: the history's pattern.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Re-check every tensor from its bytes; exit code 1 names the first offender.

    Example: sparsekit verify pruned --pattern 2:4
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        if pattern is not None:
            Pattern.parse(pattern)
        path = Path(_model(folder, progress))
        from sparsekit.stages.inspect import verify as stage

        show.verified(terminal, stage(path, pattern, progress))


@app.command("methods")
def list_methods(json: Json = False) -> None:
    """List the pruning methods with their sources, options and defaults.

    Example: sparsekit methods
    """
    show.methods(Terminal(json=json))


@app.command()
def demo(
    model: Annotated[str, typer.Argument(help="Another model than SmolLM2-135M.")] = "demo",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the checkpoints.")] = Path(
        "sparsekit-demo"
    ),
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune a small real model to 2:4 three ways, score each, and leave the checkpoints.

    Example: sparsekit demo
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True) as progress:
        name = _model(model, progress)
        from sparsekit.stages.demo import demo as stage

        show.demo(terminal, stage(name, out, progress), out)


@bench_app.command("prune")
def bench_prune(
    model: Model,
    method: Method = "wanda",
    pattern: PatternText = "2:4",
    option: Options = [],  # noqa: B006
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
        config = _prune_config(
            method=method,
            pattern=pattern,
            option=option,
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
        name = _model(model, progress)
        from sparsekit.stages.bench import bench_prune as stage

        result = stage(config, name, repeat=repeat, floor=floor, scratch=scratch, progress=progress)
        show.bench(terminal, result)


@bench_app.command("generate")
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


def _prune_config(
    *,
    method: str,
    pattern: str,
    option: list[str],
    calibration: str | None,
    samples: int | None,
    length: int | None,
    seed: int,
    skip: list[str],
    reconstruct: str,
    propagate: bool | None,
    device: str,
    dtype: str,
) -> PruneConfig:
    """The checked configuration that the flags of `prune` and `bench prune` spell."""
    options: dict[str, str] = {}
    for item in option:
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"--option {item!r} has no value", "write --option KEY=VALUE")
        options[key.strip()] = value.strip()
    rows: Calibration | None = None
    if calibration is not None:
        rows = Calibration(source=calibration, samples=samples, length=length, seed=seed)
    config = PruneConfig(
        method=method,
        pattern=pattern,
        options=options,
        calibration=rows,
        skip=skip,
        reconstruct=reconstruct,  # type: ignore[arg-type]  (check() refuses other words)
        propagate=propagate,
        device=device,
        dtype=dtype,
    )
    config.check()
    if rows is None and config.rows is not None:
        rows = Calibration(samples=samples, length=length, seed=seed)
        rows.check()
        return replace(config, calibration=rows)
    if rows is None and (samples is not None or length is not None):
        raise UsageError(
            f"{method} reads no calibration: --samples and --length have no effect",
            "leave them out, or pass --calibration to have the output error measured",
        )
    return config


def _model(name: str, progress: Progress) -> str:
    """The model that a word stands for: `-` is read from stdin, `demo` is fetched."""
    if name == "-":
        lines = [line.strip() for line in sys.stdin if line.strip()]
        if not lines:
            raise UsageError(
                "no model on stdin", "pipe a path, as: sparsekit prune … | sparsekit eval -"
            )
        if len(lines) > 1:
            raise UsageError(f"{len(lines)} models on stdin, one is wanted", "pass them by name")
        name = lines[0]
    if name == "demo":
        from sparsekit.models.demo import demo_model

        return str(demo_model(progress))
    return name


def main() -> Any:
    """Run the command line."""
    return app()
