"""Clocks, records and tables: durations are what they claim, and a case that fails says so."""

import json
import time

import pytest
import torch
from torch import nn

from benchmarks import timing
from benchmarks.loop import time_training
from Gpt.generator import Batch, Generator
from Gpt.training import TrainerConfig

CPU = torch.device("cpu")


def bench(*arguments):
    return timing.Bench(timing.parser("A test.").parse_args(["--device", "cpu", *arguments]))


def test_intervals_lie_between_marks(monkeypatch):
    readings = iter([1.0, 3.0, 4.5])
    monkeypatch.setattr(timing, "perf_counter", lambda: next(readings))
    clock = timing.Clock(CPU)
    for _ in range(3):
        clock.mark()
    assert clock.intervals() == [2.0, 1.5]


def test_warm_up_is_not_timed_and_the_median_is_robust():
    durations = iter([0.2, 0.0, 0.0, 0.1])
    timed = timing.measure(lambda: time.sleep(next(durations)), CPU, warmup=1, repeats=3)
    assert timed.repeats == 3 and timed.peak_bytes is None
    assert timed.fastest <= timed.median < 0.1 <= timed.slowest < 0.2


def test_facts_hold_rates():
    facts = timing.Timing(0.5, 0.4, 0.6, 7, 3 * 2**30).facts(samples=1024)
    assert facts["samples_per_second"] == 2048 and facts["peak_gib"] == 3 and facts["repeats"] == 7


def test_a_record_says_what_where_when_and_how(tmp_path):
    output = tmp_path / "deep" / "records.jsonl"
    runner = bench("--output", str(output), "--seed", "3")
    runner.case("first", lambda: timing.Timing(1.0, 1.0, 1.0, 1, None).facts())
    runner.case("second", lambda: {"exponent": 1.1})
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["name"] for record in records] == ["first", "second"]
    expected = {"card", "torch", "cuda", "python", "seed", "date", "command", "wall_seconds"}
    assert all(expected <= set(record) for record in records) and records[0]["seed"] == 3
    lines = timing.table(records).splitlines()
    assert len(lines) == 3 and "1.00 s" in lines[1] and "exponent 1.1" in lines[2]


def test_only_the_named_cases_run():
    runner, ran = bench("--only", "train/*", "sample/b"), []
    for name in ("train/a", "sample/a", "sample/b"):
        runner.case(name, lambda name=name: ran.append(name) or {})
    assert ran == ["train/a", "sample/b"]


def test_a_case_that_does_not_fit_is_recorded_and_the_next_one_runs():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    runner = bench()
    runner.case("large", too_large)
    runner.case("small", dict)
    assert runner.records[0]["failed"] == "out of memory" and len(runner.records) == 2
    assert "out of memory" in timing.table(runner.records)


def test_mistakes_of_a_case_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        bench().case("broken", lambda: {"x": 1 / 0})


class Line(Generator):
    """One weight, for the loop's sake."""

    def __init__(self):
        nn.Module.__init__(self)
        self.weight = nn.Parameter(torch.zeros(()))

    def loss(self, batch, rng):
        return (self.weight - batch.target.mean()).square()


def test_the_training_loop_is_timed_step_by_step():
    calls = []

    def draw(count, rng):
        calls.append(count)
        time.sleep(0.02)
        return Batch(torch.ones(count, 1))

    generator = Line()
    config = TrainerConfig(batch_size=4, learning_rate=0.1, warmup=0)
    timed = time_training(generator, draw, config, CPU, warmup=2, repeats=3)
    assert timed.repeats == 3 and timed.fastest >= 0.02
    assert calls == [4] * 7  # warm-up, repeats, the one that ends the last interval, and the final validation
    assert generator.weight > 0
