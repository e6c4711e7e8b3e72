"""Families of tasks from the zoo to the report: class masks, and sentences for them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import main
from Gpt.errors import CheckpointError, ConfigError
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
@pytest.mark.filterwarnings("default")  # warnings of transformers are not this project's
def test_conditions_of_a_family_alone_and_together(tmp_path, monkeypatch, encoder_folder, condition, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    encoder = f"condition.encoder={encoder_folder('tiny', 24)}"
    results = main.run(masked("evaluation.samples_per_prompt=1", f"condition={condition}", encoder))
    assert any(words in f"{row.name}; {row.note}" for row in results.table)


def test_without_the_sentence_model_text_is_refused_before_anything_is_collected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("Gpt.text.BUNDLED", "no_such_package")
    with pytest.raises(ConfigError, match=r"not installed; .*gpt-weights\[text\]"):
        main.run(masked(name="digits_text_rpg"))
    assert not list(tmp_path.iterdir())


def spoken(*settings: str) -> Experiment:
    return masked("evaluation.samples_per_prompt=1", "run.name=spoken", *settings, name="digits_text_rpg")


def files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.filterwarnings("default")
def test_a_run_is_told_by_the_encoder_of_its_choice_and_by_no_other(tmp_path, monkeypatch, encoder_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    encoder_folder("models/small", 24)
    small = "condition.encoder=models/small"
    before = files(tmp_path)
    main.run(spoken(small, "dry_run=true"))
    assert files(tmp_path) == before, "embeddings of a dry run are not kept"
    missing = "condition.encoder=models/smal"
    with pytest.raises(ConfigError, match="'models/smal' is neither a folder nor"):
        main.run(spoken(missing))
    with pytest.raises(ConfigError, match="the dry run says about: task"):
        main.run(spoken(missing, "dry_run=true"))
    assert files(tmp_path) == before

    results = main.run(spoken(small))
    experiment = spoken(small)
    assert results is not None and experiment.generator.conditions.encoders["text"].features == 24
    run = tmp_path / "runs" / "spoken"
    assert files(run / "text") == [f"{experiment.encoder.label}/embeddings.safetensors"]
    assert OmegaConf.load(run / "config.yaml").condition.encoder == "models/small"

    def again(*settings: str):
        found = main.run(spoken("test_only=true", *settings))
        return found and [row.metrics for row in found.table]

    encoder_folder("models/other", 24)
    encoder_folder("models/wide", 32)
    for name in ("other", "wide"):  # of the same size or not
        with pytest.raises(ConfigError, match=rf"condition\.encoder was small, now {name}\)\. Choose another run.name"):
            again(f"condition.encoder=models/{name}")
    (tmp_path / "elsewhere").mkdir()
    shutil.move("models/small", "elsewhere/small")
    assert again("condition.encoder=elsewhere/small") == [row.metrics for row in results.table]
    replaced = f"condition.encoder={encoder_folder('models/small', 24, seed=1)}"
    labels = experiment.encoder.label, spoken(replaced).encoder.label
    with pytest.raises(CheckpointError, match="has condition.encoder '{}', this run has '{}'; choose".format(*labels)):
        again(replaced)


@pytest.mark.filterwarnings("default")
def test_a_run_from_before_encoders_could_be_chosen_was_told_by_the_default_one(tmp_path, monkeypatch, encoder_folder):
    """A folder of that name stands in for the packaged model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    encoder_folder("all-MiniLM-L6-v2", 384)
    encoder_folder("other", 24)
    results = main.run(spoken())
    run = tmp_path / "runs" / "spoken"
    for file in [run / "config.json", *run.glob("checkpoints/*/facts.json")]:
        text = json.loads(file.read_text())
        part, key = (text["condition"], "encoder") if "condition" in text else (text["identity"], "condition.encoder")
        del part[key]
        file.write_text(json.dumps(text))
    assert main.run(spoken()) is None, "it is finished"
    found = main.run(spoken("test_only=true"))
    assert [row.metrics for row in found.table] == [row.metrics for row in results.table]
    with pytest.raises(ConfigError, match=re.escape("condition.encoder was all-MiniLM-L6-v2, now other")):
        main.run(spoken("test_only=true", "condition.encoder=other"))
    with pytest.raises(CheckpointError, match="has condition.encoder 'all-MiniLM-L6-v2', this run has 'other-"):
        spoken("condition.encoder=other").trained()


@pytest.mark.filterwarnings("default")
def test_a_run_that_is_told_in_bits_does_not_depend_on_an_encoder(tmp_path, monkeypatch, encoder_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(main, "save_figures", lambda *_: {})
    main.run(masked("evaluation.samples_per_prompt=1"))
    assert main.run(masked("evaluation.samples_per_prompt=1", f"condition.encoder={encoder_folder('a', 24)}")) is None
    with pytest.raises(ConfigError, match="'missing' is neither"):
        main.run(masked("condition.encoder=missing", "run.name=another"))
