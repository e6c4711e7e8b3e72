"""Words and numbers: nothing is claimed that the intervals do not carry."""

import dataclasses
import math

import pytest

from Gpt.evaluation.results import Interval, Results, Row
from Gpt.report.text import (
    column_label,
    comparison_rows,
    format_flops,
    format_interval,
    format_number,
    format_seconds,
    metric_columns,
    metric_label,
    print_table,
    summarise,
)


def results_of(generator: Interval, retrieval: Interval, minimize: bool = True) -> Results:
    rows = [
        Row("G.pt, one update", "generator", {"test_loss": generator}),
        Row("retrieval", "baseline", {"test_loss": retrieval}),
    ]
    return Results("task", "test_loss", minimize, rows)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.25, 93.98, 0.00123, 123456.0, 3.4e-7, 8.1e13])
def test_a_formatted_number_reads_back_to_four_digits(value):
    assert float(format_number(value)) == pytest.approx(value, rel=5.1e-4)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (Interval(0.34812, 0.32812, 0.36812, 4), ("0.348", "0.328 … 0.368")),
        (Interval(93.98, 93.7, 94.26, 4), ("93.98", "93.70 … 94.26")),
        (Interval(2.0, 2.0, 2.0, 1), ("2.000", "2.000 … 2.000")),
        (Interval(212.0, 112.0, 312.0, 4), ("212", "112 … 312")),
        (Interval(math.inf, math.nan, math.inf, 4), ("inf", "nan … inf")),
    ],
)
def test_an_interval_has_the_decimals_that_its_width_supports(interval, expected):
    assert format_interval(interval) == expected


def test_units():
    assert [format_seconds(s) for s in (None, 2e-5, 0.0123, 42.0, 1200.0, 7.2e4)] == [
        "", "20.0 µs", "12.3 ms", "42.0 s", "20.0 min", "20.0 h",
    ]  # fmt: skip
    assert [format_flops(f) for f in (None, 12.0, 568320.0, 3.4e9, 8.1e13)] == [
        "", "12 FLOP", "568 kFLOP", "3.40 GFLOP", "81.0 TFLOP",
    ]  # fmt: skip
    assert metric_label("test_error") == "test error (%)"
    assert metric_label("test_loss") == "test loss"
    assert metric_label("s2_lead") == "s2 lead (points)"
    for metric, label in {"s2_exact": "s2 lead (points)", "s2_distance": "s2 lead"}.items():
        assert column_label("s2_lead", Results("some", metric, True, [])) == label
        assert column_label("test_error", Results("some", metric, True, [])) == "test error (%)"


@pytest.mark.parametrize(
    ("generator", "minimize", "verdict"),
    [
        (Interval(0.1, 0.05, 0.15, 8), True, "beats returning a stored network"),
        (Interval(0.1, 0.05, 0.15, 8), False, "is worse than returning a stored network"),
        (Interval(0.9, 0.85, 0.95, 8), True, "is worse than returning a stored network"),
        (Interval(0.9, 0.85, 0.95, 8), False, "beats returning a stored network"),
        (Interval(0.4, 0.2, 0.55, 8), True, "cannot be told from returning a stored network"),
        (Interval(math.inf, math.nan, math.inf, 8), True, "is worse than returning a stored network"),
    ],
)
def test_the_summary_claims_a_difference_only_between_disjoint_intervals(generator, minimize, verdict):
    assert verdict in summarise(results_of(generator, Interval(0.5, 0.45, 0.55, 8), minimize))


@pytest.mark.parametrize("minimize", [True, False])
@pytest.mark.parametrize(
    ("lead", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3, 8), "beats returning a stored network"),
        (Interval(-0.2, -0.3, -0.1, 8), "is worse than returning a stored network"),
        (Interval(0.2, -0.1, 0.5, 8), "cannot be told from returning a stored network"),
    ],
)
def test_a_lead_tells_more_than_two_intervals(lead, verdict, minimize):
    """The two intervals overlap, whatever their difference."""
    found = results_of(Interval(0.4, 0.2, 0.55, 8), Interval(0.5, 0.45, 0.55, 8), minimize)
    rows = [
        dataclasses.replace(row, metrics=row.metrics | {"lead": lead}) if row.kind == "baseline" else row
        for row in found.table
    ]
    summary = summarise(dataclasses.replace(found, table=rows))
    assert verdict in summary
    assert ("by 0.20 (0.10 … 0.30) one by one" in summary) == (lead.low * lead.high > 0)


def test_the_lead_of_the_first_of_several_splits_decides():
    found = results_of(Interval(0.4, 0.2, 0.55, 8), Interval(0.5, 0.45, 0.55, 8), False)
    rows = [dataclasses.replace(row, metrics={"s2_exact": row.metrics["test_loss"]}) for row in found.table]
    rows[1].metrics["s2_lead"] = Interval(0.2, 0.1, 0.3, 8)
    several = dataclasses.replace(found, table=rows, metric="s2_exact")
    assert rows[1].kind == "baseline" and "beats returning a stored network" in summarise(several)
    assert metric_columns(several) == ["s2_exact", "s2_lead"]


def test_nothing_is_compared_with_a_single_measurement():
    once = results_of(Interval(0.1, 0.1, 0.1, 1), Interval(0.5, 0.45, 0.55, 8), True)
    assert "measured once" in summarise(once) and "beats" not in summarise(once)


def test_controls_are_no_rivals():
    found = results_of(Interval(0.4, 0.3, 0.45, 8), Interval(0.5, 0.49, 0.55, 8), True)
    control = Row("shuffled prompts", "control", {"test_loss": Interval(0.1, 0.1, 0.1, 8)})
    assert "shuffled" not in summarise(dataclasses.replace(found, table=[*found.table, control]))


def test_the_summary_says_what_was_not_measured_and_what_does_not_pay(synthetic_results):
    only_generator = dataclasses.replace(synthetic_results, table=synthetic_results.table[:1], costs=None)
    assert "Retrieval was not measured" in summarise(only_generator)
    assert "Ordinary training was not measured" in summarise(only_generator)
    assert "no generated network" in summarise(dataclasses.replace(synthetic_results, table=[]))
    never = dataclasses.replace(synthetic_results.costs, break_even=None)
    assert "never pays off" in summarise(dataclasses.replace(synthetic_results, costs=never))
    assert "from 740 networks on" in summarise(synthetic_results)
    unknown = dataclasses.replace(never, zoo_seconds=0.0, train_seconds=0.0)
    assert "is not known here" in summarise(dataclasses.replace(synthetic_results, costs=unknown))
    published = dataclasses.replace(never, generator_seconds=0.0, generator_flops=0.0)
    assert "What training the generator took is not known" in summarise(
        dataclasses.replace(synthetic_results, costs=published)
    )


@pytest.mark.parametrize("minimize", [True, False])
def test_the_summary_names_the_best_way_without_a_generator_where_it_is_not_retrieval(minimize):
    found = results_of(Interval(0.4, 0.3, 0.5, 8), Interval(0.5, 0.5, 0.5, 1), minimize)
    assert "the best way without" not in summarise(found)
    ways = {"ridge": 0.1, "mean network": 0.9, "broken": math.inf if minimize else -math.inf}
    rows = [Row(name, "baseline", {"test_loss": Interval(x, x, x, 8)}) for name, x in ways.items()]
    best = "ridge" if minimize else "mean network"
    expected = f"is worse than the best way without a generator, “{best}”, which reaches"
    assert expected in summarise(dataclasses.replace(found, table=[*found.table, *rows]))


def test_an_interval_is_claimed_only_of_several_networks(synthetic_results):
    for count, shown in ((1, "0.3480"), (2, "0.3480 ± 0.0000")):
        row = dataclasses.replace(
            synthetic_results.table[0], metrics={"test_loss": Interval(0.348, 0.348, 0.348, count)}
        )
        lines = print_table(dataclasses.replace(synthetic_results, table=[row])).splitlines()
        line = next(line for line in lines if "G.pt" in line)
        assert shown in line and ("±" in line) == (count > 1)


def test_a_generator_that_ignores_its_prompt_is_found_out(synthetic_results):
    held_out, shuffled = synthetic_results.curves[0], synthetic_results.curves[4]
    assert "does follow its prompt" in summarise(synthetic_results)
    same = dataclasses.replace(shuffled, alignment=held_out.alignment)
    assert "not shown to follow" in summarise(dataclasses.replace(synthetic_results, curves=[held_out, same]))


def test_the_table_fits_the_terminal_and_holds_every_row(synthetic_results):
    wide = Row("x" * 90, "baseline", {"test_loss": Interval(1e-5, 0.0, 2e-5, 3)}, 10**7, 1e6, 1e20, "n" * 200)
    text = print_table(dataclasses.replace(synthetic_results, table=[*synthetic_results.table, wide]))
    assert max(map(len, text.splitlines())) <= 120
    for row in synthetic_results.table:
        assert row.name in text
        assert format_interval(row.metrics["test_loss"])[0] in text


def test_many_metrics_leave_the_main_one_in_the_table(synthetic_results):
    row = synthetic_results.table[0]
    side_metrics = {f"test_{i}": row.metrics["test_error"] for i in range(9)}
    crowded = dataclasses.replace(row, metrics={**row.metrics, **side_metrics})
    text = print_table(dataclasses.replace(synthetic_results, table=[crowded]))
    assert max(map(len, text.splitlines())) <= 120
    assert "test_loss" in text and "0.348" in text


def test_a_lead_and_the_worst_are_worth_more_room_than_the_number_of_operations(synthetic_results):
    row = dataclasses.replace(synthetic_results.table[0], name="x" * 42, seconds=1.0, flops=1e9)
    measured = {name: row.metrics["test_error"] for name in ("worst_mask_error", "lead", "test_other")}
    crowded = dataclasses.replace(row, metrics={"test_loss": row.metrics["test_loss"]} | measured)
    header = print_table(dataclasses.replace(synthetic_results, table=[crowded])).splitlines()[2].split()
    assert header == ["name", "kind", "test_loss", "lead", "worst_mask_error", "updates", "time"]


def test_the_controls_are_compared_with_the_curve_that_was_asked_the_same(synthetic_results):
    assert "held-out starts, attainable) is 0.900" in summarise(synthetic_results)


def test_optimisers_are_compared_with_one_generated_row_and_with_no_optimiser(synthetic_results):
    names = [row.name for row in comparison_rows(synthetic_results)]
    assert [name for name in names if "G.pt" in name] == ["G.pt, one update"]
    assert "ordinary training" in names and "retrieval" in names and "SGD, 1 step" not in names
