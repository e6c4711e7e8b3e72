"""Rows survive the way through results.json, and only comparable ones are taken."""

import json

import pytest

from Gpt.errors import ConfigError
from Gpt.evaluation.beside import generator_rows
from Gpt.evaluation.results import Interval, Results, Row

ROW = Row("G.pt, one update", "generator", {"test_error": Interval(1.0, 0.5, 1.5, 9)}, 1, 0.2, 3e6, "asked for 0")


@pytest.fixture
def folder(tmp_path):
    baseline = Row("soup", "baseline", {"test_error": Interval(2.0, 2.0, 2.0, 1)})
    results = Results("cifar10_error", "test_error", True, [ROW, baseline])
    (tmp_path / "results.json").write_text(json.dumps(results.to_json()))
    return tmp_path


def test_only_the_generators_rows_are_taken_and_say_whose_they_are(folder):
    (row,) = generator_rows(folder, "test_error")
    assert row.note == f"of the run {folder.name}, task cifar10_error; asked for 0"
    assert (row.name, row.metrics, row.updates, row.seconds, row.flops) == (ROW.name, ROW.metrics, 1, 0.2, 3e6)


def test_what_was_not_finite_is_not_a_number(folder):
    content = json.loads((folder / "results.json").read_text())
    content["table"][0]["metrics"]["test_error"]["mean"] = None
    (folder / "results.json").write_text(json.dumps(content))
    (row,) = generator_rows(folder, "test_error")
    assert row.metrics["test_error"].mean != row.metrics["test_error"].mean


def test_another_metric_or_an_unfinished_run_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="is about test_error, this run about test_loss"):
        generator_rows(folder, "test_loss")
    with pytest.raises(ConfigError, match="finish that run first"):
        generator_rows(tmp_path / "nowhere", "test_error")
