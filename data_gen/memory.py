"""Zoos that are never stored: trained into memory, and kept fresh while a generator learns from them.

A population trains in seconds on a GPU, writing it to a disk takes longer. Such a zoo is trained anew in every session,
to the same numbers, because a run is a function of (seed, run id). A `Stream` replaces the oldest training runs by new
ones as training goes on: a generator then never sees a network often enough to memorise it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data_gen.collect import snapshot_schedule, total_iterations, train_population
from Gpt.data.shards import DTYPES, bad_runs
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError
from Gpt.tasks import Task

Trained = tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]


def collect_in_memory(
    task: Task,
    *,
    runs: int,
    snapshots: int,
    spacing: str = "log",
    seed: int = 0,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    population: int = 256,
    max_weight: float = 10.0,
    test_runs: int = 0,
    validation_runs: int = 0,
    progress: bool = True,
) -> Zoo:
    """Train runs 0 … runs - 1, `population` at a time, and keep them on `device`; arguments as of `collect`.

    Raises:
        TaskError: the task has no recipe.
        ConfigError: the snapshots do not fit the recipe, or a setting is unknown.
    """
    for name, value in {"runs": runs, "population": population}.items():
        if value < 1:
            raise ConfigError(f"zoo: {name} is {value}, expected at least 1")
    if dtype not in DTYPES:
        raise ConfigError(f"zoo: dtype {dtype!r} is not known, expected one of {', '.join(DTYPES)}")
    iterations = snapshot_schedule(total_iterations(task), snapshots, spacing, seed)
    weights = torch.empty(runs, len(iterations), task.structure.size, dtype=DTYPES[dtype], device=device)
    metrics: dict[str, Tensor] = {}
    run_ids: list[int] = []
    dropped: dict[int, str] = {}
    with tqdm(total=runs * len(iterations), unit=" snapshots", unit_scale=True, disable=not progress) as bar:
        for first in range(0, runs, population):
            members = list(range(first, min(first + population, runs)))
            trained, columns = train_population(task, members, seed, iterations, device, progress=bar.update)
            dropped |= (bad := bad_runs(members, trained, max_weight))
            kept = [i for i, run in enumerate(members) if run not in bad]
            rows = slice(len(run_ids), len(run_ids) + len(kept))
            weights[rows] = trained[kept].to(weights.dtype)
            for name, values in columns.items():
                metrics.setdefault(name, torch.empty(runs, len(iterations), device=device))[rows] = values[kept]
            run_ids += [members[i] for i in kept]
            del trained
    count = len(run_ids)
    return Zoo.from_tensors(
        weights[:count],
        {name: values[:count] for name, values in metrics.items()},
        run_ids,
        iterations,
        task.structure,
        test_runs=test_runs,
        validation_runs=validation_runs,
        dropped=dropped,
    )


class Stream:
    """Every `every` training steps, the oldest `population` training runs of a zoo give way to new ones.

    What the zoo holds at a step is a function of the step: a resumed training trains again the populations that the
    zoo held when it was interrupted.

    Args:
        zoo: kept in memory; its test and validation runs stay.
        train: `run ids -> (weights, metrics)` of these runs.

    Raises:
        ConfigError: the training split holds fewer runs than a population.
    """

    def __init__(
        self, zoo: Zoo, train: Callable[[list[int]], Trained], every: int, population: int, max_weight: float = 10.0
    ):
        self.zoo, self.train, self.every, self.population, self.max_weight = zoo, train, every, population, max_weight
        self.rows = zoo.split("train")
        self.slots = len(self.rows) // population
        self.first_run = int(zoo.run_ids.max()) + 1
        self.generation = 0
        if self.slots < 1:
            raise ConfigError(
                f"zoo.refresh_every: the training split has {len(self.rows)} runs, fewer than "
                f"zoo.population={population}; lower zoo.population"
            )

    def __call__(self, step: int) -> None:
        """Bring the zoo to the state that belongs to a training step; steps must not decrease."""
        wanted = step // self.every
        for generation in range(max(self.generation, wanted - self.slots) + 1, wanted + 1):
            self._replace(generation)
        self.generation = wanted

    def _replace(self, generation: int) -> None:
        first = self.first_run + (generation - 1) * self.population
        run_ids = list(range(first, first + self.population))
        weights, metrics = self.train(run_ids)
        bad = bad_runs(run_ids, weights, self.max_weight)
        good = [i for i, run in enumerate(run_ids) if run not in bad]
        if not good:
            return
        # A run that had to be dropped is replaced by a sound one of its population.
        source = torch.tensor([i if run not in bad else good[i % len(good)] for i, run in enumerate(run_ids)])
        slot = (generation - 1) % self.slots
        rows = self.rows[slot * self.population : (slot + 1) * self.population]
        names = torch.tensor(run_ids)[source]
        source = source.to(weights.device)
        self.zoo.replace(rows, names, weights[source], {name: values[source] for name, values in metrics.items()})
