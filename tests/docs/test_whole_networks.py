"""docs/whole_networks.md is true: what it names composes and builds, and a folder of one's own becomes a task."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch

import main
from Gpt.run.command_line import CONFIGS, compose
from Gpt.run.experiment import Experiment
from Gpt.tasks import TASK_METADATA, check_entry

PAGE = (Path(main.__file__).parent / "docs" / "whole_networks.md").read_text(encoding="utf-8")
COMMAND = re.search(r"^```\npython main.py --config-name (\w+) (.*)\n```$", PAGE, re.MULTILINE)
CODE = [part for text in re.findall(r"`([^`\n]+)`", PAGE) for part in shlex.split(text)]
TINY = [
    "generator.width=32", "generator.depth=1", "generator.heads=2", "trainer.steps=2", "trainer.batch_size=8",
    "trainer.warmup=1", "trainer.validate_every=2", "trainer.compile=false", "trainer.precision=float32",
    "evaluation.networks=3", "evaluation.quick_networks=2", "evaluation.novelty_networks=3", "logger=disabled",
    "device=cpu",
]  # fmt: skip
SMALL = ["generator.width=64", "generator.depth=1", "generator.heads=2", "generator.rank=4", "device=cpu"]


def ablations() -> list[str]:
    """Every setting of the table, `key=value` or a value alone that goes with the key before it."""
    found, key = [], ""
    for line in re.findall(r"^\|.*\| (`generator\.\w+=.*) \|$", PAGE, re.MULTILINE):
        for text in re.findall(r"`([^`]+)`", line):
            key = text.partition("=")[0] if "=" in text else key
            found.append(f"{key}={text.rpartition('=')[2]}")
    return found


def test_the_page_names_every_choice():
    settings = ablations()
    assert len({s for s in settings if "backbone=" in s}) == 7 and len({s for s in settings if "policy=" in s}) == 5
    named = {name for name in CODE if re.fullmatch(r"(cifar|digits)_(rpg|pdiff)\w*", name)}
    assert named >= {f.stem for f in CONFIGS.glob("cifar_*.yaml")} - {"cifar_gpt"}
    assert all((CONFIGS / f"{name}.yaml").is_file() for name in named)


@pytest.mark.parametrize("setting", ablations())
def test_every_ablation_builds_its_generator(setting):
    experiment = Experiment(compose("cifar_rpg", [*SMALL, setting]), "cifar_rpg")
    name = experiment.config.task
    experiment.__dict__["task"] = check_entry(name, TASK_METADATA[name])  # without its images
    key, value = setting.removeprefix("generator.").split("=")
    assert str(getattr(experiment.generator.config, key)) == value


def test_commands_within_the_text_compose():
    lines = [text for text in re.findall(r"`([^`]+)`", PAGE) if "--config-name" in text]
    assert len(lines) >= 2
    for line in lines:
        words = shlex.split(line)
        name = words[words.index("--config-name") + 1]
        assert compose(name, [word for word in words if "=" in word])


MY_TASKS = """
import torch
from torch import nn

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
DATA = (X, (X[:, 0] > 0).long())
TASK_METADATA = {
    "mine": {
        "task_test_fn": lambda x, y, net: torch.nn.functional.cross_entropy(net(x), y),
        "constructor": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)),
        "data_fn": lambda: DATA,
        "train_data_fn": lambda: DATA,
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "metric": "loss",
        "checkpoints": "checkpoints",
    }
}
"""


@pytest.mark.parametrize("one_run_of_many", [False, True])
def test_a_folder_of_ones_own_is_trained_on_and_judged(tmp_path, monkeypatch, one_run_of_many):
    """Nothing but the page's command: no other run beside it, and statistics re-estimated in the row that says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    Path("my_tasks.py").write_text(MY_TASKS, encoding="utf-8")
    constructor = runpy.run_path("my_tasks.py")["TASK_METADATA"]["mine"]["constructor"]
    folder = Path("checkpoints") / ("run" if one_run_of_many else "")
    folder.mkdir(parents=True)
    for seed in range(22):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            torch.save(constructor().state_dict(), folder / f"seed {seed}.pt")
    name, arguments = COMMAND.groups()
    settings = [*shlex.split(arguments), *TINY, "evaluation.recalibrate=true"]
    settings += ["zoo.split=snapshot"] if one_run_of_many else []
    results = main.run(Experiment(compose(name, settings), name))
    rows = {row.name: row for row in results.table}
    assert rows["RPG, statistics re-estimated"].note == "batch norm saw 60 training images"
    assert rows["originals, held out"].metrics["test_loss"].count == 3
    assert [f.name for f in Path("runs").iterdir()] == ["mine"]
    assert json.loads(Path("runs/mine/results.json").read_text())["task"] == "mine"
