"""The charts of reports and studies, as SVG text to be placed inside an HTML page.

A chart is drawn by matplotlib with text kept as text, then loosened from it: fixed colours become
CSS variables, so one drawing serves a light and a dark page, and identifiers, metadata and
namespaces that a page does not need are dropped. Equal inputs give equal bytes.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

# Colours that stand for CSS variables until the drawing is finished.
_COLOURS = {
    "#010203": "var(--ink)",
    "#040506": "var(--faint)",
    "#070809": "var(--series-1)",
    "#0a0b0c": "var(--series-2)",
    "#0d0e0f": "var(--series-3)",
}
_INK, _FAINT, *_SERIES = _COLOURS
_FONT = "var(--sans)"
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
_APART = 0.012  # of the axis, between the intervals of two series
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": _INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Line:
    """One series of a line chart; `marks` draws points as well."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    references: Mapping[str, float] | None = None,
    faint: Line | None = None,
) -> str:
    """Lines over a common axis.

    Args:
        title: Spoken by screen readers; the page's own heading is what the eye reads.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        lines: At most three series.
        references: Named horizontal dashes.
        faint: A series drawn thin behind the others, for example the unsmoothed loss.
    """

    def draw(axes: Any) -> None:
        if faint is not None:
            axes.plot(faint.x, faint.y, color=_FAINT, linewidth=0.8, label=faint.name)
        for colour, line in zip(_SERIES, lines, strict=False):
            marker = "o" if line.marks else None
            axes.plot(line.x, line.y, color=colour, marker=marker, markersize=4, label=line.name)
        for name, value in (references or {}).items():
            axes.axhline(value, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)), label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(lines) + len(references or {}) + (faint is not None) > 1:
            axes.legend(loc="best", handlelength=1.6)

    return _render(title, draw, width=6.6, height=2.9)


def interval_chart(
    title: str,
    x_label: str,
    rows: Sequence[tuple[str, float, float, float]],
    differences: bool = False,
) -> str:
    """A dot with its interval for each (name, value, low, high), the first on top.

    Args:
        title: Spoken by screen readers.
        x_label: Name of the axis.
        rows: What is drawn.
        differences: Write signs and mark zero; otherwise the first row is marked.
    """
    text = "{:+.3f}" if differences else "{:.3f}"

    def draw(axes: Any) -> None:
        places = np.arange(len(rows))[::-1]
        for place, (_, value, low, high), first in zip(
            places, rows, [not differences] + [False] * (len(rows) - 1), strict=True
        ):
            colour = _SERIES[0] if first else _INK
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot([value], [place], color=colour, marker="o", markersize=6.5)
            axes.annotate(
                text.format(value).replace("-", "\u2212"),
                (value, place),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        if rows:
            mark = 0.0 if differences else rows[0][1]
            axes.axvline(mark, color=_FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.set_yticks(places, [name for name, *_ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.3)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(x_label)

    return _render(title, draw, width=6.6, height=0.8 + 0.42 * max(1, len(rows)))


@dataclass(frozen=True)
class Series:
    """A figure with its interval over a few values of x."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def series_chart(
    title: str, x_label: str, y_label: str, series: Sequence[Series], doubling: bool = False
) -> str:
    """Dots with intervals, joined by lines; any number of series, told apart by colour and dashes.

    Args:
        title: Spoken by screen readers.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
        series: What is drawn; intervals stand a little apart so that they can be told.
        doubling: Equal distances stand for equal ratios of x.
    """

    def draw(axes: Any) -> None:
        places = sorted({x for line in series for x in line.x})
        if doubling:
            axes.set_xscale("log", base=2)
        for number, line in enumerate(series):
            colour = _SERIES[number % len(_SERIES)]
            dashes = _DASHES[number // len(_SERIES) % len(_DASHES)]
            shift = (number - (len(series) - 1) / 2) * _APART
            if doubling:
                x = [value * (places[-1] / places[0]) ** shift for value in line.x]
            else:
                x = [value + shift * (places[-1] - places[0]) for value in line.x]
            axes.plot(x, line.y, color=colour, linestyle=dashes, marker="o", markersize=4)
            axes.vlines(x, line.low, line.high, color=colour, linewidth=1)
            axes.plot([], [], color=colour, linestyle=dashes, marker="o", label=line.name)
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handlelength=2.4)

    return _render(title, draw, width=6.6, height=max(2.9, 0.8 + 0.2 * len(series)))


def cost_chart(
    title: str, x_label: str, y_label: str, points: Sequence[tuple[str, float, float, float, float]]
) -> str:
    """A named dot with its interval for each (name, cost, value, low, high)."""

    def draw(axes: Any) -> None:
        for number, (name, x, y, low, high) in enumerate(points):
            colour = _SERIES[number % len(_SERIES)]
            axes.plot([x], [y], color=colour, marker="o", markersize=5)
            axes.vlines([x], [low], [high], color=colour, linewidth=1)
            axes.annotate(name, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.margins(x=0.2)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _render(title, draw, width=6.6, height=3.4)


def reliability_chart(title: str, lines: Sequence[Line]) -> str:
    """Share of positives over mean predicted probability, beside the diagonal of a perfect one."""

    def draw(axes: Any) -> None:
        axes.plot(
            [0, 1],
            [0, 1],
            color=_FAINT,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label="perfect calibration",
        )
        for colour, line in zip(_SERIES, lines, strict=False):
            axes.plot(line.x, line.y, color=colour, marker="o", markersize=4, label=line.name)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("mean predicted probability")
        axes.set_ylabel("share of likes")
        axes.legend(loc="upper left", handlelength=1.6)

    return _render(title, draw, width=6.6, height=3.4)


def _render(title: str, draw: Callable[[Any], None], width: float, height: float) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": title}):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        empty = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=empty)
    return _loosen(buffer.getvalue(), title)


def _loosen(svg: str, title: str) -> str:
    """Make matplotlib's document an element of a page."""
    svg = svg[svg.index("<svg") :]
    for pattern in (r"<!--.*?-->\s*", r"<metadata>.*?</metadata>\s*", r"<style.*?</style>\s*"):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    opening = r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>'
    svg = re.sub(
        opening, rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">', svg, count=1
    )
    svg = svg.replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: m.group(0) if m.group(1) in used else "", svg)
    svg = re.sub(r"font-family: [^;\"]*", f"font-family: {_FONT}", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", rf"font: \1px {_FONT}", svg)
    svg = re.sub(r"<[^>]*>", _shorten, svg)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"\s*\n\s*", "\n", svg.strip())


def _shorten(tag: re.Match[str]) -> str:
    """Coordinates to two decimals; the text between tags keeps its figures."""
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m.group(0)):.2f}", tag.group(0))
