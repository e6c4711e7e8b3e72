"""Supervised training of networks too large for a batched population: one after the other, by an ordinary loop.

bfloat16 products and channels-last memory on CUDA devices; the data set and its augmentation stay on the device.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from data_gen.images import WINDOWS, flip_crop, zero_padded
from data_gen.progress import Progress, iterations
from data_gen.vision import check_choices, iterations_of
from Gpt.errors import TaskError
from Gpt.evaluation.population import test_population as score_population
from Gpt.population.functional import stack_initial
from Gpt.recipes import SingleRecipe
from Gpt.seeds import derive_seed, own_random_state, rng
from Gpt.tasks import Task


def train_one_by_one(
    task: Task,
    recipe: SingleRecipe,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    device: torch.device | str,
    *,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    """Train R networks of a task and keep snapshots of each.

    On one kind of device, a run's trajectory depends on (seed, run id) alone, up to floating-point rounding.

    Args:
        snapshot_iterations: increasing; 0 is the initialisation, i the weights after i mini-batches.
        progress: told of new snapshots as training goes on, see `data_gen.progress`.

    Returns:
        float32 weights on `device`, and the columns that the task's test function gives for validation and test.

    Raises:
        TaskError: the training data are not (inputs, labels), or cannot be augmented; the task is a family.
        DataError: the training split is smaller than one mini-batch.
        ConfigError: the recipe names an unknown optimizer, schedule or augmentation.
    """
    if task.family is not None:
        raise TaskError(f"task {task.name!r} is a family, whose networks are trained together: use a SupervisedRecipe")
    device = torch.device(device)
    weights, metrics = [], []
    for run_id in run_ids:
        weights.append(train_network(task, recipe, run_id, seed, snapshot_iterations, device, progress))
        found: dict[str, Tensor] = {}
        for split in ("validation", "test"):
            found |= score_population(task, weights[-1], split, device=device)
        metrics.append(found)
    return torch.stack(weights), {name: torch.stack([m[name] for m in metrics]) for name in metrics[0]}


def total_iterations_of(task: Task, recipe: SingleRecipe) -> int:
    """Mini-batches of a complete run, the tail included."""
    return iterations_of(task, recipe) + recipe.tail_iterations


def train_network(
    task: Task,
    recipe: SingleRecipe,
    run_id: int,
    seed: int,
    keep: list[int],
    device: torch.device,
    progress: Progress | None = None,
) -> Float[Tensor, "S D"]:
    """One run: its weights after each number of iterations in `keep`; see `train_one_by_one`."""
    check_choices(recipe)
    annealed = iterations_of(task, recipe)
    batches = mini_batches(task, recipe, run_id, seed, device)
    net = _initial_network(task, 0 if recipe.shared_init else run_id, seed, device)
    optimizer = _optimizer(net, recipe)
    kept: list[Tensor] = []
    with own_random_state(derive_seed(seed, "random layers", run_id)):
        for iteration in iterations(keep, 1, progress):
            if iteration == keep[len(kept)]:
                kept.append(task.structure.flatten(net.state_dict()))
            if iteration < keep[-1]:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, iteration, annealed)
                inputs, labels = next(batches)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = net(inputs)
                F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    return torch.stack(kept)


def learning_rate(recipe: SingleRecipe, iteration: int, annealed: int) -> float:
    """Of one iteration: linear warm-up, a cosine to the tail's rate, and the tail after `annealed` iterations."""
    warm, end = recipe.warmup * annealed, recipe.tail_learning_rate
    if iteration >= annealed:
        return end
    if iteration < warm:
        return recipe.learning_rate * (iteration + 1) / math.ceil(warm)
    if recipe.schedule == "constant":
        return recipe.learning_rate
    return end + (recipe.learning_rate - end) * 0.5 * (1 + math.cos(math.pi * (iteration - warm) / (annealed - warm)))


def mini_batches(
    task: Task, recipe: SingleRecipe, run_id: int, seed: int, device: torch.device
) -> Iterator[tuple[Float[Tensor, "B ..."], Int[Tensor, " B"]]]:
    """Augmented inputs and labels without end; every epoch has an order of its own and drops the incomplete batch.

    Raises:
        TaskError: the training inputs are no images, and the recipe augments.
    """
    inputs, labels = task.data("train", device)
    augmented = recipe.augmentation == "flip_crop"
    if (augmented or recipe.cutout) and inputs.dim() != 4:
        raise TaskError(
            f"task {task.name!r}: augmentation and cutout need images [N, C, H, W], train_data_fn returned inputs of "
            f"shape {tuple(inputs.shape)}; set augmentation='none' and cutout=0 in the task's recipe"
        )
    padded = zero_padded(inputs) if augmented else None
    draws = rng(device, seed, "batches and augmentation", run_id)
    while True:
        order = torch.randperm(len(labels), generator=draws, device=device)
        for index in order[: len(order) // recipe.batch_size * recipe.batch_size].split(recipe.batch_size):
            if padded is not None:
                windows = torch.randint(WINDOWS, (1, len(index)), generator=draws, device=device)
                batch = flip_crop(padded, index[None], windows)[0]
            else:
                batch = inputs[index]
            batch = cutout(batch, recipe.cutout, draws) if recipe.cutout else batch
            yield _channels_last(batch), labels[index]


def cutout(images: Float[Tensor, "B C H W"], side: int, draws: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Zero a square of each image, centred anywhere in it; at the borders less of the square is inside."""
    spans = []
    for axis, length in ((2, images.shape[2]), (3, images.shape[3])):
        centre = torch.randint(length, (len(images), 1, 1, 1), generator=draws, device=images.device)
        first = centre - side // 2
        place = torch.arange(length, device=images.device).view([-1 if a == axis else 1 for a in range(4)])
        spans.append((place >= first) & (place < first + side))
    return images.masked_fill(spans[0] & spans[1], 0.0)


def _initial_network(task: Task, run_id: int, seed: int, device: torch.device) -> nn.Module:
    weights = stack_initial(task.constructor, task.structure, [derive_seed(seed, "init", run_id)])[0]
    with torch.random.fork_rng(devices=[]):
        net = task.constructor()
    net.load_state_dict(task.structure.state_dict(weights))
    return net.to(device).to(memory_format=torch.channels_last).train()


def _optimizer(net: nn.Module, recipe: SingleRecipe) -> torch.optim.Optimizer:
    """Of torch.optim, on a GPU as one kernel; biases, norms and other vectors are not decayed."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": recipe.learning_rate, "fused": trained[0].is_cuda}
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=recipe.momentum, nesterov=recipe.nesterov, **options)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer](groups, **options)


def _channels_last(batch: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
    return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
