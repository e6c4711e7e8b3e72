"""Ordinary optimisers from the generator's own starting networks, with the learning rate tuned on validation data.

All networks train at once, with a few learning rates each, as rows of one matrix; several processes share the learning
rates. The loss is the cross-entropy on the task's training data.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.distributed import Rows, from_first, in_chunks
from Gpt.errors import TaskError
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import Starts
from Gpt.evaluation.results import Trace
from Gpt.evaluation.statistics import trace
from Gpt.population import updates
from Gpt.population.functional import population_gradient
from Gpt.recipes import SupervisedRecipe
from Gpt.seeds import rng
from Gpt.tasks import Task

RATES_AT_ONCE = 4  # while tuning, on a few networks; fewer would leave a GPU idle


@dataclass(frozen=True)
class Optimiser:
    """An update rule, made from the mask of trainable entries, and between which powers of ten its rate is tuned."""

    name: str
    rule: Callable[[Tensor], updates.Update]
    low: float
    high: float

    def learning_rates(self, count: int) -> list[float]:
        return torch.logspace(self.low, self.high, count, dtype=torch.float64).tolist()


OPTIMISERS = (
    Optimiser("SGD, momentum 0.9", partial(updates.sgd, momentum=0.9), -3.0, 1.0),
    Optimiser("Adam", updates.adam, -4.0, 0.0),
    Optimiser("AdamW", partial(updates.adam, decoupled=True, weight_decay=0.01), -4.0, 0.0),
)


@dataclass(frozen=True)
class Tuned:
    """An optimiser at one step count, with the learning rate that was best there on validation data.

    Attributes:
        weights: `[n, D]` networks from the starts that are reported.
        at_edge: the best rate was the lowest or highest of the grid.
    """

    steps: int
    learning_rate: float
    at_edge: bool
    weights: Float[Tensor, "n D"]


def optimise(
    task: Task,
    starts: Float[Tensor, "n D"],
    optimiser: Optimiser,
    learning_rates: Sequence[float],
    steps: Sequence[int],
    seed: int,
) -> Float[Tensor, "steps rates n D"]:
    """Train every start with every learning rate; the networks after each of the (increasing) step counts.

    Mini-batches have the recipe's size and are drawn afresh for every network and step, the same ones for every rate.

    Raises:
        TaskError: the task has no supervised recipe.
    """
    if not isinstance(task.recipe, SupervisedRecipe):
        raise TaskError(f"task {task.name!r} has no supervised recipe to optimise by; give it a `recipe`")
    device, batch_size = starts.device, task.recipe.batch_size
    x, y = task.data("train", device)
    rates, count = len(learning_rates), len(starts)
    rule = optimiser.rule(updates.trainable(task.template, task.structure).to(device))
    gradient = population_gradient(task.template, task.structure, x[:1])
    state = updates.initial_state(starts.repeat(rates, 1), square=True)
    learning_rate = torch.tensor(learning_rates, device=device).repeat_interleave(count)[:, None]
    draw = rng(device, seed, "mini-batches")
    kept = []
    for step in range(max(steps) + 1):
        if step in steps:
            kept.append(state["weights"].view(rates, count, -1).clone())
        if step == max(steps):
            break
        batch = torch.randint(len(y), (count, batch_size), generator=draw, device=device).repeat(rates, 1)
        rule(state, gradient(state["weights"], x[batch], y[batch]), learning_rate)
        state["iteration"] += 1
    return torch.stack(kept)


def checkpoint_steps(last: int, extra: Sequence[int] = ()) -> list[int]:
    """0, 1, 2, 5, 10, 20, 50, ... up to `last`, and the extra ones that lie within."""
    steps = {0, last, *(step for step in extra if 0 <= step <= last)}
    decade = 1
    while decade <= last:
        steps |= {decade * factor for factor in (1, 2, 5) if decade * factor <= last}
        decade *= 10
    return sorted(steps)


def tune(
    task: Task,
    optimiser: Optimiser,
    tuning: Starts,
    starts: Starts,
    *,
    budgets: Sequence[int],
    learning_rates: int,
    seed: int,
) -> tuple[list[Tuned], Trace]:
    """Choose the learning rate of every budget (a number of steps) on validation data, then run it from the starts.

    Returns:
        One entry per budget, and the trace of the largest budget's learning rate in the task's test metric.
    """
    grid = optimiser.learning_rates(learning_rates)
    budgets = sorted(set(budgets))
    tried = _shared_out(task, tuning.weights, optimiser, grid, budgets, seed, RATES_AT_ONCE)
    chosen = [_best_rate(task, networks) for networks in tried]
    rates = sorted(set(chosen))
    steps = checkpoint_steps(budgets[-1], budgets)
    trained = _shared_out(task, starts.weights, optimiser, [grid[i] for i in rates], steps, seed + 1, 1)
    tuned = [
        Tuned(budget, grid[i], i in (0, len(grid) - 1), trained[steps.index(budget), rates.index(i)])
        for budget, i in zip(budgets, chosen, strict=True)
    ]
    longest = trained[:, rates.index(chosen[-1])]
    metric = test_population(task, longest.flatten(0, 1), "test")[f"test_{task.metric}"].view(longest.shape[:2])
    return tuned, trace(optimiser.name, "optimiser", steps, list(metric), seed)


def step_seconds(task: Task, starts: Starts, seed: int, steps: int = 10) -> float:
    """Wall-clock seconds of one SGD step of one network on this machine, all starts training together."""

    def waited(steps: int) -> None:
        optimise(task, starts.weights, OPTIMISERS[0], [0.1], [steps], seed).sum().item()

    waited(1)  # what the first call alone takes
    began = time.perf_counter()
    waited(steps)
    return from_first(time.perf_counter() - began) / steps / len(starts.weights)


def _shared_out(
    task: Task,
    starts: Float[Tensor, "n D"],
    optimiser: Optimiser,
    learning_rates: Sequence[float],
    steps: Sequence[int],
    seed: int,
    size: int,
) -> Float[Tensor, "steps rates n D"]:
    """`optimise`, its learning rates shared out among the processes, `size` at a time."""

    def work(chunk: slice) -> Rows:
        return {"weights": optimise(task, starts, optimiser, learning_rates[chunk], steps, seed).transpose(0, 1)}

    return in_chunks(work, len(learning_rates), size)["weights"].transpose(0, 1)


def _best_rate(task: Task, networks: Float[Tensor, "rates n D"]) -> int:
    """Index of the rate with the best mean validation metric; a rate that breaks a network is out."""
    metric = test_population(task, networks.flatten(0, 1), "validation")[f"validation_{task.metric}"]
    mean = metric.view(networks.shape[:2]).mean(1)
    return int(mean.argmin() if task.minimize else mean.argmax())
