"""From prompts to PEFT folders on the tiny base model."""

import copy
import json

import pytest
import torch

from Gpt.adapters.answers import answer_scores
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import prompt_states
from Gpt.adapters.peft_io import load_adapter
from Gpt.catalogue.adapters import TASKS
from Gpt.conditions import Conditions
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import DataError
from Gpt.tasks import Task
from rpg.adapters import QueryConfig, QueryGenerator
from rpg.write_adapter import read_tasks, write_adapter

PROMPTS = ["Give the first word.\nInput: a, b", "Put it in square brackets."]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft reads an attribute that transformers is about to rename
def test_a_folder_is_the_adapter_that_the_generator_writes(tmp_path):
    peft = pytest.importorskip("peft")
    task = Task(name="lora_tiny", **TASKS["lora_tiny"])
    config = QueryConfig(width=16, depth=1, heads=2, latents=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = QueryGenerator(task.structure, Conditions({"text": 384}, 16, 0.1), FlowMatching(), config).eval()
        for head in generator.decoder.heads:
            torch.nn.init.normal_(head.weight, std=0.05)
    assert write_adapter(generator, task, PROMPTS, tmp_path / "one", base_name="tiny") > 0
    expected = generator.sample({"text": prompt_states([PROMPTS], "hash").states})[0]
    assert torch.equal(load_adapter(tmp_path / "one", task.recipe.spec, "tiny"), expected)
    assert json.loads((tmp_path / "one" / "prompts.json").read_text())["prompts"] == PROMPTS
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"

    base = load_base("tiny")
    answers = task.family.answers("tiny", "test")[:1].trimmed()
    scores = answer_scores(base, task.recipe.spec, expected[None], answers)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "one").eval()
    with torch.no_grad():
        logits = model(input_ids=answers.tokens[0]).logits
    predicted = logits.argmax(-1).gather(1, answers.positions[0] - 1)
    assert torch.equal(predicted[answers.valid[0]], scores.predicted[0][answers.valid[0]])
    for nothing in ([], [" "], ["Give the first word.", ""]):
        with pytest.raises(DataError, match="no prompt"):
            write_adapter(generator, task, nothing, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_text_files_and_batches(tmp_path):
    text, batch = tmp_path / "prompts.txt", tmp_path / "tasks.jsonl"
    text.write_text("Give the first word.\n\nNo brackets.\n")
    lines = [
        {"task": "a b", "prompts": ["Give the first word.", "No brackets."]},
        {"task": "c", "prompts": ["No\u2028."]},
    ]
    batch.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    assert read_tasks(text) == {"": ["Give the first word.", "No brackets."]}
    assert read_tasks(batch) == {"a b": ["Give the first word.", "No brackets."], "c": ["No\u2028."]}
    with pytest.raises(DataError, match="none.txt is not a readable text file"):
        read_tasks(tmp_path / "none.txt")
    text.write_text(" \n\n")
    with pytest.raises(DataError, match="prompts.txt is empty; each line should be a prompt"):
        read_tasks(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"task": "a"}', "line 1"),
        ('{"task": "a", "prompts": ["x"]}\n{"task": "a", "prompts": ["y"]}', "line 2: there is a task 'a' before"),
        ('{"task": "../a", "prompts": ["x"]}', "folder"),
        ('{"task": "a", "prompts": "x"}', "list of strings"),
        ('{"task": "a", "prompts": ["x"]}\n{"task": "b", "prompts": []}', "line 2: .*no prompt"),
        ('{"task": "a", "prompts": ["x", " "]}', "line 1: .*say something"),
        ("not json", "line 1"),
        ("\n", "tasks.jsonl is empty"),
    ],
)
def test_a_wrong_batch_is_told(tmp_path, content, said):
    file = tmp_path / "tasks.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=said):
        read_tasks(file)
