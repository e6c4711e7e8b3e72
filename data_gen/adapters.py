"""Adapter populations: many low-rank adapters of one frozen language model, trained in the same passes through it."""

import math
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_gen.progress import Progress, iterations
from data_gen.randomness import permuted, run_keys
from Gpt.adapters.answers import Answers
from Gpt.adapters.base import BaseModel, load_base
from Gpt.adapters.measure import adapter_parts, measure
from Gpt.adapters.replay import AnswerLoss
from Gpt.adapters.spec import AdapterModule
from Gpt.errors import DataError
from Gpt.recipes import AdapterRecipe
from Gpt.seeds import derive_seed
from Gpt.tasks import Task

FINAL_RATE = 0.1  # of the first learning rate: last iterates are good adapters, and still differ


def train_adapter_population(
    task: Task,
    recipe: AdapterRecipe,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    device: torch.device | str,
    *,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    """Train R adapters, run r on the member of the task's family that is its own, and keep snapshots of all of them.

    A run's trajectory depends on (seed, run id) alone, up to floating-point rounding.

    Args:
        snapshot_iterations: increasing; 0 is the initialisation, i the adapter after i mini-batches.
        progress: told of new snapshots as training goes on, see `data_gen.progress`.

    Returns:
        float32 weights on `device`, and the columns `<split>_loss` (nats a token of the answers) and `<split>_error`
        (answers that are not exactly right, percent) of the splits validation and test.

    Raises:
        DataError: there are fewer training examples than one mini-batch takes.
    """
    base = load_base(recipe.base, device)
    groups = _groups(task, recipe, run_ids)
    trained = [_train_group(task, recipe, base, group, seed, snapshot_iterations, progress) for group in groups]
    order = torch.tensor([run_ids.index(run) for group in groups for run in group], device=base.device).argsort()
    metrics = {name: torch.cat([columns[name] for _, columns in trained])[order] for name in trained[0][1]}
    return torch.cat([weights for weights, _ in trained])[order], metrics


def _groups(task: Task, recipe: AdapterRecipe, run_ids: list[int]) -> list[list[int]]:
    """Runs that are trained in one pass: as many in each, of similar length, so that little is padding."""
    family, _ = adapter_parts(task)
    longest = task.data("train")[1].amax((1, 2))[family.member_of_runs(torch.tensor(run_ids))].tolist()
    order = [run for _, run in sorted(zip(longest, run_ids, strict=True))]
    count = math.ceil(len(order) / recipe.adapters_per_forward)
    return [order[i * len(order) // count : (i + 1) * len(order) // count] for i in range(count)]


def _train_group(
    task: Task,
    recipe: AdapterRecipe,
    base: BaseModel,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    progress: Progress | None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    family, _ = adapter_parts(task)
    members = family.member_of_runs(torch.tensor(run_ids))
    pool = Answers(*task.data("train", base.device))[members.to(base.device)].trimmed()
    keys = run_keys(seed, "batches", run_ids, base.device)
    weights = initial_adapters(task, recipe, run_ids, seed).to(base.device).requires_grad_()
    optimizer = torch.optim.AdamW([weights], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    loss = AnswerLoss(base, recipe.spec)
    snapshots: list[Tensor] = []
    metrics: dict[str, list[Tensor]] = {}
    for iteration in iterations(snapshot_iterations, len(run_ids), progress):
        if iteration in snapshot_iterations:
            snapshots.append(weights.detach().clone())
            for name, values in measure(task, base, snapshots[-1], members).items():
                metrics.setdefault(name, []).append(values)
        if iteration < snapshot_iterations[-1]:
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * learning_rate_factor(iteration / recipe.iterations)
            optimizer.zero_grad()
            examples = mini_batches(pool, keys, iteration, recipe.examples)
            loss(weights, examples).sum().backward()
            optimizer.step()
    return torch.stack(snapshots, 1), {name: torch.stack(values, 1) for name, values in metrics.items()}


def learning_rate_factor(progress: float) -> float:
    """From 1 down to `FINAL_RATE`, in a straight line."""
    return 1 - (1 - FINAL_RATE) * progress


def initial_adapters(task: Task, recipe: AdapterRecipe, run_ids: list[int], seed: int) -> Float[Tensor, "R D"]:
    """The base model itself, once for every run; what is not zero in it is A, where A is trained."""
    if not recipe.own_a:
        return task.structure.flatten(task.template.state_dict()).repeat(len(run_ids), 1)
    specs = [replace(recipe.spec, a_seed=derive_seed(seed, "lora_A", run)) for run in run_ids]
    return torch.stack([task.structure.flatten(AdapterModule(recipe.base, spec).state_dict()) for spec in specs])


def mini_batches(pool: Answers, keys: Int[Tensor, "R 2"], iteration: int, count: int) -> Answers:
    """Every run's own examples of this iteration, from its own permutation of its member's; each epoch is complete.

    Raises:
        DataError: see `train_adapter_population`.
    """
    length = pool.tokens.shape[1]
    if length < count:
        raise DataError(f"a mini-batch takes {count} examples, there are {length}; raise the family's train_examples")
    epoch, index = divmod(iteration, length // count)
    slots = index * count + torch.arange(count, device=keys.device)
    rows = torch.arange(len(keys), device=keys.device)[:, None]
    return pool[rows, permuted(keys, epoch, slots, length)]
