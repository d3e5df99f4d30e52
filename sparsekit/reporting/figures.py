"""The pictures of a report's page, each with its heading and the key to its models."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from sparsekit.reporting.compare import Comparison
from sparsekit.reporting.drawing import INK, Style, bars, key, lines, numbered, scatter, styles
from sparsekit.reporting.table import BEST, short
from sparsekit.reporting.traces import Trace, errors_by_block, sparsity_by_block, trainings
from sparsekit.scoring.quality import Windows, headings, perplexity_of

ZEROS = "share of zeros"
ERROR = "Of the output on calibration tokens, a mean over the weights of a block."
QUICKEST = "no other model took less time and is at least as good, or is better and took no longer"
STAGES = {"prune": "pruning", "recover": "training", "quantize": "quantization"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture with its words."""

    title: str
    svg: str
    models: Sequence[tuple[int, ...]]
    """What the key tells: models that are drawn as one line, or one by one."""
    text: str = ""
    """What has to be known of it."""


def figures(comparison: Comparison) -> str:
    """All pictures as HTML, under the headings of what they show."""
    drawn = _styles(comparison)
    sections = {
        "Quality against size and cost": _quality(comparison, drawn),
        "By block": _blocks(comparison, drawn),
        "Training": _training(comparison, drawn),
        "Zero-shot accuracy": _zero_shot(comparison, drawn),
    }
    parts, number = [], 0
    for title, drawings in sections.items():
        shown = []
        for drawing in drawings:
            number += 1
            shown.append(_figure(comparison, drawing, drawn, number))
        if shown:
            inside = "\n".join(shown)
            parts.append(
                f'<section>\n<h2>{title}</h2>\n<div class="figures">\n{inside}\n</div>\n</section>'
            )
    return "\n".join(parts)


def _styles(comparison: Comparison) -> list[Style]:
    """The style of each model; what was not made by any stage is drawn as the axes are."""
    made = iter(styles(len(comparison.rows)))
    plain = Style(colour=INK, marker="o", dash="dashed")
    return [next(made) if row.history else plain for row in comparison.rows]


def _figure(comparison: Comparison, drawing: Drawing, drawn: Sequence[Style], number: int) -> str:
    """A picture as HTML."""
    names = [", ".join(comparison.rows[model].name for model in group) for group in drawing.models]
    signs = [key(drawn[group[0]]) for group in drawing.models]
    items = "".join(
        f"<li>{sign}{escape(name)}</li>" for sign, name in zip(signs, names, strict=True)
    )
    text = f"<p>{escape(drawing.text)}</p>" if drawing.text else ""
    title = escape(drawing.title)
    return (
        f"<figure>\n<figcaption>{title}</figcaption>\n{numbered(drawing.svg, number, title)}\n"
        f'<ul class="key">{items}</ul>\n{text}</figure>'
    )


def _quality(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """For all windows, perplexity against size and time."""
    rows = comparison.rows
    sizes = [None if row.n_bytes is None else row.n_bytes / 1e6 for row in rows]
    seconds = [row.seconds for row in rows]
    for windows, title in zip(comparison.windows, headings(comparison.windows), strict=True):
        values = _perplexities(comparison, windows)
        best, quickest = (
            [model for model, marked in enumerate(marks) if marked and model in values]
            for marks in (comparison.best(windows), comparison.best_by_time(windows))
        )
        if any(sizes[model] for model in values):
            points = {m: (sizes[m], value) for m, value in values.items() if sizes[m] is not None}
            yield Drawing(
                title=f"Perplexity ({title}) against size",
                svg=scatter(points, best, drawn, "size on disk, MB"),
                models=[(model,) for model in points],
                text=f"Ringed: {BEST}.",
            )
        if any(seconds[model] for model in values):
            points = {
                model: (seconds[model], value)
                for model, value in values.items()
                if seconds[model] is not None or not rows[model].history
            }
            told = [f"Ringed: {QUICKEST}."]
            if any(x is None for x, _ in points.values()):
                told.append("A line over the whole width: the model was not made here.")
            yield Drawing(
                title=f"Perplexity ({title}) against cost",
                svg=scatter(points, quickest, drawn, "seconds of all stages"),
                models=[(model,) for model in points],
                text=" ".join(told),
            )


def _perplexities(comparison: Comparison, windows: Windows) -> dict[int, float]:
    """The perplexity of each model that has one that can be drawn."""
    told = {
        model: perplexity_of(row.quality[windows].figure.value)
        for model, row in enumerate(comparison.rows)
        if windows in row.quality
    }
    return {model: value for model, value in told.items() if math.isfinite(value)}


def _blocks(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Errors and zeros by block."""
    for stage, traces in errors_by_block(comparison.rows).items():
        title = f"Relative error of {STAGES.get(stage, stage)}"
        yield _traced(title, traces, drawn, "block", "relative error", ERROR)
    if traces := sparsity_by_block(comparison.rows):
        yield _traced("Sparsity", traces, drawn, "block", ZEROS)


def _training(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Losses, perplexities and mask changes; those on different texts in pictures of their own."""
    logs = trainings(comparison.rows)
    for text in dict.fromkeys(log.text for log in logs):
        for name, what in (("divergence", "KL from the teacher"), ("entropy", "Cross entropy")):
            losses = [log.losses(name) for log in logs if log.text == text]
            title = f"{what} on {short(text) or 'the training text'}"
            yield from _drawn(title, losses, drawn, "nats per token")
    for text in dict.fromkeys(row.get("evaluated_on", "") for log in logs for row in log.measured):
        title = f"Perplexity on the way ({text or 'text not told'})"
        yield from _drawn(title, [log.perplexities(text) for log in logs], drawn, "perplexity")
    flips = [log.flips() for log in logs]
    yield from _drawn("Mask entries that changed sides", flips, drawn, "entries in a selection")


def _drawn(
    title: str, traces: Sequence[Trace | None], drawn: Sequence[Style], up: str
) -> Iterator[Drawing]:
    """A picture of training, if there is anything to draw."""
    if there := [trace for trace in traces if trace is not None]:
        yield _traced(title, there, drawn, "tokens", up)


def _zero_shot(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """For all sets of tasks the accuracy in each."""
    for tasks, title in zip(comparison.task_sets, headings(comparison.task_sets), strict=True):
        models = [m for m, row in enumerate(comparison.rows) if tasks in row.quality]
        values = {
            sample.task: {m: comparison.rows[m].quality[tasks].tasks[sample.task] for m in models}
            for sample in tasks.tasks
        }
        yield Drawing(
            title="Accuracy by task",
            svg=bars(values, drawn, "accuracy"),
            models=[(model,) for model in models],
            text=f"{title}. Whiskers are one standard error.",
        )


def _traced(
    title: str,
    traces: Sequence[Trace],
    drawn: Sequence[Style],
    across: str,
    up: str,
    text: str = "",
) -> Drawing:
    """A picture of lines, with one line for all models whose lines are the same."""
    groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Trace]] = {}
    for trace in traces:
        groups.setdefault((tuple(trace.across), tuple(trace.up)), []).append(trace)
    return Drawing(
        title=title,
        svg=lines([g[0] for g in groups.values()], drawn, across, up, share=up == ZEROS),
        models=[tuple(trace.model for trace in group) for group in groups.values()],
        text=text,
    )
