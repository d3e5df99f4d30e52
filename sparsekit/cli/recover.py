"""The verb `recover`: its flags, and the configuration that they spell."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import SHORTER_ROWS, Terminal
from sparsekit.cli.options import (
    Debug,
    Device,
    DryRun,
    Form,
    Json,
    MixedPrecision,
    Model,
    Options,
    Overwrite,
    Quiet,
    Seed,
    Skip,
    Timed,
    named,
    refuse_early,
    refuse_timed,
)
from sparsekit.cli.plan import show_plan
from sparsekit.progress import Progress
from sparsekit.recovery.config import recover_config

if TYPE_CHECKING:
    from sparsekit.provenance.entry import Report
    from sparsekit.recovery.config import RecoverConfig


Method = Annotated[
    str,
    typer.Option(
        help="auto, fixed, ast or cast; auto is what was found best, ast.",
        autocompletion=complete.names("recoverers", before=("auto",)),
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="Text to train on: builtin, self (sampled from the teacher), c4, wikitext2, a "
        ".txt, .jsonl, .json.gz or .parquet file, or token rows in a .safetensors file.",
        autocompletion=complete.sources,
    ),
]
Tokens = Annotated[
    str | None, typer.Option(help="How many to train on, as 200K or 20M; or give --max-time.")
]
MaxTime = Annotated[
    str | None, typer.Option(help="Time that the run may take, as 30m; plans the steps.")
]
Teacher = Annotated[
    str | None, typer.Option(help="The dense model. Default: what MODEL was made from.")
]
PatternText = Annotated[
    str | None,
    typer.Option(
        help="As in prune. Default: that of MODEL, 2:4 for a dense one.",
        autocompletion=complete.patterns,
    ),
]
Metric = Annotated[
    str,
    typer.Option(
        help="What is kept: the largest by magnitude, or by activation (|w| times its input).",
        autocompletion=complete.words("magnitude", "activation"),
    ),
]
Batch = Annotated[int, typer.Option(help="Rows in one forward pass.")]
Length = Annotated[int, typer.Option(help="Tokens in a row.")]
Accumulate = Annotated[int, typer.Option(help="Forward passes in one step.")]
Rate = Annotated[
    float | None, typer.Option(help="Largest learning rate. Default: by method and size.")
]
Schedule = Annotated[
    str,
    typer.Option(
        help="flat, cosine, linear or constant. Default: by method.",
        autocompletion=complete.schedules,
    ),
]
Share = Annotated[
    float | None,
    typer.Option(help="Share of the loss that is KL from the teacher. Default: by size."),
]
Temperature = Annotated[float, typer.Option(help="Of the softmax in that KL.")]
TeacherTop = Annotated[
    int | None,
    typer.Option(help="Keep this many largest probabilities of the teacher on disk, as 64."),
]
Slorb = Annotated[
    int | None,
    typer.Option(help="Train low-rank branches too, one row for so many inputs, as 16."),
]
SaveEvery = Annotated[
    int | None, typer.Option(help="Steps between saved states. Default: ten minutes.")
]
EvalEvery = Annotated[
    int | None, typer.Option(help="Steps between perplexities of the sparse model.")
]
EvalText = Annotated[
    str | None,
    typer.Option(
        help="Text for them. Default: the held-out part of builtin.",
        autocompletion=complete.windows,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Type of weights in training: auto or float32.",
        autocompletion=complete.words("auto", "float32"),
    ),
]


def recover(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    method: Method = "auto",
    data: Data = "builtin",
    tokens: Tokens = None,
    max_time: MaxTime = None,
    teacher: Teacher = None,
    pattern: PatternText = None,
    option: Options = [],  # noqa: B006  (typer's form of a repeatable option)
    skip: Skip = [],  # noqa: B006  (the same)
    metric: Metric = "magnitude",
    batch: Batch = 2,
    length: Length = 512,
    accumulate: Accumulate = 1,
    lr: Rate = None,
    schedule: Schedule = "auto",
    share: Share = None,
    temperature: Temperature = 1.0,
    teacher_top: TeacherTop = None,
    slorb: Slorb = None,
    form: Form = "dense",
    save_every: SaveEvery = None,
    eval_every: EvalEvery = None,
    eval_text: EvalText = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    mixed_precision: MixedPrecision = "no",
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    timed: Timed = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train MODEL against its dense parent and write a checkpoint with exactly its pattern.

    Example: sparsekit recover pruned -o recovered --tokens 100K
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working(resumable=True, takes_less=SHORTER_ROWS) as progress:
        config = recover_config(
            method=method,
            data=data,
            tokens=tokens,
            max_time=max_time,
            teacher=None if teacher is None else named(teacher),
            pattern=pattern,
            option=option,
            skip=skip,
            metric=metric,
            batch=batch,
            length=length,
            accumulate=accumulate,
            lr=lr,
            schedule=schedule,
            share=share,
            temperature=temperature,
            teacher_top=teacher_top,
            slorb=slorb,
            format=form,
            save_every=save_every,
            eval_every=eval_every,
            eval_text=eval_text,
            seed=seed,
            device=device,
            dtype=dtype,
            mixed_precision=mixed_precision,
        )
        does = _verb(dry_run=dry_run, timed=timed)
        does(terminal, config, named(model), out, overwrite=overwrite, progress=progress)


def _verb(*, dry_run: bool, timed: bool) -> Callable[..., None]:
    """What is done with the configuration: a run, or the plan of one."""
    refuse_timed(dry_run=dry_run, timed=timed)
    return partial(_plan, timed=timed) if dry_run else _run


def _run(
    terminal: Terminal,
    config: "RecoverConfig",
    model: str,
    out: Path,
    *,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Call the stage, and show what it did in the process that writes."""
    refuse_early(model, out, overwrite=overwrite)
    from sparsekit.recovery.recover import recover as stage

    report = stage(config, model, out, overwrite=overwrite, progress=progress)
    if report is not None:
        show_recovered(terminal, report)


def _plan(terminal: Terminal, config: "RecoverConfig", *where: Any, **how: Any) -> None:
    """Show what a run would do; arguments as of `_run`."""
    refuse_early(*where, overwrite=how["overwrite"])
    from sparsekit.recovery.dry_run import plan_recover

    show_plan(terminal, plan_recover(config, *where, **how))


def show_recovered(terminal: Terminal, report: "Report") -> None:
    """The outcome of `recover`."""
    entry = report.entry
    flipped = sum(row["flipped"] for row in entry["weights"]) / entry["totals"]["size"]
    terminal.table(
        f"{entry['recipe']['method']} {entry['recipe']['pattern']} in {entry['seconds']:.0f} s",
        ("weights", "steps", "tokens", "zeros", "changed sides"),
        [
            (
                entry["totals"]["weights"],
                entry["plan"]["steps"],
                entry["tokens"],
                f"{entry['totals']['sparsity']:.2%}",
                f"{flipped:.2%}",
            )
        ],
    )
    if (kept := entry["kept_mass"]) is not None:
        terminal.note(f"the loss looked at {kept:.2%} of the teacher's mass")
    terminal.result(report.out, report.to_json())
