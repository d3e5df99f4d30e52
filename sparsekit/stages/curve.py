"""The picture of a training run: losses, perplexity and mask changes against tokens."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

# Losses are drawn as means over so many points at most, so that a long run stays readable.
POINTS = 200
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


def draw(log: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of a log's rows; pictures of the same rows are the same bytes.

    Args:
        log: A row for each step, as of `StepRow`, some with `perplexity` and `evaluated_on`, the
            text of it; one of step 0 has nothing else.
        title: Stands above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [row for row in log if "perplexity" in row]
    log = [row for row in log if row["step"]]  # before the first one there are no losses
    selected = any(row["flips"] for row in log)
    figure = Figure(figsize=(7, 2.2 * (1 + bool(measured) + selected) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1 + bool(measured) + selected, sharex=True, squeeze=False)[:, 0])
    losses = next(axes)
    for name, colour, label in (
        ("divergence", BLUE, "KL from the teacher"),
        ("entropy", ORANGE, "CE with the text"),
    ):
        tokens, values = smoothed(log, name)
        if any(values):  # no line for a divergence that was not computed
            losses.plot(tokens, values, color=colour, label=label)
    losses.set_ylabel("nats per token")
    losses.legend(frameon=False)
    losses.set_title(title, loc="left", fontsize="medium")
    last = losses
    if measured:
        last = next(axes)
        points = [row["tokens"] for row in measured], [row["perplexity"] for row in measured]
        last.plot(*points, color=GREEN, marker="o", markersize=3)
        last.set_ylabel("perplexity")
        texts = dict.fromkeys(row.get("evaluated_on", "") for row in measured)
        last.set_title(", ".join(texts), loc="left", fontsize="small")
    if selected:
        last = next(axes)
        flips = [row for row in log if row["flips"]]
        last.plot([r["tokens"] for r in flips], [r["flips"] for r in flips], ".", color=BLUE)
        last.set_ylabel("mask entries changed")
    last.set_xlabel("tokens")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    return file.getvalue()


def smoothed(
    log: Sequence[Mapping[str, Any]], name: str, points: int = POINTS
) -> tuple[list[float], list[float]]:
    """Tokens and values of a column, as means of neighbours where there are more than `points`."""
    width = -(-len(log) // points)
    tokens, values = [], []
    for start in range(0, len(log), width):
        part = log[start : start + width]
        tokens.append(sum(row["tokens"] for row in part) / len(part))
        values.append(sum(row[name] for row in part) / len(part))
    return tokens, values
