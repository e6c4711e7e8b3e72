"""Networks trained one at a time: the same numbers as an ordinary loop by hand, whatever is trained beside them."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data_gen import single
from Gpt.errors import ConfigError, TaskError
from Gpt.evaluation.population import test_population as measure
from Gpt.masks import MaskSplit
from Gpt.networks import MLP
from Gpt.population.functional import stack_initial
from Gpt.recipes import SingleRecipe
from Gpt.scoring import classification_error
from Gpt.seeds import derive_seed, rng

RECIPE = SingleRecipe(epochs=3, batch_size=8, learning_rate=0.05, augmentation="none")
CPU = torch.device("cpu")


class Normalised(nn.Module):
    """Convolution, batch normalisation, dropout."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.fc(self.dropout(F.relu(self.norm(self.conv(x))).mean((2, 3))))


@pytest.fixture
def task_of(noise_task):
    sizes = {"train": 52, "validation": 30, "test": 40}
    fields = {"task_test_fn": classification_error, "metric": "error", "batched": False, "recipe": RECIPE}
    return partial(noise_task, constructor=Normalised, shape=(3, 8, 8), **sizes, **fields)


def by_hand(task, recipe, run_id, iterations):
    """The same run with torch.optim's own schedules."""
    net = task.constructor()
    start = stack_initial(task.constructor, task.structure, [derive_seed(0, "init", run_id)])[0]
    net.load_state_dict(task.structure.state_dict(start))
    decayed = [p for p in net.parameters() if p.dim() > 1]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov)
    else:
        optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    annealed = recipe.epochs * (len(task.data("train")[1]) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, annealed, eta_min=recipe.tail_learning_rate)
    batches = single.mini_batches(task, recipe, run_id, 0, CPU)
    for iteration in range(iterations):
        inputs, labels = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(net(inputs), labels, label_smoothing=recipe.label_smoothing).backward()
        optimizer.step()
        if iteration < annealed:
            schedule.step()
    return task.structure.flatten(net.state_dict()).detach()


@pytest.mark.parametrize(
    "changes",
    [
        dict(warmup=0.0),
        dict(warmup=0.0, nesterov=False, label_smoothing=0.1, tail_iterations=4, tail_learning_rate=0.01),
        dict(warmup=0.0, optimizer="adamw", learning_rate=0.01, weight_decay=0.1),
        dict(warmup=0.0, augmentation="flip_crop", cutout=3),
    ],
)
def test_a_run_is_what_torch_optim_gives(task_of, changes):
    task, recipe = task_of(), replace(RECIPE, **changes)
    total = single.total_iterations_of(task, recipe)
    weights, _ = single.train_one_by_one(task, recipe, [4], 0, [0, 7, total], "cpu")
    for snapshot, iterations in enumerate((0, 7, total)):
        torch.testing.assert_close(weights[0, snapshot], by_hand(task, recipe, 4, iterations), atol=1e-5, rtol=1e-4)


def test_a_run_does_not_depend_on_its_company_nor_on_the_global_random_state(task_of):
    task = task_of(constructor=lambda: Normalised(dropout=0.5))
    together, _ = single.train_one_by_one(task, RECIPE, [0, 3], 0, [5, 18], "cpu")
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    alone, _ = single.train_one_by_one(task, RECIPE, [3], 0, [5, 18], "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(alone[0], together[1])
    assert (together[0] - together[1]).abs().max() > 0.01


def test_metrics_are_those_of_the_stored_networks_and_training_lowers_them(task_of):
    task, calls = task_of(constructor=lambda: MLP(192, 8, 3)), []
    recipe = replace(RECIPE, learning_rate=0.01, epochs=15)
    weights, metrics = single.train_one_by_one(task, recipe, [0, 1], 0, [0, 9, 90], "cpu", progress=calls.append)
    assert calls == [1] * 6
    for split in ("validation", "test"):
        expected = measure(task, weights.flatten(0, 1), split)[f"{split}_error"].view(2, 3)
        assert torch.equal(metrics[f"{split}_error"], expected)
    assert metrics["test_error"][:, -1].mean() < metrics["test_error"][:, 0].mean() - 20


def test_a_shared_initialisation_leaves_the_mini_batches_apart(task_of):
    recipe = replace(RECIPE, shared_init=True)
    weights, _ = single.train_one_by_one(task_of(), recipe, [5, 6], 0, [0, 1], "cpu")
    assert torch.equal(weights[0, 0], weights[1, 0])
    assert not torch.equal(weights[0, 1], weights[1, 1])


def test_the_learning_rate_rises_falls_and_stays():
    recipe = SingleRecipe(learning_rate=0.4, warmup=0.2, tail_learning_rate=0.001)
    rates = [single.learning_rate(recipe, i, 100) for i in range(110)]
    assert rates[19] == pytest.approx(0.4) and rates[20] == pytest.approx(0.4)
    assert rates[:20] == sorted(rates[:20]) and rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[60] == pytest.approx((0.4 + 0.001) / 2)
    assert rates[100:] == [0.001] * 10
    assert math.isclose(single.learning_rate(replace(recipe, schedule="constant"), 99, 100), 0.4)


def test_an_epoch_shows_every_example_at_most_once(task_of):
    task = task_of()
    batches = single.mini_batches(task, RECIPE, 0, 0, CPU)
    data = task.data("train")[0].flatten(1)
    epochs = [torch.cat([next(batches)[0].flatten(1) for _ in range(6)]) for _ in range(2)]
    found = [(epoch[:, None] == data).all(-1).float().argmax(-1) for epoch in epochs]
    assert all(len(indices.unique()) == 48 for indices in found)
    assert not torch.equal(*found)


def test_cutout_blanks_squares_that_may_reach_over_the_border():
    blanked = single.cutout(torch.ones(500, 2, 9, 7), 4, rng("cpu", 0)) == 0
    assert torch.equal(blanked[:, 0], blanked[:, 1])
    rows, columns = blanked[:, 0].any(2).sum(1), blanked[:, 0].any(1).sum(1)
    assert torch.equal(blanked[:, 0].sum((1, 2)), rows * columns)
    assert set(rows.tolist()) == {2, 3, 4} and set(columns.tolist()) == {2, 3, 4}
    assert blanked[:, 0].float().mean(0).min() > 0.02  # every pixel is hit


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"optimizer": "lion"}, "optimizer is 'lion'"), ({"schedule": "step"}, "schedule is 'step'")],
)
def test_unknown_settings_are_named(task_of, changes, message):
    with pytest.raises(ConfigError, match=message):
        single.train_one_by_one(task_of(), replace(RECIPE, **changes), [0], 0, [0], "cpu")


def test_vectors_cannot_be_cropped_and_families_are_trained_as_populations(task_of):
    flat = task_of(constructor=lambda: MLP(6, 4, 3), shape=(6,))
    with pytest.raises(TaskError, match="augmentation='none'"):
        single.train_one_by_one(flat, replace(RECIPE, cutout=2), [0], 0, [1], "cpu")
    with pytest.raises(TaskError, match="family"):
        family = MaskSplit(held_out=2, validation=1)
        single.train_one_by_one(task_of(family=family), RECIPE, [0], 0, [1], "cpu")


def test_the_template_of_the_task_is_left_alone(task_of):
    task = task_of()
    before = copy.deepcopy(task.template.state_dict())
    single.train_one_by_one(task, RECIPE, [0], 0, [3], "cpu")
    assert all(torch.equal(value, before[name]) for name, value in task.template.state_dict().items())
