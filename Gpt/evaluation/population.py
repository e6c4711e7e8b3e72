"""A task's test function on many networks at once, in bounded memory."""

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from Gpt.errors import TaskError
from Gpt.population import Population
from Gpt.tasks import Task

Members = Bool[Tensor, "P classes"] | Int[Tensor, " P"]
"""Which task of its family each network is measured on: class masks, or numbers of an `AdapterFamily`'s members."""

COMPANION = {"loss": "error", "error": "loss"}


@torch.no_grad()
def test_population(
    task: Task,
    weights: Float[Tensor, "P D"],
    split: str,
    masks: Members | None = None,
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
) -> dict[str, Float[Tensor, " P"]]:
    """Measure every network with the task's test function.

    A batched task is called once for every `batch` networks, any other once for each network. A metric that is not a
    number becomes the worst one, so that a broken network counts as broken.

    Args:
        masks: of a family, the member (mask) that each network is measured on; the first held-out one when None.

    Returns:
        `{f"{split}_{metric}": [P]}` on the CPU. A batched classification task whose function returns a pair, (loss,
        error) or (error, loss), gives both columns.

    Raises:
        TaskError: the batched test function did not return one number per network.
    """
    device = device or weights.device
    data = task.data(split, device)
    if not task.batched:
        nets = _one_by_one(task, weights, device)
        values = [_first(task.task_test_fn(*_with_mask(data, masks, i), net)) for i, net in enumerate(nets)]
        return {f"{split}_{task.metric}": _finite_or_worst(torch.tensor(values).float(), task.metric, task.minimize)}
    columns: dict[str, list[Tensor]] = {}
    for first in range(0, len(weights), batch):
        chunk = weights[first : first + batch]
        inputs = _with_mask(data, masks, slice(first, first + batch))
        result = task.task_test_fn(*inputs, Population(task.template, task.structure, chunk.to(device)))
        for metric, value in _named(task, result).items():
            columns.setdefault(metric, []).append(_column(task, value, len(chunk)))
    return {
        f"{split}_{metric}": _finite_or_worst(torch.cat(parts), metric, task.minimize)
        for metric, parts in columns.items()
    }


@torch.no_grad()
def correct_population(
    task: Task,
    weights: Float[Tensor, "P D"],
    split: str,
    masks: Members | None = None,
    *,
    batch: int = 256,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "P N"]:
    """Which of the split's N examples every network gets right, on the CPU; `masks` as in `test_population`.

    Raises:
        TaskError: the task has no `correct_fn`.
    """
    if task.correct_fn is None:
        raise TaskError(f"task {task.name!r} has no correct_fn, which per-example measures are made from; add one")
    device = device or weights.device
    data = task.data(split, device)
    if not task.batched:
        nets = _one_by_one(task, weights, device)
        return torch.stack([task.correct_fn(*_with_mask(data, masks, i), net).cpu() for i, net in enumerate(nets)])
    parts = []
    for first in range(0, len(weights), batch):
        inputs = _with_mask(data, masks, slice(first, first + batch))
        population = Population(task.template, task.structure, weights[first : first + batch].to(device))
        parts.append(task.correct_fn(*inputs, population).cpu())
    return torch.cat(parts)


def _with_mask(data: tuple, masks: Members | None, networks: int | slice) -> tuple:
    """The test function's inputs with the masks of these networks in the place of the family's first one."""
    return data if masks is None else (*data[:-1], masks[networks].to(data[-1].device))


def _one_by_one(task: Task, weights: Float[Tensor, "P D"], device: torch.device | str) -> Iterator[nn.Module]:
    """The same module with the weights of one network after the other."""
    net = copy.deepcopy(task.template).to(device).eval()
    for row in weights:
        net.load_state_dict(task.structure.state_dict(row))
        yield net


def _first(result) -> float:
    return float(result[0] if isinstance(result, tuple | list) else result)


def _named(task: Task, result) -> dict[str, Tensor]:
    """The test function's result by metric; the second item of a pair is a loss's error or an error's loss."""
    if not isinstance(result, tuple | list):
        return {task.metric: result}
    names = [task.metric, COMPANION[task.metric]] if task.metric in COMPANION and len(result) == 2 else [task.metric]
    return dict(zip(names, result, strict=False))


def _column(task: Task, value, count: int) -> Float[Tensor, " P"]:
    value = torch.as_tensor(value).detach().float().cpu()
    if value.shape != (count,):
        raise TaskError(
            f"task {task.name!r}: batched task_test_fn returned shape {tuple(value.shape)} for {count} networks, "
            f"expected one number per network; set batched to False if it takes one network at a time"
        )
    return value


def _finite_or_worst(values: Float[Tensor, " P"], metric: str, minimize: bool) -> Float[Tensor, " P"]:
    worst = torch.inf if minimize or metric in COMPANION else -torch.inf
    return torch.where(values.isnan(), worst, values)
