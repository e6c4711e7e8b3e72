"""What a run reports: nothing lost, no step twice, wandb readable without a network and never in the way."""

import dataclasses
import json
import logging
import math
import struct
import sys

import pytest
import wandb
from PIL import Image
from wandb.proto import wandb_internal_pb2

from Gpt.errors import ConfigError
from Gpt.report.logger import (
    JsonlLogger,
    LoggerConfig,
    Loggers,
    WandbLogger,
    line_charts,
    open_loggers,
    read_metrics,
)


def read_wandb_history(folder):
    """The logged rows of an offline run: protobuf records in LevelDB's log format (32 KiB blocks, 7-byte headers)."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, position, record, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            message = wandb_internal_pb2.Record.FromString(record)
            record = b""
            if message.HasField("history"):
                items = message.history.item
                rows.append({"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


def close(logger):
    """Finish the run and wandb's own process, which otherwise writes its last records a moment later."""
    logger.finish()
    assert not logger._failed
    wandb.teardown()


def read_wandb_table(folder, name):
    (path,) = folder.glob(f"wandb/offline-run-*/files/media/table/{name}_*.table.json")
    return json.loads(path.read_text())


@pytest.fixture
def offline(tmp_path):
    logger = WandbLogger(LoggerConfig(project="tests"), tmp_path / "run", {"zoo": {"runs": 8}})
    yield logger
    logger.finish()


def test_every_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    logger = JsonlLogger(tmp_path / "run")
    logger.log({"train/loss": 0.5}, 1)
    logger.log({"train/loss": math.nan, "train/networks": 3}, 2)
    first, second = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (first["step"], first["train/loss"]) == (1, 0.5) and first["time"] > 1e9
    assert second["train/loss"] is None and second["train/networks"] == 3
    assert math.isnan(read_metrics(tmp_path / "run/metrics.jsonl")[1]["train/loss"])
    logger.finish()
    logger.finish()


def test_a_resumed_run_holds_every_step_once(tmp_path):
    first = JsonlLogger(tmp_path)
    for step in range(1, 8):
        first.log({"train/loss": 1.0}, step)
    first.finish()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "train/lo')  # killed while it wrote
    second = JsonlLogger(tmp_path, resume_step=5)
    for step in range(6, 9):
        second.log({"train/loss": 2.0}, step)
    second.finish()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["train/loss"] for line in lines] == [1.0] * 5 + [2.0] * 3


def test_a_fresh_run_in_an_old_folder_starts_from_nothing(tmp_path):
    for _ in range(2):
        logger = JsonlLogger(tmp_path)
        logger.log({"train/loss": 1.0}, 0)
        logger.finish()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_results_are_kept_as_strict_json(tmp_path, synthetic_results):
    logger = JsonlLogger(tmp_path)
    trace = dataclasses.replace(synthetic_results.recursive[0], high=[math.inf] * 6)
    logger.results(dataclasses.replace(synthetic_results, recursive=[trace]))
    logger.finish()
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["table"][0]["metrics"]["test_loss"]["mean"] == 0.348
    assert found["recursive"][0]["high"] == [None] * 6


def test_scalars_can_be_read_back_from_an_offline_wandb_run(offline, tmp_path, capfd):
    offline.log({"train/loss": 0.75}, 10)
    offline.log({"train/loss": 0.5, "validation/alignment": 0.9}, 20)
    close(offline)
    rows = read_wandb_history(tmp_path / "run")
    assert [(row["step"], row["train/loss"]) for row in rows] == [(10, 0.75), (20, 0.5)]
    assert rows[1]["validation/alignment"] == 0.9
    assert capfd.readouterr() == ("", "")


def test_charts_tables_and_figures_can_be_read_back_from_an_offline_wandb_run(offline, tmp_path, synthetic_results):
    Image.new("RGB", (5, 4), "teal").save(tmp_path / "figure.png")
    offline.figure("prompt_alignment", tmp_path / "figure.png")
    offline.results(synthetic_results)
    close(offline)
    image, results = read_wandb_history(tmp_path / "run")
    assert (image["figures/prompt_alignment/width"], image["figures/prompt_alignment/height"]) == (5, 4)
    assert "results/path" in results and "optimisers_table/path" in results
    table = read_wandb_table(tmp_path / "run", "results")
    assert table["columns"][:5] == ["name", "kind", "test_loss", "test_loss low", "test_loss high"]
    assert ["retrieval", "baseline", 0.171] in [line[:3] for line in table["data"]]
    chart = read_wandb_table(tmp_path / "run", "optimisers_table")
    drawn = {(line[1], line[0]): line[2] for line in chart["data"]}
    adam = synthetic_results.optimisers[1]
    assert [drawn["Adam", x] for x in adam.x] == adam.mean
    assert drawn["G.pt, one update", 200.0] == 0.348 and drawn["retrieval", 0.0] == 0.171


def test_a_resumed_run_keeps_its_wandb_id(tmp_path):
    ids = set()
    for _ in range(2):
        logger = WandbLogger(LoggerConfig(), tmp_path, {})
        ids.add(logger._run.id)
        logger.finish()
    assert len(ids) == 1


def test_line_charts_hold_the_identity_and_every_network(synthetic_results):
    charts = line_charts(synthetic_results)
    assert set(charts) == {*(f"prompt_curve/{c.name}" for c in synthetic_results.curves), "optimisers", "recursive"}
    for chart in charts.values():
        assert len(chart["xs"]) == len(chart["ys"]) == len(chart["keys"])
        assert all(len(x) == len(y) for x, y in zip(chart["xs"], chart["ys"], strict=True))
    chart = charts["prompt_curve/held-out starts"]
    assert chart["ys"][1] == chart["xs"][1] and len(chart["keys"]) == 26
    assert "SGD, 1 step" not in charts["optimisers"]["keys"]


@pytest.mark.parametrize("broken", ["init", "import"])
def test_a_wandb_that_fails_costs_one_warning(tmp_path, monkeypatch, caplog, synthetic_results, broken):
    if broken == "import":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        def refuse(**settings):
            raise wandb.errors.CommError("no network")

        monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        loggers = open_loggers(LoggerConfig(wandb="online"), tmp_path, {})
        loggers.log({"train/loss": 1.0}, 0)
        loggers.figure("x", tmp_path / "x.png")
        loggers.results(synthetic_results)
        loggers.finish()
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["train/loss"] == 1.0


def test_disabled_leaves_wandb_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    loggers = open_loggers(LoggerConfig(wandb="disabled"), tmp_path, {})
    assert [type(logger) for logger in loggers.loggers] == [JsonlLogger]
    loggers.finish()
    assert not (tmp_path / "wandb").exists()


def test_an_unknown_mode_is_a_configuration_error():
    with pytest.raises(ConfigError, match="'ofline'; choose one of offline, online, disabled"):
        LoggerConfig(wandb="ofline")


def test_the_fan_out_hands_everything_to_everyone(tmp_path, synthetic_results):
    class Recorder:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args: self.calls.append((name, *args))

    first, second = Recorder(), Recorder()
    both = Loggers([first, second])
    both.log({"a": 1.0}, 3)
    both.figure("f", tmp_path)
    both.results(synthetic_results)
    both.finish()
    expected = [("log", {"a": 1.0}, 3), ("figure", "f", tmp_path), ("results", synthetic_results), ("finish",)]
    assert first.calls == second.calls == expected
