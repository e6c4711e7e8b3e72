"""The evaluation of a generator that writes whole networks and is asked for nothing in particular.

Published comparisons give the best, mean and worst of ten generated networks beside the checkpoints that the generator
was trained on. Here they stand beside everything that is made of these checkpoints without a generator, with the
distance to the nearest of them and the overlap of wrong predictions: a generator that returns its training set, or the
mean of it, shows.

Networks are measured set by set and dropped; what is kept of a set is a few numbers for each network.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.data.alignment import align, permutation_distance
from Gpt.data.zoo import Zoo
from Gpt.distributed import Rows, busy, from_first, in_chunks
from Gpt.errors import ZooError
from Gpt.evaluation import baselines, costs
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.evaluate import EvaluationConfig, Progress
from Gpt.evaluation.novelty import former_runs_note
from Gpt.evaluation.population import correct_population, test_population
from Gpt.evaluation.prompting import evaluating, tensor_stds
from Gpt.evaluation.recalibration import EXAMPLES, recalibrated
from Gpt.evaluation.results import Novelty, Results, Row
from Gpt.evaluation.statistics import bootstrap_interval, data_copying_z, overlap
from Gpt.generator import Generator
from Gpt.seeds import derive_seed, rng
from Gpt.structure import Structure
from Gpt.tasks import Task

POOL = 1024  # training networks that averages and Gaussians are made of, the best ones

ORIGINALS, HELD_OUT = "originals, trained on", "originals, held out"


def evaluate_whole(
    generator: Generator,
    task: Task,
    zoo: Zoo,
    config: EvaluationConfig,
    device: torch.device | str,
    spent: Spent = Spent(),
    *,
    recalibrate: bool = False,
    progress: Progress | None = None,
) -> Results:
    """Judge unconditionally written networks, beside their training set and everything that is made of it.

    Args:
        zoo: the final snapshot of each run counts; `Gpt.data.views.split_by_snapshot` makes runs of snapshots.
            Networks of the test split, where there is one, are what "held out" means.
        config: `networks` are written; `noise_scales`, `soup`, `label`, `steps`, `guidance`, `max_batch`, `seed` and
            the `novelty_…` settings mean what they always do.
        recalibrate: also measure the written networks with re-estimated batch-norm statistics, as a row of its own.
        spent: on the generator and on its zoo.

    Raises:
        ConfigError: there is nothing to recalibrate.
        ZooError: the zoo has fewer than two training networks.
    """
    say = progress or (lambda phrase: None)
    bench = WholeBench(generator, task, zoo, config, device)
    with evaluating(generator):
        say("writing networks")
        written = bench.written(recalibrate)
        found = []
        for networks in bench.sets(written):
            say(networks.name)
            found.append(bench.measure(networks))
    row = found[0].row
    passes = (config.steps or generator.default_steps) * (1 if config.guidance == 1 else 2)
    assert row.seconds is not None and row.flops is not None
    paid = costs.costs(
        task,
        runs=bench.trainings,
        zoo_seconds=spent.zoo_seconds,
        generator_seconds=spent.training_seconds,
        sample_seconds=row.seconds,
        train_seconds=spent.zoo_seconds / bench.trainings,
        generator_flops=spent.training_examples * costs.TRAINING_FACTOR * row.flops / passes,
        flops_of_a_sample=row.flops,
    )
    novelty, bar = bench.novelty(found)
    return Results(
        task=task.name,
        metric=f"test_{task.metric}",
        minimize=task.minimize,
        table=[measured.row for measured in found],
        novelty=novelty,
        costs=paid,
        notes=[*bench.notes(recalibrate), f"novelty: a network is good at {bar:.4g} or better in test {task.metric}"],
    )


def whole_score(
    generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """What training watches: mean and worst validation metric of a few written networks.

    Returns:
        `validation_<metric>` and `validation_worst_<metric>`.
    """
    bench = WholeBench(generator, task, zoo, config, device)
    with evaluating(generator):
        weights = bench.write(min(config.networks, config.quick_networks), "validation score")
    metric = test_population(task, weights, "validation", device=device)[f"validation_{task.metric}"]
    worst = metric.max() if task.minimize else metric.min()
    return {f"validation_{task.metric}": float(metric.mean()), f"validation_worst_{task.metric}": float(worst)}


@dataclass(frozen=True)
class Networks:
    """A set of networks under one name. `details` are further fields of its row; `own` are their places among the
    originals, for networks that are originals themselves."""

    name: str
    kind: str
    weights: Float[Tensor, "n D"]
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    own: Int[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Measured:
    """What is kept of a set: its row and, of each network, metric, distance to the nearest original (other than itself)
    and largest overlap of wrong test examples with one."""

    row: Row
    metric: Float[Tensor, " n"]
    distance: Float[Tensor, " n"]
    overlap: Float[Tensor, " n"] | None


class WholeBench:
    """One evaluation's parts, each a method; what they share is made once."""

    def __init__(
        self, generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
    ):
        self.generator, self.task, self.zoo, self.config, self.device = generator, task, zoo, config, device

    def write(self, count: int, name: str) -> Float[Tensor, "count D"]:
        """`count` networks, `max_batch` at once, shared by the processes; `name` names the noise."""

        def write(chunk: slice) -> Rows:
            written = self.generator.sample(
                {},
                count=chunk.stop - chunk.start,
                steps=self.config.steps,
                guidance=self.config.guidance,
                seed=derive_seed(self.config.seed, name, chunk.start // self.config.max_batch),
            )
            return {"weights": written.float()}

        return in_chunks(write, count, self.config.max_batch)["weights"]

    @cached_property
    def originals(self) -> Float[Tensor, "m D"]:
        """The training networks, the best on validation data first.

        Raises:
            ZooError: there is only one, so that nothing can be said about distances.
        """
        stored = baselines.final_stored(self.zoo, self.task, "train", self.config.novelty_runs)
        if len(stored.runs) < 2:
            raise ZooError("the zoo has one training network, but novelty is measured against the distance between two")
        return stored.read(self.zoo, self.device)

    @cached_property
    def wrong(self) -> Bool[Tensor, "k N"] | None:
        """Which test examples the best originals get wrong; None for a task without `correct_fn`."""
        if self.task.correct_fn is None:
            return None
        return ~correct_population(self.task, self.originals[: self.config.novelty_behaviours], "test")

    @cached_property
    def pool(self) -> Float[Tensor, "k D"]:
        """The best originals, with their hidden units in one order."""
        best = self.originals[:POOL]
        return align(best, best[0], self.task.structure)[0] if self.task.structure.groups else best

    @cached_property
    def held_out(self) -> Float[Tensor, "n D"] | None:
        """Networks of the test split; None where the zoo has no such split."""
        try:
            stored = baselines.final_stored(self.zoo, self.task, "test", self.config.novelty_networks)
        except ZooError:
            return None
        return stored.read(self.zoo, self.device)

    @property
    def trainings(self) -> int:
        """How many networks were trained for the zoo: fewer than its runs where these are snapshots."""
        stored = len(self.zoo.manifest.iterations) if self.zoo.manifest else self.zoo.snapshots
        return self.zoo.runs * self.zoo.snapshots // stored

    # --- sets ---------------------------------------------------------------------------------------------------------

    def written(self, recalibrate: bool) -> list[Networks]:
        """The generator's networks, and the same with re-estimated statistics."""
        config = self.config
        self.write(config.networks, "warm-up")  # compiles what is timed next
        began = time.perf_counter()
        weights = self.write(config.networks, "written")
        weights.sum().item()  # waits for the device
        seconds = from_first(time.perf_counter() - began) * busy(config.networks, config.max_batch) / config.networks
        details = {"seconds": seconds, "flops": from_first(costs.count_flops(lambda: self.write(1, "FLOPs")))}
        sets = [Networks(f"{config.label}, written from noise", "generator", weights, details=details)]
        if recalibrate:
            name, note = f"{config.label}, statistics re-estimated", f"batch norm saw {EXAMPLES:,} training images"
            sets.append(Networks(name, "generator", recalibrated(self.task, weights, self.device), note))
        return sets

    def sets(self, written: list[Networks]) -> Iterator[Networks]:
        """Every set of networks, the generator's first, each made when it is asked for."""
        config, weights = self.config, written[0].weights
        yield from written
        count = min(config.novelty_networks, len(self.originals))
        training = {"updates": costs.training_steps(self.task)}
        own = torch.arange(count, device=self.originals.device)
        yield Networks(ORIGINALS, "reference", self.originals[:count], "the training set", training, own)
        if self.held_out is not None:
            note = "trained alike, never seen by the generator"
            yield Networks(HELD_OUT, "reference", self.held_out, note, training)
        for name, make, note in self._baselines(weights):
            yield Networks(name, "baseline", make(), note)

    def _baselines(self, written: Float[Tensor, "n D"]) -> Iterator[tuple[str, Callable[[], Tensor], str]]:
        """Name, maker and note of every set that is made of the originals."""
        config, structure, count = self.config, self.task.structure, self.config.networks
        to_nearest, nearest = self.distances(written).min(1)
        noised = self.originals[torch.arange(count, device=self.originals.device) % len(self.originals)]

        def noisy(scale: float) -> Callable[[], Tensor]:
            return lambda: baselines.noisy(noised, structure, scale, derive_seed(config.seed, "noise", str(scale)))

        yield "retrieval", lambda: self.originals[:1], "the stored network best on validation data"
        yield "nearest original", lambda: self.originals[nearest], "to each generated network"
        yield "mean network", lambda: self.pool.mean(0, keepdim=True), f"average of {len(self.pool)} originals"
        size = min(config.soup, len(self.pool))
        yield "soup", lambda: baselines.soups(self.pool, size), f"averages of {size} originals, the best first"
        yield (
            "interpolation",
            lambda: baselines.midpoints(self.originals[: 2 * count], structure),
            "halfway between two originals",
        )
        for scale in config.noise_scales:
            yield f"noise {scale:g}", noisy(scale), "originals; in units of each tensor's deviation"
        matched = self.noise_scale(float(to_nearest.mean()))
        yield "noise, matched", noisy(matched), f"scale {matched:.3g}: as far from the originals as what was generated"
        seed = derive_seed(config.seed, "per-weight Gaussian")
        yield (
            "per-weight Gaussian",
            lambda: baselines.per_weight_gaussian(self.pool, structure, count, seed),
            f"fitted to {len(self.pool)} originals",
        )
        seed = derive_seed(config.seed, "PCA Gaussian")
        yield (
            "PCA Gaussian",
            lambda: pca_gaussian(self.pool, structure, count, seed),
            f"with the mean and covariance of {len(self.pool)} originals",
        )

    def noise_scale(self, distance: float) -> float:
        """The scale of `Gpt.evaluation.baselines.noisy` that takes an original this far away, on average."""
        tensors = self.task.structure.tensors
        still = torch.cat([torch.full((t.numel,), t.kind.startswith("running_")) for t in tensors])
        stds = tensor_stds(self.originals[:1], self.task.structure)
        return distance / float(stds.masked_fill(still.to(stds.device), 0).norm())

    # --- measures -----------------------------------------------------------------------------------------------------

    def measure(self, networks: Networks) -> Measured:
        """Test metrics, distances and overlaps of one set."""
        task, seed, main = self.task, self.config.seed, f"test_{self.task.metric}"
        columns = test_population(task, networks.weights, "test", device=self.device)
        intervals = {name: bootstrap_interval(values, seed) for name, values in columns.items()}
        if len(networks.weights) > 1:
            ends = {"best": columns[main].min(), "worst": columns[main].max()}
            if not task.minimize:
                ends = {"best": ends["worst"], "worst": ends["best"]}
            intervals |= {f"{end}_{task.metric}": bootstrap_interval(value[None]) for end, value in ends.items()}
        distances, alike = self.distances(networks.weights), self.overlaps(networks.weights)
        if networks.own is not None:
            rows = torch.arange(len(networks.weights), device=networks.own.device)
            distances[rows, networks.own] = torch.inf
            if alike is not None:
                rows = rows.cpu()[: alike.shape[1]]
                alike[rows, networks.own.cpu()[: alike.shape[1]]] = 0.0
        return Measured(
            Row(networks.name, networks.kind, intervals, note=networks.note, **networks.details),
            columns[main],
            distances.min(1).values.cpu(),
            None if alike is None else alike.max(1).values,
        )

    def distances(self, weights: Float[Tensor, "n D"]) -> Float[Tensor, "n m"]:
        """L2 distance to each original, and to each run that gave way to others while the generator was trained;
        minimum over permutations of hidden units where the task names them."""
        known = torch.cat([self.originals, self.zoo.former.to(self.originals)])
        return permutation_distance(weights, known, self.task.structure, self.config.novelty_candidates)

    def overlaps(self, weights: Float[Tensor, "n D"]) -> Float[Tensor, "n k"] | None:
        """Intersection over union of the wrongly classified test examples, with each original's."""
        if self.wrong is None:
            return None
        return overlap(~correct_population(self.task, weights, "test", device=self.device), self.wrong)

    def novelty(self, found: list[Measured]) -> tuple[list[Novelty], float]:
        """A line for every set, see `Novelty`, and the bar that a good network reaches.

        The unit is the mean distance of an original to the nearest other one. Good is at most one standard deviation
        worse than the held-out networks' mean, which Z_U compares with as well; originals stand in where none is held
        out.
        """
        by_name = {measured.row.name: measured for measured in found}
        reference = by_name.get(HELD_OUT, by_name[ORIGINALS])
        unit, minimize = float(by_name[ORIGINALS].distance.mean()), self.task.minimize
        spread = float(reference.metric.std(correction=0))
        bar = float(reference.metric.mean()) + (spread if minimize else -spread)
        rows = []
        for name, measured in by_name.items():
            good = measured.metric <= bar if minimize else measured.metric >= bar
            rows.append(
                Novelty(
                    name=name,
                    kind=measured.row.kind,
                    metric=bootstrap_interval(measured.metric, self.config.seed),
                    distance=float(measured.distance.mean()),
                    distance_ratio=float(measured.distance.mean()) / unit,
                    error_overlap=None if measured.overlap is None else float(measured.overlap.mean()),
                    copying_z=data_copying_z(measured.distance, reference.distance),
                    novel_and_good=float((good & (measured.distance >= unit)).float().mean()),
                )
            )
        return rows, bar

    def notes(self, recalibrate: bool) -> list[str]:
        found = []
        if self.trainings < self.zoo.runs:
            found.append(
                f"number of trainings that the originals are snapshots of: {self.trainings}; held-out ones lie between "
                "those trained on, so nothing here says what the generator knows of other trainings, and one more of "
                "them costs a single gradient step, not the training that the break-even number counts"
            )
        if self.held_out is None:
            found.append("no network is held out: the originals beside the generator are those it was trained on")
        if self.task.validation_data_fn is None:
            found.append("the task has no validation_data_fn: training was watched on the test data")
        if recalibrate:
            found.append("batch-norm statistics were re-estimated in the row that says so, and in no other")
        return found + former_runs_note(self.zoo)


def pca_gaussian(
    aligned: Float[Tensor, "n D"], structure: Structure, count: int, seed: int
) -> Float[Tensor, "count D"]:
    """Draws from the Gaussian with the mean and the covariance of n networks, which lives in their affine span.

    A draw is mean + sum_i e_i (w_i - mean) / sqrt(n - 1) with standard normal e; tensor by tensor, without a copy of
    the networks. Running variances stay non-negative.
    """
    n = len(aligned)
    draws = torch.randn(count, n, generator=rng("cpu", seed, "pca")).to(aligned) / math.sqrt(max(1, n - 1))
    blocks = []
    for spec in structure.tensors:
        mean = aligned[:, spec.slice].mean(0)
        block = mean + draws @ (aligned[:, spec.slice] - mean)
        blocks.append(block.clamp_min(0) if spec.kind == "running_var" else block)
    return torch.cat(blocks, 1)
