"""SVG charts with colours for light and dark pages."""

import io
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparsekit.reporting.curves import Curve
from sparsekit.scoring.standard_error import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Okabe and Ito's colours with enough contrast on white and on dark pages, and two more that
# colour-blind readers can distinguish from them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6B38", "#9B61F2")
# Text, axes and the dense model.
GREY = "#767676"
MARKERS = "os^DvPX"
DASHES = ("solid", "dashed", "dotted", "dashdot")
# Ratio of largest to smallest value above which an axis is logarithmic.
LOGARITHMIC = 5.0
# In inches of 72 points: the width of a phone, so that the text keeps its size there.
WIDTH, HEIGHT = 5.0, 3.1
# Width in characters and height in inches of a line of the legend.
LEGEND_CHARACTERS, LEGEND_HEIGHT = 60, 0.19
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsekit",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), GREY
    ),
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """Name, colour, marker and dashes of a model in all charts."""

    name: str
    colour: str
    marker: str
    dash: str


def styles(names: Sequence[str]) -> list[Style]:
    """Styles, all different up to 42; only the first six differ by colour alone."""
    return [
        Style(
            name=name,
            colour=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            dash=DASHES[index // len(COLOURS) % len(DASHES)],
        )
        for index, name in enumerate(names)
    ]


def scatter(
    points: Mapping[int, tuple[float | None, float]],
    best: Sequence[int],
    drawn: Sequence[Style],
    across: str,
    flat: Sequence[int] = (),
) -> str:
    """Perplexity against a cost.

    Args:
        points: Cost, if known, and perplexity of each model.
        best: Models joined by a line from left to right.
        drawn: Style of each model.
        across: Label of the cost axis.
        flat: Models whose perplexity is also drawn as a line over the whole width.
    """
    with _picture([drawn[model] for model in points]) as (axes, out):
        joined = sorted(points[model] for model in best)
        axes.plot(
            [x for x, _ in joined], [y for _, y in joined],
            color=GREY, linewidth=0.8, linestyle="dotted", drawstyle="steps-post",
        )  # fmt: skip
        for model, (x, y) in points.items():
            style = drawn[model]
            if x is None or model in flat:
                axes.axhline(y, color=style.colour, linestyle=style.dash, linewidth=1)
            if x is None:
                continue
            if model in best:
                axes.plot(x, y, marker="o", markersize=13, fillstyle="none", color=GREY)
            axes.plot(x, y, marker=style.marker, markersize=7, color=style.colour)
        _scale(axes, "x", [x for x, _ in points.values() if x is not None])
        _scale(axes, "y", [y for _, y in points.values()])
        axes.set_xlabel(across)
        axes.set_ylabel("perplexity")
    return out[0]


def lines(
    curves: Sequence[Curve], drawn: Sequence[Style], across: str, up: str, *, share: bool = False
) -> str:
    """Curves over the same axis; equal curves are one line, and curves of few points have markers.

    Args:
        curves: The lines.
        drawn: Style of each model.
        across: Label of the horizontal axis.
        up: Label of the vertical axis.
        share: Whether the vertical axis ranges from 0 to 1.
    """
    groups: dict[tuple[tuple[float, ...], tuple[float, ...]], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((tuple(curve.across), tuple(curve.up)), []).append(curve)
    legend = [
        replace(drawn[group[0].model], name=", ".join(drawn[curve.model].name for curve in group))
        for group in groups.values()
    ]
    with _picture(legend) as (axes, out):
        for (curve, *_), style in zip(groups.values(), legend, strict=True):
            few = len(curve.across) <= 40
            axes.plot(
                curve.across, curve.up, color=style.colour, linestyle=style.dash, linewidth=1.4,
                marker=style.marker if few else None, markersize=4,
            )  # fmt: skip
        if share:
            axes.set_ylim(0, 1)
        else:
            _scale(axes, "y", [value for curve in curves for value in curve.up])
        axes.xaxis.set_major_formatter(lambda value, _: plain(value))
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return out[0]


def bars(values: Mapping[str, Mapping[int, Figure]], drawn: Sequence[Style], across: str) -> str:
    """Bars of each model, grouped by name; whiskers are one standard error."""
    count = sum(map(len, values.values()))
    height = max(HEIGHT, 0.9 + 0.2 * count + 0.2 * len(values))
    models = dict.fromkeys(model for figures in values.values() for model in figures)
    with _picture([drawn[model] for model in models], height) as (axes, out):
        place, ticks = 0.0, []
        for figures in values.values():
            first = place
            for model, figure in figures.items():
                style = drawn[model]
                axes.barh(
                    place, figure.value, height=0.8, color=style.colour,
                    alpha=0.5 if style.colour == GREY else 1.0,
                    xerr=figure.stderr, ecolor=GREY, capsize=2,
                )  # fmt: skip
                axes.plot(0, place, marker=style.marker, markersize=5, color=GREY, clip_on=False)
                place += 1
            ticks.append((first + place - 1) / 2)
            place += 1
        axes.set_yticks(ticks, list(values))
        axes.tick_params(axis="y", length=0, pad=8)
        axes.set_ylim(place - 1, -1)
        axes.set_xlim(left=0)
        axes.set_xlabel(across)
        axes.grid(visible=False, axis="y")
    return out[0]


@contextmanager
def _picture(legend: Sequence[Style], height: float = HEIGHT) -> Iterator[tuple["Axes", list[str]]]:
    """Axes to draw on, and a list that receives the SVG text on exit."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], color=style.colour, marker=style.marker, linestyle=style.dash, markersize=5,
            label=textwrap.fill(" ".join(style.name.split()), LEGEND_CHARACTERS),
        )
        for style in legend
    ]  # fmt: skip
    height += LEGEND_HEIGHT * sum(handle.get_label().count("\n") + 1 for handle in handles)
    with matplotlib.rc_context(SETTINGS):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        axes, out = canvas.subplots(), []
        axes.grid(color=GREY, alpha=0.3, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes, out
        canvas.legend(
            handles=handles, loc="outside lower left", frameon=False, handlelength=2.6,
            labelspacing=0.25, borderpad=0,
        )  # fmt: skip
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    out.append(file.getvalue())


def _scale(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """Set the scale of an axis: logarithmic for a wide range, with plain labels."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low > 0 and high / low > LOGARITHMIC and math.isfinite(high):
        (axes.set_xscale if which == "x" else axes.set_yscale)("log")
        subs = (1, 2, 5) if high / low < 1000 else (1,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: plain(value))


def plain(value: float) -> str:
    """Short label of a number on an axis."""
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= bound:
            return f"{value / (1e3 if letter == 'K' else bound):.4g}{letter}"
    return f"{value:.4g}"
