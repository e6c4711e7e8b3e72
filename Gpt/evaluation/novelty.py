"""Are generated networks copies? Distances to the training networks, shared mistakes, and the data-copying score."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.data.alignment import permutation_distance
from Gpt.data.zoo import Zoo
from Gpt.evaluation.baselines import best_stored, final_stored
from Gpt.evaluation.population import correct_population, test_population
from Gpt.evaluation.results import Novelty
from Gpt.evaluation.statistics import bootstrap_interval, data_copying_z, overlap
from Gpt.tasks import Task


@dataclass(frozen=True)
class Bank:
    """The training networks that others are compared with, and what they score.

    Attributes:
        weights: the final and the best snapshot of training runs, the best runs first; then the final networks of all
            runs that gave way to others while the generator was trained.
        runs: the run of each, so that a training network is not compared with its own run.
        wrong: which test examples the best of these runs get wrong, by both snapshots; None without a `correct_fn`.
    """

    weights: Float[Tensor, "m D"]
    runs: Int[Tensor, " m"]
    wrong: Bool[Tensor, "k N"] | None

    @classmethod
    def of(cls, zoo: Zoo, task: Task, max_runs: int, max_behaviours: int, device: torch.device | str) -> "Bank":
        """The best `max_runs` training runs; mistakes are compared with the best `max_behaviours` of them."""
        final, best = final_stored(zoo, task, "train", max_runs), best_stored(zoo, task, max_runs)
        snapshots = [final.read(zoo, device), best.read(zoo, device)]
        wrong = None
        if task.correct_fn is not None:
            behaving = torch.cat([weights[: max_behaviours // 2] for weights in snapshots])
            wrong = ~correct_population(task, behaving, "test")
        former = torch.arange(zoo.runs, zoo.runs + len(zoo.former))
        weights = torch.cat([*snapshots, zoo.former.to(snapshots[0])])
        return cls(weights, torch.cat([final.runs, best.runs, former]), wrong)


def novelty(
    task: Task,
    sets: dict[str, Float[Tensor, "n D"]],
    kinds: dict[str, str],
    held_out: str,
    bank: Bank,
    *,
    candidates: int,
    seed: int,
) -> tuple[list[Novelty], float]:
    """Compare sets of networks with the training networks.

    A network is good when its test metric is no more than one standard deviation worse than the mean of the held-out
    trained networks, and novel when it is at least as far from every training network as training networks are from
    those of other runs, on average.

    Args:
        sets, kinds: networks by name, and what kind each set is, see `Row`.
        held_out: the name of the trained networks that no training run holds, which Z_U compares with.
        candidates: see `permutation_distance`.

    Returns:
        A line for each set, and the bar that a good network reaches.
    """
    count = min(max(len(weights) for weights in sets.values()), len(bank.weights))
    everything = torch.cat([bank.weights[:count], *sets.values()])
    distances = permutation_distance(everything, bank.weights, task.structure, candidates)
    own_run = bank.runs[:count, None] == bank.runs
    nearest = distances[count:].min(1).values.cpu()
    between = distances[:count].cpu().masked_fill(own_run, torch.inf).min(1).values
    unit = float(between.mean())

    by_set = dict(zip(sets, nearest.split([len(weights) for weights in sets.values()]), strict=True))
    metrics = {name: test_population(task, weights, "test")[f"test_{task.metric}"] for name, weights in sets.items()}
    bar = _bar(metrics[held_out], task.minimize)
    rows = []
    for name, weights in sets.items():
        distance, metric = by_set[name], metrics[name]
        good = metric <= bar if task.minimize else metric >= bar
        rows.append(
            Novelty(
                name=name,
                kind=kinds[name],
                metric=bootstrap_interval(metric, seed),
                distance=float(distance.mean()),
                distance_ratio=float(distance.mean()) / unit,
                error_overlap=_error_overlap(task, weights, bank),
                copying_z=data_copying_z(distance, by_set[held_out]),
                novel_and_good=float((good & (distance >= unit)).float().mean()),
            )
        )
    return rows, bar


def former_runs_note(zoo: Zoo) -> list[str]:
    """What to say of a zoo whose runs changed while the generator learnt from it; nothing of any other."""
    if not len(zoo.former):
        return []
    return [
        f"the zoo changed during training: novelty counts also the {len(zoo.former):,} runs that gave way to others, "
        "by their final networks; all other rows and curves know the runs that the zoo held at the end"
    ]


def _bar(metric: Float[Tensor, " n"], minimize: bool) -> float:
    tolerance = float(metric.std(correction=0))
    return float(metric.mean()) + (tolerance if minimize else -tolerance)


def _error_overlap(task: Task, weights: Float[Tensor, "n D"], bank: Bank) -> float | None:
    """Mean over networks of the largest IoU of wrong test examples with a training network (Zeng et al. 2025)."""
    if bank.wrong is None:
        return None
    wrong = ~correct_population(task, weights, "test")
    return float(overlap(wrong, bank.wrong).max(1).values.mean())
