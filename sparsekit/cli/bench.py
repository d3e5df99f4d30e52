"""Verb `bench`: time and memory of sparsekit itself."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import SHORTER_ROWS, Terminal
from sparsekit.cli.options import Debug, Device, Json, Model, Quiet, named
from sparsekit.cli.verb import Command, Group, read, takes
from sparsekit.pruning.config import PruneConfig
from sparsekit.recovery.config import RecoverConfig

app = typer.Typer(
    cls=Group,
    help="Measure time and memory of sparsekit itself.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

# Options of `prune` and `recover` that change how long a weight or a step takes.
PRUNING = (
    *("method", "pattern", "option", "preset", "initial", "reconstruct", "propagate"),
    *("calibration", "samples", "length", "seed", "device", "dtype"),
)
TRAINING = ("method", "batch", "length", "teacher", "mixed_precision", "device")


@app.command("prune", cls=Command)
@takes(PruneConfig, only=PRUNING)
def bench_prune(
    model: Model,
    repeat: Annotated[int, typer.Option(help="Runs of each; the result is the median.")] = 3,
    floor: Annotated[
        bool, typer.Option(help="Also time a plain forward pass; needs the whole model in memory.")
    ] = True,
    scratch: Annotated[Path | None, typer.Option(help="Folder for the temporary output.")] = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Time pruning against one plain forward pass over the same rows; measure peak memory.

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
    steps: Annotated[int, typer.Option(help="Steps to time; the result is the median.")] = 6,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Time training against the machine's matrix products; measure its memory.

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
    prompt: Annotated[int, typer.Option(help="Tokens per prompt.")] = 256,
    new: Annotated[int, typer.Option(help="Tokens to generate, one at a time.")] = 32,
    batch: Annotated[int, typer.Option(help="Prompts per pass.")] = 1,
    resident: Annotated[
        str,
        typer.Option(
            help="packed: keep weights as on disk; expand: make them dense on loading.",
            autocompletion=complete.words("packed", "expand"),
        ),
    ] = "packed",
    device: Device = "auto",
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time loading, prompt and generation of MODELS; measure their memory.

    Example: sparsekit bench infer pruned packed
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(takes_less="a smaller --prompt or --batch takes less") as progress:
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
    """Show time and memory; stdout has one line per model with tokens per second."""
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
    """Show the speed of training as a share of the possible, and its memory."""
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
    terminal.table("memory", ("part", "size"), [*parts, ("peak", _megabytes(result))])
    terminal.result(f"{result['share_of_the_possible']:.3f}", result)


def _megabytes(result: dict[str, Any]) -> str:
    return f"{result['peak_bytes'] / 1e6:.0f} MB"


def show_bench(terminal: Terminal, result: dict[str, Any]) -> None:
    """Show times, their ratio, and memory."""
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
