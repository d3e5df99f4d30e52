"""Verb `eval`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsekit.cli.console import Terminal, paired_text
from sparsekit.cli.options import RUNNING, Debug, Json, Quiet, named
from sparsekit.cli.verb import read, takes
from sparsekit.scoring.config import EvalConfig
from sparsekit.scoring.saved_scores import require_own, save_scores

if TYPE_CHECKING:
    from sparsekit.scoring.evaluate import Score


TASK_COLUMNS = (
    *("model", "task", "version", "shots"),
    *("metric", "value", "stderr", "n", "difference"),
)


@takes(EvalConfig)
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Folders, hub ids, 'demo' or - (stdin).")],
    save: Annotated[
        bool,
        typer.Option(
            "--save",
            help="Store the scores with each model, for compare and report.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
    **words: Any,
) -> None:
    """Measure perplexity and zero-shot scores of one or more models.

    Example: sparsekit eval pruned --baseline demo --text builtin --length 512 --limit 16
    """
    terminal = Terminal(json=json, quiet=quiet, debug=debug)
    with terminal.working() as progress:
        config = read(EvalConfig, words)
        names = [named(name) for name in models]
        if save:
            require_own(names)
        from sparsekit.scoring.evaluate import evaluate as stage

        scores = stage(config, names, config.baseline, progress)
        if save:
            save_scores(scores[len(scores) - len(names) :], names, config, config.baseline)
        show_scores(terminal, scores, names)


def show_scores(terminal: Terminal, scores: "Sequence[Score]", names: Sequence[str]) -> None:
    """Show one table of perplexities and one of tasks."""
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
        columns = ("model", "windows", "tokens each", "perplexity", "log", "log difference")
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
