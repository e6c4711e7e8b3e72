"""Runs that are killed, continued and shared: they find what an unbroken run of one process finds."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import main
from Gpt.checkpoint import CheckpointFolder
from Gpt.data.shards import finished_shards
from Gpt.report.logger import read_metrics

# main.py, which at one place says so and waits for a line: what is sent to it meanwhile finds it there.
WAITING = """
import sys
import data_gen.collect as collecting, main

place, main.save_figures = sys.argv.pop(1), lambda *_: {}
train, train_population = main.train, collecting.train_population

def wait():
    print("waiting", flush=True)
    sys.stdin.readline()

def second_shard(task, run_ids, *args, **options):
    if run_ids[0]:
        wait()
    return train_population(task, run_ids, *args, **options)

def fifth_step(*args):
    *others, _, signalled = args
    return train(*others, lambda step: wait() if step == 4 else None, signalled)

if place == "zoo":
    collecting.train_population = second_shard
if place == "training":
    main.train = fifth_step
if place == "evaluation":
    main.judge = lambda *_: wait()
main.main()
"""


# main.py in two processes, of which the first waits at one place until a file is there; the second goes on.
LATE = """
import sys, time
from pathlib import Path
import main
from Gpt.distributed import primary
from Gpt.run.experiment import Experiment

def late(job):
    def waiting(*args):
        if primary():
            print("waiting", flush=True)
            while not Path("go on").exists():
                time.sleep(0.1)
        return job(*args)
    return waiting

place, main.save_figures = sys.argv.pop(1), lambda *_: {}
if place == "training":
    Experiment.fit = late(Experiment.fit)
else:
    main.judge = late(main.judge)
main.main()
"""


class Killed(BaseException):
    pass


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(main.__file__).parent)}


def assert_same_run(folder: Path, expected_folder: Path) -> None:
    """What was logged, but when, and the weights of both runs."""
    expected, found = (
        [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(f / "metrics.jsonl")]
        for f in (expected_folder, folder)
    )
    assert found == expected
    files = (sorted(f.rglob("*.safetensors")) for f in (expected_folder, folder))
    for old, new in zip(*files, strict=True):
        assert old.name == new.name
        assert old.read_bytes() == new.read_bytes()


@pytest.fixture
def killed(here, unmeasured, monkeypatch, run) -> Path:
    """The folder of a run that was killed in its fourth step, after its first checkpoint."""
    log = main.Loggers.log

    def kill_at_four(self, metrics, step):
        log(self, metrics, step)
        if step == 4:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(main.Loggers, "log", kill_at_four)
        run("run.name=killed")
    return here / "runs" / "killed"


def test_a_killed_run_continues_with_the_same_command(here, killed, run):
    finished, folder = here / "runs" / "digits_loss", killed
    run("run.name=killed", "test_only=true")  # which does not finish it
    assert "finished" not in json.loads((folder / "summary.json").read_text())
    assert run("run.name=killed") is not None
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert_same_run(folder, finished)


def test_a_killed_run_is_judged_as_having_taken_what_it_took(killed, monkeypatch, run, capsys):
    spent = []
    monkeypatch.setattr(main, "judge", lambda experiment, summary: spent.append(summary))
    run("run.name=killed", "test_only=true")
    stored = json.loads((killed / "checkpoints" / "step-00000002" / "facts.json").read_text())["state"]
    assert (spent[0]["step"], spent[0]["training_seconds"]) == (2, stored["seconds"])
    assert "not trained to the end: step 2 of 6\n" in capsys.readouterr().out
    assert stored["seconds"] > 0 and spent[0]["zoo_seconds"] > 0


@contextlib.contextmanager
def waiting(here: Path, place: str, *settings: str) -> Iterator[subprocess.Popen]:
    """main.py in a process of its own, at that place."""
    (here / "waiting.py").write_text(WAITING)
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    call = [sys.executable, "waiting.py", place, *settings]
    child = subprocess.Popen(call, cwd=here, env=environment(), text=True, **pipes)
    try:
        for line in child.stdout:
            if line == "waiting\n":
                break
        yield child
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_told_to_stop_stores_its_step_and_continues_with_the_same_command(
    here, tiny, unmeasured, run, number
):
    folder = here / "runs" / "stopped"
    with waiting(here, "training", *tiny, "run.name=stopped") as child:
        child.send_signal(number)
        _, said = child.communicate("go on\n", timeout=120)
    assert child.returncode == 128 + number
    assert "Interrupted at step 5 of 6. The same command continues" in said and "Traceback" not in said
    assert CheckpointFolder(folder / "checkpoints", {}).latest_step() == 5
    assert (folder / "metrics.csv").is_file()  # which closes the loggers
    assert run("run.name=stopped") is not None
    assert_same_run(folder, here / "runs" / "digits_loss")


def test_a_second_ctrl_c_does_not_wait_for_the_step(here, tiny):
    with waiting(here, "training", *tiny, "run.name=stopped") as child:
        child.send_signal(signal.SIGINT)
        assert any("Ctrl-C now ends it at once" in line for line in child.stderr)
        child.send_signal(signal.SIGINT)
        assert child.wait(120) == 130
        assert "Interrupted. The same command continues" in (said := child.stderr.read()) and "Traceback" not in said
    folder = here / "runs" / "stopped"
    assert CheckpointFolder(folder / "checkpoints", {}).latest_step() == 4
    assert (folder / "metrics.csv").is_file()


@pytest.mark.parametrize("place", ["zoo", "evaluation"])
def test_sigterm_elsewhere_ends_as_ctrl_c_does(here, tiny, place):
    settings = {"zoo": ["zoo.path=fresh", "run.name=stopped"], "evaluation": ["test_only=true"]}[place]
    with waiting(here, place, *tiny, *settings) as child:
        child.send_signal(signal.SIGTERM)
        assert child.wait(120) == 143
        assert "Interrupted. The same command continues" in (said := child.stderr.read()) and "Traceback" not in said
    if place == "zoo":
        assert finished_shards(here / "fresh") == [0] and not list((here / "fresh").glob("*.lock"))


@pytest.mark.parametrize(("place", "step"), [("training", 2), ("evaluation", 6)])
def test_two_processes_that_are_told_between_two_parts_end_together(here, tiny, place, step):
    """The first before the part, the second in it, waiting for the first: both end where they meet."""
    (here / "late.py").write_text(LATE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = [*launcher, "late.py", place, *tiny, "run.name=told", "trainer.slices=2"]
    pipes = {name: subprocess.PIPE for name in ("stdout", "stderr")}
    child = subprocess.Popen(call, cwd=here, env=environment(), text=True, **pipes)
    try:
        assert any(line == "waiting\n" for line in child.stdout)
        time.sleep(3)  # the second is in its part
        child.send_signal(signal.SIGTERM)
        time.sleep(1)
        (here / "go on").touch()
        _, said = child.communicate(timeout=25)  # torchrun kills them after 30 seconds
    finally:
        child.kill()
        child.communicate()
    assert said.count("The same command continues") == 1, said
    assert "Connection closed" not in said and "RuntimeError" not in said, said
    assert CheckpointFolder(here / "runs" / "told" / "checkpoints", {}).latest_step() == step


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
    call = [*launcher, "without_figures.py", *tiny, "test_only=true"]
    ended = subprocess.run(call, cwd=here, env=environment(), capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("evaluating: one update") == 1
    found = less_the_clock(json.loads(file.read_text()))
    assert found == expected
    assert expected["curves"] and sum(row["kind"] == "optimiser" for row in expected["table"]) == 3
