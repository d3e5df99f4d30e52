"""How each report looks: a table for people on stderr, and the one result on stdout."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsekit import methods as registry
from sparsekit.cli.showplan import plan_costs, plans_together
from sparsekit.cli.console import Terminal

if TYPE_CHECKING:
    from sparsekit.stages.demo import DemoRow
    from sparsekit.stages.evaluate import Score
    from sparsekit.stages.inspect import Inspection
    from sparsekit.stages.report import Report
    from sparsekit.stages.run import Done

TASK_COLUMNS = (
    *("model", "task", "version", "shots"),
    *("metric", "value", "stderr", "n", "difference"),
)


def show_run(terminal: Terminal, out: Path, done: Sequence["Done"], *, dry: bool) -> None:
    """What became of each step of a recipe; stdout gets the models that nothing else is made of."""
    models = [one for one in done if one.step.verb != "eval"]
    rows = [
        (
            *(one.step.name, one.step.verb, one.state, _seconds(one)),
            *(plan_costs(one.plan) if dry else ()),
            str(one.folder),
        )
        for one in done
    ]
    plans = [one.plan for one in done if one.plan is not None]
    if len(plans) > 1:
        rows.append((f"these {len(plans)} together", None, None, *plans_together(plans), None))
    title = "plan (nothing was written)" if dry else f"{out}"
    costs = ("to write", "memory") if dry else ()
    terminal.table(title, ("step", "verb", "", "seconds", *costs, "folder"), rows)
    parents = {one.step.parent for one in models}
    last = [str(one.folder) for one in models if one.step.name not in parents]
    if terminal.json or not dry:
        told = {"out": str(out), "steps": [one.to_json() for one in done]}
        terminal.result("\n".join(last), told)


def _seconds(done: "Done") -> str | None:
    if done.plan is not None and (seconds := done.plan.get("seconds_estimate")) is not None:
        return f"about {seconds:.0f}"
    return f"{done.seconds:.0f}" if done.state == "made" else None


def show_pruned(terminal: Terminal, report: "Report") -> None:
    """The outcome of `prune`, by kind of weight."""
    kinds = by_kind(report.entry["weights"])
    rows = [kind_row(name, group) for name, group in kinds.items()]
    rows.append(kind_row("all", report.entry["weights"]))
    recipe = report.entry["recipe"]
    if (bits := report.entry["totals"]["bits_per_weight"]) is not None:
        terminal.note(
            f"{bits:.2f} bits a weight as factors; zeros are those of the cores"
            + ("" if recipe["format"] == "factored" else ": the products on disk are not sparse")
        )
    terminal.table(
        f"{recipe['method']} {recipe['pattern']} {recipe['then'] or ''}".rstrip()
        + f" in {report.entry['seconds']:.0f} s",
        ("weights", "count", "zeros", "relative error", "worst", "solve s"),
        rows,
    )
    terminal.result(report.out, report.to_json())


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


def by_kind(weights: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of weights by the last part of their names."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in weights:
        kinds.setdefault(row["name"].removesuffix(".weight").rpartition(".")[2], []).append(row)
    return kinds


def kind_row(name: str, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Count, zeros, errors and seconds of the weights of one kind."""
    errors = [row["error"] for row in rows if row["error"] is not None]
    zeros = sum(row["zeros"] for row in rows) / sum(row["size"] for row in rows)
    return (
        name,
        len(rows),
        f"{zeros:.2%}",
        f"{sum(errors) / len(errors):.4f}" if errors else "-",
        f"{max(errors):.4f}" if errors else "-",
        f"{sum(row['seconds'] for row in rows):.1f}",
    )


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
                _paired(score.difference.get("log_perplexity")),
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
                        _paired(score.difference.get(f"{task.task}.{name}")),
                    )
                )
    if rows:
        terminal.table(f"lm-eval {_lm_eval_version()}", TASK_COLUMNS, rows)
    value = {"lm_eval": _lm_eval_version(), "models": [score.to_json() for score in scores]}
    terminal.result("\n".join(names), value)


def _paired(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    stderr = difference["stderr"]
    return f"{difference['value']:+.4f} ± " + ("-" if stderr is None else f"{stderr:.4f}")


def _lm_eval_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")


def show_inspection(terminal: Terminal, report: "Inspection") -> None:
    """Sparsity by block and by weight type, and the history."""
    columns = ("", "weights", "zeros", "sparsity", "pattern")
    for title, rows in (("by block", report.blocks), ("by weight type", report.types)):
        terminal.table(title, columns, [_sparsity_row(row) for row in [*rows, report.total]])
    steps = [
        (
            entry.get("stage"),
            " ".join(filter(None, map(entry.get("recipe", {}).get, ("method", "pattern", "grid")))),
            f"{entry.get('seconds', 0):.0f} s",
            entry.get("source", {}).get("path"),
        )
        for entry in report.history
    ]
    if steps:
        terminal.table("history", ("stage", "what", "time", "source"), steps)
    terminal.note(f"{report.model}: {report.n_bytes / 1e6:.1f} MB of weights")
    terminal.result(report.model, report.to_json())


def _sparsity_row(row: dict[str, Any]) -> tuple[Any, ...]:
    zeros = f"{row['zeros']:,}"
    return (row["name"], f"{row['size']:,}", zeros, f"{row['sparsity']:.2%}", row["pattern"])


def show_verified(terminal: Terminal, result: dict[str, Any]) -> None:
    """A check that held."""
    pattern = result["pattern"]
    named = pattern if isinstance(pattern, str) else ", ".join(pattern)
    terminal.note(
        f"{result['model']}: {result['weights']} weights are {named}, {result['zeros']:,} of "
        f"{result['size']:,} zero; {result['tensors']} tensors are finite"
    )
    terminal.result(result["model"], result)


def _needs(method: registry.Method) -> str:
    """What a method needs besides the weight."""
    if method.kind == "recoverers":
        return "text, the dense model"
    if method.initial:
        return f"calibration, {method.initial} (--initial)"
    return "nothing" if method.data_free else "calibration"


def show_methods(terminal: Terminal) -> None:
    """The methods; stdout has one name a line unless it is the terminal itself."""
    kinds = ("pruners", "refiners", "recoverers", "quantizers")
    found = [registry.describe(kind, name) for kind in kinds for name in registry.names(kind)]
    terminal.table(
        "methods of prune, of recover ("
        + ", ".join(registry.names("recoverers"))
        + ") and of quantize ("
        + ", ".join(registry.names("quantizers"))
        + ")",
        ("method", "what it does", "needs", "source"),
        [(m.name, m.summary, _needs(m), m.source) for m in found],
    )
    options = [(m.name, o.name, o.type, o.default, o.help) for m in found for o in m.options]
    terminal.table(
        "options (--option NAME=VALUE)", ("method", "name", "type", "default", ""), options
    )
    if terminal.json or terminal.quiet or not sys.stdout.isatty():
        names = "\n".join(m.name for m in found)
        terminal.result(names, [asdict(m) for m in found])


def show_demo(terminal: Terminal, rows: "Sequence[DemoRow]", out: Path) -> None:
    """The demo's table."""
    cells, values = [], []
    for row in rows:
        measured = row.score.perplexity
        assert measured is not None
        cells.append(
            (
                row.name,
                f"{measured.value:.2f}",
                _paired(row.score.difference.get("log_perplexity")),
                "" if row.seconds is None else f"{row.seconds:.0f} s",
            )
        )
        values.append({**row.score.to_json(), "prune_seconds": row.seconds})
    first = rows[0].score.perplexity
    assert first is not None
    title = f"perplexity on {first.text}: {first.windows} windows of {first.length} tokens"
    terminal.table(title, ("model", "perplexity", "log difference", "pruned in"), cells)
    terminal.result(out, {"out": str(out), "models": values})
