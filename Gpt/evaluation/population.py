"""A task's test function on many networks at once, in bounded memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.distributed import Rows, in_chunks
from Gpt.errors import TaskError
from Gpt.population.functional import Population
from Gpt.tasks import Task

Members = Bool[Tensor, "P classes"] | Int[Tensor, " P"]
"""Which task of its family each network is measured on: class masks, or numbers of an `AdapterFamily`'s members."""

COMPANION = {"loss": "error", "error": "loss"}


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, matrix products and the convolutions of populations are float32, also where the process trains in
    TensorFloat-32. cuDNN keeps to its own setting, TensorFloat-32: in float32 large networks take much longer."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@exact_products()
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

    A batched task is called once for every `batch` networks, any other once for each network; several processes share
    the calls. A metric that is not a number becomes the worst one, so that a broken network counts as broken.

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
    net = None if task.batched else copy.deepcopy(task.template).to(device).eval()

    def measure(chunk: slice) -> Rows:
        if net is None:
            population = Population(task.template, task.structure, weights[chunk].to(device))
            result = task.task_test_fn(*_with_mask(data, masks, chunk), population)
            return {metric: _column(task, value, len(weights[chunk])) for metric, value in _named(task, result).items()}
        net.load_state_dict(task.structure.state_dict(weights[chunk.start]))
        value = _first(task.task_test_fn(*_with_mask(data, masks, chunk.start), net))
        return {task.metric: torch.tensor([value]).float()}

    columns = in_chunks(measure, len(weights), batch if task.batched else 1)
    return {f"{split}_{metric}": _finite_or_worst(values, metric, task.minimize) for metric, values in columns.items()}


@torch.no_grad()
@exact_products()
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
    correct, net = task.correct_fn, None if task.batched else copy.deepcopy(task.template).to(device).eval()

    def judge(chunk: slice) -> Rows:
        if net is None:
            population = Population(task.template, task.structure, weights[chunk].to(device))
            return {"correct": correct(*_with_mask(data, masks, chunk), population).cpu()}
        net.load_state_dict(task.structure.state_dict(weights[chunk.start]))
        return {"correct": correct(*_with_mask(data, masks, chunk.start), net)[None].cpu()}

    return in_chunks(judge, len(weights), batch if task.batched else 1)["correct"]


def _with_mask(data: tuple, masks: Members | None, networks: int | slice) -> tuple:
    """The test function's inputs with the masks of these networks in the place of the family's first one."""
    return data if masks is None else (*data[:-1], masks[networks].to(data[-1].device))


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
