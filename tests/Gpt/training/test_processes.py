"""Several processes train what one trains, and end together."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_training import CONFIG, MUON, SHARDED, Killed, Killer, assert_same, contents, lines, run

from Gpt import distributed
from Gpt.checkpoint import CheckpointFolder
from Gpt.report.logger import read_metrics
from Gpt.training import _agreed


def assert_close(folder: Path, expected_folder: Path) -> None:
    """Checkpoints of the same names and shapes, and both they and the losses equal up to the order of sums."""
    found, expected = contents(folder), contents(expected_folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    losses = [[line.get("train/loss") for line in read_metrics(f / "metrics.jsonl")] for f in (folder, expected_folder)]
    assert losses[0] == pytest.approx(losses[1], nan_ok=True)


def test_two_processes_train_what_one_trains(tmp_path, unbroken, two_processes):
    two_processes(tmp_path, "process")
    assert_close(tmp_path, unbroken)


@pytest.mark.parametrize("kind", SHARDED)
def test_two_processes_with_a_part_of_the_weights_each_train_what_one_trains(tmp_path, kind, two_processes):
    run(tmp_path / "one", MUON, SHARDED[kind]())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 20)
        run(tmp_path / "two", MUON, SHARDED[kind]())
    assert CheckpointFolder(tmp_path / "two" / "checkpoints", {}).latest_step() == 4
    two_processes(tmp_path / "two", kind)
    assert_close(tmp_path / "two", tmp_path / "one")


@pytest.mark.parametrize(("step", "told"), [(4, "0"), (5, "1"), (6, "01")])
def test_two_processes_stop_after_the_same_step_whoever_is_told(tmp_path, unbroken_pair, step, told, two_processes):
    """Where they ask each other, every 2 steps here; the signal that both end with is the same."""
    outputs = two_processes(tmp_path, "stopped", step, told)
    stop = step + 2 - step % 2
    expected = f"SIGTERM at step {stop} of 12" if "1" in told else f"SIGINT at step {stop} of 12"
    assert [expected in output.splitlines() for output in outputs] == [True, True], outputs
    assert [output.count("the training ends after a step") for output in outputs] == [int("0" in told), 0]
    (tmp_path / "rendezvous").unlink(missing_ok=True)
    two_processes(tmp_path, "process")
    assert_same(contents(tmp_path), contents(unbroken_pair))
    assert lines(tmp_path) == lines(unbroken_pair)


@pytest.mark.parametrize(("log_every", "expected"), [(5, [5, 10, 12]), (0, [10, 12]), (50, [10, 12])])
def test_processes_ask_each_other_within_ten_steps_and_at_the_end(monkeypatch, log_every, expected):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "largest", lambda number: max(number, signal.SIGINT))
    config = replace(CONFIG, log_every=log_every)
    assert [step for step in range(13) if _agreed(0, step, config) == signal.SIGINT] == expected
    assert _agreed(signal.SIGTERM, 10, config) == signal.SIGTERM and _agreed(signal.SIGTERM, 9, config) == 0
