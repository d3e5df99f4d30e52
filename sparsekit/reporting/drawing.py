"""Pictures as SVG for a page: its text and lines take the colour of the text around them."""

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsekit.reporting.traces import Trace
from sparsekit.scoring.standard_error import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


# Okabe and Ito's colours that stand out from a white page and from a dark one, and two more that
# do, which the colour-blind can tell from them and from each other.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#8C6B38", "#9B61F2")
MARKERS = "os^DvPX"
# The same in a box of 28 by 12.
SHAPES = (
    "M14 2a4 4 0 1 0 .01 0z",
    "M10 2h8v8h-8z",
    "M14 1l5 9h-10z",
    "M14 1l5 5-5 5-5-5z",
    "M14 11l5-9h-10z",
    "M12.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "M11 1l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
)
DASHES = ("solid", "dashed", "dotted", "dashdot")
# What matplotlib draws in black becomes the colour of the page's text.
INK = "#000000"
# The largest value of an axis as a multiple of the smallest, from which it is logarithmic.
LOGARITHMIC = 5.0
# In inches of 72 points: as wide as a phone, so that the text keeps its size there.
WIDTH, HEIGHT = 5.0, 3.1
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sparsekit",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a model is drawn in every picture."""

    colour: str
    marker: str
    dash: str


def styles(count: int) -> list[Style]:
    """So many styles that all differ, up to 42; colours alone differ only in the first six."""
    return [
        Style(
            colour=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            dash=DASHES[index // len(COLOURS) % len(DASHES)],
        )
        for index in range(count)
    ]


def scatter(
    points: Mapping[int, tuple[float | None, float]],
    best: Sequence[int],
    drawn: Sequence[Style],
    across: str,
) -> str:
    """Perplexity against what it takes.

    Args:
        points: For each model what it takes, and its perplexity; a line over the whole width
            where the first is None.
        best: The models that a line joins from left to right.
        drawn: The style of each model.
        across: What the first numbers are.
    """
    with _picture() as (axes, out):
        joined = sorted(points[model] for model in best)
        axes.plot(
            [x for x, _ in joined], [y for _, y in joined],
            color=INK, linewidth=0.8, linestyle="dashed", drawstyle="steps-post",
        )  # fmt: skip
        for model, (x, y) in points.items():
            style = drawn[model]
            if x is None:
                axes.axhline(y, color=style.colour, linestyle=style.dash, linewidth=1)
                continue
            if model in best:
                axes.plot(x, y, marker="o", markersize=13, fillstyle="none", color=INK)
            axes.plot(x, y, marker=style.marker, markersize=7, color=style.colour)
        _scale(axes, "x", [x for x, _ in points.values() if x is not None])
        _scale(axes, "y", [y for _, y in points.values()])
        axes.set_xlabel(across)
        axes.set_ylabel("perplexity")
    return out[0]


def lines(
    traces: Sequence[Trace], drawn: Sequence[Style], across: str, up: str, *, share: bool = False
) -> str:
    """Traces over the same axis; markers show where few points are.

    Args:
        traces: The lines.
        drawn: The style of each model.
        across: What is across.
        up: What is up.
        share: Whether that is a share of a whole, so that the axis goes from 0 to 1.
    """
    with _picture() as (axes, out):
        for trace in traces:
            style = drawn[trace.model]
            few = len(trace.across) <= 40
            axes.plot(
                trace.across, trace.up, color=style.colour, linestyle=style.dash, linewidth=1.4,
                marker=style.marker if few else None, markersize=4,
            )  # fmt: skip
        if share:
            axes.set_ylim(0, 1)
        else:
            _scale(axes, "y", [value for trace in traces for value in trace.up])
        axes.xaxis.set_major_formatter(lambda value, _: plain(value))
        axes.set_xlabel(across)
        axes.set_ylabel(up)
    return out[0]


def bars(values: Mapping[str, Mapping[int, Figure]], drawn: Sequence[Style], across: str) -> str:
    """A group of bars for each name, with a bar for each model; whiskers are one standard error."""
    count = sum(map(len, values.values()))
    height = max(HEIGHT, 0.9 + 0.2 * count + 0.2 * len(values))
    with _picture(height) as (axes, out):
        place, ticks = 0.0, []
        for figures in values.values():
            first = place
            for model, figure in figures.items():
                style = drawn[model]
                axes.barh(
                    place, figure.value, height=0.8, color=style.colour,
                    alpha=0.5 if style.colour == INK else 1.0,
                    xerr=figure.stderr, ecolor=INK, capsize=2,
                )  # fmt: skip
                axes.plot(
                    0.0, place, marker=drawn[model].marker, markersize=5, color=INK, clip_on=False
                )
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
def _picture(height: float = HEIGHT) -> Iterator[tuple["Axes", list[str]]]:
    """Axes to draw on, and where the picture will be when that is done."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(SETTINGS):
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(canvas)
        axes, out = canvas.subplots(), []
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes, out
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    out.append(_inline(file.getvalue()))


def _scale(axes: "Axes", which: str, values: Sequence[float]) -> None:
    """A logarithmic axis for values that are far apart, labelled with plain numbers."""
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
    """A number as short as an axis needs it."""
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= bound:
            return f"{value / (1e3 if letter == 'K' else bound):.4g}{letter}"
    return f"{value:.4g}"


def _inline(svg: str) -> str:
    """An SVG file as a part of a page: without addresses, and in the page's colour and type."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| width="[^"]*pt"| height="[^"]*pt"', "", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace("xlink:href=", "href=").replace(INK, "currentColor")
    return re.sub(r"\n\s*", "\n", svg)


def numbered(svg: str, number: int, title: str) -> str:
    """A picture whose ids are its own on a page with others.

    Args:
        svg: The picture.
        number: Its number on the page.
        title: What it shows, as escaped text, for those who do not see it.
    """
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>p{number}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def key(style: Style) -> str:
    """The sign of a style, to stand before the name of its model."""
    dash = dict(zip(DASHES, ("none", "5 3", "1 3", "5 2 1 2"), strict=True))[style.dash]
    shape = dict(zip(MARKERS, SHAPES, strict=True))[style.marker]
    colour = style.colour.replace(INK, "currentColor")
    return (
        f'<svg class="sign" viewBox="0 0 28 12" aria-hidden="true" style="color: {colour}">'
        f'<path d="M0 6h28" stroke="currentColor" stroke-dasharray="{dash}" stroke-width="1.4"/>'
        f'<path d="{shape}" fill="currentColor"/></svg>'
    )
