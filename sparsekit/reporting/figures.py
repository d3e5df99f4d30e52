"""The pictures of a report's page, each with its heading."""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from sparsekit.reporting.compare import Comparison
from sparsekit.reporting.drawing import GREY, Style, bars, lines, scatter, styles
from sparsekit.reporting.table import BEST, short
from sparsekit.reporting.traces import Trace, errors_by_block, sparsity_by_block, trainings
from sparsekit.scoring.quality import Windows, headings, perplexity_of

ERROR = "Of the output on calibration tokens, a mean over the weights of a block."
QUICKEST = "no other model took less time and is at least as good, or is better and took no longer"
UNMADE = "A dashed line over the whole width: a model that was not made here."
# Lines of training with fewer points than this are not worth a picture.
FEWEST_POINTS = 10
STAGES = {"prune": "pruning", "recover": "training", "quantize": "quantization"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One picture with its words."""

    title: str
    svg: str
    text: str = ""
    """What a reader of it has to know."""


def figures(comparison: Comparison) -> str:
    """All pictures as HTML, under the headings of what they show."""
    drawn = _styles(comparison)
    sections = {
        "Quality against size and cost": _quality(comparison, drawn),
        "By block": _blocks(comparison, drawn),
        "Training": _training(comparison, drawn),
        "Zero-shot accuracy": _zero_shot(comparison, drawn),
    }
    return "\n".join(
        f'<section>\n<h2>{title}</h2>\n<div class="figures">\n{inside}\n</div>\n</section>'
        for title, drawings in sections.items()
        if (inside := "\n".join(map(_figure, drawings)))
    )


def _styles(comparison: Comparison) -> list[Style]:
    """The style of each model; what was not made by any stage is drawn as the axes are."""
    made = iter(styles([row.name for row in comparison.rows if row.history]))
    return [
        next(made) if row.history else Style(name=row.name, colour=GREY, marker="o", dash="dashed")
        for row in comparison.rows
    ]


def _figure(drawing: Drawing) -> str:
    """A picture as HTML; as an image of its own, nothing in it can act on the page."""
    text = f"<p>{escape(drawing.text)}</p>" if drawing.text else ""
    title = escape(drawing.title)
    data = base64.b64encode(drawing.svg.encode()).decode()
    return (
        f"<figure>\n<figcaption>{title}</figcaption>\n"
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">\n{text}</figure>'
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
        flat = [model for model in values if not rows[model].history]
        for taken, what, across, marked, meaning in (
            (sizes, "size", "size on disk, MB", best, BEST),
            (seconds, "cost", "seconds of all stages", quickest, QUICKEST),
        ):
            if not any(taken[model] for model in values):
                continue
            points = {
                model: (taken[model], value)
                for model, value in values.items()
                if taken[model] is not None or model in flat
            }
            yield Drawing(
                title=f"Perplexity ({title}) against {what}",
                svg=scatter(points, marked, drawn, across, flat),
                text=f"Ringed: {meaning}." + (f" {UNMADE}" if flat else ""),
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
        yield Drawing(title=title, svg=lines(traces, drawn, "block", "relative error"), text=ERROR)
    traces = sparsity_by_block(comparison.rows)
    if len({round(share, 3) for trace in traces for share in trace.up}) > 1:
        svg = lines(traces, drawn, "block", "share of zeros", share=True)
        yield Drawing(title="Sparsity", svg=svg)


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
    """A picture of training, if any line has enough points."""
    there = [trace for trace in traces if trace is not None]
    if any(len(trace.up) >= FEWEST_POINTS for trace in there):
        yield Drawing(title=title, svg=lines(there, drawn, "tokens", up))


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
            text=f"{title}. Whiskers are one standard error.",
        )
