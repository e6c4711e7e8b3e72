"""Prompt sets of a user: nothing overlaps, nothing is lost, mistakes are named by file and line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from Gpt.adapters import user
from Gpt.adapters.suite import Member
from Gpt.adapters.user import PromptSet, is_prompt_folder, prepare_prompts, read_prompts, write_prompts
from Gpt.errors import ConfigError, DataError

SAMPLES = [{"task": f"t{i % 2}", "prompt": f"question {i // 2}?", "answer": f"{i}"} for i in range(50)]


def test_sets_partition_the_prompts_of_every_task():
    parts = prepare_prompts(SAMPLES + SAMPLES[:10], samples_per_prompt=4, test_ratio=0.3)
    for task in ("t0", "t1"):
        sets = [found for sets in parts.values() for found in sets if found.task == task]
        prompts = [prompt for found in sets for prompt in found.prompts]
        assert sorted(prompts) == sorted(f"question {i}?" for i in range(25)), "each once, repeated samples dropped"
        assert sorted(len(found.prompts) for found in sets) == [1] + [4] * 6
        assert sum(found.task == task for found in parts["test"]) == 2
        answers = {s["prompt"]: s["answer"] for s in SAMPLES if s["task"] == task}
        assert all(answers[p] == a for found in sets for p, a in zip(found.prompts, found.answers, strict=True))


def test_the_split_is_a_function_of_its_seed():
    one, same, other = (prepare_prompts(SAMPLES, 4, 0.1, seed) for seed in (0, 0, 1))
    assert one == same != other


def test_a_folder_is_read_back_and_drawn_from(tmp_path):
    parts = prepare_prompts(SAMPLES, 3, 0.2)
    assert not is_prompt_folder(str(tmp_path))
    write_prompts(tmp_path, parts)
    assert is_prompt_folder(str(tmp_path))
    suite = read_prompts(str(tmp_path))
    assert {member.name for member in suite.members} == {"t0/plain", "t1/plain"}
    member = Member("t1", "plain")
    texts = {"\n\n".join(found.prompts) for found in parts["test"] if found.task == "t1"}
    assert set(suite.condition_prompts(member, "test", len(texts))) == texts
    assert len(suite.condition_prompts(member, "test", 50)) == 50
    known = {(f"question {i}?\n", f"{2 * i + 1}\n") for i in range(25)}
    train, test = (set(suite.examples(member, split, 500)) for split in ("train", "test"))
    assert train | test == known and not train & test
    assert set(suite.examples(member, "validation", 500)) == train
    assert suite.judge(member, " 7\n", "7").exact and not suite.judge(member, "8", "7").exact


def test_prompts_may_hold_any_character(tmp_path):
    prompts = ("one\ntwo", "é\u2028ü\x85\x0c", '"\\"')
    write_prompts(tmp_path, {part: [PromptSet("t", prompts)] for part in ("train", "test")})
    assert [found.prompts for _, found in read_prompts.__wrapped__(str(tmp_path)).sets] == [prompts, prompts]


def test_sets_without_answers_describe_tasks_but_cannot_train(tmp_path):
    write_prompts(tmp_path, {part: [PromptSet("t", ("a?", "b?"))] for part in ("train", "test")})
    suite = read_prompts.__wrapped__(str(tmp_path))
    assert suite.condition_prompts(suite.members[0], "train", 1) == ["a?\n\nb?"]
    assert not suite.answered
    with pytest.raises(DataError, match="'t' has no answers that an adapter could be trained on"):
        suite.examples(suite.members[0], "train", 1)


def test_answers_are_all_there_or_none(tmp_path):
    bare = [{name: text for name, text in sample.items() if name != "answer"} for sample in SAMPLES]
    assert not any(found.answers for sets in prepare_prompts(bare, 4, 0.3).values() for found in sets)
    with pytest.raises(DataError, match="'question 2.' has no answer, but the prompt 'question 0.' has one; .* none"):
        prepare_prompts([*SAMPLES[:4], *bare[4:]], 4, 0.3)
    with pytest.raises(DataError, match=r"^x.jsonl, line 1 has no answer, but y.jsonl, line 7 has one"):
        prepare_prompts([bare[0] | {"place": "x.jsonl, line 1"}, SAMPLES[1] | {"place": "y.jsonl, line 7"}], 4, 0.3)
    full, empty = PromptSet("t", ("a", "b"), ("x", "y")), PromptSet("u", ("c",))
    for sets, line, said in (((full, empty), 2, "has no answers.*has some"), ((empty, full), 2, "has answers.*none")):
        write_prompts(tmp_path, {"train": sets, "test": [sets[0]]})
        with pytest.raises(DataError, match=rf"train.jsonl, line {line} \(task .*{said}; .*add those that are missing"):
            read_prompts.__wrapped__(str(tmp_path))
    write_prompts(tmp_path, {"train": [full], "test": [PromptSet("t", ("d",))]})
    with pytest.raises(DataError, match="test.jsonl, line 1"):
        read_prompts.__wrapped__(str(tmp_path))


def test_mistakes_are_named(tmp_path):
    with pytest.raises(DataError, match="'t0' has 25 different prompts, too few for two sets of 25"):
        prepare_prompts(SAMPLES, 25, 0.1)
    with pytest.raises(ConfigError, match="--test-ratio 1.5: .*above 0 and below 1"):
        prepare_prompts(SAMPLES, 4, 1.5)
    with pytest.raises(ConfigError, match="--samples-per-prompt 0: a set has at least one prompt"):
        prepare_prompts(SAMPLES, 0, 0.1)
    (tmp_path / "train.jsonl").write_text('{"task": "t", "prompts": ["a"]}\n{"task": "t"}\n')
    (tmp_path / "test.jsonl").write_text('{"task": "t", "prompts": ["a"]}\n')
    with pytest.raises(DataError, match=r"train.jsonl, line 2 is not a prompt set \(KeyError\('prompts'\)\)"):
        read_prompts.__wrapped__(str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"task": "t", "prompts": ["a", "b"], "answers": ["x"]}\n')
    with pytest.raises(DataError, match="2 prompts, but 1 answers"):
        read_prompts.__wrapped__(str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"task": "u", "prompts": ["a"]}\n')
    suite = read_prompts.__wrapped__(str(tmp_path))
    with pytest.raises(DataError, match="'t' has no prompt set in train.jsonl"):
        suite.condition_prompts(Member("t", "plain"), "train", 1)


IN_ANOTHER_LOCALE = """
import sys
from Gpt.adapters.user import prepare_prompts, read_prompts, write_prompts

samples = [{"task": "caf\\u00e9", "prompt": "\\u00bf" + str(i), "answer": "\\u4e00"} for i in range(4)]
write_prompts(sys.argv[1], prepare_prompts(samples, 2, 0.5))
read_prompts(sys.argv[1])
"""


def test_prompts_in_any_language_are_the_same_on_every_machine(tmp_path):
    root = str(Path(user.__file__).parents[2])
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": root}
    command = [sys.executable, "-c", IN_ANOTHER_LOCALE, str(tmp_path)]
    ended = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert [member.name for member in read_prompts(str(tmp_path)).members] == ["café/plain"]
