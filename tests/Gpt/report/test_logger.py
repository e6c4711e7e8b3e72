"""What a run writes into its folder: nothing lost, no step twice, the same numbers as JSON lines and as a table."""

import csv
import dataclasses
import json
import math
import sys

import pytest

from Gpt.report.logger import JsonlLogger, LoggerConfig, Loggers, open_loggers, read_metrics


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


def read_csv(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_what_the_lines_hold(tmp_path):
    logger = JsonlLogger(tmp_path)
    logger.log({"train/loss": 0.1 + 0.2}, 1)
    logger.log({"validation/loss": math.inf, "train, rate": 1e-30}, 2)
    logger.finish()
    first, second = read_csv(tmp_path)
    assert list(first) == ["step", "time", "train/loss", "validation/loss", "train, rate"]
    assert (first["step"], float(first["train/loss"]), first["validation/loss"]) == ("1", 0.1 + 0.2, "")
    assert (second["train/loss"], second["validation/loss"], float(second["train, rate"])) == ("", "nan", 1e-30)


def test_the_table_after_a_kill_has_both_sessions(tmp_path):
    killed = JsonlLogger(tmp_path)
    for step in range(1, 5):
        killed.log({"train/loss": float(step)}, step)
    second = JsonlLogger(tmp_path, resume_step=3)  # the first was never finished
    second.log({"train/loss": 40.0}, 4)
    second.finish()
    assert [(row["step"], row["train/loss"]) for row in read_csv(tmp_path)] == [
        ("1", "1.0"), ("2", "2.0"), ("3", "3.0"), ("4", "40.0")
    ]  # fmt: skip


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


def test_results_that_are_being_written_leave_the_former_ones_whole(tmp_path, synthetic_results, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    logger = JsonlLogger(tmp_path)
    logger.results(synthetic_results)
    former = (tmp_path / "results.json").read_bytes()
    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(Killed):
        logger.results(dataclasses.replace(synthetic_results, table=[]))
    assert (tmp_path / "results.json").read_bytes() == former


@pytest.mark.parametrize("backend", ["wandb", "swanlab", "tensorboard"])
def test_without_a_tracker_there_are_files_only(tmp_path, monkeypatch, backend):
    monkeypatch.setitem(sys.modules, backend, None)
    loggers = open_loggers(LoggerConfig(backend="none"), tmp_path, {})
    loggers.log({"train/loss": 1.0}, 0)
    loggers.finish()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_the_fan_out_hands_everything_to_everyone(tmp_path, synthetic_results):
    class Recorder:
        def __init__(self):
            self.calls = []

        def log(self, *args):
            self.calls.append(("log", *args))

        def flush(self):
            self.calls.append(("flush",))

        def figure(self, *args):
            self.calls.append(("figure", *args))

        def results(self, *args):
            self.calls.append(("results", *args))

        def finish(self):
            self.calls.append(("finish",))

    first, second = Recorder(), Recorder()
    both = Loggers([first, second])
    both.log({"a": 1.0}, 3)
    both.flush()
    both.figure("f", tmp_path)
    both.results(synthetic_results)
    both.finish()
    told = [("log", {"a": 1.0}, 3), ("flush",), ("figure", "f", tmp_path), ("results", synthetic_results), ("finish",)]
    assert first.calls == second.calls == told


def test_one_that_cannot_finish_does_not_keep_the_others_from_it(tmp_path):
    class Tracker(JsonlLogger):
        finished = False

        def finish(self):
            super().finish()
            self.finished = True

    class Full(Tracker):
        def finish(self):
            raise OSError("no space left")

    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    trackers = [kind(folder) for kind, folder in zip((Tracker, Full, Tracker), folders, strict=True)]
    with pytest.raises(OSError, match="no space"):
        Loggers(trackers).finish()
    assert [tracker.finished for tracker in trackers] == [True, False, True]
