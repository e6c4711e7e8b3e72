"""The figures of a run, one function each; without data to draw, each raises ValueError."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import ArrayLike

from Gpt.evaluation.results import Interval, Novelty, PromptCurve, Results, Trace
from Gpt.report.confusion import confusions
from Gpt.report.logger import Metrics, read_metrics
from Gpt.report.style import (
    COLOURS,
    DASHES,
    INK,
    MARKERS,
    MUTED,
    label_right,
    metric_scale,
    new_figure,
    save,
    shade,
    styled,
)
from Gpt.report.text import (
    comparison_rows,
    format_interval,
    metric_label,
    side_by_side_rows,
)

GAP = "_gap_closed"


@styled
def prompt_alignment(results: Results) -> Figure:
    """Asked against achieved, one panel per prompt curve on common axes."""
    curves = _present(results.curves, "prompt curves")
    rows, columns = _grid(len(curves))
    figure = new_figure(max(6.5, 3.9 * columns), 4.3 * rows + 0.5)
    shared = None
    for place, curve in enumerate(curves):
        axis = shared = figure.add_subplot(rows, columns, place + 1, sharex=shared, sharey=shared)
        _draw_curve(axis, curve)
        for row in results.table:
            if row.kind == "reference" and results.metric in row.metrics:
                axis.axhline(row.metrics[results.metric].mean, color=COLOURS["reference"], lw=1.2, label=row.name)
        metric = metric_label(results.metric.removeprefix("test_").removeprefix("validation_"))
        axis.set_xlabel(f"asked {metric}")
        axis.set_ylabel(f"achieved {metric}" if place % columns == 0 else "")
    _limit_achieved(figure.axes[0], curves)
    _legend_below(figure)
    return figure


@styled
def optimisers(results: Results) -> Figure:
    """Optimiser traces over their steps, the generator, the references and the baselines as levels."""
    traces = _present(results.optimisers, "optimiser traces")
    figure = new_figure(10.0, 6.0)
    axis = figure.subplots()
    _draw_traces(axis, traces)
    axis.set_xscale("symlog", linthresh=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlim(0, max(max(trace.x) for trace in traces))
    levels = [(row, row.metrics[results.metric]) for row in comparison_rows(results)]
    metric_scale(axis, "y", [*_trace_values(traces), *(level.mean for _, level in levels)], results.minimize)
    axis.set_xlabel("optimiser steps")
    axis.set_ylabel(metric_label(results.metric))
    for row, level in levels:
        weight, alpha = (2.2, 0.15) if row.kind == "generator" else (1.1, 0.06)
        axis.axhline(level.mean, color=COLOURS[row.kind], lw=weight, zorder=1.5)
        if math.isfinite(level.high - level.low):
            axis.axhspan(level.low, level.high, color=COLOURS[row.kind], alpha=alpha, lw=0)
    label_right(axis, [(level.mean, row.name, COLOURS[row.kind]) for row, level in levels])
    _legend_below(figure)
    return figure


@styled
def side_by_side(results: Results) -> Figure:
    """What every way costs in updates of one network, and what it reaches: none for generation and for a stored
    network, one for one-step optimisation, many for ordinary training, whose course is drawn where the zoo knows it
    (start and end alone are no course)."""
    rows = _present(side_by_side_rows(results), "training curve and no other run")
    levels = [(row, row.metrics[results.metric]) for row in rows]
    figure = new_figure(11.5, 6.0)
    axis = figure.subplots()
    _draw_traces(axis, [trace for trace in results.training_curves if len(trace.x) > 2])
    updates = [row.updates or 0 for row in rows]
    for place, (row, level) in enumerate(levels):
        low, mean, high = _finite([level.low, level.mean, level.high])
        x = updates[place]
        beside = updates[:place].count(x) - (updates.count(x) - 1) / 2  # markers apart, where rows cost the same
        moved = axis.transData + ScaledTranslation(beside * 12 / 72, 0, figure.dpi_scale_trans)
        look: dict[str, Any] = {"color": COLOURS[row.kind], "zorder": 3, "transform": moved}
        if row.kind == "reference" and row.updates is None:  # nobody knows how many: a level, and no place
            axis.axhline(mean, lw=0.9, dashes=(4, 3), color=COLOURS[row.kind], label=row.name, zorder=1.5)
            continue
        axis.plot([x, x], [low, high], lw=4, alpha=0.45, solid_capstyle="butt", **look)
        axis.plot([x], [mean], MARKERS[place % len(MARKERS)], ms=9, label=row.name, **look)
        axis.update_datalim([(x, y) for y in (low, mean, high) if np.isfinite(y)])  # what is moved does not count
        axis.axhline(mean, lw=0.9, dashes=(4, 3), color=COLOURS[row.kind], zorder=1.5)
    axis.autoscale_view()
    axis.set_xscale("symlog", linthresh=1)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_xlim(-0.3, 1.2 * max(1, *updates, *(max(t.x) for t in results.training_curves)))
    drawn = [*_trace_values(results.training_curves), *(level.mean for _, level in levels)]
    metric_scale(axis, "y", drawn, results.minimize)
    axis.set_xlabel("updates behind one network")
    axis.set_ylabel(metric_label(results.metric))
    label_right(axis, [(level.mean, row.name, COLOURS[row.kind]) for row, level in levels])
    _legend_below(figure)
    return figure


@styled
def table(results: Results) -> Figure:
    """All rows of the table as dots with their intervals, the best on top."""
    rows = _present([row for row in results.table if results.metric in row.metrics], f"rows with {results.metric}")
    rows = sorted(rows, key=lambda row: _rank(row.metrics[results.metric].mean, results.minimize), reverse=True)
    figure = new_figure(10.0, 0.36 * len(rows) + 1.4)
    axis = figure.subplots()
    for height, row in enumerate(rows):
        interval = row.metrics[results.metric]
        mean, bounds = format_interval(interval)
        _draw_interval(axis, interval, height, COLOURS[row.kind])
        axis.annotate(
            f"{mean}   [{bounds}]",
            xy=(1.02, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=10,
            color=COLOURS[row.kind],
            annotation_clip=False,
        )
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(axis.get_yticklabels(), rows, strict=True):
        label.set_color(COLOURS[row.kind])
    axis.set_ylim(-0.6, len(rows) - 0.4)
    metric_scale(axis, "x", [row.metrics[results.metric].mean for row in rows], results.minimize)
    axis.set_xlabel(metric_label(results.metric))
    for kind in [kind for kind in COLOURS if any(row.kind == kind for row in rows)]:
        axis.plot([], [], "o", color=COLOURS[kind], label=kind)
    _legend_below(figure)
    return figure


@styled
def gap_closed(results: Results) -> Figure:
    """How far each way goes from the base model (0 %) to adapters trained for the task (100 %), a panel a split."""
    splits = _present(_splits_with_gaps(results), "gaps between a base model and training")
    rows = [row for row in results.table if splits[0] in row.metrics]
    rows.sort(key=lambda row: row.metrics[splits[0]].mean)
    figure = new_figure(4.0 * len(splits) + 2.5, 0.3 * len(rows) + 1.5)
    panels = np.atleast_1d(figure.subplots(1, len(splits), sharey=True))
    for axis, split in zip(panels, splits, strict=True):
        for place, row in enumerate(rows):
            if split in row.metrics:
                found, colour = row.metrics[split], COLOURS[row.kind]
                axis.plot([found.low, found.high], [place, place], color=colour, lw=2)
                axis.plot([found.mean], [place], "o", color=colour, ms=6)
        for end in (0, 100):
            axis.axvline(end, color=MUTED, lw=1.2, dashes=(4, 3), zorder=1)
        axis.set_xlabel(f"{split.removesuffix(GAP)}: gap closed (%)")
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
    return figure


@styled
def recursive(results: Results) -> Figure:
    """The metric after 0, 1, 2, … updates, from every kind of start."""
    traces = _present(results.recursive, "recursive traces")
    figure = new_figure(9.0, 5.5)
    axis = figure.subplots()
    _draw_traces(axis, traces, markers=True)
    levels = [r for r in results.table if r.kind == "reference" and results.metric in r.metrics]
    for row in levels:
        axis.axhline(row.metrics[results.metric].mean, color=COLOURS["reference"], lw=1.2, label=row.name, zorder=1.5)
    level_values = [row.metrics[results.metric].mean for row in levels]
    metric_scale(axis, "y", [*_trace_values(traces), *level_values], results.minimize)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("updates by the generator")
    axis.set_ylabel(metric_label(results.metric))
    _legend_below(figure)
    return figure


@styled
def novelty(results: Results) -> Figure:
    """Distance ratio against metric, one point per set of networks, and error overlap where it was measured."""
    sets = _present(results.novelty, "novelty rows")
    overlaps = [(n, n.error_overlap) for n in sets if n.error_overlap is not None]
    figure = new_figure(11.0 if overlaps else 7.0, 5.2)
    axes = figure.subplots(1, 2 if overlaps else 1, sharey=True, squeeze=False)[0]
    markers = _markers(sets)
    _draw_sets(axes[0], [(n, n.distance_ratio) for n in sets], markers)
    axes[0].axvline(1.0, color=MUTED, lw=1.2, dashes=(4, 3), zorder=1)
    axes[0].set_xlabel("distance to the nearest training network\n(1 = between training networks)")
    axes[0].set_ylabel(metric_label(results.metric))
    if overlaps:
        _draw_sets(axes[1], overlaps, markers)
        axes[1].set_xlabel("overlap of wrongly classified examples\nwith the most similar training network (IoU)")
    metric_scale(axes[0], "y", [n.metric.mean for n in sets], results.minimize)
    _legend_below(figure)
    return figure


@styled
def wrong_predictions(results: Results) -> Figure:
    """Overlap of wrong predictions against the distance to the nearest training network, one point per set.

    Noise of growing scale draws a line: what lies below it differs from its nearest training network by more than the
    distance alone would make it. Copies, at no distance, stand at the left edge.
    """
    sets = _present(_overlaps(results), "overlaps of wrong predictions")
    edge = min((n.distance_ratio for n, _ in sets if n.distance > 0), default=1.0) / 3
    figure = new_figure(9.0, 5.8)
    axis = figure.subplots()
    ladder = sorted((max(edge, n.distance_ratio), overlap) for n, overlap in sets if n.name.startswith("noise"))
    axis.plot([x for x, _ in ladder], [y for _, y in ladder], color=MUTED, lw=1.2, zorder=1)
    markers = _markers(results.novelty)
    for row, overlap in sets:
        look = {"color": COLOURS[row.kind], "ms": 9, "label": row.name, "ls": "none"}
        axis.plot([max(edge, row.distance_ratio)], [overlap], markers[row.name], **look)
    axis.set_xscale("log")
    axis.axvline(1.0, color=MUTED, lw=1.2, dashes=(4, 3), zorder=1)
    axis.set_xlabel("distance to the nearest training network (1 = between training networks)")
    axis.set_ylabel("overlap of wrongly classified examples\nwith the most similar training network (IoU)")
    axis.margins(0.08)
    _legend_below(figure)
    return figure


@styled
def training(metrics: Sequence[Metrics]) -> Figure:
    """Training curves from the lines of metrics.jsonl: the objective in one panel, each validation score in its own."""
    panels = _present(_training_panels(metrics), "training curves")
    rows, columns = _grid(len(panels))
    figure = new_figure(max(7.0, 4.2 * columns), 3.7 * rows)
    for place, (title, names) in enumerate(panels.items()):
        axis = figure.add_subplot(rows, columns, place + 1)
        for name in names:
            _draw_series(axis, metrics, name, COLOURS["baseline" if name == "train/loss" else "generator"])
        if "train/loss" in names:
            _mark_phases(axis, metrics)
        axis.set_title(title)
        axis.set_xlabel("step")
        metric_scale(axis, "y", [line[n] for line in metrics for n in names if n in line], minimize="loss" in title)
        if len(names) > 1:
            axis.legend(loc="upper right")
    return figure


def save_figures(results: Results, metrics_path: Path, folder: Path) -> dict[str, Path]:
    """Draw every figure there is data for into `folder` (PNG and SVG); returns `{name: path of the PNG}`."""
    metrics = read_metrics(metrics_path)
    figures = {
        "table": table(results) if results.table else None,
        "side_by_side": side_by_side(results) if side_by_side_rows(results) else None,
        "prompt_alignment": prompt_alignment(results) if results.curves else None,
        "optimisers": optimisers(results) if results.optimisers else None,
        "recursive": recursive(results) if results.recursive else None,
        "novelty": novelty(results) if results.novelty else None,
        "gap_closed": gap_closed(results) if _splits_with_gaps(results) else None,
        "confusions": confusions(results) if results.confusions else None,
        "wrong_predictions": wrong_predictions(results) if _overlaps(results) else None,
        "training": training(metrics) if _training_panels(metrics) else None,
    }
    return {name: save(figure, folder / f"{name}.png") for name, figure in figures.items() if figure is not None}


def _training_panels(metrics: Sequence[Metrics]) -> dict[str, list[str]]:
    """`{title: names}` of what is worth a panel; a score may be logged as `validation/x` or `validation_x`, and the one
    that selects is another's copy."""
    names = sorted({name for line in metrics for name in line} - {"validation/score"})
    objective = [name for name in names if name in ("train/loss", "validation/loss")]
    scores = [name for name in names if name.startswith("validation") and name not in objective]
    panels = {"objective: loss": objective} if objective else {}
    return panels | {name.replace("_", " ").replace("/", " "): [name] for name in scores}


def _splits_with_gaps(results: Results) -> list[str]:
    """The columns that say how much of the gap between a base model and training is closed, one for each split."""
    return list(dict.fromkeys(name for row in results.table for name in row.metrics if name.endswith(GAP)))


def _overlaps(results: Results) -> list[tuple[Novelty, float]]:
    """The sets of networks, each with its overlap of wrong predictions, where that was measured."""
    return [(n, n.error_overlap) for n in results.novelty if n.error_overlap is not None]


def _present(items: Any, what: str) -> Any:
    if not items:
        raise ValueError(f"there is nothing to draw: the results hold no {what}")
    return items


def _grid(panels: int) -> tuple[int, int]:
    """Rows and columns of a page of panels: at most three wide, four as a square."""
    columns = 2 if panels == 4 else min(3, panels)
    return math.ceil(panels / columns), columns


def _finite(values: ArrayLike) -> np.ndarray:
    """Diverged values (inf, nan) as nan, which leaves a gap instead of stretching the axes."""
    array = np.asarray(values, dtype=float)
    return np.where(np.isfinite(array), array, np.nan)


def _rank(mean: float, minimize: bool) -> float:
    return math.inf if math.isnan(mean) else (mean if minimize else -mean)


def _draw_curve(axis: Axes, curve: PromptCurve) -> None:
    colour = COLOURS[curve.kind]
    prompted, achieved = np.asarray(curve.prompted), _finite(curve.achieved)
    axis.plot(prompted.T, achieved.T, color=colour, lw=0.7, alpha=min(0.5, max(0.12, 8 / len(prompted))))
    ends = [prompted.min(), prompted.max()]
    axis.plot(ends, ends, color=INK, lw=1.2, dashes=(4, 3), label="achieved = asked")
    whole = np.isfinite(achieved).all(axis=0)
    axis.plot(
        prompted.mean(axis=0)[whole],
        achieved.mean(axis=0)[whole],
        color=colour,
        lw=2.6,
        label=f"mean, {curve.kind}",
    )
    mean, bounds = format_interval(curve.alignment)
    diverged = int((~np.isfinite(achieved)).any(axis=1).sum())
    axis.set_title(curve.name, pad=20)
    alignment = f"R² {mean}  [{bounds}]" + (f", {diverged} diverged" if diverged else "")
    axis.annotate(alignment, xy=(0, 1.02), xycoords="axes fraction", color=colour, fontsize=10)


def _limit_achieved(axis: Axes, curves: Sequence[PromptCurve]) -> None:
    """Show 99 % of what was achieved: one exploding network must not flatten all others."""
    asked = np.concatenate([np.ravel(c.prompted) for c in curves])
    achieved = np.concatenate([np.ravel(c.achieved) for c in curves])
    achieved = achieved[np.isfinite(achieved)] if np.isfinite(achieved).any() else asked
    low = min(asked.min(), np.percentile(achieved, 0.5))
    high = max(asked.max(), np.percentile(achieved, 99.5))
    margin = 0.04 * (high - low or 1.0)
    axis.set_ylim(low - margin, high + margin)


def _draw_traces(axis: Axes, traces: Sequence[Trace], markers: bool = False) -> None:
    counts: dict[str, int] = {}
    for trace in traces:
        index = counts.get(trace.kind, 0)
        counts[trace.kind] = index + 1
        colour = shade(trace.kind, index, sum(t.kind == trace.kind for t in traces))
        look: dict[str, Any] = {"color": colour, "dashes": DASHES[index % len(DASHES)], "label": trace.name}
        if markers:
            look |= {"marker": MARKERS[index % len(MARKERS)], "ms": 6}
        axis.plot(trace.x, _finite(trace.mean), **look)
        axis.fill_between(trace.x, _finite(trace.low), _finite(trace.high), color=colour, alpha=0.15, lw=0)


def _trace_values(traces: Sequence[Trace]) -> list[float]:
    return [value for trace in traces for value in trace.mean]


def _draw_interval(axis: Axes, interval: Interval, height: int, colour: str) -> None:
    low, mean, high = _finite([interval.low, interval.mean, interval.high])
    axis.plot([low, high], [height, height], color=colour, lw=3, alpha=0.45, solid_capstyle="butt")
    axis.plot([mean], [height], "o", color=colour, ms=7)


def _markers(sets: Sequence[Novelty]) -> dict[str, str]:
    """The marker of each set, alike in every figure; those of one kind share a colour and differ in it."""
    kinds = [row.kind for row in sets]
    return {row.name: MARKERS[kinds[:i].count(row.kind) % len(MARKERS)] for i, row in enumerate(sets)}


def _draw_sets(axis: Axes, points: Sequence[tuple[Novelty, float]], markers: dict[str, str]) -> None:
    for row, x in points:
        low, mean, high = _finite([row.metric.low, row.metric.mean, row.metric.high])
        axis.plot([x, x], [low, high], color=COLOURS[row.kind], lw=2, alpha=0.45)
        axis.plot([x], [mean], markers[row.name], color=COLOURS[row.kind], ms=9, label=row.name, ls="none")
    axis.margins(0.08)


def _draw_series(axis: Axes, metrics: Sequence[Metrics], name: str, colour: str) -> None:
    points = [(line["step"], line[name]) for line in metrics if name in line]
    steps, values = np.array([x for x, _ in points]), _finite([y for _, y in points])
    if len(values) < 40:
        axis.plot(steps, values, color=colour, marker="o", ms=3.5, label=name)
        return
    axis.plot(steps, values, color=colour, lw=0.8, alpha=0.35)
    axis.plot(steps, _running_average(values, len(values) / 100), color=colour, label=f"{name}, running average")


def _mark_phases(axis: Axes, metrics: Sequence[Metrics]) -> None:
    """A line where the loss became another: what lies before it and after it is not the same quantity."""
    phases = [(line["step"], line["train/phase"]) for line in metrics if "train/phase" in line]
    for (_, before), (step, after) in itertools.pairwise(phases):
        if after > before:
            axis.axvline(step, color=MUTED, ls=":", lw=1)
            axis.text(step, 0.03, " other terms", color=MUTED, transform=axis.get_xaxis_transform())


def _running_average(values: np.ndarray, horizon: float) -> np.ndarray:
    """Bias-corrected exponential average over about `horizon` values; gaps (nan) are skipped."""
    keep, total, weight = math.exp(-1 / horizon), 0.0, 0.0
    smooth = np.empty_like(values)
    for i, value in enumerate(values):
        if not math.isnan(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smooth[i] = total / weight if weight else math.nan
    return smooth


def _legend_below(figure: Figure) -> None:
    """One legend for all axes, below them, each name once."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    if entries:
        columns = math.ceil(len(entries) / math.ceil(len(entries) / 4))
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
