"""What one network costs by each way to obtain it: floating-point operations counted, seconds measured elsewhere."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from Gpt.data.zoo import Zoo
from Gpt.evaluation.results import Costs
from Gpt.recipes import AdapterRecipe, PpoRecipe, SingleRecipe, SupervisedRecipe
from Gpt.tasks import Task

# A backward pass takes about twice its forward pass: gradients of the inputs and of the weights.
TRAINING_FACTOR = 3


@dataclass(frozen=True)
class Spent:
    """What a generator and its zoo took: wall-clock seconds, and the examples that it was trained on; 0 where nobody
    knows."""

    zoo_seconds: float = 0.0
    training_seconds: float = 0.0
    training_examples: int = 0


@dataclass(frozen=True)
class Price:
    """What writing one network takes: seconds, of all processes that are at it; FLOPs; and the FLOPs of writing it in a
    single step without guidance, which is every part of the generator once, as for a training example."""

    seconds: float
    flops: float
    once_flops: float


def forward_flops(task: Task) -> float:
    """FLOPs of the network on one example; a dense network's two per weight where there is no training data to try."""
    if task.train_data_fn is None:
        return float(sum(2 * t.numel for t in task.structure.tensors if t.kind == "weight"))
    inputs = task.data("train")[0]
    net = copy.deepcopy(task.template).eval()
    return count_flops(lambda: net(inputs[:1]))


@torch.no_grad()
def count_flops(work: Callable[[], object]) -> float:
    """FLOPs of matrix products, convolutions and attention in a piece of work, two per multiply-add.

    Runs it uncompiled and with attention spelt out: the counter sees neither compiled code nor fused CPU attention.
    """
    counter = FlopCounterMode(display=False)
    with torch.compiler.set_stance("force_eager"), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return float(counter.get_total_flops())


def training_steps(task: Task) -> int | None:
    """Gradient steps of one complete run of the recipe, None without one."""
    recipe = task.recipe
    if recipe is None:
        return None
    if isinstance(recipe, PpoRecipe):
        return recipe.iterations * recipe.epochs * recipe.minibatches
    if isinstance(recipe, AdapterRecipe):
        return recipe.iterations
    steps = recipe.epochs * (len(task.data("train")[1]) // recipe.batch_size)
    return steps + recipe.tail_iterations if isinstance(recipe, SingleRecipe) else steps


def training_step_flops(task: Task) -> float:
    """FLOPs of one gradient step of one network: batch x 3 forward passes; with PPO also its share of the rollouts."""
    recipe = task.recipe
    if recipe is None:
        return 0.0
    if isinstance(recipe, PpoRecipe):
        transitions = recipe.environments * recipe.horizon
        passes = transitions * (1 + TRAINING_FACTOR * recipe.epochs) / (recipe.epochs * recipe.minibatches)
        return passes * forward_flops(task)
    if not isinstance(recipe, SupervisedRecipe):
        raise TypeError(f"FLOPs of a {type(recipe).__name__} are those of its base model: Gpt.evaluation.adapter_costs")
    return recipe.batch_size * TRAINING_FACTOR * forward_flops(task)


def trainings(zoo: Zoo) -> int:
    """How many networks were trained for a zoo: fewer than its runs where these are snapshots of longer ones."""
    return zoo.runs * zoo.snapshots // zoo.snapshots_of_training


def break_even(spent: Spent, sample_seconds: float, train_seconds: float) -> float | None:
    """Number of networks from which a zoo and a generator once and `sample_seconds` each beat `train_seconds` each."""
    saved = train_seconds - sample_seconds
    known = spent.training_seconds > 0  # not of published weights
    return (spent.zoo_seconds + spent.training_seconds) / saved if known and saved > 0 else None


def costs(task: Task, zoo: Zoo, price: Price, spent: Spent, step_seconds: float = 0.0) -> Costs:
    """Everything behind one generated network beside one network's training by the recipe.

    Args:
        step_seconds: of a gradient step, which stand for the training of a network where its share of the zoo's
            wall-clock is not known.
    """
    count, steps = trainings(zoo), training_steps(task) or 0
    train_seconds, train_flops = spent.zoo_seconds / count or step_seconds * steps, steps * training_step_flops(task)
    return Costs(
        zoo_seconds=spent.zoo_seconds,
        generator_seconds=spent.training_seconds,
        sample_seconds=price.seconds,
        train_seconds=train_seconds,
        zoo_flops=count * train_flops,
        generator_flops=spent.training_examples * TRAINING_FACTOR * price.once_flops,
        sample_flops=price.flops,
        train_flops=train_flops,
        break_even=break_even(spent, price.seconds, train_seconds),
    )
