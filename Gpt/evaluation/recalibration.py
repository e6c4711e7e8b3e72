"""Batch-norm statistics re-estimated for networks whose weights were written or averaged, not trained."""

import copy
import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from Gpt.errors import ConfigError
from Gpt.structure import Structure
from Gpt.tasks import Task

EXAMPLES, BATCH = 10_000, 500


def has_statistics(structure: Structure) -> bool:
    """Whether the architecture keeps running statistics."""
    return any(t.kind == "running_var" for t in structure.tensors)


def check_recalibration(task: Task) -> None:
    """Raises:
    ConfigError: the architecture has no batch normalisation, or the task no training data.
    """
    if not has_statistics(task.structure):
        raise ConfigError(f"recalibrate: the networks of task {task.name!r} have no batch-norm statistics")
    if task.train_data_fn is None:
        raise ConfigError(f"recalibrate: task {task.name!r} has no training data; add the key 'train_data_fn'")


def examples(task: Task) -> int:
    """How many training images the statistics are of."""
    return min(EXAMPLES, len(task.data("train")[0]))


@torch.no_grad()
def recalibrated(task: Task, weights: Float[Tensor, "P D"], device: torch.device | str) -> Float[Tensor, "P D"]:
    """The networks with running means and variances averaged over batches of training images, without augmentation.

    All else stays to the bit. Generated and averaged networks often fail by their statistics alone (Jordan et al. 2023,
    "REPAIR", arXiv 2211.08403).

    Raises:
        ConfigError: see `check_recalibration`.
    """
    check_recalibration(task)
    inputs = task.data("train", device)[0][: examples(task)]
    batches = inputs.chunk(math.ceil(len(inputs) / BATCH))  # alike: a last one of a single example has no variance
    net = copy.deepcopy(task.template).to(device).eval()
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
        norm.momentum = None  # the plain average of all batches
    written = weights.clone()
    for row in written:
        net.load_state_dict(task.structure.state_dict(row))
        for norm in norms:
            norm.reset_running_stats()
        for batch in batches:
            net(batch)
        state = net.state_dict()
        for spec in task.structure.statistics:
            row[spec.slice] = state[spec.name].flatten().to(row)
    return written
