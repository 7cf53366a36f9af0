"""Plots as inline SVG, whose text is text and whose colours are the page's own: light, dark and on paper."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis as PlotAxis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

# What matplotlib draws in these becomes the variable --NAME of page.css: one drawing serves every colour scheme.
_COLORS = {
    "muted": "#000001",
    "rule": "#000002",
    **{f"series-{number}": f"#00001{number}" for number in range(1, 7)},
}
NUM_SERIES = 6
# In CSS pixels where a figure has the width it is drawn for, two to a row; a phone shows nearly that width.
_WIDTH, _HEIGHT, _FONT_SIZE = 440, 264, 12.5
_MOST_POINTS = 400
_MARKERS, _MOST_MARKERS = "oDs^vP", 40
_PLAIN_TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Axis:
    """`log`: a logarithmic scale where the values span more than a factor of two. `low`, `high`: the range, if given;
    `percent`: shares from 0 to 1 are written as such."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    percent: bool = False


@dataclass(frozen=True)
class Curve:
    """`series`: its colour, 1 to NUM_SERIES. `label` stands at its end."""

    x: Sequence[float]
    y: Sequence[float]
    series: int
    kind: Literal["line", "faint", "points", "level"] = "line"
    label: str = ""


def draw(name: str, title: str, curves: Sequence[Curve], *, x: Axis, y: Axis) -> str:
    """Returns an <svg>: the same values give the same bytes. `name` keeps its ids apart from other figures'."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "tinystories_jax", "font.size": _FONT_SIZE})
        figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        for curve in curves:
            _draw_curve(axes, curve)
        _set_up(axes, axes.xaxis, x)
        _set_up(axes, axes.yaxis, y)
        axes.set_xlabel(x.label, color=_COLORS["muted"])
        axes.grid(axis="y", color=_COLORS["rule"], linewidth=1)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(_COLORS["rule"])
        drawn = io.StringIO()
        FigureCanvasSVG(figure).print_svg(drawn, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _for_page(drawn.getvalue(), name, title)


def thin_out(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Returns at most about _MOST_POINTS points: the lowest and the highest of each stretch, so that spikes stay."""
    stretch = 2 * -(-len(y) // _MOST_POINTS)
    if len(y) <= _MOST_POINTS:
        return list(x), list(y)
    kept: set[int] = {0, len(y) - 1}
    for start in range(0, len(y), stretch):
        indices = range(start, min(start + stretch, len(y)))
        kept |= {min(indices, key=y.__getitem__), max(indices, key=y.__getitem__)}
    return [x[index] for index in sorted(kept)], [y[index] for index in sorted(kept)]


def smooth(y: Sequence[float]) -> list[float]:
    """Returns centred means over a fortieth of the values; the window narrows towards both ends, so none is delayed."""
    sums = [0.0]
    for value in y:
        sums.append(sums[-1] + value)
    reach = len(y) // 80
    means = []
    for index in range(len(y)):
        near = min(reach, index, len(y) - 1 - index)
        means.append((sums[index + near + 1] - sums[index - near]) / (2 * near + 1))
    return means


def compact(value: float) -> str:
    """Returns a short form of a number: 0.004, 7,500, 3.28 M, 2.97e13."""
    size = abs(value)
    if size >= 1e9:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.3g}\u00a0M"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.3g}"


def _draw_curve(axes: Axes, curve: Curve) -> None:
    color = _COLORS[f"series-{curve.series}"]
    if curve.kind == "level":
        axes.axhline(curve.y[0], color=color, linewidth=1.2, linestyle=(0, (4, 3)))
    elif curve.kind == "points":
        marker = _MARKERS[curve.series - 1] if len(curve.x) <= _MOST_MARKERS else ""
        style = {"color": color, "linewidth": 1.4, "marker": marker, "markersize": 4.5}
        # A marker on the edge is drawn whole.
        (line,) = axes.plot(curve.x, curve.y, clip_on=False, **style)
        line.set_in_layout(False)
    else:
        faint = curve.kind == "faint"
        axes.plot(curve.x, curve.y, color=color, linewidth=0.8 if faint else 1.8, alpha=0.4 if faint else 1.0)
    if curve.label and curve.x:
        axes.annotate(
            curve.label,
            (curve.x[-1], curve.y[-1]),
            xytext=(2, 7),  # above the end: losses come down from the left
            textcoords="offset points",
            horizontalalignment="right",
            color=color,
            fontweight="bold",
            annotation_clip=False,
        )


def _set_up(axes: Axes, plot_axis: PlotAxis, wanted: Axis) -> None:
    vertical = plot_axis is axes.yaxis
    low, high = axes.dataLim.intervaly if vertical else axes.dataLim.intervalx
    decimals = 0
    limits = axes.set_ylim if vertical else axes.set_xlim
    if wanted.log and low > 0 and high > 2 * low:
        (axes.set_yscale if vertical else axes.set_xscale)("log")
        ticks = [digits * 10.0**power for power in range(-12, 13) for digits in _PLAIN_TICKS]
        inside = [tick for tick in ticks if low * 0.97 <= tick <= high * 1.03]
        decades = [tick for tick in inside if f"{tick:e}".startswith("1.000000e")]
        plot_axis.set_major_locator(FixedLocator(decades if len(decades) > 3 else inside[:: -(-len(inside) // 6) or 1]))
        plot_axis.set_minor_locator(NullLocator())
    else:
        limits(wanted.low, wanted.high)
        plot_axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        # All ticks with the decimals of the one that needs most.
        decimals = max(len(f"{tick:.6g}".partition(".")[2]) for tick in plot_axis.get_majorticklocs())
    form = FuncFormatter(lambda value, _: f"{value:.0%}" if wanted.percent else _tick(value, decimals))
    plot_axis.set_major_formatter(form)
    plot_axis.set_tick_params(which="both", length=0, labelcolor=_COLORS["muted"], pad=6)


def _tick(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if decimals and abs(value) < 1000 else compact(value)


def _for_page(svg: str, name: str, title: str) -> str:
    """Returns the <svg> alone, with its own ids, no size but its proportions, and the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(title)}">', svg, count=1
    )
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # the page's
    for color, drawn_in in _COLORS.items():
        svg = svg.replace(drawn_in, f"var(--{color})")
    return re.sub(r">\s+<", "><", svg)
