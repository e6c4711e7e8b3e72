"""Rows and curves survive the way through results.json, only comparable ones are taken, and none is told twice."""

import json
import math
from dataclasses import replace

import pytest
import torch

from Gpt.data.views import split_by_snapshot
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError
from Gpt.evaluation.beside import Others, read_runs, side_by_side, training_curves
from Gpt.evaluation.results import Interval, Results, Row, Trace

ROW = Row("G.pt, one update", "generator", {"test_error": Interval(1.0, 0.5, 1.5, 9)}, 1, 0.2, 3e6, "asked for 0")
TRAINED = Row("ordinary training", "reference", {"test_error": Interval(0.9, 0.8, 1.0, 9)}, 90)
CURVE = Trace("ordinary training", "reference", [0.0, 90.0], [50.0, 0.9], [49.0, 0.8], [51.0, 1.0])
OWN = Results("cifar10_whole", "test_error", True, [Row("RPG", "generator", ROW.metrics)])


@pytest.fixture
def folder(tmp_path):
    baseline = Row("soup", "baseline", {"test_error": Interval(2.0, 2.0, 2.0, 1)})
    told = replace(ROW, name="pdiff, from noise (pdiff)", run="pdiff")
    results = Results("cifar10_error", "test_error", True, [ROW, baseline, TRAINED, told], training_curves=[CURVE])
    (tmp_path / "results.json").write_text(json.dumps(results.to_json()))
    return tmp_path


def test_generators_and_training_are_taken_and_say_whose_they_are(folder):
    others = read_runs([folder], "test_error")
    row, trained = others.rows  # neither the baseline nor what that run has from others
    assert row.note == f"of the run {folder.name}, task cifar10_error; asked for 0"
    assert (row.name, row.run) == (f"{ROW.name} ({folder.name})", folder.name)
    assert (row.metrics, row.updates, row.seconds, row.flops) == (ROW.metrics, 1, 0.2, 3e6)
    assert trained.kind == "reference" and trained.updates == 90
    assert others.training_curves == [replace(CURVE, name=f"ordinary training ({folder.name})")]


def test_what_was_not_finite_is_not_a_number_and_what_was_unknown_stays_unknown(folder):
    content = json.loads((folder / "results.json").read_text())
    content["table"][0]["metrics"]["test_error"]["mean"] = None
    content["table"][0]["seconds"] = None
    content["training_curves"][0]["high"][0] = None
    (folder / "results.json").write_text(json.dumps(content))
    others = read_runs([folder], "test_error")
    assert math.isnan(others.rows[0].metrics["test_error"].mean) and others.rows[0].seconds is None
    assert math.isnan(others.training_curves[0].high[0])


def test_results_written_before_there_were_curves_and_runs_are_read(folder):
    content = json.loads((folder / "results.json").read_text())
    del content["training_curves"], content["table"][0]["run"]
    (folder / "results.json").write_text(json.dumps(content))
    assert [row.run for row in read_runs([folder], "test_error").rows] == [folder.name] * 2


def test_another_metric_or_an_unfinished_run_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="is about test_error, this run about test_loss"):
        read_runs([folder], "test_loss")
    with pytest.raises(ConfigError, match="finish that run first"):
        read_runs([tmp_path / "nowhere"], "test_error")


def test_the_curve_of_a_shared_zoo_is_drawn_once(folder):
    others = read_runs([folder], "test_error")
    assert side_by_side(OWN, Others()) == OWN
    joined = side_by_side(replace(OWN, training_curves=[CURVE]), others)
    assert [row.run for row in joined.table] == ["", folder.name, folder.name]
    assert joined.training_curves == [CURVE]
    other = replace(CURVE, mean=[50.0, 0.8])
    assert len(side_by_side(replace(OWN, training_curves=[other]), others).training_curves) == 2


def test_the_training_curve_is_the_mean_over_the_first_test_runs(task, zoo):
    (curve,) = training_curves(zoo, task, 8)
    assert curve.x == zoo.iterations and curve.kind == "reference"
    assert curve.mean == pytest.approx(zoo.metrics["test_loss"][:8].double().mean(0).tolist())
    assert all(low <= mean <= high for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True))


def test_a_zoo_that_does_not_know_the_course_of_training_has_no_curve(task, zoo):
    assert training_curves(split_by_snapshot(zoo, 5, 5), task, 8) == []
    assert training_curves(zoo, replace(task, recipe=None), 8) == []  # imported: numbered, not counted in iterations
    weights, ids, steps = torch.zeros(4, 2, task.structure.size), [0, 1, 2, 3], [0, 1]
    unmeasured = {"test_loss": torch.full((4, 2), torch.nan)}
    for metrics, held_out in (({}, 2), (unmeasured, 2), ({"test_loss": torch.zeros(4, 2)}, 0)):
        bare = Zoo.from_tensors(weights, metrics, ids, steps, task.structure, test_runs=held_out)
        assert training_curves(bare, task, 8) == []
