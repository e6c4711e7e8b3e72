"""A user's prompts and adapters become a zoo of a task, without a line in the library."""

import shutil

import pytest
import torch

from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.importer import import_adapters
from Gpt.adapters.peft_io import save_adapter
from Gpt.adapters.spec import AdapterSpec
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import adapter_entry
from Gpt.data.zoo import Zoo
from Gpt.errors import DataError, TaskError
from Gpt.recipes import AdapterRecipe
from Gpt.tasks import TASK_METADATA, Task, check_entry

pytest.importorskip("peft")


def make_task(folder, spec: AdapterSpec, answers: tuple[str, ...] = ("yes",)) -> Task:
    sets = {
        part: [PromptSet(task, (f"{part} {task}?",), answers) for task in ("arc", "boolq", "piqa")]
        for part in ("train", "test")
    }
    write_prompts(folder, sets)
    family = AdapterFamily(
        str(folder), unseen_rules=1, unseen_combinations=0, validation=1, train_examples=2, examples=2, prompts=1
    )
    entry = adapter_entry(family, AdapterRecipe("tiny", spec))
    return check_entry("mine", entry if answers else entry | {"checkpoints": "adapters"})


def test_adapters_become_runs_of_their_members(tmp_path, drawn):
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    task = make_task(tmp_path / "prompts", spec)
    rows = {}
    for seed, member in enumerate(task.family.members):
        rows[member.rule] = drawn(spec, 2 if seed else 1, seed).float()
        for i, row in enumerate(rows[member.rule]):
            save_adapter(tmp_path / "adapters" / member.rule / f"checkpoint-{i}", row, spec, "tiny")
    assert import_adapters(tmp_path / "adapters", tmp_path / "zoo", task, shard_runs=4) is None
    family = task.family
    zoo = Zoo.open(tmp_path / "zoo", task.structure, test_runs=family.test_runs, validation_runs=family.validation_runs)
    assert zoo.runs == 1 + 1 + 2 * 2 and set(zoo.metrics) >= {"validation_loss", "validation_error", "test_error"}
    members = family.member_of_runs(zoo.run_ids).tolist()
    stored = zoo.read(torch.arange(zoo.runs), torch.zeros(zoo.runs, dtype=torch.long))
    for row, member in zip(stored, members, strict=True):
        assert any(torch.equal(row, own) for own in rows[family.members[member].rule])


def test_adapters_for_prompts_without_answers_are_imported_without_a_language_model(tmp_path, drawn, monkeypatch):
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    task = make_task(tmp_path / "prompts", spec, answers=())
    for seed, member in enumerate(task.family.members):
        for i, row in enumerate(drawn(spec, 2, seed).float()):
            save_adapter(tmp_path / "adapters" / member.rule / f"checkpoint-{i}", row, spec, "tiny")

    def load(name):
        raise AssertionError(f"{name} was loaded")

    monkeypatch.setattr("Gpt.adapters.base._original", load)
    assert import_adapters(tmp_path / "adapters", tmp_path / "zoo", task) is None
    zoo = Zoo.open(tmp_path / "zoo", task.structure)
    assert {*zoo.metrics} == {"validation_distance", "test_distance"}
    members = task.family.member_of_runs(zoo.run_ids).tolist()
    stored = zoo.read(torch.arange(zoo.runs), torch.zeros(zoo.runs, dtype=torch.long))
    for row, member, distance in zip(stored, members, zoo.metrics["validation_distance"][:, 0], strict=True):
        own = stored[members.index(member)]  # one frozen A, whose rows are all but orthogonal and alike
        assert (distance < 1e-6) == torch.equal(row, own)
        assert abs(distance - (1 - torch.cosine_similarity(row, own, dim=0))) < 0.1


def test_nothing_is_left_of_an_earlier_import(tmp_path, drawn):
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    task = make_task(tmp_path / "prompts", spec)
    library = tmp_path / "adapters"
    for count in (5, 1):
        shutil.rmtree(library, ignore_errors=True)
        for seed, member in enumerate(task.family.members):
            for i, row in enumerate(drawn(spec, count, seed).float()):
                save_adapter(library / member.rule / f"checkpoint-{i}", row, spec, "tiny")
        import_adapters(library, tmp_path / "zoo", task, shard_runs=4)
        runs = 1 + 1 + 2 * count
        assert Zoo.open(tmp_path / "zoo", task.structure).run_ids.tolist() == list(range(runs))
    assert len(list((tmp_path / "zoo").glob("shard-*"))) == 3


def test_adapters_without_a_common_gauge_are_imported_with_a_warning(tmp_path, drawn):
    spec = AdapterSpec(rank=2, targets=("q_proj",), train_a=True)
    task = make_task(tmp_path / "prompts", spec)
    for seed, member in enumerate(task.family.members):
        own = AdapterSpec(rank=2, targets=("q_proj",), train_a=True, a_seed=seed)
        save_adapter(tmp_path / "adapters" / member.rule, drawn(own, 1, seed)[0].float(), own, "tiny")
    warning = import_adapters(tmp_path / "adapters", tmp_path / "zoo", task)
    assert "do not share a gauge" in warning
    assert Zoo.open(tmp_path / "zoo", task.structure).manifest.notes[-1] == warning


def test_a_member_without_adapters_is_named(tmp_path, drawn):
    spec = AdapterSpec(rank=2, targets=("q_proj",))
    task = make_task(tmp_path / "prompts", spec)
    save_adapter(tmp_path / "adapters" / "arc", drawn(spec, 1)[0].float(), spec, "tiny")
    with pytest.raises(DataError, match="no sub-folder 'boolq' with adapters"):
        import_adapters(tmp_path / "adapters", tmp_path / "zoo", task)


def test_a_task_of_another_kind_is_named(tmp_path):
    with pytest.raises(TaskError, match="task 'digits_loss' is not about adapters.*adapter_entry"):
        import_adapters(tmp_path, tmp_path / "zoo", check_entry("digits_loss", TASK_METADATA["digits_loss"]))
