"""Figures: what is drawn is what was found, whatever part of it is missing, diverged or huge."""

import dataclasses
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from Gpt.evaluation.results import Interval
from Gpt.report import figures, style

OF_RESULTS = ["side_by_side", "prompt_alignment", "optimisers", "table", "recursive", "novelty", "wrong_predictions"]


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in (*axis.texts, *axis.get_yticklabels(), axis.title)]


def test_every_figure_is_saved_as_png_and_svg(saved_figures):
    assert set(saved_figures) == {*OF_RESULTS, "training"}
    for path in saved_figures.values():
        with Image.open(path) as image:
            assert 600 <= image.width <= 1700
        assert "<script" not in path.with_suffix(".svg").read_text()


def test_parts_that_were_not_evaluated_are_skipped_on_disk_and_refused_one_by_one(synthetic_results, tmp_path):
    empty = dataclasses.replace(synthetic_results, table=[], curves=[], recursive=[], optimisers=[], novelty=[])
    assert figures.save_figures(empty, tmp_path / "none.jsonl", tmp_path) == {}
    for name in OF_RESULTS:
        with pytest.raises(ValueError, match="nothing to draw"):
            getattr(figures, name)(empty)
    with pytest.raises(ValueError, match="nothing to draw"):
        figures.training([{"step": 1, "time": 0.0}])


@pytest.mark.parametrize("split", ["s1", "s2"])
def test_the_gap_that_is_closed_is_drawn_of_whatever_split_there_is(synthetic_results, tmp_path, split):
    """A family of one's own may hold no combinations out, which are S2."""
    closed = {f"{split}_gap_closed": Interval(60.0, 50.0, 70.0, 8)}
    rows = [dataclasses.replace(row, metrics=row.metrics | closed) for row in synthetic_results.table]
    found = dataclasses.replace(synthetic_results, table=rows, curves=[], recursive=[], optimisers=[], novelty=[])
    assert "gap_closed" in figures.save_figures(found, tmp_path / "none.jsonl", tmp_path)


def test_copies_alone_are_drawn_too(synthetic_results, tmp_path):
    copies = [row for row in synthetic_results.novelty if row.distance == 0]
    assert copies and all(row.error_overlap for row in copies)
    found = dataclasses.replace(synthetic_results, table=[], curves=[], recursive=[], optimisers=[], novelty=copies)
    assert set(figures.save_figures(found, tmp_path / "none.jsonl", tmp_path)) == {"novelty", "wrong_predictions"}


def test_the_table_is_sorted_best_first_and_shows_every_interval(synthetic_results):
    figure = figures.table(synthetic_results)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[-1] == "ordinary training" and names[0] == "per-weight Gaussian"
    assert any("0.171" in text and "[0.151 … 0.191]" in text for text in texts(figure))
    rewarded = figures.table(dataclasses.replace(synthetic_results, minimize=False))
    assert [label.get_text() for label in rewarded.axes[0].get_yticklabels()][-1] == "per-weight Gaussian"


def test_one_update_generation_and_training_stand_on_one_axis(synthetic_results, tmp_path):
    axis = figures.side_by_side(synthetic_results).axes[0]
    drawn = {line.get_label(): line for line in axis.lines}
    points = {"G.pt, one update": (1, 0.348), "RPG, written from noise (other)": (0, 0.29), "retrieval": (0, 0.171)}
    for name, (updates, loss) in (points | {"ordinary training": (1120, 0.142)}).items():
        point = [line for line in axis.lines if line.get_label() == name][-1]
        assert (point.get_xdata()[-1], point.get_ydata()[-1]) == (updates, pytest.approx(loss, abs=1e-4))
    assert "G.pt, 5 updates, best attainable" not in drawn and "soup" not in drawn
    (curve,) = (line for line in axis.lines if len(line.get_xdata()) == 4)
    np.testing.assert_array_equal(curve.get_ydata(), synthetic_results.training_curves[0].mean)
    at_zero = [line for line in axis.lines if line.get_label() in ("RPG, written from noise (other)", "retrieval")]
    places = [line.get_transform().transform(line.get_xydata())[0, 0] for line in at_zero]
    assert abs(places[0] - places[1]) > 10  # pixels: one marker does not hide the other
    low, high = axis.get_ylim()
    levels = [row.metrics["test_loss"] for row in synthetic_results.table if row.name in (*points, "ordinary training")]
    assert len(levels) == 4 and all(low <= level.low and level.high <= high for level in levels)

    ends = dataclasses.replace(
        synthetic_results.training_curves[0],
        **{name: getattr(synthetic_results.training_curves[0], name)[::3] for name in ("x", "mean", "low", "high")},
    )
    axis = figures.side_by_side(dataclasses.replace(synthetic_results, training_curves=[ends])).axes[0]
    assert len(ends.x) == 2 and not axis.collections  # no line and no band through two points

    rows = [dataclasses.replace(r, updates=None) if r.kind == "reference" else r for r in synthetic_results.table]
    axis = figures.side_by_side(dataclasses.replace(synthetic_results, table=rows, training_curves=[])).axes[0]
    (trained,) = (line for line in axis.lines if line.get_label() == "ordinary training")
    assert trained.get_marker() == "None" and len(set(trained.get_ydata())) == 1  # a level: its updates are not known

    own = [row for row in synthetic_results.table if not row.run]
    alone = dataclasses.replace(synthetic_results, table=own, training_curves=[])
    assert "side_by_side" not in figures.save_figures(alone, tmp_path / "none.jsonl", tmp_path)


def test_prompt_curves_draw_every_network_and_the_mean(synthetic_results):
    curve = synthetic_results.curves[0]
    axis = figures.prompt_alignment(synthetic_results).axes[0]
    drawn = {line.get_label(): line for line in axis.lines}
    np.testing.assert_allclose(drawn["mean, generator"].get_ydata(), np.mean(curve.achieved, axis=0))
    np.testing.assert_array_equal(axis.lines[3].get_ydata(), curve.achieved[3])
    assert len(axis.lines) == len(curve.achieved) + 3  # identity, mean, ordinary training


def test_diverged_networks_neither_crash_nor_stretch_a_figure_and_are_counted(synthetic_results):
    curve = synthetic_results.curves[0]
    achieved = [[math.inf, math.nan, *curve.achieved[0][2:]], *curve.achieved[1:-1], [1e9, *curve.achieved[-1][1:]]]
    nothing = [[math.inf] * len(networks) for networks in achieved]
    trace = dataclasses.replace(synthetic_results.recursive[0], high=[math.inf] * 6)
    infinite = Interval(math.inf, math.nan, math.inf, 3)
    row = dataclasses.replace(synthetic_results.table[0], metrics={"test_loss": infinite})
    diverged = dataclasses.replace(
        synthetic_results,
        curves=[dataclasses.replace(curve, achieved=achieved), dataclasses.replace(curve, achieved=nothing)],
        recursive=[trace],
        table=[row, *synthetic_results.table],
    )
    for name in OF_RESULTS:
        FigureCanvasAgg(getattr(figures, name)(diverged)).draw()
    figure = figures.prompt_alignment(diverged)
    assert ["1 diverged" in texts(figure)[0], "24 diverged" in " ".join(texts(figure))] == [True, True]
    assert figure.axes[0].get_ylim()[1] < 10


def test_no_legend_covers_data(synthetic_results):
    for name in OF_RESULTS:
        figure = getattr(figures, name)(synthetic_results)
        FigureCanvasAgg(figure).draw()
        boxes = [legend.get_window_extent() for legend in figure.legends]
        assert all(axis.get_legend() is None for axis in figure.axes)
        assert not any(box.overlaps(axis.get_window_extent()) for box in boxes for axis in figure.axes)


def test_training_curves_keep_short_series_as_they_are():
    lines = [{"step": s, "time": 0.0, "train/loss": 1.0 + s, "validation/alignment": 0.1 * s} for s in range(5)]
    loss, alignment = figures.training(lines).axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(alignment.lines[0].get_ydata(), [0, 0.1, 0.2, 0.3, 0.4])


def test_training_curves_show_where_the_loss_became_another_and_each_series_once():
    lines = [{"step": s, "time": 0.0, "train/loss": 1.0, "train/phase": int(s > 3)} for s in range(8)]
    lines += [{"step": 7, "time": 0.0, "validation/generated_error": 0.1, "validation/score": 0.1}]
    loss, error = figures.training(lines).axes
    assert list(loss.lines[1].get_xdata()) == [4, 4] and loss.texts
    assert error.get_title("left") == "validation generated error"
    (joined,) = figures.training([line | {"train/phase": 1} for line in lines[:8]]).axes
    assert len(joined.lines) == 1 and not joined.texts


def test_the_running_average_keeps_constants_and_bridges_gaps():
    values = np.full(100, 3.0)
    values[10:20] = np.nan
    np.testing.assert_allclose(figures._running_average(values, 5.0), 3.0)


def test_drawing_leaves_matplotlib_as_it_was(synthetic_results):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.table(synthetic_results)
    assert dict(matplotlib.rcParams) == before


def test_spread_keeps_order_and_gap_and_leaves_distant_positions_alone():
    positions = [0.0, 0.01, 0.02, 0.5, 0.53, 0.9]
    moved = style.spread(positions, 0.05)
    assert np.diff(moved).min() >= 0.05 - 1e-12
    assert moved[-1] == 0.9
    np.testing.assert_allclose(np.mean(moved[:3]), 0.01)


def test_logarithmic_axes_only_for_positive_losses_that_span_a_decade():
    scales = []
    for values, minimize in [([0.1, 2.0], True), ([0.1, 2.0], False), ([0.0, 2.0], True), ([1.0, 2.0], True)]:
        axis = style.new_figure(4.0, 3.0).subplots()
        style.metric_scale(axis, "y", values, minimize)
        scales.append(axis.get_yscale())
    assert scales == ["log", "linear", "linear", "linear"]


def test_a_set_of_networks_has_one_marker_in_all_figures(synthetic_results):
    def looks(axis):
        handles, labels = axis.get_legend_handles_labels()
        return {label: (h.get_marker(), h.get_color()) for h, label in zip(handles, labels, strict=True)}

    alone = looks(figures.wrong_predictions(synthetic_results).axes[0])
    beside, overlaps = map(looks, figures.novelty(synthetic_results).axes)
    assert len(set(beside.values())) == len(beside) == len(synthetic_results.novelty)
    assert alone.items() <= overlaps.items() <= beside.items()


def test_copies_stand_at_the_left_edge_of_the_logarithmic_axis_of_distances(synthetic_results):
    copy, *others = synthetic_results.novelty
    copying = dataclasses.replace(copy, distance=0.0, distance_ratio=0.0)
    axis = figures.wrong_predictions(dataclasses.replace(synthetic_results, novelty=[copying, *others])).axes[0]
    places = {line.get_label(): line.get_xdata()[0] for line in axis.lines}
    assert {copy.name, "retrieval", "soup", "noise 0.2"} <= set(places)
    moved = [n for n in synthetic_results.novelty if n.name not in (copy.name, "retrieval")]
    assert all(places[n.name] == n.distance_ratio for n in moved)
    assert 0 < places[copy.name] == places["retrieval"] < min(n.distance_ratio for n in moved)
    assert axis.get_xscale() == "log" and axis.get_xlim()[0] < places[copy.name]


def test_as_many_baselines_as_an_evaluation_of_whole_networks_has_are_told_apart(synthetic_results):
    names = [f"baseline {i}" for i in range(15)]  # 13 with five scales of noise
    sets = [dataclasses.replace(synthetic_results.novelty[-1], name=name) for name in names]
    assert len(set(figures._markers(sets).values())) == len(names)
