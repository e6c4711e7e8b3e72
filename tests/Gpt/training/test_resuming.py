"""A training that is killed at any moment continues to the bit."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from toy_training import (
    CONFIG,
    MUON,
    Killed,
    Killer,
    Toy,
    assert_same,
    contents,
    run,
    subprocess_of,
)

from Gpt.checkpoint import CheckpointFolder
from Gpt.report.logger import read_metrics


def file_operations(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, 10_000)
        run(folder)
    return 10_000 - killer.left


def test_a_run_killed_at_any_file_operation_continues_to_the_bit(tmp_path, unbroken):
    total = file_operations(tmp_path / "count")
    assert total > 40
    for n in range(total):
        folder = tmp_path / str(n)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            Killer(patch, n)
            run(folder)
        run(folder)
        assert_same(contents(folder), contents(unbroken))


@pytest.mark.parametrize("kills", [(0,), (1,), (5, 6), (4, 3, 2), (11,)])
def test_a_run_killed_between_steps_continues_to_the_bit(tmp_path, unbroken, kills):
    class Fragile(Toy):
        def __init__(self, steps: int):
            super().__init__()
            self.calls_left = CONFIG.slices * steps

        def loss(self, batch, rng):
            self.calls_left -= torch.is_grad_enabled()
            if self.calls_left < 0:
                raise Killed
            return super().loss(batch, rng)

    for steps_of_session in kills:
        with pytest.raises(Killed):
            run(tmp_path, generator=Fragile(steps_of_session))
    generator, state = run(tmp_path)
    assert state.step == CONFIG.steps
    assert_same(contents(tmp_path), contents(unbroken))
    again, _ = run(tmp_path)
    assert_same(again.state_dict(), generator.state_dict())


def test_hidden_matrices_of_muon_continue_to_the_bit_too(tmp_path):
    run(tmp_path / "muon", MUON)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 20)
        run(tmp_path / "killed", MUON)
    assert CheckpointFolder(tmp_path / "killed" / "checkpoints", {}).latest_step() == 4
    run(tmp_path / "killed", MUON)
    assert_same(contents(tmp_path / "killed"), contents(tmp_path / "muon"))


def test_no_line_is_written_twice_and_none_is_lost(tmp_path, unbroken):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        Killer(patch, 33)
        run(tmp_path)
    run(tmp_path)
    run(tmp_path)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = read_metrics(unbroken / "metrics.jsonl")
    assert [set(line) | {line["step"]} for line in lines] == [set(line) | {line["step"]} for line in expected]
    validated = [line["step"] for line in lines if "validation/loss" in line]
    assert validated == [3, 6, 9, 12]


def test_a_finished_run_is_left_alone(tmp_path, unbroken):
    folder = shutil.copytree(unbroken, tmp_path / "again")
    before = {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")}
    run(folder)
    assert {file: file.stat().st_mtime_ns for file in (folder / "checkpoints").rglob("*")} == before


def test_sigkill_in_the_middle_of_a_checkpoint(tmp_path, unbroken):
    child = subprocess_of(tmp_path, "kill-while-saving", 8)
    output, _ = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGKILL, output
    assert [f.name for f in (tmp_path / "checkpoints").glob("step-*") if ".tmp" not in f.name] == ["step-00000004"]
    run(tmp_path)
    assert_same(contents(tmp_path), contents(unbroken))
    assert not list((tmp_path / "checkpoints").glob("*.tmp*"))


def test_what_was_logged_is_on_the_disk_before_the_checkpoint_that_goes_on_after_it(tmp_path, disk):
    run(tmp_path)
    lines, used = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / "latest.json"
    uses = [i for i, event in enumerate(disk.events) if event == ("named", used)]
    flushes = [i for i, event in enumerate(disk.events) if event == ("flushed", lines)][1:]  # of the empty file
    assert len(uses) == len(flushes) == 3
    assert all(flushed < use for flushed, use in zip(flushes, uses, strict=True))
