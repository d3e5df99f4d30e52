"""The verbs of the command line. A command parses, calls one stage, and shows its report."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekit.cli import complete, streams
from sparsekit.cli.bench import app as bench
from sparsekit.cli.run import app as recipe
from sparsekit.cli.compare import compare, report
from sparsekit.cli.deploy import deploy
from sparsekit.cli.env import env, version_text
from sparsekit.cli.forms import convert, pack, unpack
from sparsekit.cli.look import inspect, verify
from sparsekit.cli.quantize import quantize
from sparsekit.cli.recover import recover
from sparsekit.cli.run import run
from sparsekit.cli.show import show_demo, show_methods, show_pruned, show_scores
from sparsekit.cli.showplan import show_plan
from sparsekit.cli.console import Terminal
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
from sparsekit.stages.config import BATCH_SIZE, PruneConfig
from sparsekit.stages.scores import require_own, save_scores
from sparsekit.stages.words import eval_config, prune_config

app = typer.Typer(
    help="Prune Hugging Face language-model checkpoints on disk, and know what it cost.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the versions.")] = False,
) -> None:
    if version:
        print(version_text())
        raise typer.Exit()


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
    from sparsekit.stages.plan import plan as stage

    show_plan(terminal, stage(config, *where, **how))


def _prune(terminal: Terminal, config: PruneConfig, *where: Any, **how: Any) -> None:
    """Make the run, and show what came of it."""
    from sparsekit.stages.prune import prune as stage

    show_pruned(terminal, stage(config, *where, **how))




def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids, 'demo' or - (stdin).")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text for perplexity: builtin (its held-out part), c4, wikitext2, a text file, or "
            "token rows in a .safetensors file. Default: builtin when no task is named.",
            autocompletion=complete.windows,
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
    batch_size: Annotated[
        int | None,
        typer.Option(help=f"Samples of a task in one forward pass. Default: {BATCH_SIZE}."),
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the scores beside each model, for compare.")
    ] = False,
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
        config = eval_config(
            text=text,
            length=length,
            tasks=tasks,
            include_path=include_path,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
        )
        names = [named(name) for name in models]
        base = named(baseline) if baseline else None
        if save:
            require_own(names)
        from sparsekit.stages.evaluate import evaluate as stage

        found = stage(config, names, base, progress)
        if save:
            save_scores(found[len(found) - len(names) :], names, config, base)
        show_scores(terminal, found, names)




def list_methods(json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """List the pruning methods with their sources, options and defaults.

    Example: sparsekit methods
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working():
        show_methods(terminal)


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
        name = named(model)
        from sparsekit.stages.demo import demo as stage

        show_demo(terminal, stage(name, out, progress), out)


for _verb in (prune, recover, quantize, pack, unpack, convert, deploy, run, env, compare, report):
    app.command()(_verb)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(verify)
app.command("methods")(list_methods)
app.command()(demo)
app.add_typer(bench, name="bench")
app.add_typer(recipe, name="recipe")


def main() -> None:
    """Run the command line in a process of its own."""
    stdout = streams.guard()
    try:
        # The name is the same under `python -m`, also in the variable of shell completion.
        app(prog_name="sparsekit")
    except SystemExit as end:
        raise SystemExit(streams.exit_code(stdout, end.code)) from None
