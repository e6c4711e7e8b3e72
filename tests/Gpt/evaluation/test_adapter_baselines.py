"""Baselines for adapters against closed forms."""

import torch

from Gpt.adapters.answers import answer_loss, answer_scores, encode_answers
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.spec import AdapterSpec, adapter_structure
from Gpt.adapters.suite import SUITES, Member
from Gpt.evaluation.adapter_baselines import (
    multitask_adapter,
    nearest,
    nearest_distance,
    other_tasks,
    repeated,
    similarity,
    softmax_mix,
    task_arithmetic,
)


def sentences(rows):
    """`[tasks, N, features]` numbers as prompts of one state each."""
    states = torch.tensor(rows)[:, :, None]
    return PromptStates(states, torch.ones(states.shape[:3], dtype=torch.bool))


def test_similarity_reads_the_mean_prompt():
    seen = sentences([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 3.0]]])
    torch.testing.assert_close(similarity(sentences([[[3.0, 4.0]]]), seen), torch.tensor([[0.6, 0.8]]))


def test_mix_is_between_the_mean_and_the_nearest():
    similar, weights = torch.tensor([[0.1, 0.9, 0.3], [0.5, 0.2, 0.1]]), torch.randn(3, 7)
    torch.testing.assert_close(softmax_mix(similar, weights, 1e-3), nearest(similar, weights))
    torch.testing.assert_close(softmax_mix(similar, weights, 1e6), weights.mean(0).expand(2, -1))
    assert torch.equal(nearest(similar, weights), weights[[1, 0]])


def test_task_arithmetic_is_exact_where_adapters_add_up():
    rules, formats = torch.randn(3, 5), torch.randn(2, 5)
    names = [(f"r{i}", f"f{j}") for i in range(3) for j in range(2)]
    weights = torch.stack([rules[int(r[1])] + formats[int(f[1])] for r, f in names])
    torch.testing.assert_close(task_arithmetic(names, names, weights), weights)
    unknown = task_arithmetic([("new", "f1")], names, weights)
    torch.testing.assert_close(unknown[0], rules.mean(0) + formats[1])


def test_nearest_distance_leaves_out_the_same():
    cosine = torch.tensor([[1.0, 0.3], [0.2, 1.0]])
    assert nearest_distance(cosine).tolist() == [0, 0]
    torch.testing.assert_close(nearest_distance(cosine, torch.eye(2).bool()), torch.tensor([0.7, 0.8]))


def test_multitask_training_lowers_the_loss_of_every_task():
    base, spec, suite = load_base("tiny"), AdapterSpec(rank=4), SUITES["mini"]
    examples = encode_answers(base.tokenizer, [suite.examples(m, "train", 64) for m in suite.members[:2]])
    fresh = torch.zeros(adapter_structure(base, spec).size)
    trained = multitask_adapter(base, spec, fresh, examples, steps=60, batch=16, learning_rate=5e-3, seed=0)
    held_out = encode_answers(base.tokenizer, [suite.examples(m, "test", 32) for m in suite.members[:2]])
    before, after = (answer_scores(base, spec, w.expand(2, -1), held_out).loss.mean(1) for w in (fresh, trained))
    assert (after < before - 0.5).all()
    assert answer_loss(base, spec, fresh.expand(2, -1), held_out).shape == (2,)


def test_shuffling_avoids_the_rule_and_the_format():
    members = [Member(rule, form) for rule in "ab" for form in "xy"]
    assert [(members[i].rule, members[i].format) for i in other_tasks(members)] == [
        ("b", "y"), ("b", "x"), ("a", "y"), ("a", "x"),
    ]  # fmt: skip
    assert other_tasks(members[:2]) == [1, 0] and other_tasks(members[:1]) == [0]


def test_shuffling_looks_elsewhere_where_a_split_has_nothing_apart():
    ax, ay, bx, by = (Member(rule, form) for rule in "ab" for form in "xy")
    assert other_tasks([ax], [ay, bx, by]) == [3]
    assert other_tasks([ax, ay], [bx, by]) == [3, 2]
    assert other_tasks([ax, by], [ay]) == [1, 0], "its own split comes first"
    assert other_tasks([ax], [ay]) == [1] and other_tasks([ax, bx], [ay]) == [1, 2]


def test_few_prompts_are_repeated():
    prompts = sentences([[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]])
    assert torch.equal(repeated(prompts, 5).states, prompts.states[:, [0, 1, 0, 1, 0]])
    assert repeated(prompts, 5).mask.shape == (1, 5, 1)
