"""Training examples: two snapshots of one run in the right order, renamed alike, with the metrics that go with them."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call

from Gpt.adapters.conditions import HashedWords
from Gpt.data.batches import BatchConfig, BatchSampler
from Gpt.data.zoo import Zoo
from Gpt.descriptions import Descriptions
from Gpt.errors import ConfigError, ZooError
from Gpt.masks import MaskSplit
from Gpt.networks import MLP
from Gpt.scoring import classification_loss
from Gpt.seeds import rng
from Gpt.tasks import Task, check_entry

RUNS, SNAPSHOTS = 12, 5


@pytest.fixture(scope="module")
def task() -> Task:
    entry = {
        "task_test_fn": classification_loss,
        "constructor": lambda: MLP(4, 3, 2),
        "data_fn": lambda: (),
        "minimize": True,
        "best_prompt": 0.0,
        "recursive_prompt": 0.0,
        "symmetry": MLP.symmetry,
        "metric": "loss",
    }
    return check_entry("numbered", entry)


@pytest.fixture(scope="module")
def zoo(task) -> Zoo:
    """Every weight of snapshot s of run r is 100 r + s, and its validation loss is that divided by 1,000."""
    numbers = 100.0 * torch.arange(RUNS)[:, None] + torch.arange(SNAPSHOTS)
    weights = numbers[..., None].expand(-1, -1, task.structure.size).contiguous()
    metrics = {"validation_loss": numbers / 1000, "test_loss": torch.full_like(numbers, torch.nan)}
    ids, iterations = list(range(RUNS)), [0, 1, 4, 16, 64]
    return Zoo.from_tensors(weights, metrics, ids, iterations, task.structure, test_runs=3, validation_runs=2)


def sampler(zoo, task, split="train", with_start=True, permute=False, conditions=("target_metric",), **config):
    return BatchSampler(zoo, task, split, conditions, BatchConfig(**config), with_start=with_start, permute=permute)


def decoded(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(run, snapshot) of networks whose weights are all one number."""
    assert (flat == flat[:, :1]).all()
    return flat[:, 0].long() // 100, flat[:, 0].long() % 100


SPLITS = {"test": {0, 1, 2}, "validation": {3, 4}, "train": set(range(5, RUNS))}


@pytest.mark.parametrize(("split", "runs"), SPLITS.items())
def test_start_and_target_are_of_one_run_of_the_split_and_in_order(zoo, task, split, runs):
    batch = sampler(zoo, task, split)(2000, rng("cpu", 0))
    (target_run, target), (start_run, start) = decoded(batch.target), decoded(batch.start)
    assert torch.equal(target_run, start_run)
    assert set(target_run.tolist()) == runs
    assert (start < target).all()
    pairs = set(zip(start.tolist(), target.tolist(), strict=True))
    assert pairs == {(a, b) for b in range(SNAPSHOTS) for a in range(b)}


def test_the_share_of_pairs_that_start_at_the_initialisation(zoo, task):
    """Without it, a spacing d and then one of the S - d starts are drawn uniformly (Peebles et al. 2022)."""
    for share in (0.0, 0.5, 1.0):
        _, start = decoded(sampler(zoo, task, from_initial=share)(20_000, rng("cpu", 1)).start)
        by_chance = sum(1 / (SNAPSHOTS - d) for d in range(1, SNAPSHOTS)) / (SNAPSHOTS - 1)
        expected = share + (1 - share) * by_chance
        assert (start == 0).float().mean().item() == pytest.approx(expected, abs=0.015)


def test_prompts_are_the_validation_metrics_of_start_and_target(zoo, task):
    batch = sampler(zoo, task)(500, rng("cpu", 2))
    expected = torch.stack([batch.start[:, 0], batch.target[:, 0]], 1) / 1000
    torch.testing.assert_close(batch.prompt["target_metric"], expected)
    assert sampler(zoo, task, conditions=())(5, rng("cpu", 2)).prompt == {}


def test_a_zoo_without_the_metric_that_is_asked_for_is_named(zoo, task):
    with pytest.raises(ZooError, match="zoo in memory has no column 'validation_error', only test_loss, .*zoo.path"):
        sampler(zoo, replace(task, metric="error"))


def test_without_a_start_targets_come_from_the_end_of_each_run(zoo, task):
    batch = sampler(zoo, task, with_start=False, last_snapshots=2)(500, rng("cpu", 3))
    assert batch.start is None
    assert set(decoded(batch.target)[1].tolist()) == {SNAPSHOTS - 2, SNAPSHOTS - 1}
    prompt = batch.prompt["target_metric"]
    assert prompt[:, 0].isnan().all()
    torch.testing.assert_close(prompt[:, 1], batch.target[:, 0] / 1000)
    every = sampler(zoo, task, with_start=False)(500, rng("cpu", 3))
    assert set(decoded(every.target)[1].tolist()) == set(range(SNAPSHOTS))


def test_different_networks_are_all_networks_where_there_are_no_more(zoo, task):
    draw = sampler(zoo, task, with_start=False, last_snapshots=2)
    everything, some = draw.distinct(10_000, rng("cpu", 3)), draw.distinct(5, rng("cpu", 3))
    assert len(everything.target) == 2 * len(draw.rows) == len(everything.target.unique(dim=0))
    assert set(decoded(everything.target)[1].tolist()) == {SNAPSHOTS - 2, SNAPSHOTS - 1}
    assert len(some.target) == 5 == len(some.target.unique(dim=0))
    torch.testing.assert_close(some.prompt["target_metric"][:, 1], some.target[:, 0] / 1000)


def test_hidden_units_are_renamed_alike_in_start_and_target(task):
    weights = torch.randn(1, 2, task.structure.size, generator=rng("cpu", 4))
    zoo = Zoo.from_tensors(weights, {"validation_loss": torch.zeros(1, 2)}, [0], [0, 1], task.structure)
    batch = sampler(zoo, task, permute=True)(50, rng("cpu", 5))
    x = torch.randn(6, 4, generator=rng("cpu", 6))
    orders = []
    for given, original in ((batch.start, weights[0, 0]), (batch.target, weights[0, 1])):
        orders.append((given[:, :, None] == original).float().argmax(-1))
        assert len(given.unique(dim=0)) == 6  # 3! orders of the hidden units
        for flat in given:
            outputs = [functional_call(task.template, task.structure.unflatten(w), (x,)) for w in (flat, original)]
            torch.testing.assert_close(*outputs)
    assert torch.equal(*orders)


def test_a_batch_is_a_function_of_its_seed(zoo, task):
    first, again, other = (sampler(zoo, task)(20, rng("cpu", seed)) for seed in (7, 7, 8))
    assert torch.equal(first.target, again.target)
    assert torch.equal(first.start, again.start)
    assert not torch.equal(first.target, other.target)


def test_pairs_need_two_snapshots(task):
    weights = torch.zeros(3, 1, task.structure.size)
    zoo = Zoo.from_tensors(weights, {"validation_loss": torch.zeros(3, 1)}, [0, 1, 2], [0], task.structure)
    with pytest.raises(ConfigError, match="pairs of snapshots, but the zoo has one snapshot of each run"):
        sampler(zoo, task)
    assert sampler(zoo, task, with_start=False)(4, rng("cpu", 0)).target.shape == (4, task.structure.size)


def test_the_prompt_of_a_family_is_the_mask_of_the_run(task, zoo):
    family = MaskSplit(held_out=2, validation=1)
    batch = sampler(zoo, replace(task, family=family), conditions=("class_mask",), with_start=False)(500, rng("cpu", 0))
    run, _ = decoded(batch.target)
    assert batch.start is None and batch.prompt.keys() == {"class_mask"}
    assert batch.prompt["class_mask"].dtype == torch.float32
    assert torch.equal(batch.prompt["class_mask"] > 0.5, family.mask_of_runs(run))
    assert len(run.unique()) == RUNS - 5


def test_the_masks_are_known_to_training_whatever_the_prompt_says(task, zoo):
    family = MaskSplit(held_out=2, validation=1)
    batch = sampler(zoo, replace(task, family=family), conditions=(), with_start=False)(500, rng("cpu", 0))
    assert batch.prompt == {}
    assert torch.equal(batch.masks > 0.5, family.mask_of_runs(decoded(batch.target)[0]))
    assert sampler(zoo, task)(4, rng("cpu", 0)).masks is None


def test_a_single_task_has_no_masks_to_prompt_with(zoo, task):
    for condition in ("class_mask", "text"):
        with pytest.raises(ConfigError, match=f"{condition}: task 'numbered' has no masks.*'family'"):
            sampler(zoo, task, conditions=(condition,))


def test_every_example_comes_with_one_of_the_sentences_about_the_mask_of_its_run(zoo, task):
    family = MaskSplit(held_out=2, validation=1)
    words = Descriptions("digits", HashedWords())
    options = dict(with_start=False, permute=False, descriptions=words)
    for split in ("train", "validation"):
        draw = BatchSampler(zoo, replace(task, family=family), split, ("class_mask", "text"), BatchConfig(), **options)
        batch = draw(400, rng("cpu", 0))
        known = words(batch.prompt["class_mask"] > 0.5, split)
        matches = (known == batch.prompt["text"][:, None]).all(2)
        assert matches.any(1).all() and matches.float().mean(0).min() > 0.15
    with pytest.raises(ConfigError, match="condition text: there are no sentences"):
        sampler(zoo, replace(task, family=family), conditions=("text",))


def test_every_training_run_has_one_identity(zoo, task):
    options = dict(with_start=False, permute=False, identities=RUNS - 5)
    batch = BatchSampler(zoo, task, "train", (), BatchConfig(), **options)(300, rng("cpu", 0))
    run, _ = decoded(batch.target)
    assert torch.equal(batch.prompt["identity"], run - 5)
    borrowed = BatchSampler(zoo, task, "test", (), BatchConfig(), **options)(50, rng("cpu", 0)).prompt["identity"]
    assert set(borrowed.tolist()) == {0, 1, 2}


def test_identities_must_be_as_many_as_training_runs(zoo, task):
    with pytest.raises(ConfigError, match="identities=3 does not fit 7 training runs: use 7"):
        BatchSampler(zoo, task, "train", (), BatchConfig(), with_start=False, permute=False, identities=3)
