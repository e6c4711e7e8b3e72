"""Runs that are killed, continued and shared: they find what an unbroken run of one process finds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from Gpt.report.logger import read_metrics


class Killed(BaseException):
    pass


def test_a_killed_run_continues_with_the_same_command(here, unmeasured, monkeypatch, run):
    finished, folder = here / "runs" / "digits_loss", here / "runs" / "killed"
    log = main.Loggers.log

    def kill_at_four(self, metrics, step):
        log(self, metrics, step)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(main.Loggers, "log", kill_at_four)
        run("run.name=killed")
    run("run.name=killed", "test_only=true")  # which does not finish it
    assert "finished" not in json.loads((folder / "summary.json").read_text())
    assert run("run.name=killed") is not None
    assert json.loads((folder / "summary.json").read_text())["finished"]
    expected, found = (
        [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(f / "metrics.jsonl")]
        for f in (finished, folder)
    )
    assert found == expected
    for old, new in zip(sorted(finished.rglob("*.safetensors")), sorted(folder.rglob("*.safetensors")), strict=True):
        assert old.name == new.name
        assert old.read_bytes() == new.read_bytes()


def test_a_zoo_that_changed_is_judged_alike_in_every_session(here, unmeasured, monkeypatch, run):
    judged = []
    monkeypatch.setattr(main, "judge", lambda experiment, _: judged.append(experiment.zoo))
    fresh = ["zoo.store=false", "zoo.population=16", "zoo.refresh_every=1", "run.name=fresh"]
    run(*fresh)
    run(*fresh, "test_only=true")
    (here / "runs" / "fresh" / "summary.json").write_text("{}")  # as of a run that was killed after its last step
    run(*fresh, "test_only=true")
    for zoo in judged:  # 64 training runs are four populations: at the sixth step the first has changed twice
        assert zoo.run_ids[32:].tolist() == [*range(160, 176), *range(112, 160)]
        assert len(zoo.former) == 64 + 16
    for zoo in judged[1:]:
        assert torch.equal(judged[0].former, zoo.former)
        assert judged[0].metrics["validation_loss"].equal(zoo.metrics["validation_loss"])


def less_the_clock(found: Any) -> Any:
    """Results without seconds, and of the optimisers only the longest run, whose steps do not follow from seconds."""
    if isinstance(found, dict):
        clocked = ("seconds" in key or key in ("break_even", "note", "optimisers") for key in found)
        return {k: less_the_clock(v) for (k, v), c in zip(found.items(), clocked, strict=True) if not c}
    if isinstance(found, list):
        rows = (r for r in found if not (isinstance(r, dict) and r.get("kind") == "optimiser" and r["updates"] < 4))
        return [less_the_clock(row) for row in rows]
    return found


def test_two_processes_find_what_one_finds(here, tiny):
    """All of the evaluation, one-update curves included: the same numbers, to the bit."""
    file = here / "runs" / "digits_loss" / "results.json"
    expected = less_the_clock(json.loads(file.read_text()))
    file.unlink()
    shutil.rmtree(here / "zoos")  # both processes collect it again
    (here / "without_figures.py").write_text("import main; main.save_figures = lambda *_: {}; main.main()")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(main.__file__).parent)}
    call = [*launcher, "without_figures.py", *tiny, "test_only=true"]
    ended = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("evaluating: one update") == 1
    found = less_the_clock(json.loads(file.read_text()))
    assert found == expected
    assert expected["curves"] and sum(row["kind"] == "optimiser" for row in expected["table"]) == 3
