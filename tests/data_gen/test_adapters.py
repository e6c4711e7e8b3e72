"""Adapter populations: runs learn, and nothing but their seed and number decides how."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from data_gen.adapters import _groups, initial_adapters, mini_batches, train_adapter_population
from data_gen.collect import collect, total_iterations
from data_gen.randomness import run_keys
from Gpt.adapters.answers import Answers, answer_loss
from Gpt.adapters.base import load_base
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import gauge_report
from Gpt.adapters.spec import AdapterSpec
from Gpt.catalogue.adapters import adapter_entry
from Gpt.data.zoo import Zoo
from Gpt.errors import DataError
from Gpt.recipes import AdapterRecipe
from Gpt.tasks import Task, check_entry

pytest.importorskip("transformers")

FAMILY = AdapterFamily("mini", unseen_rules=1, unseen_combinations=1, validation=1, train_examples=64, examples=16)
RECIPE = AdapterRecipe("tiny", AdapterSpec(rank=4), 12, examples=8, learning_rate=1e-2, adapters_per_forward=3)


def make_task(**changes) -> Task:
    return check_entry("adapters", adapter_entry(FAMILY, replace(RECIPE, **changes)))


@pytest.fixture(scope="module")
def trained():
    task = make_task()
    return train_adapter_population(task, task.recipe, [0, 4, 5, 9], 0, [0, 6, 12], "cpu")


def test_training_lowers_the_loss_of_every_run_from_the_bases(trained):
    weights, metrics = trained
    assert weights.shape == (4, 3, 4608) and weights.dtype == torch.float32
    assert set(metrics) == {"validation_loss", "validation_error", "test_loss", "test_error"}
    assert all(values.shape == (4, 3) for values in metrics.values())
    for column in ("validation_loss", "test_loss"):
        assert (metrics[column][:, 0] > 1.5 * metrics[column][:, -1]).all()
    assert (weights[:, 0] == 0).all(), "a run begins as the base model"


def test_a_run_does_not_depend_on_its_companions(trained):
    weights, metrics = trained
    task = make_task()
    alone, columns = train_adapter_population(task, task.recipe, [5], 0, [0, 6, 12], "cpu")
    torch.testing.assert_close(alone[0], weights[2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(columns["test_loss"][0], metrics["test_loss"][2], rtol=1e-3, atol=1e-4)
    other, _ = train_adapter_population(task, task.recipe, [5], 1, [12], "cpu")
    assert (other[0, 0] - alone[0, -1]).abs().max() > 0.01


def test_runs_of_one_member_differ_in_their_mini_batches_alone():
    task = make_task()
    first = task.family.test_runs + task.family.validation_runs
    runs = [first, first + len(task.family.splits["train"])]
    assert task.family.member_of_runs(torch.tensor(runs)).unique().numel() == 1
    weights, metrics = train_adapter_population(task, task.recipe, runs, 0, [0, 6], "cpu")
    assert torch.equal(weights[0, 0], weights[1, 0]) and not torch.equal(weights[0, 1], weights[1, 1])
    assert torch.equal(metrics["test_loss"][0, 0], metrics["test_loss"][1, 0])


def test_groups_are_even_and_of_similar_length():
    task = make_task(adapters_per_forward=3)
    runs = list(range(7))
    groups = _groups(task, task.recipe, runs)
    assert sorted(run for group in groups for run in group) == runs and [len(group) for group in groups] == [2, 2, 3]
    longest = task.data("train")[1].amax((1, 2))
    lengths = [[int(longest[i]) for i in task.family.member_of_runs(torch.tensor(group))] for group in groups]
    assert all(max(a) <= min(b) for a, b in pairwise(lengths))


def test_steps_are_adamws_by_hand_at_a_rate_that_falls_to_a_tenth():
    task = make_task(weight_decay=0.1)
    weights, _ = train_adapter_population(task, task.recipe, [3], 0, [0, 1, 2], "cpu")
    base, keys = load_base("tiny"), run_keys(0, "batches", [3])
    pool = Answers(*task.data("train"))[task.family.member_of_runs(torch.tensor([3]))]
    first, second = weights[:, 0], weights[:, 1]

    def gradient(iteration):
        start = weights[:, iteration].clone().requires_grad_()
        batch = mini_batches(pool, keys, iteration, 8)
        return torch.autograd.grad(answer_loss(base, task.recipe.spec, start, batch).sum(), start)[0]

    g, h = gradient(0), gradient(1)
    # Adam's first step is the sign of the gradient (its epsilon apart); decay has nothing to shrink in zeros.
    torch.testing.assert_close(second, first - 1e-2 * g / (g.abs() + 1e-8), rtol=1e-3, atol=1e-5)
    mean = (0.9 * 0.1 * g + 0.1 * h) / (1 - 0.9**2)
    square = (0.999 * 0.001 * g**2 + 0.001 * h**2) / (1 - 0.999**2)
    rate = 1e-2 * (1 - 0.9 * 1 / 12)
    by_hand = second * (1 - rate * 0.1) - rate * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(weights[:, 2], by_hand, rtol=1e-3, atol=1e-5)


def test_an_epoch_shows_every_example_once_and_too_few_are_named():
    pool = Answers(*(torch.arange(24)[None, :, None] for _ in range(2)), torch.ones(1, 24, 1, dtype=torch.bool))
    keys = run_keys(0, "batches", [7])
    epoch = torch.cat([mini_batches(pool, keys, i, 8).tokens for i in range(3)], 1)
    assert sorted(epoch.flatten().tolist()) == list(range(24))
    assert not torch.equal(epoch[:, :8], mini_batches(pool, keys, 3, 8).tokens)
    with pytest.raises(DataError, match="takes 25 examples, there are 24; raise the family's train_examples"):
        mini_batches(pool, keys, 0, 25)


def test_trained_as_share_a_gauge_until_every_run_has_its_own():
    for own_a in (False, True):
        task = make_task(spec=AdapterSpec(rank=4, train_a=True), own_a=own_a, iterations=6)
        weights, _ = train_adapter_population(task, task.recipe, [0, 1, 2], 0, [6], "cpu")
        report = gauge_report([task.structure.state_dict(row) for row in weights[:, 0]])
        assert (report.warning is not None) == own_a
    fresh = initial_adapters(task, task.recipe, [0, 1], 0)
    assert not torch.equal(fresh[0], fresh[1])


def test_dora_is_trained_too():
    task = make_task(spec=AdapterSpec(rank=2, targets=("q_proj", "o_proj"), dora=True))
    weights, metrics = train_adapter_population(task, task.recipe, [0], 0, [0, 8], "cpu")
    magnitude = next(t for t in task.structure.tensors if t.name.endswith("magnitude_vector"))
    assert (weights[0, 0, magnitude.slice] - weights[0, 1, magnitude.slice]).abs().max() > 1e-3
    assert metrics["test_loss"][0, 1] < metrics["test_loss"][0, 0]


def test_a_zoo_of_adapters_is_collected_and_joined_again(tmp_path):
    task = make_task(iterations=4)
    assert total_iterations(task) == 4
    for _ in range(2):  # the second time finds the manifest that the first one wrote
        collect(task, tmp_path, runs=6, snapshots=2, spacing="tail", shard_runs=4, progress=False)
    family = task.family
    zoo = Zoo.open(tmp_path, task.structure, test_runs=family.test_runs, validation_runs=family.validation_runs)
    assert zoo.runs == 6 and zoo.iterations == [3, 4]
    assert [len(zoo.split(name)) for name in ("test", "validation", "train")] == [3, 1, 2]
