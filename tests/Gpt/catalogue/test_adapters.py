"""The entries of adapter tasks keep the registry's contract."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from Gpt.adapters.base import SMOLLM2
from Gpt.adapters.conditions import loaded_encoder
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import load_adapter, save_adapter
from Gpt.adapters.spec import PREFIX, AdapterSpec
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import TASKS, adapter_entry
from Gpt.errors import DataError
from Gpt.population.functional import Population
from Gpt.recipes import AdapterRecipe
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tasks import check_entry, get_task
from Gpt.text import BUNDLED

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def task():
    return check_entry("lora_tiny", TASKS["lora_tiny"]).verify()


def test_the_tiny_task_describes_adapters_of_the_tiny_base(task):
    assert task.structure.size == 9216 and task.metric == "error"
    assert all(t.name.startswith(PREFIX) and t.name.endswith("lora_B.weight") for t in task.structure.tensors)
    assert task.structure.fingerprint == Structure.of(task.template).fingerprint


@torch.no_grad()
def test_a_population_a_module_and_an_adapter_folder_are_measured_alike(task, tmp_path):
    weights = 0.1 * torch.randn(3, task.structure.size, generator=rng("cpu", 0))
    members = torch.tensor([2, 0, 2])
    data = task.data("test")[:3]
    errors, losses = task.task_test_fn(*data, members, Population(task.template, task.structure, weights))
    correct = task.correct_fn(*data, members, Population(task.template, task.structure, weights))
    assert correct.shape == (3, task.family.examples)
    torch.testing.assert_close(errors, 100 * (1 - correct.float().mean(1)))
    for row, member, error, loss in zip(weights, members, errors, losses, strict=True):
        folder = save_adapter(tmp_path / str(int(member)), row, task.recipe.spec, task.recipe.base)
        task.template.load_state_dict(task.structure.state_dict(load_adapter(folder, task.recipe.spec, "tiny")))
        alone = task.task_test_fn(*data, member, task.template)
        torch.testing.assert_close(torch.stack(alone), torch.stack([error, loss]))
    assert float(losses[0]) != pytest.approx(float(losses[2]))


def test_one_member_serves_a_whole_population(task):
    twice = Population(task.template, task.structure, torch.zeros(2, task.structure.size))
    errors, losses = task.task_test_fn(*task.data("validation"), twice)
    assert errors.shape == (2,) and losses[0] == losses[1]


def test_parts_have_their_own_examples(task):
    train, validation, test = (task.data(split)[0] for split in ("train", "validation", "test"))
    assert train.shape[:2] == (6, 512) and test.shape[:2] == validation.shape[:2] == (6, 32)
    assert not (validation[0, :, None] == test[0][None]).all(-1).any()


def test_a_task_is_looked_up_without_its_language_model(monkeypatch):
    def load(name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("Gpt.adapters.base._original", load)
    assert get_task("lora_tiny").structure.size == 9216


def test_without_answers_there_is_nothing_to_test(tmp_path):
    sets = [PromptSet(name, (f"{name}?",)) for name in ("a", "b")]
    write_prompts(tmp_path, {"train": sets, "test": sets})
    family = AdapterFamily(str(tmp_path), unseen_rules=0, unseen_combinations=0, validation=1, encoder="hash")
    entry = adapter_entry(family, AdapterRecipe("tiny", AdapterSpec(rank=2))) | {"checkpoints": "adapters"}
    task = check_entry("mine", entry)
    assert task.metric == "distance" and task.correct_fn is None
    rank_3 = task.with_recipe(AdapterRecipe("tiny", AdapterSpec(rank=3)))
    assert 2 * rank_3.structure.size == 3 * task.structure.size
    for other in (task, rank_3):
        with pytest.raises(DataError, match="no answers to test an adapter by"):
            other.score(other.template, "test")


@pytest.mark.parametrize("name", [name for name, entry in TASKS.items() if entry["family"].tokens])
def test_no_prompt_has_more_states_than_are_read(name):
    family = TASKS[name]["family"]
    if family.encoder != "hash" and importlib.util.find_spec(BUNDLED) is None:
        pytest.skip("needs the extra text")
    encoder = loaded_encoder(family.encoder, torch.device("cpu"))
    sets = [s for split in ("train", "validation", "test") for s in family.condition_prompts(split, 32)]
    longest = max(length for prompts in sets for length in encoder.lengths(prompts))
    assert family.tokens - 8 < longest <= family.tokens
    if all(map(importlib.util.find_spec, (SMOLLM2, "gguf"))):
        assert get_task("lora_rules").structure.size == 1_244_160


def test_entries_are_made_without_loading_a_model():
    code = """if True:
        import sys, Gpt.catalogue.adapters as adapters
        assert not {"transformers", "peft"} & set(sys.modules)
        print(sorted(adapters.TASKS))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(sorted(TASKS)), done.stderr
