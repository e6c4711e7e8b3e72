"""The look shared by every figure: colours by kind, light grid, no chart junk; no pyplot, so no global state."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from Gpt.files import replacing

COLOURS = {
    "generator": "#0b62c4",
    "optimiser": "#d1600a",
    "baseline": "#6b7280",
    "reference": "#0f8a5f",
    "control": "#8f6bb3",
}
INK, MUTED, GRID = "#1f2328", "#59636e", "#e4e7eb"
MARKERS = "osD^vPX*<>hpd8H"
DASHES = ((), (5, 2), (1, 1.5), (6, 2, 1, 2), (3, 1, 1, 1, 1, 1))

RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "svg.hashsalt": "gpt",
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run a figure function under the house style."""

    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(RC):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches (120 pixels an inch) that keeps its parts from overlapping."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> Path:
    """Write `path` (PNG) for viewers and, beside it, the same figure as SVG for the report; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(RC):
        for file, facts in ((path, None), (path.with_suffix(".svg"), {"Date": None})):
            with replacing(file) as temporary:
                figure.savefig(temporary, metadata=facts)
    return path


def shade(kind: str, index: int = 0, count: int = 1) -> tuple[float, ...]:
    """RGB colour of the index-th of `count` things of one kind: the kind's own, paler towards the last."""
    colour = np.array(to_rgb(COLOURS[kind]))
    paleness = 0.45 * index / max(1, count - 1)
    return tuple(float(c) for c in colour + (1 - colour) * paleness)


def metric_scale(axis: Axes, which: str, values: Sequence[float], minimize: bool) -> None:
    """Logarithmic axis for a loss or error whose positive values span more than a factor of ten."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    if minimize and finite.size and finite.min() > 0 and finite.max() > 10 * finite.min():
        getattr(axis, f"set_{which}scale")("log")
        ticks = getattr(axis, f"{which}axis")
        ticks.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        if finite.max() < 100 * finite.min():
            ticks.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        ticks.set_minor_formatter(matplotlib.ticker.NullFormatter())


def label_right(axis: Axes, labels: Sequence[tuple[float, str, object]], line_height: float = 0.052) -> None:
    """Name horizontal levels `(y, text, colour)` in the right margin, moved apart where they would overlap.

    Args:
        line_height: height of a line of text as a fraction of the axes.
    """
    axis.get_ylim()  # settles limits that are still to be computed
    to_axes = axis.transData + axis.transAxes.inverted()
    placed = sorted((float(to_axes.transform((1, y))[1]), text, colour) for y, text, colour in labels)
    heights = spread([height for height, _, _ in placed], line_height)
    for height, (level, text, colour) in zip(heights, placed, strict=True):
        axis.annotate(
            text,
            xy=(1.0, level),
            xytext=(1.04, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            color=colour,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "shrinkA": 2, "shrinkB": 0, "relpos": (0, 0.5)},
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Move sorted positions apart until neighbours are at least `gap` away, each cluster about its own centre."""
    clusters: list[tuple[float, int]] = []  # centre, number of members
    for position in positions:
        centre, count = position, 1
        while clusters and centre - clusters[-1][0] < gap * (count + clusters[-1][1]) / 2:
            other, members = clusters.pop()
            centre = (centre * count + other * members) / (count + members)
            count += members
        clusters.append((centre, count))
    return [centre + (i - (count - 1) / 2) * gap for centre, count in clusters for i in range(count)]
