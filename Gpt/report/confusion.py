"""The figure of what networks do, when they should do which."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from Gpt.evaluation.results import Confusion, Results
from Gpt.report.style import COLOURS, INK, MUTED, new_figure, styled

CELL = 0.3  # inches
MARGIN = 1.7  # inches beside and below a table, for names
LEAST = 3  # cells, so that titles have room
SHADES = LinearSegmentedColormap.from_list("shares", ["white", COLOURS["generator"]])


@styled
def confusions(results: Results) -> Figure:
    """One table for each of `results.confusions`, two beside each other; shades are shares of a row."""
    tables = results.confusions
    columns, rows = min(2, len(tables)), math.ceil(len(tables) / 2)
    widths = [max(LEAST, *(len(t.found) for t in tables[i::columns])) for i in range(columns)]
    heights = [max(LEAST, *(len(t.wanted) for t in tables[i : i + columns])) for i in range(0, len(tables), columns)]
    figure = new_figure(sum(widths) * CELL + columns * MARGIN, sum(heights) * CELL + rows * MARGIN)
    ratios = {"width_ratios": widths, "height_ratios": heights}
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios).flatten()
    for axis in axes[len(tables) :]:
        axis.set_axis_off()
    for axis, table in zip(axes, tables, strict=False):
        _draw(axis, table)
    return figure


def _draw(axis: Axes, table: Confusion) -> None:
    counts = np.array(table.counts)
    shares = counts / counts.sum(1, keepdims=True)
    axis.imshow(shares, cmap=SHADES, vmin=0, vmax=1)
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = "white" if shares[row, column] > 0.5 else INK
        axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=9, color=colour)
    for row, name in enumerate(table.wanted):
        if name in table.found:
            corner = (table.found.index(name) - 0.5, row - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=MUTED, linewidth=1))
    axis.set_xticks(range(len(table.found)), [name.replace("_", " ") for name in table.found], rotation=90, fontsize=9)
    axis.set_yticks(range(len(table.wanted)), [name.replace("_", " ") for name in table.wanted], fontsize=9)
    axis.grid(False)
    axis.set_title(table.name)
    axis.set_xlabel("carried out")
    axis.set_ylabel("asked for")
