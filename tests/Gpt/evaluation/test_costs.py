from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from Gpt.data.views import align_runs, split_by_snapshot
from Gpt.evaluation import costs
from Gpt.evaluation.costs import Price, Spent
from Gpt.recipes import PpoRecipe, SingleRecipe

FORWARD = 2 * (6 * 4 + 4 * 3)


def test_counts_products_and_fused_attention():
    a, q = torch.zeros(3, 4), torch.zeros(1, 2, 8, 16)
    assert costs.count_flops(lambda: a @ a.T) == 2 * 3 * 4 * 3
    assert costs.count_flops(lambda: F.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 8 * 8 * 16


def test_of_networks_and_their_training(task):
    assert costs.forward_flops(task) == FORWARD
    assert costs.training_step_flops(task) == 16 * 3 * FORWARD
    assert costs.training_steps(task) == 10 * (300 // 16)
    assert costs.forward_flops(replace(task, train_data_fn=None)) == FORWARD
    assert costs.training_steps(replace(task, recipe=None)) is None
    with_tail = SingleRecipe(epochs=10, batch_size=16, tail_iterations=7)
    assert costs.training_steps(replace(task, recipe=with_tail)) == 10 * (300 // 16) + 7


def test_of_reinforcement_learning(task):
    recipe = PpoRecipe(iterations=3, environments=8, horizon=4, epochs=2, minibatches=2)
    reinforced = replace(task, train_data_fn=None, recipe=recipe)
    whole = costs.training_steps(reinforced) * costs.training_step_flops(reinforced)
    assert whole == 3 * (8 * 4) * (1 + 3 * 2) * FORWARD


def test_a_generator_costs_three_forward_passes_an_example(task, zoo):
    """A hundred examples, three forward passes each."""
    price = Price(seconds=2.0, flops=40.0, once_flops=9.0)
    found = costs.costs(task, zoo, price, Spent(24.0, 36.0, training_examples=100))
    assert found.generator_flops == 100 * 3 * 9 and found.sample_flops == 40
    assert found.zoo_flops == 120 * found.train_flops == 120 * 10 * (300 // 16) * 16 * 3 * FORWARD
    assert found.train_seconds == 24 / 120 and found.break_even is None
    timed = costs.costs(task, zoo, price, Spent(training_seconds=36.0), step_seconds=0.1)
    assert timed.train_seconds == pytest.approx(18.0) and timed.break_even == pytest.approx(36 / 16)


def test_snapshots_of_a_training_cost_one_training_however_they_are_split(zoo):
    split = split_by_snapshot(zoo, 5, 5)
    assert (split.runs, split.snapshots) == (720, 1)
    for seen in (zoo, split, align_runs(zoo, 20, 20), align_runs(split, 5, 5)):
        assert costs.trainings(seen) == 120


@pytest.mark.parametrize(
    ("fixed", "sample", "train", "expected"),
    [(100.0, 1.0, 3.0, 50.0), (100.0, 3.0, 3.0, None), (100.0, 4.0, 3.0, None), (0.0, 1.0, 3.0, None)],
)
def test_break_even(fixed, sample, train, expected):
    """Nothing is known of a generator that took no time: its weights were published."""
    assert costs.break_even(Spent(0.25 * fixed, 0.75 * fixed), sample, train) == expected
