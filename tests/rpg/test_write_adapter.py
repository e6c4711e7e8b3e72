"""From prompts to PEFT folders on the tiny base model."""

import copy
import dataclasses
import json

import pytest
import torch

from Gpt.adapters.answers import answer_scores
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import prompt_states
from Gpt.adapters.peft_io import load_adapter
from Gpt.catalogue.adapters import TASKS
from Gpt.checkpoint import CheckpointFolder, TrainingState
from Gpt.conditions import Conditions
from Gpt.config import RunConfig
from Gpt.diffusion.objectives import FlowMatching
from Gpt.tasks import TASK_METADATA, Task
from rpg.adapters import QueryConfig, QueryGenerator
from rpg.write_adapter import load_run, main

pytest.importorskip("peft")
SETTINGS = {"name": "query", "width": 16, "depth": 1, "heads": 2, "latents": 2}
PROMPTS = ["Give the first word.\nInput: a, b", "Put it in square brackets."]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as main.py leaves it, its generator untrained but for its heads."""
    TASK_METADATA.setdefault("lora_tiny", TASKS["lora_tiny"])
    task = Task(name="lora_tiny", **TASKS["lora_tiny"])
    config = QueryConfig(**{key: value for key, value in SETTINGS.items() if key != "name"})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = QueryGenerator(task.structure, Conditions({"text": 384}, 16, 0.1), FlowMatching(), config)
        for head in generator.decoder.heads:
            torch.nn.init.normal_(head.weight, std=0.05)
    folder = tmp_path_factory.mktemp("run")
    checkpoints = CheckpointFolder(folder / "checkpoints", {"architecture": task.structure.fingerprint})
    optimizer = torch.optim.AdamW(generator.parameters())
    checkpoints.save(TrainingState(step=1), generator, generator, optimizer)
    settings = RunConfig(task="lora_tiny", generator=SETTINGS).training_settings()
    settings["condition"] = {"names": ["text"], "dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, task, generator.eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is about to rename
def test_a_folder_is_the_adapter_that_the_generator_writes(run, tmp_path, capsys):
    folder, task, generator = run
    arguments = ["--run", str(folder), "--output", str(tmp_path / "one")]
    assert main([*arguments, *(part for prompt in PROMPTS for part in ("--prompt", prompt))]) == 0
    expected = generator.sample({"text": prompt_states([PROMPTS], "hash").states})[0]
    assert torch.equal(load_adapter(tmp_path / "one", task.recipe.spec, "tiny"), expected)
    assert json.loads((tmp_path / "one" / "prompts.json").read_text())["prompts"] == PROMPTS

    peft = pytest.importorskip("peft")
    base = load_base("tiny")
    answers = task.family.answers("tiny", "test")[:1].trimmed()
    scores = answer_scores(base, task.recipe.spec, expected[None], answers)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "one").eval()
    with torch.no_grad():
        logits = model(input_ids=answers.tokens[0]).logits
    predicted = logits.argmax(-1).gather(1, answers.positions[0] - 1)
    assert torch.equal(predicted[answers.valid[0]], scores.predicted[0][answers.valid[0]])


def test_text_file_and_batch(run, tmp_path):
    folder, task, generator = run
    text, batch = tmp_path / "prompts.txt", tmp_path / "tasks.jsonl"
    text.write_text("Give the first word.\n\nNo brackets.\n")
    lines = [{"task": "a b", "prompts": ["Give the first word.", "No brackets."]}, {"task": "c", "prompts": ["Last."]}]
    batch.write_text("\n".join(map(json.dumps, lines)))
    assert main(["--run", str(folder), "--output", str(tmp_path / "one"), "--prompt-file", str(text)]) == 0
    assert main(["--run", str(folder), "--output", str(tmp_path / "many"), "--prompt-file", str(batch)]) == 0
    one, first, second = (
        load_adapter(tmp_path / name, task.recipe.spec, "tiny") for name in ("one", "many/a b", "many/c")
    )
    assert torch.equal(one, first) and not torch.equal(first, second)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"task": "a"}', "line 1"),
        ('{"task": "a", "prompts": ["x"]}\n{"task": "a", "prompts": ["y"]}', "line 2: there is a task 'a' before"),
        ('{"task": "../a", "prompts": ["x"]}', "folder"),
        ('{"task": "a", "prompts": "x"}', "list of strings"),
        ('{"task": "a", "prompts": []}', "no prompt"),
        ("not json", "line 1"),
    ],
)
def test_a_wrong_batch_is_told(run, tmp_path, capsys, content, said):
    file = tmp_path / "tasks.jsonl"
    file.write_text(content)
    assert main(["--run", str(run[0]), "--output", str(tmp_path), "--prompt-file", str(file)]) == 2
    assert said in capsys.readouterr().err


def test_a_wrong_run_is_told(run, tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "out"), "--prompt", "x", "--run"]
    assert main([*arguments, str(tmp_path)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    config = json.loads((run[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"generator": {"name": "gpt"}}))
    assert main([*arguments, str(tmp_path)]) == 2
    assert "neuron tokens need the hidden-unit symmetry" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(config | {"task": "lora_tin"}))
    assert main([*arguments, str(tmp_path)]) == 2
    assert "lora_tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_changes_of_the_recipe_are_kept(run, tmp_path):
    """A run that was collected with another recipe writes adapters in that recipe's form."""
    folder, task, _ = run
    config = json.loads((folder / "config.json").read_text())
    config["zoo"]["recipe"] = {"iterations": 7}
    changed = tmp_path / "run"
    changed.mkdir()
    (changed / "config.json").write_text(json.dumps(config))
    (changed / "checkpoints").symlink_to(folder / "checkpoints")
    assert load_run(changed)[1].recipe == dataclasses.replace(task.recipe, iterations=7)
