"""Families of tasks from the zoo to the report: class masks, and sentences for them."""

import json

import pytest

import main
from Gpt.adapters.conditions import HashedWords
from Gpt.errors import ConfigError
from Gpt.report.logger import read_metrics
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment

MASKED = [
    "zoo.runs=136", "zoo.shard_runs=136", "zoo.snapshots=2", "zoo.recipe={epochs: 2}", "generator.width=32",
    "generator.depth=1", "generator.heads=2", "trainer.steps=4", "trainer.batch_size=16", "trainer.warmup=2",
    "trainer.validate_every=2", "trainer.checkpoint_every=2", "trainer.log_every=2", "evaluation.samples_per_prompt=2",
    "logger=disabled", "device=cpu",
]  # fmt: skip


def masked(*settings: str, name: str = "digits_mask_rpg") -> Experiment:
    return Experiment(compose(name, [*MASKED, *settings]), name)


def test_a_family_of_masks_from_the_zoo_to_the_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    experiment = masked()
    results = main.run(experiment)
    assert results is not None
    family = experiment.task.family
    assert [len(experiment.zoo.split(name)) for name in ("test", "validation", "train")] == [64, 32, 40]
    assert results.table[0].name == "RPG, unseen masks"
    assert results.table[0].metrics["test_error"].count == family.held_out
    folder = tmp_path / "runs" / "digits_mask_rpg"
    assert "nearest seen mask" in (folder / "report.html").read_text()
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation/score" in line]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(line["validation/generated_worst_mask"] >= line["validation/generated_error"] for line in lines)
    assert json.loads((folder / "summary.json").read_text())["finished"]
    assert "RPG, unseen masks" in capsys.readouterr().out
    repeated = main.run(masked("test_only=true"))
    assert repeated is not None
    assert [row.metrics for row in repeated.table] == [row.metrics for row in results.table]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("class_mask_and_metric", "asked for error"),
        ("class_mask_and_text", "RPG, unseen masks in words alone"),
        ("text", "RPG, unseen masks"),
    ],
)
def test_conditions_of_a_family_alone_and_together(tmp_path, monkeypatch, condition, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    monkeypatch.setattr("Gpt.run.experiment.find_model", lambda: None)
    monkeypatch.setattr("Gpt.run.experiment.SentenceEncoder", lambda **_: HashedWords())
    results = main.run(masked("evaluation.samples_per_prompt=1", f"condition={condition}"))
    assert any(words in f"{row.name}; {row.note}" for row in results.table)


def test_without_the_sentence_model_text_is_refused_before_anything_is_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Gpt.text.BUNDLED", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; .*gpt-weights\[text\]"):
        main.run(masked(name="digits_text_rpg"))
    assert not list(tmp_path.iterdir())
