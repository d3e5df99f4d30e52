"""The verb `eval`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsekit.cli import complete
from sparsekit.cli.console import Terminal, paired_text
from sparsekit.cli.options import Debug, Device, Dtype, Json, Quiet, Seed, named
from sparsekit.scoring.config import BATCH_SIZE, eval_config
from sparsekit.scoring.saved_scores import require_own, save_scores

if TYPE_CHECKING:
    from sparsekit.scoring.evaluate import Score


TASK_COLUMNS = (
    *("model", "task", "version", "shots"),
    *("metric", "value", "stderr", "n", "difference"),
)


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
        from sparsekit.scoring.evaluate import evaluate as stage

        found = stage(config, names, base, progress)
        if save:
            save_scores(found[len(found) - len(names) :], names, config, base)
        show_scores(terminal, found, names)


def show_scores(terminal: Terminal, scores: "Sequence[Score]", names: Sequence[str]) -> None:
    """One table for perplexity and one for tasks, all models together."""
    measured = [score for score in scores if score.perplexity]
    if measured:
        rows = [
            (
                score.model,
                score.perplexity.windows,
                score.perplexity.length,
                f"{score.perplexity.value:.3f}",
                f"{score.perplexity.log:.4f}",
                paired_text(score.difference.get("log_perplexity")),
            )
            for score in measured
            if score.perplexity
        ]
        title = f"perplexity on {measured[0].perplexity.text}"
        columns = ("model", "windows", "of tokens", "perplexity", "log", "log difference")
        terminal.table(title, columns, rows)
    rows = []
    for score in scores:
        for task in score.tasks:
            for name, metric in task.metrics.items():
                rows.append(
                    (
                        score.model,
                        task.task,
                        task.version,
                        task.n_shot,
                        name,
                        f"{metric.value:.4f}",
                        "-" if metric.stderr is None else f"{metric.stderr:.4f}",
                        task.n,
                        paired_text(score.difference.get(f"{task.task}.{name}")),
                    )
                )
    if rows:
        terminal.table(f"lm-eval {_lm_eval_version()}", TASK_COLUMNS, rows)
    value = {"lm_eval": _lm_eval_version(), "models": [score.to_json() for score in scores]}
    terminal.result("\n".join(names), value)


def _lm_eval_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")
