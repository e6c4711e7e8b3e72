"""What stands behind one written adapter, beside what one trained adapter takes."""

import torch

from Gpt import seeds
from Gpt.adapters.answers import answer_scores
from Gpt.adapters.base import load_base
from Gpt.adapters.measure import adapter_parts
from Gpt.data.adapter_batches import AdapterBatchSampler, fresh_adapter
from Gpt.data.batches import BatchConfig
from Gpt.data.zoo import Zoo
from Gpt.evaluation import costs
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.results import Costs
from Gpt.generator import Generator
from Gpt.tasks import Task

# The frozen model's backward pass computes the gradients of inputs and not those of weights.
FROZEN_TRAINING_FACTOR = 2
COUNTED = 16  # adapters that a loss is counted on: as in training, the longest answers decide


def adapter_costs(generator: Generator, task: Task, zoo: Zoo, price: Price, spent: Spent) -> Costs:
    """Seconds and operations of the zoo, the generator, a written and a trained adapter; the encoder is not counted.

    What it took to train adapters that were imported is not known, neither in seconds nor in operations, and counts as
    nothing.
    """
    _, recipe = adapter_parts(task)
    train_seconds = train_flops = 0.0
    if not task.checkpoints:
        train_seconds = spent.zoo_seconds / zoo.runs
        train_flops = recipe.iterations * recipe.examples * FROZEN_TRAINING_FACTOR * forward_flops(task, zoo.device)
    return Costs(
        zoo_seconds=spent.zoo_seconds,
        generator_seconds=spent.training_seconds,
        sample_seconds=price.seconds,
        train_seconds=train_seconds,
        zoo_flops=zoo.runs * train_flops,
        generator_flops=spent.training_examples * costs.TRAINING_FACTOR * loss_flops(generator, task, zoo),
        sample_flops=price.flops,
        train_flops=train_flops,
        break_even=costs.break_even(spent, price.seconds, train_seconds),
    )


def forward_flops(task: Task, device: torch.device) -> float:
    """Operations of one adapter's answer to one example of its task."""
    family, recipe = adapter_parts(task)
    answers = family.answers(recipe.base, "train")[:, :1].trimmed().to(device)
    fresh = fresh_adapter(task).to(device).expand(len(answers.tokens), -1)
    base = load_base(recipe.base, device)
    return costs.count_flops(lambda: answer_scores(base, recipe.spec, fresh, answers)) / len(fresh)


def loss_flops(generator: Generator, task: Task, zoo: Zoo) -> float:
    """Operations of the generator's loss for one adapter, its passes through the frozen model included.

    A loss may change on the way: the mean of four moments of training.
    """
    draw = AdapterBatchSampler(zoo, task, "train", BatchConfig(), pooled=not generator.reads_prompt_sets)
    batch, rng = draw(COUNTED, seeds.rng(zoo.device, 0)), seeds.rng(zoo.device, 0)
    found = []
    for progress in (0.125, 0.375, 0.625, 0.875):
        batch.progress = progress
        found.append(costs.count_flops(lambda: generator.loss(batch, rng)))
    return sum(found) / len(found) / COUNTED
