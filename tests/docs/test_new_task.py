"""docs/new_task.md is true: its files are saved, its commands run, at a tiny size, and do what the text says."""

import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import main
from Gpt.errors import UserError
from Gpt.tasks import check_entry

PAGE = (Path(main.__file__).parent / "docs" / "new_task.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
FILES = {text.split("\n", 1)[0].lstrip("# "): text for language, text in BLOCKS if language in ("python", "yaml")}
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.splitlines()]
TINY = [
    "generator.width=16", "generator.depth=1", "generator.heads=2", "trainer.steps=4", "trainer.batch_size=16",
    "trainer.validate_every=2", "evaluation.networks=4", "evaluation.prompts=3", "evaluation.recursive_steps=1",
    "evaluation.optimiser_steps=2", "evaluation.learning_rates=2", "evaluation.novelty_networks=4",
    "evaluation.tuning_networks=2", "evaluation.quick_networks=2", "zoo.recipe={epochs: 6}", "logger=disabled",
]  # fmt: skip
TINY_ZOO = ["zoo.runs=48", "zoo.test_runs=8", "zoo.validation_runs=8", "zoo.shard_runs=24", "zoo.snapshots=5"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the page's files."""
    folder = tmp_path_factory.mktemp("new_task")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})


def execute(monkeypatch, command: str, *smaller: str) -> None:
    """One line of the page, in this process."""
    program, script, *arguments = shlex.split(command)
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments, *smaller])
    if script == "main.py":
        main.main()
    else:
        runpy.run_path(script)


def command_with(*parts: str) -> str:
    return next(c for c in COMMANDS if all(part in c for part in parts))


def test_the_page_has_the_parts_that_are_tested_here():
    assert set(FILES) == {"my_tasks.py", "wine.yaml", "train_diabetes.py", "diabetes_tasks.py"}
    assert len(COMMANDS) == 5
    assert all(f"`{name}`" in PAGE for name in FILES)


def test_a_task_with_a_recipe(monkeypatch, capsys, place):
    execute(monkeypatch, command_with("collect_only"), *TINY, *TINY_ZOO)
    assert "48 runs x 5 snapshots x 139 weights in zoos/wine_loss" in capsys.readouterr().out
    assert not (place / "runs").exists()
    assert not logging.getLogger("Gpt.report.logger").disabled  # hydra would, and warnings would be lost
    shards = {f: f.stat().st_mtime_ns for f in (place / "zoos").rglob("*.safetensors")}
    execute(monkeypatch, command_with("run.name=wine"), *TINY, *TINY_ZOO)
    assert shards == {f: f.stat().st_mtime_ns for f in (place / "zoos").rglob("*.safetensors")}
    results = json.loads((place / "runs" / "wine" / "results.json").read_text())
    assert results["task"] == "wine_loss"
    assert {row["kind"] for row in results["table"]} == {"generator", "baseline", "optimiser", "reference"}
    assert (place / "runs" / "wine" / "report.html").is_file()


def test_a_configuration_of_the_users_own(monkeypatch, capsys, place):
    command = command_with("--config-name wine")
    execute(monkeypatch, command, *TINY, *TINY_ZOO)
    with pytest.raises(SystemExit) as caught:
        execute(monkeypatch, command, *TINY, *TINY_ZOO, "seed=1")
    assert caught.value.code == 2
    assert "runs/wine holds a run with other settings (seed was 0, now 1)" in capsys.readouterr().err
    execute(monkeypatch, f"{command} run.name=other", *TINY, *TINY_ZOO)
    assert (place / "runs" / "other" / "report.html").is_file()
    assert (place / "zoos" / "wine_2048").is_dir()


def test_a_task_with_checkpoints(monkeypatch, capsys, place):
    script = place / "train_diabetes.py"
    script.write_text(script.read_text().replace("range(96)", "range(48)"))
    execute(monkeypatch, "python train_diabetes.py")
    command = command_with("task=diabetes")
    tiny = [argument for argument in TINY if "recipe" not in argument]
    execute(monkeypatch, command, *tiny)
    results = json.loads((place / "runs" / "diabetes" / "results.json").read_text())
    assert {row["kind"] for row in results["table"]} == {"generator", "baseline", "reference"}
    shutil.rmtree(place / "diabetes_runs")
    capsys.readouterr()
    execute(monkeypatch, command, *tiny, "collect_only=true")
    assert "48 runs x 9 snapshots x 73 weights in zoos/diabetes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"minimise": True}, "task 'wine_loss': unknown key 'minimise'; did you mean 'minimize'?"),
        ({"best_prompt": "0"}, "task 'wine_loss': key 'best_prompt' is '0', expected a number"),
        ({"symmetry": {"0.weight": ("hidden",)}},
         "task 'wine_loss': symmetry: symmetry of '0.weight' names 1 axes, the tensor has 2"),
    ],
)  # fmt: skip
def test_messages_are_quoted_as_they_are(change, message):
    entry = runpy.run_path("my_tasks.py")["TASK_METADATA"]["wine_loss"]
    with pytest.raises(UserError) as caught:
        check_entry("wine_loss", entry | change)
    assert str(caught.value) == message
    assert f"error: {message}" in PAGE
