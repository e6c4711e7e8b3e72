"""A user's prompts without answers and a folder of adapters, from the commands to a written adapter; of the language
model there is nothing but its configuration."""

import json
from pathlib import Path

import pytest
import torch

import main
import playground
from Gpt.adapters import tools
from Gpt.adapters.base import load_config
from Gpt.adapters.changes import apart
from Gpt.adapters.peft_io import load_adapter, save_adapter, spec_of
from Gpt.adapters.spec import AdapterModule, AdapterSpec, adapter_structure
from Gpt.errors import ConfigError
from Gpt.report.logger import read_metrics
from Gpt.run.command_line import compose
from Gpt.run.experiment import Experiment
from playground import PlaygroundConfig, play

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft reads it

VERBS, NOUNS = ("sort", "count", "find"), ("words", "numbers", "names")
TASK_FILE = """
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import spec_of
from Gpt.catalogue.adapters import adapter_entry
from Gpt.recipes import AdapterRecipe

family = AdapterFamily("{here}/prompts", unseen_rules=1, unseen_combinations=0, validation=2, prompts=8, encoder="hash")
recipe = AdapterRecipe("base", spec_of("adapters/sort-words"))
TASK_METADATA = {{"mine": adapter_entry(family, recipe) | {{"checkpoints": "adapters"}}}}
"""
SETTINGS = (
    "task=mine", "task_modules=[my_tasks.py]", "logger=disabled", "device=cpu", "trainer.steps=120",
    "trainer.validate_every=60", "trainer.checkpoint_every=60",
)  # fmt: skip
WEIGHTS_ALONE = ("generator.loss.sft=0", "generator.loss.mse=1", "generator.loss.regression_until=1")


def experiment(*settings: str) -> Experiment:
    return Experiment(compose("lora_tiny", [*SETTINGS, *settings]), "lora_tiny")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with what a user has: samples, adapters that add up from two words each, a task file."""
    monkeypatch.chdir(tmp_path)
    load_config("tiny").save_pretrained("base")
    spec, draws = AdapterSpec(rank=2, targets=("q_proj", "v_proj"), train_a=True), torch.Generator().manual_seed(0)
    structure = adapter_structure("base", spec)
    with torch.no_grad():
        fresh = structure.flatten(AdapterModule("base", spec).state_dict())
    verbs, nouns = (0.02 * torch.randn(3, structure.size, generator=draws) for _ in range(2))
    samples = []
    for i, verb in enumerate(VERBS):
        for j, noun in enumerate(NOUNS):
            save_adapter(f"adapters/{verb}-{noun}", fresh + verbs[i] + nouns[j], spec, "base")
            lines = [f"Please {verb} the {noun} in list {k}." for k in range(8)]
            samples += [{"task": f"{verb}-{noun}", "prompt": line} for line in lines]
    Path("samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    command = ["prepare", "--source", "samples.jsonl", "--output-dir", "prompts", "--samples-per-prompt", "1"]
    assert tools.main(command) == 0
    Path("my_tasks.py").write_text(TASK_FILE.format(here=tmp_path))
    return tmp_path


def test_a_task_from_prompts_and_adapters_alone(here, capsys):
    results = main.run(experiment(*WEIGHTS_ALONE))
    assert results is not None and results.metric == "s3_distance"
    found = {row.name: row.metrics for row in results.table}
    written = found["query transformer"]
    assert written["s1_distance"].mean < 0.5 * found["query transformer, shuffled prompts"]["s1_distance"].mean
    assert written["s1_recognised"].mean == 100 and written["s3_distance"].count == 1
    folder = here / "runs" / "lora_tiny"
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation/score" in line]
    assert [line["step"] for line in lines] == [60, 120]
    assert all(line["validation/score"] == line["validation/generated_distance"] for line in lines)
    assert "generated_distance" in (folder / "metrics.csv").read_text()
    assert {file.name for file in (folder / "figures").glob("*.png")} == {"table.png", "training.png"}
    assert "nearest of the library" in (folder / "report.html").read_text()
    repeated = main.run(experiment(*WEIGHTS_ALONE, "test_only=true"))
    assert repeated is not None
    assert [row.metrics for row in repeated.table] == [row.metrics for row in results.table]

    run = playground.run_of(experiment().config, "lora_tiny", [])
    play(run, PlaygroundConfig(prompt="Please sort the words in list 9.", out="out"))
    assert "an adapter, " in capsys.readouterr().out
    spec = spec_of("out")
    out, own, other = (
        load_adapter(name, spec, "base")[None] for name in ("out", "adapters/sort-words", "adapters/find-names")
    )
    assert apart("base", spec, out, own)[0] < 0.5 * apart("base", spec, out, other)[0]


def test_a_loss_through_the_language_model_is_refused_before_anything_is_imported(here):
    with pytest.raises(ConfigError, match=r"generator.loss.sft=1.0: .*answers.*'mine'.* by generator.loss.sft=0 "):
        main.run(experiment())
    assert not (here / "zoos").exists()
