"""The trivial ways to get a network from a zoo, which a generator has to beat; selection reads validation metrics."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.data.alignment import align
from Gpt.data.zoo import Zoo
from Gpt.evaluation.prompting import tensor_stds, validation_metric
from Gpt.seeds import rng
from Gpt.structure import Structure
from Gpt.tasks import Task


@dataclass(frozen=True)
class Stored:
    """Places of networks in a zoo: row of the run, index of the snapshot."""

    runs: Int[Tensor, " n"]
    snapshots: Int[Tensor, " n"]

    def read(self, zoo: Zoo, device: torch.device | str) -> Float[Tensor, "n D"]:
        return zoo.read(self.runs, self.snapshots).float().to(device)


def retrieve(zoo: Zoo, task: Task, wanted: Float[Tensor, " B"]) -> Stored:
    """For every wish, the stored training snapshot whose validation metric is nearest."""
    runs = zoo.split("train").cpu()
    metric = validation_metric(zoo, task)[runs]
    snapshots = metric.shape[1]
    ordered, order = torch.where(metric.isfinite(), metric, torch.inf).flatten().sort()
    ordered = ordered[: int(metric.isfinite().sum())]
    wanted = wanted.cpu().to(ordered).contiguous()
    above = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
    below = (above - 1).clamp(min=0)
    nearest = torch.where((ordered[above] - wanted).abs() < (ordered[below] - wanted).abs(), above, below)
    flat = order[nearest]
    return Stored(runs[flat // snapshots], flat % snapshots)


def best_stored(zoo: Zoo, task: Task, count: int | None = None) -> Stored:
    """The best snapshot of every training run, the best runs first, at most `count` of them."""
    runs = zoo.split("train").cpu()
    metric = validation_metric(zoo, task)[runs]
    metric = torch.where(metric.isfinite(), metric if task.minimize else -metric, torch.inf)
    best, snapshot = metric.min(1)
    order = best.argsort()[:count]
    return Stored(runs[order], snapshot[order])


def final_stored(zoo: Zoo, task: Task, split: str, count: int | None = None) -> Stored:
    """The final snapshot of the runs of a split: of training runs the best ones first, else in their order."""
    runs = zoo.split(split).cpu()
    if split == "train":
        metric = validation_metric(zoo, task)[runs, -1]
        runs = runs[torch.where(metric.isfinite(), metric if task.minimize else -metric, torch.inf).argsort()]
    runs = runs[:count]
    return Stored(runs, torch.full_like(runs, zoo.snapshots - 1))


def noisy(weights: Float[Tensor, "n D"], structure: Structure, scale: float, seed: int) -> Float[Tensor, "n D"]:
    """Add Gaussian noise of `scale` times each tensor's own standard deviation; running statistics stay as they are."""
    return _jitter(weights, scale * tensor_stds(weights, structure), structure, seed)


def soups(aligned: Float[Tensor, "n D"], size: int) -> Float[Tensor, "soups D"]:
    """Averages of `size` consecutive networks each: of networks in order of merit, the first is the soup of the best.

    A last, incomplete group is left out, unless it is the only one.
    """
    size = min(size, len(aligned))
    return aligned[: len(aligned) // size * size].unflatten(0, (-1, size)).mean(1)


def per_weight_gaussian(
    aligned: Float[Tensor, "n D"], structure: Structure, count: int, seed: int
) -> Float[Tensor, "count D"]:
    """Every weight drawn by itself from the normal distribution that it has over the (aligned) networks."""
    mean, std = aligned.mean(0), aligned.std(0, correction=0)
    return _jitter(mean.expand(count, -1), std, structure, seed)


def midpoints(weights: Float[Tensor, "n D"], structure: Structure) -> Float[Tensor, "pairs D"]:
    """Halfway between networks 0 and 1, 2 and 3, ..., the second of each pair aligned to the first."""
    pairs = len(weights) // 2
    first, second = weights[: 2 * pairs : 2], weights[1 : 2 * pairs : 2]
    return (first + align(second, first, structure)[0]) / 2


def _jitter(
    weights: Float[Tensor, "n D"], std: Float[Tensor, "... D"], structure: Structure, seed: int
) -> Float[Tensor, "n D"]:
    still = torch.ones(structure.size)
    for spec in structure.statistics:  # a noisy variance could be negative
        still[spec.slice] = 0
    noise = torch.randn(weights.shape, generator=rng("cpu", seed, "jitter"))
    return weights + std * (noise * still).to(weights)
