"""Batches of adapters: everything in a row is about the same task."""

import dataclasses
from collections import Counter

import pytest
import torch

from Gpt.adapters.answers import encode_answers
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import PromptStates, prompt_states
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.user import PromptSet, write_prompts
from Gpt.catalogue.adapters import TASKS
from Gpt.data.adapter_batches import (
    AdapterBatchSampler,
    fresh_adapter,
    prompt_for,
)
from Gpt.data.batches import BatchConfig
from Gpt.data.zoo import Zoo
from Gpt.diffusion.objectives import FlowMatching
from Gpt.errors import ConfigError
from Gpt.generator import Generator
from Gpt.seeds import rng
from Gpt.tasks import Task

SNAPSHOTS = 4


@pytest.fixture(scope="module")
def task():
    return Task(name="lora_tiny", **TASKS["lora_tiny"])


@pytest.fixture(scope="module")
def zoo(task):
    """Adapters that say which run and which snapshot they are."""
    runs = 12
    weights = torch.arange(runs)[:, None, None] * 10.0 + torch.arange(SNAPSHOTS)[None, :, None]
    weights = weights.repeat(1, 1, task.structure.size)
    return Zoo.from_tensors(
        weights, {}, list(range(runs)), list(range(SNAPSHOTS)), task.structure,
        test_runs=task.family.test_runs, validation_runs=task.family.validation_runs,
    )  # fmt: skip


def draw(zoo, task, split="train", count=64, seed=0, **options):
    config = BatchConfig(last_snapshots=2)
    return AdapterBatchSampler(zoo, task, split, config, **options)(count, rng("cpu", seed, "test"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_adapter_prompts_and_examples_are_of_one_task(zoo, task, split):
    batch = draw(zoo, task, split)
    runs = (batch.target[:, 0] // 10).long()
    assert torch.equal(task.family.member_of_runs(runs), batch.members)
    assert set(runs.tolist()) <= set(zoo.split(split).tolist())
    assert set((batch.target[:, 0] % 10).tolist()) == {2.0, 3.0}
    assert set(batch.members.tolist()) <= set(task.family.splits["train"])

    stored = prompt_states(task.family.condition_prompts(split), task.family.encoder).states.squeeze(2)
    assert batch.prompt["text_mask"].all()
    answers = task.family.answers(task.recipe.base, split)
    for i, member in enumerate(batch.members.tolist()):
        rows = {tuple(row.tolist()) for row in stored[member]}
        assert {tuple(row.tolist()) for row in batch.prompt["text"][i].squeeze(1)} <= rows
        known = {tuple(row.tolist()) for row in answers.tokens[member]}
        assert {tuple(row.tolist()) for row in batch.answers.tokens[i]} <= known


def test_prompts_without_answers_give_batches_without_a_loss_of_answers(zoo, task, tmp_path):
    sets = [PromptSet(name, (f"{name}?",)) for name in ("a", "b", "c")]
    write_prompts(tmp_path, {"train": sets, "test": sets})
    family = AdapterFamily(
        str(tmp_path), unseen_rules=1, unseen_combinations=0, validation=1, prompts=1, encoder="hash"
    )
    batch = draw(zoo, dataclasses.replace(task, family=family), count=2)
    assert batch.target.shape[0] == len(batch.members) == 2 and batch.answers is None
    with pytest.raises(ConfigError, match="prompts of this task have no answers"):
        batch.answer_loss(batch.target)


def test_sets_have_many_sizes_and_are_repeated(zoo, task):
    sizes = [len(rows.unique(dim=0)) for rows in draw(zoo, task, count=200, prompts=8).prompt["text"]]
    assert min(sizes) == 1 and max(sizes) >= 6
    batch = draw(zoo, task, prompts=8, pooled=True)
    torch.testing.assert_close(batch.prompt["text"], draw(zoo, task, prompts=8).prompt["text"].mean((1, 2)))


def test_token_states_come_with_their_padding(zoo, task):
    family = dataclasses.replace(task.family, tokens=40)
    batch = draw(zoo, dataclasses.replace(task, family=family), prompts=3)
    states, mask = batch.prompt["text"], batch.prompt["text_mask"]
    assert states.shape == (64, 3, 40, 384) and mask.shape == (64, 3, 40)
    stored = prompt_states(family.condition_prompts("train"), family.encoder, 40)
    for i in (0, 1):
        same = (stored.states[batch.members[i]] == states[i, 0]).all((1, 2)).nonzero()
        assert torch.equal(stored.mask[batch.members[i], same[0, 0]], mask[i, 0])
        assert not states[i][~mask[i]].any() and states[i][mask[i]].any(-1).all()
    pooled = draw(zoo, dataclasses.replace(task, family=family), prompts=3, pooled=True).prompt
    torch.testing.assert_close(pooled["text"][0], states[0][mask[0]].mean(0))


def test_every_rule_is_drawn_as_often_as_any_other(zoo, task):
    """Of two rules, one has fewer runs than the other."""
    members = task.family.members
    rows = [members[i].rule for i in task.family.member_of_runs(zoo.run_ids[zoo.split("train")]).tolist()]
    (few, fewer), (most, more) = sorted(Counter(rows).items(), key=lambda item: item[1])
    assert fewer < more
    drawn = Counter(members[i].rule for i in draw(zoo, task, count=2000).members.tolist())
    assert abs(drawn[few] - drawn[most]) < 200


def test_a_batch_is_a_function_of_its_seed(zoo, task):
    first, again, other = draw(zoo, task), draw(zoo, task), draw(zoo, task, seed=1)
    assert torch.equal(first.answers.tokens, again.answers.tokens)
    assert torch.equal(first.prompt["text"], again.prompt["text"])
    assert not torch.equal(first.prompt["text"], other.prompt["text"])


def test_the_fresh_adapter_is_the_base_model(zoo, task):
    """Its loss is that of the language model alone."""
    batch, base = draw(zoo, task, count=2, examples=3), load_base("tiny")
    fresh = fresh_adapter(task)
    assert torch.equal(batch.fresh, fresh)
    answers = batch.answers
    logits = base.model(input_ids=answers.tokens.flatten(0, 1)).logits.log_softmax(-1).unflatten(0, (2, 3))
    expected = []
    for b in range(2):
        nll = [
            -logits[b, n, p - 1, answers.tokens[b, n, p]]
            for n in range(3)
            for p, valid in zip(answers.positions[b, n], answers.valid[b, n], strict=True)
            if valid
        ]
        expected.append(torch.stack(nll).mean())
    torch.testing.assert_close(batch.answer_loss(fresh.expand(2, -1)), torch.stack(expected))


def test_prompts_in_the_form_a_generator_reads(task):
    class Reader(Generator):
        reads_prompt_sets = True

    sets = PromptStates(torch.randn(2, 3, 5, 4), torch.ones(2, 3, 5, dtype=torch.bool))
    reader, pooling = (kind(task.structure, FlowMatching(), "euler", 1) for kind in (Reader, Generator))
    assert prompt_for(reader, sets) == {"text": sets.states, "text_mask": sets.mask}
    torch.testing.assert_close(prompt_for(pooling, sets)["text"], sets.states.mean((1, 2)))


def test_examples_never_state_the_task(zoo, task):
    """What the language model reads is the bare input."""
    sampler = AdapterBatchSampler(zoo, task, "train", BatchConfig())
    batch = sampler(8, rng("cpu", 0))
    tokenizer = batch.loss_of.base.tokenizer
    for row in batch.answers.tokens.flatten(0, 1)[:32]:
        assert tokenizer.decode([row.tolist()])[0].startswith("Input:")
    assert encode_answers(tokenizer, [[("Input: a\nOutput:", " a\n")]]).valid.any()
