"""Are generated networks copies? Distances to the training networks, shared mistakes, and the data-copying score."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.data.alignment import mutual_distance, permutation_distance
from Gpt.data.zoo import Zoo
from Gpt.evaluation.baselines import best_stored, final_stored
from Gpt.evaluation.population import correct_population
from Gpt.evaluation.results import Novelty
from Gpt.evaluation.statistics import bootstrap_interval, data_copying_z, overlap
from Gpt.tasks import Task

SPREAD_NETWORKS = 16  # 120 pairs to match


@dataclass(frozen=True)
class Bank:
    """The training networks that others are compared with.

    Attributes:
        weights: final snapshots of training runs, the best runs first; their best snapshots, where asked for; then the
            final networks of all runs that gave way to others while the generator was trained.
        runs: the run of each.
        wrong: which test examples the best of these runs get wrong; None without a `correct_fn`.
        wrong_runs: the run of each of these.
        candidates: see `permutation_distance`.
    """

    task: Task
    weights: Float[Tensor, "m D"]
    runs: Int[Tensor, " m"]
    wrong: Bool[Tensor, "k N"] | None
    wrong_runs: Int[Tensor, " k"]
    candidates: int

    @classmethod
    def of(
        cls,
        zoo: Zoo,
        task: Task,
        device: torch.device | str,
        *,
        max_runs: int,
        max_behaviours: int,
        candidates: int,
        with_best: bool = True,
    ) -> "Bank":
        """The best `max_runs` training runs; mistakes are compared with the best `max_behaviours` networks of them."""
        kept = [final_stored(zoo, task, "train", max_runs)]
        if with_best:
            kept.append(best_stored(zoo, task, max_runs))
        weights = [snapshots.read(zoo, device) for snapshots in kept]
        share, wrong = max_behaviours // len(kept), None
        if task.correct_fn is not None:
            wrong = ~correct_population(task, torch.cat([part[:share] for part in weights]), "test")
        former = torch.arange(zoo.runs, zoo.runs + len(zoo.former))
        return cls(
            task,
            torch.cat([*weights, zoo.former.to(weights[0])]),
            torch.cat([*(snapshots.runs for snapshots in kept), former]),
            wrong,
            torch.cat([snapshots.runs[:share] for snapshots in kept]),
            candidates,
        )

    def nearest(
        self, weights: Float[Tensor, "n D"], own: Int[Tensor, " n"] | None = None
    ) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
        """L2 distance to the nearest of these networks, and which one it is; minimum over permutations of hidden units
        where the task names them.

        Args:
            own: the run of each network, whose snapshots do not count; -1 for none.
        """
        distances = permutation_distance(weights, self.weights, self.task.structure, self.candidates)
        if own is not None:
            distances = distances.masked_fill((own[:, None] == self.runs).to(distances.device), torch.inf)
        return distances.min(1)

    def spread(self, weights: Float[Tensor, "n D"]) -> float | None:
        """Mean L2 distance of two of the networks, the first `SPREAD_NETWORKS` of them, minimum over permutations of
        hidden units; None of a single one."""
        some = weights[:SPREAD_NETWORKS]
        if len(some) < 2:
            return None
        return float(mutual_distance(some, self.task.structure).mean())

    def overlap(
        self, weights: Float[Tensor, "n D"], own: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n"] | None:
        """Largest intersection over union of wrongly classified test examples with one of these networks (Zeng et al.
        2025); None for a task without `correct_fn`."""
        if self.wrong is None:
            return None
        shared = overlap(~correct_population(self.task, weights, "test"), self.wrong)
        if own is not None:
            shared = shared.masked_fill(own[:, None] == self.wrong_runs, 0)
        return shared.max(1).values


@dataclass(frozen=True)
class Measured:
    """What is kept of a set of networks.

    Attributes:
        kind: see `Row`.
        metric: on the test split.
        distance: to the nearest training network.
        overlap: largest one of wrong test examples with a training network's.
        spread: of the networks among themselves, see `Bank.spread`; None where that is not measured.
    """

    kind: str
    metric: Float[Tensor, " n"]
    distance: Float[Tensor, " n"]
    overlap: Float[Tensor, " n"] | None = None
    spread: float | None = None


def novelty(
    sets: Mapping[str, Measured], reference: Measured, unit: float, minimize: bool, seed: int
) -> tuple[list[Novelty], float]:
    """A line for each set, and the bar that a good network reaches.

    A network is good when its test metric is no more than one standard deviation worse than the mean of the reference,
    and novel when it is at least `unit` away from every training network.

    Args:
        reference: trained networks that the generator has not seen, which Z_U compares with.
        unit: mean distance of a training network to the nearest other one.
    """
    spread = float(reference.metric.std(correction=0))
    bar = float(reference.metric.mean()) + (spread if minimize else -spread)
    rows = []
    for name, found in sets.items():
        good = found.metric <= bar if minimize else found.metric >= bar
        distance = found.distance.mean()
        rows.append(
            Novelty(
                name=name,
                kind=found.kind,
                metric=bootstrap_interval(found.metric, seed),
                distance=float(distance),
                distance_ratio=float(distance / unit),
                error_overlap=None if found.overlap is None else float(found.overlap.mean()),
                copying_z=data_copying_z(found.distance, reference.distance),
                novel_and_good=float((good & (found.distance >= unit)).float().mean()),
                diversity=found.spread / reference.spread if found.spread is not None and reference.spread else None,
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
