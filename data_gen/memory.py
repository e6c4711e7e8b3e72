"""Zoos that are never stored: trained into memory, and kept fresh while a generator learns from them.

A population trains in seconds on a GPU, writing it to a disk takes longer. Such a zoo is trained anew in every session,
to the same numbers, because a run is a function of (seed, run id). A `Stream` replaces the oldest training runs by new
ones as training goes on: a generator then never sees a network often enough to memorise it.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from data_gen.collect import check_positive, snapshot_schedule, total_iterations, train_population
from Gpt.data.shards import DTYPES, bad_runs
from Gpt.data.zoo import Zoo
from Gpt.distributed import Rows, from_all, in_parts, primary, share, total, world
from Gpt.errors import ConfigError
from Gpt.files import save_tensors
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

    Several processes share the populations out, and all keep the whole zoo.

    Raises:
        TaskError: the task has no recipe.
        ConfigError: the snapshots do not fit the recipe, or a setting is unknown.
    """
    check_positive(runs=runs, population=population)
    if dtype not in DTYPES:
        raise ConfigError(f"zoo: dtype {dtype!r} is not known, expected one of {', '.join(DTYPES)}")
    iterations = snapshot_schedule(total_iterations(task), snapshots, spacing, seed)
    weights = torch.empty(runs, len(iterations), task.structure.size, dtype=DTYPES[dtype], device=device)
    metrics: dict[str, Tensor] = {}
    run_ids: list[int] = []
    dropped: dict[int, str] = {}  # by this process, as are the seconds
    seconds = 0.0

    def sound(chunk: slice) -> Rows:
        nonlocal seconds
        begun = time.perf_counter()
        members = list(range(chunk.start, chunk.stop))
        trained, columns = train_population(task, members, seed, iterations, device, progress=bar.update)
        dropped.update(bad := bad_runs(members, trained, max_weight))
        kept = [i for i, run in enumerate(members) if run not in bad]
        numbers = torch.tensor([members[i] for i in kept], dtype=torch.long)
        found = {"weights": trained[kept].to(weights.dtype), "run": numbers}
        seconds += time.perf_counter() - begun
        return found | {name: values[kept] for name, values in columns.items()}

    own = sum(min(population, runs - first) for first in share(range(0, runs, population)))
    with tqdm(total=own * len(iterations), unit=" snapshots", unit_scale=True, disable=not progress) as bar:
        for part in in_parts(sound, runs, population):
            numbers = part.pop("run").tolist()
            rows = slice(len(run_ids), len(run_ids) + len(numbers))
            weights[rows] = part.pop("weights")
            for name, values in part.items():
                metrics.setdefault(name, torch.empty(runs, len(iterations), device=device))[rows] = values
            run_ids += numbers
    count = len(run_ids)
    return Zoo.from_tensors(
        weights[:count],
        {name: values[:count] for name, values in metrics.items()},
        run_ids,
        iterations,
        task.structure,
        test_runs=test_runs,
        validation_runs=validation_runs,
        dropped=dict(sorted(entry for found in from_all(dropped) for entry in found.items())),
        seconds=total(torch.tensor(seconds, dtype=torch.float64)).item(),
    )


class Stream:
    """Every `every` training steps, the oldest `population` training runs of a zoo give way to new ones.

    What the zoo holds at a step is a function of the step: a resumed training trains again the populations that the
    zoo held when it was interrupted. Final networks of all populations are kept on disk, 4 D bytes a run, so that an
    evaluation can tell copies of any run that training drew from.

    Of several processes each trains one of the next populations, and all keep these in memory until their turn.

    Args:
        zoo: kept in memory; its test and validation runs stay.
        train: `run ids -> (weights, metrics)` of these runs.
        folder: for the final networks, which are a function of what `train` is.

    Raises:
        ConfigError: the training split holds fewer runs than a population.
    """

    def __init__(
        self,
        zoo: Zoo,
        train: Callable[[list[int]], Trained],
        every: int,
        population: int,
        folder: Path,
        max_weight: float = 10.0,
    ):
        self.zoo, self.train, self.every, self.population, self.max_weight = zoo, train, every, population, max_weight
        self.folder = folder
        self.rows = zoo.split("train")
        self.slots = len(self.rows) // population
        self.first_run = int(zoo.run_ids.max()) + 1
        self.generation = 0
        self._ahead: dict[int, Rows] = {}
        if self.slots < 1:
            raise ConfigError(
                f"zoo.refresh_every: the training split has {len(self.rows)} runs, fewer than "
                f"zoo.population={population}; lower zoo.population"
            )
        first = self.rows[: self.slots * population]  # in the order in which they give way
        self._first_networks = zoo.read(first, torch.full_like(first, zoo.snapshots - 1)).cpu()

    def __call__(self, step: int) -> None:
        """Bring the zoo to the state that belongs to a training step; steps must not decrease."""
        wanted = step // self.every
        for generation in range(max(self.generation, wanted - self.slots) + 1, wanted + 1):
            self._replace(generation)
        self.generation = wanted

    def finish(self, steps: int) -> None:
        """Bring the zoo to the state of the last of so many steps, and give it the networks that it held before."""
        self(steps - 1)
        left = range(1, self.generation - self.slots + 1)
        replaced = self._first_networks[: min(self.generation, self.slots) * self.population]
        self.zoo.former = torch.cat([replaced, *(self._final_networks(generation) for generation in left)])

    def _replace(self, generation: int) -> None:
        if generation not in self._ahead:
            parts = in_parts(lambda turn: self._sound(generation + turn.start), world(), 1)
            self._ahead = dict(enumerate(parts, generation))
        metrics = self._ahead.pop(generation)
        run_ids, weights = metrics.pop("run"), metrics.pop("weights")
        self._keep(generation, weights)
        if not len(run_ids):
            return
        # A run that had to be dropped is replaced by a sound one of its population.
        source = torch.arange(self.population) % len(run_ids)
        slot = (generation - 1) % self.slots
        rows = self.rows[slot * self.population : (slot + 1) * self.population]
        names = run_ids[source]
        source = source.to(weights.device)
        self.zoo.replace(rows, names, weights[source], {name: values[source] for name, values in metrics.items()})

    def _sound(self, generation: int) -> Rows:
        """The runs of a population that need not be dropped: their numbers, weights and metrics."""
        first = self.first_run + (generation - 1) * self.population
        run_ids = list(range(first, first + self.population))
        weights, metrics = self.train(run_ids)
        bad = bad_runs(run_ids, weights, self.max_weight)
        good = [i for i, run in enumerate(run_ids) if run not in bad]
        numbers = torch.tensor([run_ids[i] for i in good], dtype=torch.long)
        return {"run": numbers, "weights": weights[good]} | {name: values[good] for name, values in metrics.items()}

    def _keep(self, generation: int, weights: Float[Tensor, "n S D"]) -> Float[Tensor, "n D"]:
        """The final networks of a population, which the first process stores."""
        final, file = weights[:, -1].cpu().contiguous(), self._file(generation)
        if primary():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors({"weights": final}, file)
        return final

    def _final_networks(self, generation: int) -> Float[Tensor, "n D"]:
        file = self._file(generation)
        if file.is_file():
            return load_file(file)["weights"]
        return self._keep(generation, self._sound(generation)["weights"])

    def _file(self, generation: int) -> Path:
        return self.folder / f"{generation:06d}.safetensors"
