"""The split is fixed, complete and leak-free; runs and members belong together."""

import json
from dataclasses import asdict

import pytest
import torch

from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.errors import ConfigError

FULL = AdapterFamily()
MINI = AdapterFamily("mini", unseen_rules=1, unseen_combinations=1, validation=1, train_examples=8, examples=4)


def test_the_full_split_has_the_planned_sizes_and_parts_do_not_meet():
    sizes = {name: len(members) for name, members in FULL.splits.items()}
    assert sizes == {"train": 100, "validation": 8, "s1": 100, "s2": 36, "s3": 24}
    train, s2, s3 = (set(FULL.splits[name]) for name in ("train", "s2", "s3"))
    assert train | s2 | s3 == set(range(160)) and len(train) + len(s2) + len(s3) == 160
    assert set(FULL.splits["validation"]) <= train and FULL.splits["s1"] == FULL.splits["train"]


@pytest.mark.parametrize("seed", range(5))
def test_combinations_are_new_but_their_parts_are_known_and_unseen_rules_are_wholly_unseen(seed):
    family = AdapterFamily(seed=seed)
    rules, formats = (
        {name: {getattr(family.members[i], part) for i in members} for name, members in family.splits.items()}
        for part in ("rule", "format")
    )
    assert rules["s2"] <= rules["train"] and formats["s2"] <= formats["train"]
    assert not rules["s3"] & (rules["train"] | rules["s2"]) and len(rules["s3"]) == 3


def test_runs_cover_held_out_then_validation_then_training_members_without_end():
    family = AdapterFamily(runs_per_member=2)
    assert (family.test_runs, family.validation_runs) == (120, 16)
    members = family.member_of_runs(torch.arange(120 + 16 + 250)).tolist()
    assert sorted(members[:120]) == sorted(2 * (family.splits["s2"] + family.splits["s3"]))
    assert sorted(members[120:136]) == sorted(2 * family.splits["validation"])
    assert sorted(members[136:236]) == list(family.splits["train"]) and members[136:236] == members[236:336]
    assert family.member_of_runs(torch.tensor([200, 3])).tolist() == [members[200], members[3]]
    with pytest.raises(ConfigError, match="run ids count from 0, got -1"):
        family.member_of_runs(torch.tensor([-1]))


def test_a_family_is_a_function_of_its_fields_and_can_be_written_down():
    fields = json.loads(json.dumps(asdict(FULL)))
    assert AdapterFamily(**fields).splits == FULL.splits
    assert AdapterFamily(seed=1).splits != FULL.splits


def test_impossible_splits_are_refused():
    with pytest.raises(ConfigError, match="leaves 0 of 6 tasks to train on"):
        AdapterFamily("mini", unseen_rules=3, unseen_combinations=0)
    with pytest.raises(ConfigError, match="has a (rule|format) without training tasks"):
        AdapterFamily("mini", unseen_rules=1, unseen_combinations=3, validation=0)
    with pytest.raises(ConfigError, match="must not be negative"):
        AdapterFamily(unseen_rules=-1)
    with pytest.raises(ConfigError, match="no adapter suite 'fulll'; expected full, mini or a folder"):
        AdapterFamily("fulll")


def test_examples_and_prompts_have_one_row_for_each_member():
    answers = MINI.answers("tiny", "train")
    assert answers.tokens.shape[:2] == (6, 8) and MINI.answers("tiny", "test").tokens.shape[:2] == (6, 4)
    told = MINI.answers("tiny", "test", instructed=True)
    assert torch.equal(told.targets, MINI.answers("tiny", "test").targets) and told.tokens.shape[-1] > 20
    prompts = MINI.condition_prompts("test", 3)
    assert [len(row) for row in prompts] == [3] * 6 and len(MINI.condition_prompts("train")[0]) == MINI.prompts


def test_a_folder_of_prompts_is_a_family_with_whole_tasks_held_out(tmp_path):
    def sets(part):
        return [PromptSet(task, (f"{part} {task}?",), ("yes",)) for task in ("a", "b", "c")]

    write_prompts(tmp_path, {"train": sets("train"), "test": sets("test")})
    family = AdapterFamily(
        str(tmp_path), unseen_rules=1, unseen_combinations=0, validation=1, train_examples=3, examples=2, prompts=1
    )
    assert {name: len(members) for name, members in family.splits.items()} == {
        "train": 2, "validation": 1, "s1": 2, "s2": 0, "s3": 1}  # fmt: skip
    assert sorted(family.condition_prompts("test")) == [["test a?"], ["test b?"], ["test c?"]]
    assert family.answers("tiny", "train").tokens.shape[:2] == (3, 3)
