from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from Gpt.diffusion.objectives import FlowMatching
from Gpt.evaluation import costs
from Gpt.evaluation.costs import Price, Spent
from Gpt.generator import Batch, Generator
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


class Growing(Generator):
    """A layer 4 -> 3, and from the middle of training on another, 3 -> 2, behind it."""

    needs_start = False

    def __init__(self, structure):
        super().__init__(structure, FlowMatching(), "euler", 1)
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)

    def loss(self, batch, rng):
        found = self.first(batch.target)
        return (self.second(found) if batch.progress >= 0.5 else found).sum()


def test_the_training_of_a_generator_is_counted_with_its_gradient_at_every_stage(task):
    generator = Growing(task.structure)
    forward, later = 2 * 4 * 3, 2 * 3 * 2
    by_weights, by_inputs = 1, 1  # gradients, each a product as large as the forward pass; none by the examples
    early = (1 + by_weights) * forward
    late = early + (1 + by_weights + by_inputs) * later
    assert costs.loss_flops(generator, lambda count, rng: Batch(torch.ones(count, 4))) == (early + late) / 2
    assert all(p.grad is None for p in generator.parameters())


def test_costs_add_up(task, zoo):
    price = Price(seconds=2.0, flops=40.0)
    found = costs.costs(task, zoo, price, Spent(24.0, 36.0, training_flops=2700.0))
    assert found.generator_flops == 2700 and found.sample_flops == 40
    assert found.zoo_flops == 120 * found.train_flops == 120 * 10 * (300 // 16) * 16 * 3 * FORWARD
    assert found.train_seconds == 24 / 120 and found.break_even is None
    timed = costs.costs(task, zoo, price, Spent(training_seconds=36.0), step_seconds=0.1)
    assert timed.train_seconds == pytest.approx(18.0) and timed.break_even == pytest.approx(36 / 16)


@pytest.mark.parametrize(
    ("fixed", "sample", "train", "expected"),
    [(100.0, 1.0, 3.0, 50.0), (100.0, 3.0, 3.0, None), (100.0, 4.0, 3.0, None)],
)
def test_break_even(fixed, sample, train, expected):
    assert costs.break_even(fixed, sample, train) == expected
