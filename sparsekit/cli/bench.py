"""The verb `bench`: what sparsekit itself costs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import SHORTER_ROWS, Terminal
from sparsekit.cli.options import Debug, Device, Json, Model, Quiet, named
from sparsekit.cli.verb import Command, read, takes
from sparsekit.pruning.config import PruneConfig
from sparsekit.recovery.config import RecoverConfig

app = typer.Typer(
    help="Measure what sparsekit itself costs.", no_args_is_help=True, rich_markup_mode=None
)

# Options of `prune`, and of `recover`, that change how long a weight, or a step, takes.
PRUNING = (
    *("method", "pattern", "option", "preset", "initial", "reconstruct", "propagate"),
    *("calibration", "samples", "length", "seed", "device", "dtype"),
)
TRAINING = ("method", "batch", "length", "teacher", "mixed_precision", "device")


@app.command("prune", cls=Command)
@takes(PruneConfig, only=PRUNING)
def bench_prune(
    model: Model,
    repeat: Annotated[int, typer.Option(help="Runs of each; medians count.")] = 3,
    floor: Annotated[
        bool, typer.Option(help="Also run the plain forward (needs the model in memory).")
    ] = True,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the deleted output.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Time pruning against one plain forward over the same rows, and measure its peak memory.

    Example: sparsekit bench prune demo --samples 32 --length 512
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        config = read(PruneConfig, words)
        from sparsekit.bench.prune import bench_prune as stage

        name = named(model)
        result = stage(config, name, repeat=repeat, floor=floor, scratch=scratch, progress=progress)
        show_bench(terminal, result)


@app.command("recover", cls=Command)
@takes(RecoverConfig, only=TRAINING, defaults={"method": "fixed"})
def bench_recover(
    model: Model = "demo",
    steps: Annotated[int, typer.Option(help="Steps that are timed; the median counts.")] = 6,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Time training against the machine's rate of matrix products, and tell what it holds.

    Example: sparsekit bench recover demo
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(takes_less=SHORTER_ROWS) as progress:
        rows = RecoverConfig.defaults() | words
        config = read(RecoverConfig, words | {"tokens": rows["batch"] * rows["length"]})
        name = named(model)
        from sparsekit.recovery.speed import bench_recover as stage

        show_train_speed(terminal, stage(config, name, steps=steps, progress=progress))


@app.command("infer", cls=Command)
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
        from sparsekit.bench.infer import InferConfig
        from sparsekit.bench.infer import bench_infer as stage

        config = InferConfig(
            prompt=prompt,
            new=new,
            batch=batch,
            resident=resident,  # type: ignore[arg-type]  (check() refuses other words)
            device=device,
        )
        show_inference(terminal, stage(config, names, progress))


def show_inference(terminal: Terminal, result: dict[str, Any]) -> None:
    """What loading and running took; stdout has a line for each model, with tokens a second."""
    memory = {"resident_bytes": "MB resident", "peak_bytes": "MB peak"}
    if result["device"] == "cuda":
        memory |= {"device_bytes": "MB on the GPU", "device_peak_bytes": "MB peak there"}
    rows = [
        (
            row["model"],
            f"{row['disk_bytes'] / 1e6:.1f}",
            f"{row['load_seconds']:.1f}",
            *(f"{row[name] / 1e6:.0f}" for name in memory),
            f"{row['prefill']:.1f}",
            f"{row['decode']:.1f}",
        )
        for row in result["models"]
    ]
    same = "the same" if result["same_tokens"] else "different"
    terminal.table(
        f"prompt of {result['prompt']}, {result['new']} generated ({same} tokens), "
        f"{result['threads']} threads, {result['device']}",
        ("model", "MB on disk", "load s", *memory.values(), "prefill/s", "decode/s"),
        rows,
    )
    lines = (f"{row['model']}\t{row['decode']:.2f}" for row in result["models"])
    terminal.result("\n".join(lines), result)


def show_train_speed(terminal: Terminal, result: dict[str, Any]) -> None:
    """Speed of training as a share of the possible, and the parts of its memory."""
    terminal.table(
        f"{result['method']} on {result['model']}, {result['threads']} threads",
        ("tokens/s", "GFLOP/token", "matrix GFLOP/s", "share of the possible"),
        [
            (
                f"{result['tokens_per_second']:.1f}",
                f"{result['flop_per_token'] / 1e9:.3f}",
                f"{result['matrix_gflops']:.1f}",
                f"{result['share_of_the_possible']:.3f}",
            )
        ],
    )
    parts = [(name, f"{size / 1e6:.0f} MB") for name, size in result["bytes"].items()]
    terminal.table("memory", ("what", "size"), [*parts, ("peak", _megabytes(result))])
    terminal.result(f"{result['share_of_the_possible']:.3f}", result)


def _megabytes(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 1e6:.0f} MB"


def show_bench(terminal: Terminal, result: dict[str, Any]) -> None:
    """Times, their ratio, and memory."""
    ratio = result["ratio"]
    rows = [
        (
            "model",
            f"{result['model']}: {result['model_bytes'] / 1e9:.2f} GB, {result['blocks']} blocks",
        ),
        ("rows", "{} of {} tokens".format(*result["rows"])),
        ("prune s", " ".join(f"{s:.1f}" for s in result["prune_seconds"])),
        ("one forward s", " ".join(f"{s:.1f}" for s in result["floor_seconds"]) or "not run"),
        ("prune / forward", " ".join(f"{r:.2f}" for r in result["ratios"]) or "-"),
        ("their median", "-" if ratio is None else f"{ratio:.2f}"),
        ("solve s", f"{result['solve_seconds']:.1f}"),
        ("peak memory above start", f"{result['peak_bytes_above_start'] / 1e6:.0f} MB"),
        ("threads", result["threads"]),
    ]
    terminal.table(f"{result['method']} {result['pattern']}", ("", ""), rows)
    terminal.result("-" if ratio is None else f"{ratio:.3f}", result)
