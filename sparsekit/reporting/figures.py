"""Charts of a report, with headings."""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from sparsekit.reporting.compare import Comparison
from sparsekit.reporting.curves import Curve, errors_by_block, sparsity_by_block, trainings
from sparsekit.reporting.drawing import GREY, Style, bars, lines, scatter, styles
from sparsekit.reporting.table import BEST, short
from sparsekit.scoring.quality import Windows, headings, perplexity_of

ERROR = "Relative error of the output on calibration tokens, mean over the weights of a block."
QUICKEST = "no other model is faster and at least as good, or better and at least as fast"
UNMADE = "Dashed line over the whole width: a model that was not made here."
# Training curves with fewer points have no chart.
FEWEST_POINTS = 10
STAGES = {"prune": "pruning", "recover": "training", "quantize": "quantization"}


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One chart with its title and text."""

    title: str
    svg: str
    text: str = ""
    """Explanation below the chart."""


def figures(comparison: Comparison) -> str:
    """All charts as HTML, by section."""
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
    """Style of each model; models without a history are grey."""
    coloured = iter(styles([row.name for row in comparison.rows if row.history]))
    return [
        next(coloured)
        if row.history
        else Style(name=row.name, colour=GREY, marker="o", dash="dashed")
        for row in comparison.rows
    ]


def _figure(drawing: Drawing) -> str:
    """A chart as HTML; it is embedded as an image, which isolates it from the page."""
    text = f"<p>{escape(drawing.text)}</p>" if drawing.text else ""
    title = escape(drawing.title)
    data = base64.b64encode(drawing.svg.encode()).decode()
    return (
        f"<figure>\n<figcaption>{title}</figcaption>\n"
        f'<img alt="{title}" src="data:image/svg+xml;base64,{data}">\n{text}</figure>'
    )


def _quality(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Perplexity against size and time, for each key."""
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
        for costs, name, across, marked, meaning in (
            (sizes, "size", "size on disk, MB", best, BEST),
            (seconds, "cost", "seconds of all stages", quickest, QUICKEST),
        ):
            if not any(costs[model] for model in values):
                continue
            points = {
                model: (costs[model], value)
                for model, value in values.items()
                if costs[model] is not None or model in flat
            }
            yield Drawing(
                title=f"Perplexity ({title}) against {name}",
                svg=scatter(points, marked, drawn, across, flat),
                text=f"Ringed: {meaning}." + (f" {UNMADE}" if flat else ""),
            )


def _perplexities(comparison: Comparison, windows: Windows) -> dict[int, float]:
    """Finite perplexity of each model that has one."""
    values = {
        model: perplexity_of(row.quality[windows].figure.value)
        for model, row in enumerate(comparison.rows)
        if windows in row.quality
    }
    return {model: value for model, value in values.items() if math.isfinite(value)}


def _blocks(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Output errors and sparsity by block."""
    for stage, curves in errors_by_block(comparison.rows).items():
        title = f"Output error of {STAGES.get(stage, stage)}"
        yield Drawing(title=title, svg=lines(curves, drawn, "block", "output error"), text=ERROR)
    curves = sparsity_by_block(comparison.rows)
    if len({round(share, 3) for curve in curves for share in curve.up}) > 1:
        svg = lines(curves, drawn, "block", "share of zeros", share=True)
        yield Drawing(title="Sparsity", svg=svg)


def _training(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Losses, perplexities and mask changes, with one chart for each text."""
    logs = trainings(comparison.rows)
    for text in dict.fromkeys(log.text for log in logs):
        for name, label in (("divergence", "KL from the teacher"), ("entropy", "Cross entropy")):
            losses = [log.losses(name) for log in logs if log.text == text]
            title = f"{label} on {short(text) or 'the training text'}"
            yield from _drawn(title, losses, drawn, "nats per token")
    for text in dict.fromkeys(row.get("evaluated_on", "") for log in logs for row in log.measured):
        title = f"Perplexity during training ({text or 'unknown text'})"
        yield from _drawn(title, [log.perplexities(text) for log in logs], drawn, "perplexity")
    changes = [log.mask_changes() for log in logs]
    yield from _drawn("Mask changes", changes, drawn, "entries per selection")


def _drawn(
    title: str, curves: Sequence[Curve | None], drawn: Sequence[Style], up: str
) -> Iterator[Drawing]:
    """A chart of training, if any curve has enough points."""
    known = [curve for curve in curves if curve is not None]
    if any(len(curve.up) >= FEWEST_POINTS for curve in known):
        yield Drawing(title=title, svg=lines(known, drawn, "tokens", up))


def _zero_shot(comparison: Comparison, drawn: Sequence[Style]) -> Iterator[Drawing]:
    """Accuracy by task, for each key."""
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
