"""The evaluation of a generator that writes whole networks and is asked for nothing in particular.

Published comparisons give the best, mean and worst of ten generated networks beside the checkpoints that the generator
was trained on. Here they stand beside everything that is made of these checkpoints without a generator, with the
distance to the nearest of them and the overlap of wrong predictions: a generator that returns its training set, or the
mean of it, shows.

Networks are measured set by set and dropped; what is kept of a set is a few numbers for each network.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.data.alignment import align
from Gpt.errors import ZooError
from Gpt.evaluation import baselines, costs
from Gpt.evaluation.beside import training_curves
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.judge import EvaluationConfig, Judge, Progress
from Gpt.evaluation.novelty import Bank, Measured, former_runs_note, novelty
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import tensor_stds
from Gpt.evaluation.recalibration import check_recalibration, examples, recalibrated
from Gpt.evaluation.results import Results, Row
from Gpt.evaluation.statistics import bootstrap_interval
from Gpt.evaluation.writing import Request
from Gpt.generator import Generator
from Gpt.seeds import derive_seed, rng
from Gpt.structure import Structure
from Gpt.tasks import Task

POOL = 1024  # training networks that averages and Gaussians are made of, the best ones

ORIGINALS, HELD_OUT = "originals, trained on", "originals, held out"


@dataclass(frozen=True)
class Networks:
    """A set of networks under one name. `details` are further fields of its row; `own` are the runs that they are of,
    for networks that are originals themselves."""

    name: str
    kind: str
    weights: Float[Tensor, "n D"]
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    own: Int[Tensor, " n"] | None = None


class WholeJudge(Judge):
    """Judges a generator that is asked for nothing in particular.

    Of the zoo, the final snapshot of each run counts; `Gpt.data.views.split_by_snapshot` makes runs of snapshots.
    Networks of the test split, where there is one, are what "held out" means.
    """

    name = "whole networks"
    settings = frozenset(
        {
            "networks", "quick_networks", "soup", "noise_scales", "novelty_networks", "novelty_runs",
            "novelty_behaviours", "novelty_candidates", "recalibrate",
        }
    )  # fmt: skip
    splits = frozenset()

    @classmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        return task.family is None and not generator.needs_start and not conditions

    @classmethod
    def check(cls, config: EvaluationConfig, task: Task, conditions: Sequence[str]) -> None:
        super().check(config, task, conditions)
        if config.recalibrate:
            check_recalibration(task)

    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        """The whole evaluation, see `Judge`.

        Raises:
            ConfigError: there is nothing to recalibrate.
            ZooError: the zoo has fewer than two training networks.
        """
        task, config, rows, measured = self.task, self.config, [], {}
        progress("writing networks")
        written, price = self.written()
        for networks in self.sets(written):
            progress(networks.name)
            row, measured[networks.name] = self.measure(networks)
            rows.append(row)
        unit, reference = float(measured[ORIGINALS].distance.mean()), measured.get(HELD_OUT, measured[ORIGINALS])
        novelty_rows, bar = novelty(measured, reference, unit, task.minimize, config.seed)
        return self.results(
            table=rows,
            training_curves=training_curves(self.zoo, task, config.networks, config.seed),
            novelty=novelty_rows,
            costs=costs.costs(task, self.zoo, price, spent),
            notes=[*self.notes(), f"novelty: a network is good at {bar:.4g} or better in test {task.metric}"],
        )

    def score(self) -> dict[str, float]:
        """What training watches: mean and worst validation metric of a few written networks.

        Returns:
            `validation_<metric>` and `validation_worst_<metric>`.
        """
        task = self.task
        weights = self.writer(Request(min(self.config.networks, self.config.quick_networks)), "validation score")
        metric = test_population(task, weights, "validation", device=self.device)[f"validation_{task.metric}"]
        worst = metric.max() if task.minimize else metric.min()
        return {f"validation_{task.metric}": float(metric.mean()), f"validation_worst_{task.metric}": float(worst)}

    @cached_property
    def bank(self) -> Bank:
        """The training networks, the best on validation data first.

        Raises:
            ZooError: there is only one, so that nothing can be said about distances.
        """
        config = self.config
        if len(self.zoo.split("train")) < 2:
            raise ZooError("the zoo has one training network, but novelty is measured against the distance between two")
        return Bank.of(
            self.zoo,
            self.task,
            self.device,
            max_runs=config.novelty_runs,
            max_behaviours=config.novelty_behaviours,
            candidates=config.novelty_candidates,
            with_best=False,
        )

    @property
    def originals(self) -> Float[Tensor, "m D"]:
        """Those that the zoo still holds."""
        return self.bank.weights[: len(self.bank.weights) - len(self.zoo.former)]

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

    # --- sets ---------------------------------------------------------------------------------------------------------

    def written(self) -> tuple[list[Networks], Price]:
        """The generator's networks, and the same with re-estimated statistics; what one takes."""
        config = self.config
        weights, price = self.writer.timed(Request(config.networks), "written")
        took = {"seconds": price.seconds, "flops": price.flops}
        sets = [Networks(f"{config.label}, written from noise", "generator", weights, details=took)]
        if config.recalibrate:
            name = f"{config.label}, statistics re-estimated"
            note = f"batch norm saw {examples(self.task):,} training images"
            sets.append(Networks(name, "generator", recalibrated(self.task, weights, self.device), note))
        return sets, price

    def sets(self, written: list[Networks]) -> Iterator[Networks]:
        """Every set of networks, the generator's first, each made when it is asked for."""
        config, weights = self.config, written[0].weights
        yield from written
        count = min(config.novelty_networks, len(self.originals))
        training = {"updates": costs.training_steps(self.task)}
        own = self.bank.runs[:count]
        yield Networks(ORIGINALS, "reference", self.originals[:count], "the training set", training, own)
        if self.held_out is not None:
            note = "trained alike, never seen by the generator"
            yield Networks(HELD_OUT, "reference", self.held_out, note, training)
        for name, make, note in self._baselines(weights):
            yield Networks(name, "baseline", make(), note)

    def _baselines(self, written: Float[Tensor, "n D"]) -> Iterator[tuple[str, Callable[[], Tensor], str]]:
        """Name, maker and note of every set that is made of the originals."""
        config, structure, count = self.config, self.task.structure, self.config.networks
        to_nearest, nearest = self.bank.nearest(written)
        noised = self.originals[torch.arange(count, device=self.originals.device) % len(self.originals)]

        def noisy(scale: float) -> Callable[[], Tensor]:
            return lambda: baselines.noisy(noised, structure, scale, derive_seed(config.seed, "noise", str(scale)))

        yield "retrieval", lambda: self.originals[:1], "the stored network best on validation data"
        yield "nearest original", lambda: self.bank.weights[nearest], "to each generated network"
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
        stds = tensor_stds(self.originals[:1], self.task.structure)
        for spec in self.task.structure.statistics:
            stds[..., spec.slice] = 0
        return distance / float(stds.norm())

    # --- measures -----------------------------------------------------------------------------------------------------

    def measure(self, networks: Networks) -> tuple[Row, Measured]:
        """Test metrics, distances and overlaps of one set."""
        task, seed, main = self.task, self.config.seed, f"test_{self.task.metric}"
        columns = test_population(task, networks.weights, "test", device=self.device)
        intervals = {name: bootstrap_interval(values, seed) for name, values in columns.items()}
        if len(networks.weights) > 1:
            ends = {"best": columns[main].min(), "worst": columns[main].max()}
            if not task.minimize:
                ends = {"best": ends["worst"], "worst": ends["best"]}
            intervals |= {f"{end}_{task.metric}": bootstrap_interval(value[None]) for end, value in ends.items()}
        row = Row(networks.name, networks.kind, intervals, note=networks.note, **networks.details)
        distance, _ = self.bank.nearest(networks.weights, networks.own)
        overlap = self.bank.overlap(networks.weights, networks.own)
        return row, Measured(networks.kind, columns[main], distance.cpu(), overlap, self.bank.spread(networks.weights))

    def notes(self) -> list[str]:
        found, trainings = [], costs.trainings(self.zoo)
        if trainings < self.zoo.runs:
            found.append(
                f"number of trainings that the originals are snapshots of: {trainings}; held-out ones lie between "
                "those trained on, so nothing here says what the generator knows of other trainings, and one more of "
                "them costs a single gradient step, not the training that the break-even number counts"
            )
        if self.held_out is None:
            found.append("no network is held out: the originals beside the generator are those it was trained on")
        if self.task.validation_data_fn is None:
            found.append("the task has no validation_data_fn: training was watched on the test data")
        if self.config.recalibrate:
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
