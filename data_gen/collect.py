"""Collecting a zoo: populations are trained shard after shard, by one worker or by several that share a folder."""

import dataclasses
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from data_gen.adapters import train_adapter_population
from data_gen.background import Background, background
from data_gen.ppo import ACTOR_SIZE, train_ppo_population
from data_gen.progress import Progress
from data_gen.single import total_iterations_of, train_one_by_one
from data_gen.vision import iterations_of, train_supervised_population
from Gpt.data import shards, sources
from Gpt.data.shards import Manifest
from Gpt.errors import ConfigError, TaskError
from Gpt.masks import MaskSplit, label_map
from Gpt.recipes import AdapterRecipe, PpoRecipe, Recipe, SingleRecipe, SupervisedRecipe
from Gpt.seeds import rng
from Gpt.tasks import Task

WAIT_SECONDS = 1.0
WRITERS = 2  # shards that are written at once, while the next is trained
PINNED_BYTES = 2**28  # pinned memory is allotted in powers of two: pieces of that size waste little


def snapshot_schedule(iterations: int, snapshots: int, spacing: str = "log", seed: int = 0) -> list[int]:
    """Which training iterations to keep: increasing, without repeats, the first is 0 and the last is `iterations`.

    Args:
        spacing: "log" spaces evenly in log(iteration), so that the early, fast part of training is well covered (where
            integers are too sparse for that, the next free ones are taken); "uniform" draws the inner iterations
            uniformly without replacement (G.pt's rule); "tail" keeps the last ones in a row, without the
            initialisation (RPG's rule; a single one is the final network).

    Raises:
        ConfigError: there are not that many iterations, or the spacing is unknown.
    """
    if spacing == "tail":
        if not 1 <= snapshots <= iterations:
            raise ConfigError(f"zoo: {snapshots} snapshots do not fit, a run has a tail of 1 to {iterations} of them")
        return list(range(iterations - snapshots + 1, iterations + 1))
    if not 2 <= snapshots <= iterations + 1:
        raise ConfigError(f"zoo: {snapshots} snapshots do not fit, a run has 2 to {iterations + 1} of them")
    inner = snapshots - 2
    if spacing == "uniform":
        drawn = torch.randperm(iterations - 1, generator=rng("cpu", seed, "snapshots"))[:inner] + 1
        return [0, *sorted(drawn.tolist()), iterations]
    if spacing != "log":
        raise ConfigError(f"zoo: spacing {spacing!r} is not known, expected log, uniform or tail")
    schedule = [0]
    for i in range(inner):
        wanted = round(iterations ** (i / inner))
        last_free = iterations - inner + i  # leaves one iteration for each that is still to come
        schedule.append(min(max(wanted, schedule[-1] + 1), last_free))
    return [*schedule, iterations]


def total_iterations(task: Task) -> int:
    """Length of a complete run of the task's recipe.

    Raises:
        TaskError: the task has no recipe, or one for another architecture.
    """
    recipe = _recipe(task)
    if isinstance(recipe, PpoRecipe | AdapterRecipe):
        return recipe.iterations
    return total_iterations_of(task, recipe) if isinstance(recipe, SingleRecipe) else iterations_of(task, recipe)


def _recipe(task: Task) -> Recipe:
    if task.recipe is None:
        raise TaskError(
            f"task {task.name!r} has no recipe, so no zoo can be collected for it; add the key 'recipe' (and "
            "train_data_fn), or import checkpoints"
        )
    if isinstance(task.recipe, PpoRecipe) and task.structure.size != ACTOR_SIZE:
        raise TaskError(
            f"task {task.name!r}: key 'recipe' is a PpoRecipe, which trains Gpt.networks.CartPoleActor alone; "
            "make that the constructor, or import checkpoints"
        )
    return task.recipe


def _recipe_record(task: Task) -> dict[str, Any]:
    """What the networks of a zoo depend on: the recipe and, of a family, which run has which of its members."""
    recipe = _recipe(task)
    record = {"type": type(recipe).__name__, **dataclasses.asdict(recipe)}
    if sources.limit() is not None:
        record["examples"] = sources.limit()
    if task.family is not None:
        fields = [f.name for f in dataclasses.fields(task.family) if f.metadata.get("decides_zoo", True)]
        record["family"] = {name: getattr(task.family, name) for name in fields}
    return json.loads(json.dumps(record))  # in the types that a manifest gives back


def train_population(
    task: Task,
    run_ids: list[int],
    seed: int,
    snapshot_iterations: list[int],
    device: torch.device | str,
    *,
    progress: Progress | None = None,
) -> tuple[Float[Tensor, "R S D"], dict[str, Float[Tensor, "R S"]]]:
    """Train runs of the task's recipe, in memory and, if it allows, at once: what a zoo is made of, stored or streamed.

    Args:
        progress: told of new snapshots as training goes on, see `data_gen.progress`.

    Returns:
        float32 weights on `device` and the metric columns.
    """
    recipe = _recipe(task)
    if isinstance(recipe, SingleRecipe):
        return train_one_by_one(task, recipe, run_ids, seed, snapshot_iterations, device, progress=progress)
    if isinstance(recipe, SupervisedRecipe):
        masks = task.family.mask_of_runs(torch.tensor(run_ids)) if isinstance(task.family, MaskSplit) else None
        labels = None if masks is None else label_map(masks)
        return train_supervised_population(
            task, recipe, run_ids, seed, snapshot_iterations, device, label_map=labels, progress=progress
        )
    if isinstance(recipe, AdapterRecipe):
        return train_adapter_population(task, recipe, run_ids, seed, snapshot_iterations, device, progress=progress)
    return train_ppo_population(task, recipe, run_ids, seed, snapshot_iterations, device, progress=progress)


def check_positive(**sizes: int) -> None:
    """Raises:
    ConfigError: one of the sizes is 0 or less.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"zoo: {name} is {value}, expected at least 1")


def collect(
    task: Task,
    path: str | Path,
    *,
    runs: int,
    snapshots: int,
    spacing: str = "log",
    seed: int = 0,
    dtype: str = "float32",
    shard_runs: int = 256,
    device: torch.device | str = "cpu",
    population: int | None = None,
    max_weight: float = 10.0,
    progress: bool = True,
) -> None:
    """Train runs 0 … runs - 1 and store them; finished shards are kept, so an interrupted collection continues.

    Several workers may collect into one folder at once: each claims a shard before it trains it, and all return when
    the zoo is complete.

    Args:
        shard_runs: runs per shard, the unit that is kept or lost.
        population: how many runs are trained at once; all of a shard by default.
        max_weight: runs with a larger absolute weight in any snapshot are dropped.

    Raises:
        ZooError: the folder holds a zoo with other settings, or the disk is full.
        TaskError: the task has no recipe, or one for another architecture.
        ConfigError: the snapshots do not fit the recipe, or a setting is unknown.
    """
    check_positive(runs=runs, shard_runs=shard_runs, population=population or shard_runs)
    folder = Path(path)
    iterations = snapshot_schedule(total_iterations(task), snapshots, spacing, seed)
    manifest = Manifest.of(
        task.zoo_name,
        task.structure,
        _recipe_record(task),
        seed=seed,
        iterations=iterations,
        dtype=dtype,
        shard_runs=shard_runs,
        max_weight=max_weight,
    )
    shards.create_manifest(folder, manifest)
    pending = {i: list(range(i * shard_runs, min((i + 1) * shard_runs, runs))) for i in range(-(-runs // shard_runs))}
    with (
        tqdm(total=runs * snapshots, unit=" snapshots", unit_scale=True, disable=not progress) as bar,
        background(WRITERS) as writers,
    ):
        worker = _Worker(task, folder, manifest, torch.device(device), population or shard_runs, writers, bar)
        while pending:
            for index, run_ids in list(pending.items()):
                if worker.finish(index, run_ids):
                    del pending[index]
            if pending:
                lock = _lock_file(folder, min(pending))
                bar.set_postfix_str(f"waiting for the worker of {lock}; delete that file if the worker is gone")
                worker.count(0)
                time.sleep(WAIT_SECONDS)


@dataclass(frozen=True)
class _Networks:
    """The networks of a shard and their metrics, in main memory or, from a GPU, on their way there.

    Attributes:
        weights: of each run.
        metrics: of each population.
        arrived: when copying ends.
        seconds: what making them took.
    """

    weights: list[Float[Tensor, "S D"]]
    metrics: list[dict[str, Float[Tensor, "_ S"]]]
    arrived: torch.cuda.Event | None
    seconds: float


@dataclass(frozen=True)
class _Worker:
    """One process's part in a collection: it trains a shard while the ones before are written in the background."""

    task: Task
    folder: Path
    manifest: Manifest
    device: torch.device
    population: int
    writers: Background
    bar: tqdm

    def finish(self, index: int, run_ids: list[int]) -> bool:
        """Make one shard unless that is done; False when another worker is at it."""
        if not shards.covers(self.folder, index, run_ids[-1]):
            with ExitStack() as claimed:
                if not claimed.enter_context(claim(self.folder, index)):
                    return False
                if not shards.covers(self.folder, index, run_ids[-1]):
                    trained = self.train(run_ids)
                    self.writers.start(partial(self.store, claimed.pop_all(), index, run_ids, trained))
                    return True
        self.count(len(run_ids) * len(self.manifest.iterations))
        return True

    def train(self, run_ids: list[int]) -> _Networks:
        """The runs of a shard; a GPU copies each population into pinned memory and is not waited for.

        The seconds include waiting for the disk, where that is slower than training.
        """
        begun = time.perf_counter()
        rows: list[Tensor] = []
        metrics, arrived = [], None
        for first in range(0, len(run_ids), self.population):
            members = run_ids[first : first + self.population]
            weights, columns = train_population(
                self.task, members, self.manifest.seed, self.manifest.iterations, self.device, progress=self.count
            )
            for piece in weights.split(max(1, PINNED_BYTES // weights[0].nbytes)):
                rows.extend(piece.to("cpu", non_blocking=True))
            metrics.append({name: values.to("cpu", non_blocking=True) for name, values in columns.items()})
        if self.device.type == "cuda":
            arrived = torch.cuda.Event(blocking=True)
            arrived.record(torch.cuda.current_stream(self.device))
        self.writers.make_room()
        return _Networks(rows, metrics, arrived, time.perf_counter() - begun)

    def store(self, claimed: ExitStack, index: int, run_ids: list[int], trained: _Networks) -> None:
        """Write a shard when its networks are there, and give up its claim."""
        with claimed:
            if trained.arrived:
                trained.arrived.synchronize()
            metrics = {name: torch.cat([part[name] for part in trained.metrics]) for name in trained.metrics[0]}
            shards.write_shard(
                self.folder, self.manifest, index, run_ids, trained.weights, metrics, seconds=trained.seconds
            )

    def count(self, made: int) -> None:
        """Show new snapshots; a full disk is told now, not when the next shard is trained."""
        self.writers.check()
        self.bar.update(made)


# --- claims -----------------------------------------------------------------------------------------------------------


@contextmanager
def claim(folder: Path, index: int) -> Iterator[bool]:
    """Hold a shard's lock file; yields False when a living worker holds it.

    A lock whose process has ended on this host is stale and is taken over; locks of other hosts are believed.
    """
    lock = _lock_file(folder, index)
    if lock.exists() and _is_stale(lock):
        _remove_stale(lock)
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        yield False
        return
    try:
        with os.fdopen(descriptor, "w") as stream:
            json.dump({**_identity(os.getpid()), "time": time.time()}, stream)
        for leftover in folder.glob(f".shard-{index:05d}.*"):
            leftover.unlink()
        yield True
    finally:
        lock.unlink(missing_ok=True)


def _lock_file(folder: Path, index: int) -> Path:
    return shards.shard_files(folder, index)["index"].with_suffix(".lock")


def _identity(pid: int) -> dict[str, str | int | None]:
    """What tells a process from a later one with the same number: host, number and start time (where /proc has it)."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        started = None
    return {"host": socket.gethostname(), "pid": pid, "started": started}


def _is_stale(lock: Path) -> bool:
    try:
        holder = json.loads(lock.read_text())
        host, pid, started = holder["host"], int(holder["pid"]), holder["started"]
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError):
        # Its worker died, or is about to write it: only the first leaves it like that.
        return time.time() - lock.stat().st_mtime > 60
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _identity(pid)["started"] != started


def _remove_stale(lock: Path) -> None:
    """Remove a stale lock; of several workers that find it, one moves it away, and none a lock made since."""
    aside = lock.with_name(f"{lock.name}.{os.getpid()}")
    try:
        os.rename(lock, aside)
    except FileNotFoundError:
        return
    if not _is_stale(aside):  # another worker had already replaced it with its own
        try:
            os.link(aside, lock)
        except FileExistsError:
            pass
    aside.unlink()
