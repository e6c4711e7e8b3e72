"""The folder of a run: what it holds in the end, what is left alone in it, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

import main
from Gpt.config import RunConfig, checked
from Gpt.errors import CheckpointError, ConfigError, UserError
from Gpt.report.logger import read_metrics
from Gpt.run.command_line import compose, guard
from Gpt.run.folder import stored_config


def test_a_run_leaves_everything_behind(workplace, tiny):
    folder = workplace / "runs" / "digits_loss"
    expected = {"config.json", "config.yaml", "metrics.jsonl", "results.json", "report.html", "summary.json"}
    assert expected | {"metrics.csv"} <= {f.name for f in folder.iterdir()}
    assert len(list((folder / "figures").iterdir())) > 3
    assert (folder / "checkpoints" / "latest.json").is_file()
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == [2, 4, 6]
    validated = [line for line in lines if "validation/score" in line]
    assert [line["step"] for line in validated] == [3, 6]
    names = ("loss", "generated_loss", "generated_alignment")  # of training, and of the networks: a loss, too
    assert all(f"validation/{name}" in line for line in validated for name in names)
    assert all(line["validation/loss"] != line["validation/generated_loss"] for line in validated)
    results = json.loads((folder / "results.json").read_text())
    assert results["task"] == "digits_loss"
    kinds = {row["kind"] for row in results["table"]}
    assert kinds == {"generator", "baseline", "optimiser", "reference"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    assert summary["step"] == 6
    assert summary["zoo_seconds"] > 0
    assert summary["training_seconds"] > 0
    assert checked(RunConfig, json.loads(json.dumps(compose("digits_loss", tiny).training_settings())))


def test_two_processes_are_not_let_into_one_run(here, unmeasured, run, times):
    """The second is told, and leaves everything as it is; when the first has ended, there is no trace of it."""
    folder = here / "runs" / "digits_loss"
    with FileLock(folder / ".lock"):
        before = times(folder)
        with pytest.raises(ConfigError, match=r"runs/digits_loss: another process is at work .* run.name"):
            run("test_only=true")
        assert times(folder) == before
    run("test_only=true")
    run("test_only=true")


def test_a_refused_process_leaves_an_untrained_run_its_settings(here, unmeasured, run, times):
    """The run that it met, which has no checkpoint yet, is gone on with afterwards; no zoo is collected either."""
    shutil.rmtree(here / "runs" / "digits_loss" / "checkpoints")
    before = times(here)
    with FileLock(here / "runs" / "digits_loss" / ".lock"), pytest.raises(ConfigError, match="another process"):
        run("seed=1", "zoo.seed=1")
    assert times(here) == before


def test_a_process_that_came_late_does_not_take_over_what_was_trained_meanwhile(here, unmeasured, run, monkeypatch):
    """While its runs beside it are finished, nobody is kept out of its own folder."""

    def meanwhile(_):
        monkeypatch.setattr(main, "run_beside", lambda _: ())
        run("run.name=late", "seed=1")

    monkeypatch.setattr(main, "run_beside", meanwhile)
    with pytest.raises(ConfigError, match="seed was 1, now 0"):
        run("run.name=late")


def test_a_finished_run_is_left_alone_and_says_so(here, capsys, run, times):
    shutil.rmtree(here / "zoos")  # not even the zoo is needed
    before = times(here)
    assert run() is None
    output = capsys.readouterr().out
    assert "finished" in output
    assert "report.html" in output
    assert "test_only=true" in output
    assert times(here) == before


def test_test_only_measures_the_same_again(here, run, times):
    folder = here / "runs" / "digits_loss"
    stored, before = json.loads((folder / "results.json").read_text()), times(here)
    results = run("test_only=true")
    assert results is not None
    rows = {row["name"]: row["metrics"] for row in json.loads((folder / "results.json").read_text())["table"]}
    for row in stored["table"]:
        if row["kind"] != "optimiser":  # of which some get as much time as the generator takes
            assert rows[row["name"]] == row["metrics"]
    changed = {name for name, written in times(here).items() if before.get(name) != written}
    assert not [name for name in changed if "checkpoints" in name or name.startswith("zoos")]
    assert len(read_metrics(folder / "metrics.jsonl")) == 5


def test_test_only_can_measure_in_another_way(here, run):
    results = run("test_only=true", "evaluation.networks=4", "evaluation.label=mine")
    assert results is not None
    assert results.table[0].name.startswith("mine")


def test_test_only_without_a_trained_generator(here, run, times):
    before = times(here)
    with pytest.raises(CheckpointError, match=r"no trained run in runs/other; train it first, or set run\.name"):
        run("test_only=true", "run.name=other")
    assert times(here) == before
    assert not (here / "runs" / "other").exists()


@pytest.mark.parametrize("change", ["trainer.learning_rate=0.001", "zoo.seed=1", "generator.width=16"])
def test_other_settings_in_the_same_folder_are_refused_by_name(here, change, run, times):
    key, value = change.split("=")
    before = times(here)
    for arguments in ([change], [change, "test_only=true"]):
        with pytest.raises(ConfigError) as caught:
            run(*arguments)
        for part in (f"{key} was", f"now {value}", "runs/digits_loss", "run.name", "resume=never"):
            assert part in str(caught.value)
    assert times(here) == before


def test_settings_without_influence_on_the_weights_may_change(here, run):
    assert run("evaluation.networks=4", "data.root=elsewhere", "zoo.storage=disk") is None


def test_an_untrained_folder_takes_corrected_settings(here, unmeasured, run, monkeypatch):
    def diverges(*_):
        raise UserError("the loss is nan")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="nan"):
        patch.setattr(main, "train", diverges)
        run("run.name=wrong", "trainer.learning_rate=1e9")
    assert run("run.name=wrong", "trainer.learning_rate=1e-3") is not None


def test_a_folder_that_cannot_be_written_is_found_before_the_zoo_is_collected(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        guard(lambda: run("run.root=file/runs"))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_published_weights_that_were_evaluated_do_not_pass_for_a_trained_run(here, unmeasured, run):
    (here / "published.pt").touch()
    run("run.name=mine", "resume_path=published.pt", "test_only=true")
    assert run("run.name=mine") is not None
    stored = stored_config(here / "runs" / "mine")
    assert stored is not None and stored.resume_path is None
    assert (here / "runs" / "mine" / "checkpoints" / "latest.json").is_file()


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_a_damaged_file_of_a_run_is_named(here, unmeasured, run, name):
    run()
    file = here / "runs" / "digits_loss" / name
    file.write_text(file.read_text()[:-5])
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        run()


def test_resume_never_makes_a_folder_beside_it(here, unmeasured, run, times):
    before = times(here / "runs" / "digits_loss")
    run("resume=never")
    assert (here / "runs" / "digits_loss-2" / "checkpoints" / "latest.json").is_file()
    assert times(here / "runs" / "digits_loss") == before
    with pytest.raises(ConfigError, match="resume=always is unknown; choose auto or never"):
        run("resume=always")


def test_collect_only_describes_the_zoo_and_trains_nothing(here, capsys, run):
    assert run("collect_only=true", "run.name=other") is None
    output = capsys.readouterr().out
    assert "96 runs x 6 snapshots x 760 weights" in output
    assert "fc1.weight" in output
    assert "final validation_loss" in output
    assert not (here / "runs" / "other").exists()


def test_the_command_itself(here, times, tiny):
    before = times(here)
    root = Path(main.__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    call = [sys.executable, str(root / "main.py"), *tiny, "trainer.steps=7"]
    refused = subprocess.run(call, cwd=here, env=environment, capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2
    expected = "error: runs/digits_loss holds a run with other settings (trainer.steps was 6, now 7)"
    assert refused.stderr.startswith(expected), refused.stderr
    assert "Traceback" not in refused.stderr
    assert times(here) == before


@pytest.mark.parametrize("command", ["main.py", "playground.py"])
def test_a_crash_in_native_code_says_where_it_was(command, tmp_path):
    root = Path(main.__file__).parent
    (tmp_path / "crashing.py").write_text("import ctypes\nctypes.string_at(0)\n")
    call = [sys.executable, str(root / command), f"task_modules=[{tmp_path}/crashing.py]", "dry_run=true"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    crashed = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert crashed.returncode == -signal.SIGSEGV
    assert "crashing.py" in crashed.stderr, crashed.stderr
