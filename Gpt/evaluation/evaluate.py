"""The whole evaluation of a generator: its prompts, its updates, the trivial baselines, the optimisers, novelty, costs.

Selection (prompts, learning rates, stored networks) reads validation data; the test split is measured once, for the
report.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.data.alignment import align
from Gpt.data.zoo import Zoo
from Gpt.distributed import from_first
from Gpt.evaluation import baselines, costs, optimisers, prompting
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.novelty import Bank, former_runs_note, novelty
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import Starts, Writer, evaluating
from Gpt.evaluation.results import Costs, Novelty, PromptCurve, Results, Row, Trace
from Gpt.evaluation.statistics import bootstrap_interval, prompt_alignment, trace
from Gpt.generator import Generator
from Gpt.recipes import SupervisedRecipe
from Gpt.seeds import derive_seed
from Gpt.tasks import Task

Progress = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is evaluated.

    Attributes:
        label: the generator's name in the tables.
        networks: starting networks of each curve, row and trace.
        prompts: wishes for each starting network.
        samples_per_prompt: networks written for each wish; above 1 the best of them, by validation data, gets a row.
        prompt_start_coeff: the prompt range ends at this share of the start's own metric (Peebles et al. 2022).
        recursive_steps: updates of the recursive traces.
        optimiser_steps: longest run of the optimisers; equal time and equal FLOPs are cut there.
        learning_rates, tuning_networks: grid and starting networks that an optimiser's learning rate is tuned on.
        soup: networks averaged into one soup.
        noise_scales: standard deviations of the noise baseline, in units of each tensor's own.
        steps, guidance: of the sampler, see `Generator.sample`.
        max_batch: networks written at once, by one process; several processes share such batches.
        novelty_networks: networks of each set whose novelty is measured.
        novelty_runs: training runs that they are compared with, the best ones if there are more.
        novelty_behaviours: training networks whose mistakes they are compared with.
        novelty_candidates: training networks that each is matched with, unit by unit.
        quick_networks: starting networks of `validation_score`.
        recalibrate: measure whole networks also with batch-norm statistics re-estimated on training images.
        beside: folders of finished runs whose generators stand in the same table.
    """

    label: str = "G.pt"
    networks: int = 64
    prompts: int = 20
    samples_per_prompt: int = 1
    prompt_start_coeff: float = 0.9
    recursive_steps: int = 5
    optimiser_steps: int = 200
    learning_rates: int = 21
    tuning_networks: int = 8
    soup: int = 16
    noise_scales: tuple[float, ...] = (0.05, 0.1, 0.2)
    steps: int | None = None
    guidance: float = 1.0
    max_batch: int = 2048
    novelty_networks: int = 64
    novelty_runs: int = 10_000
    novelty_behaviours: int = 1024
    novelty_candidates: int = 8
    quick_networks: int = 16
    recalibrate: bool = False
    beside: tuple[str, ...] = ()
    seed: int = 0


def evaluate(
    generator: Generator,
    task: Task,
    zoo: Zoo,
    config: EvaluationConfig,
    device: torch.device | str,
    spent: Spent = Spent(),
    *,
    progress: Progress | None = None,
) -> Results:
    """Judge a generator beside everything that it has to beat.

    Args:
        spent: on the generator and on its zoo, for the break-even number.
        progress: is told what is being done, a phrase at a time.
    """
    say = progress or (lambda phrase: None)
    bench = Bench(generator, task, zoo, config, device)
    with evaluating(generator):
        say("choosing the prompt")
        chosen = bench.choose_prompt()
        say("one update")
        update = bench.one_update(chosen)
        say("prompt curves")
        curves = bench.curves()
        say("recursive updates")
        traces, recursive_rows = bench.recursive(chosen)
        say("baselines")
        sets, baseline_rows = bench.trivial_networks()
        say("optimisers")
        optimiser_traces, optimiser_rows, step_seconds = bench.tuned_optimisers(update)
        say("novelty")
        sets = {config.label: update.networks} | sets
        novelty_rows, bar = bench.novelty_of(sets)
        say("costs")
        paid = bench.costs_of(update, spent, step_seconds)
    notes = bench.notes() + [f"novelty: a network is good at {bar:.4g} or better in test {task.metric}"]
    return Results(
        task=task.name,
        metric=f"test_{task.metric}",
        minimize=task.minimize,
        table=[*update.rows, *recursive_rows, bench.ordinary_training(paid), *baseline_rows, *optimiser_rows],
        curves=curves,
        recursive=traces,
        optimisers=optimiser_traces,
        novelty=novelty_rows,
        costs=paid,
        notes=notes,
    )


def validation_score(
    generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """What training watches, from the validation runs alone.

    Returns:
        `validation_<metric>`, the mean after one update towards the attainable wish that serves best, and
        `validation_alignment`, the mean R² over attainable wishes.
    """
    bench = Bench(generator, task, zoo, config, device)
    starts = bench.starts("validation", min(config.networks, config.quick_networks))
    wanted = bench.wishes(starts, bench.attained)
    with evaluating(generator):
        achieved = prompting.achieved_metric(bench.writer, task, starts, wanted, 1, "validation score")
    return {
        f"validation_{task.metric}": float(achieved.mean(0)[prompting.select_prompt(achieved, task.minimize)]),
        "validation_alignment": float(prompt_alignment(wanted, achieved).mean()),
    }


@dataclass(frozen=True)
class Update:
    """One update of the held-out starts with the chosen prompt.

    Attributes:
        networks: `[n, D]`, one for each start.
        seconds, flops: of writing one network; seconds of all processes that were at it.
    """

    rows: list[Row]
    networks: Float[Tensor, "n D"]
    seconds: float
    flops: float


class Bench:
    """One evaluation's parts, each a method; what they share is made once."""

    def __init__(
        self, generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
    ):
        self.generator, self.task, self.zoo, self.config, self.device = generator, task, zoo, config, device
        self.writer = Writer(generator, config.steps, config.guidance, config.seed, config.max_batch)
        self.attained = prompting.best_attained(zoo, task)
        self.single = "one update" if generator.needs_start else "written from noise"

    @cached_property
    def held_out(self) -> Starts:
        return self.starts("test", self.config.networks)

    def starts(self, split: str, count: int) -> Starts:
        return prompting.initial_networks(self.zoo, self.task, split, count, self.device)

    def wishes(self, starts: Starts, best: float) -> Float[Tensor, "n p"]:
        return prompting.prompt_range(best, starts.metric, self.config.prompts, self.config.prompt_start_coeff)

    def candidate_wishes(self, starts: Starts) -> Float[Tensor, "n candidates"]:
        """The task's own best prompt, then the attainable range."""
        best = torch.full((len(starts.metric), 1), float(self.task.best_prompt))
        return torch.cat([best, self.wishes(starts, self.attained)], 1)

    def row(self, name: str, kind: str, weights: Float[Tensor, "n D"], **details) -> Row:
        """Measured on the test split."""
        metrics = test_population(self.task, weights, "test", device=self.device)
        intervals = {column: bootstrap_interval(values, self.config.seed) for column, values in metrics.items()}
        return Row(name, kind, intervals, **details)

    def choose_prompt(self) -> int:
        """The place among the candidate wishes that serves the validation runs' starts best."""
        starts = self.starts("validation", self.config.networks)
        wanted = self.candidate_wishes(starts)
        achieved = prompting.achieved_metric(self.writer, self.task, starts, wanted, 1, "choice")
        return prompting.select_prompt(achieved, self.task.minimize)

    def one_update(self, chosen: int) -> Update:
        """One update of the held-out starts; several samples a wish also give the row of the best of them."""
        config, task, samples = self.config, self.task, self.config.samples_per_prompt
        wanted = self.candidate_wishes(self.held_out)[:, chosen]
        began = time.perf_counter()
        written = self.writer(self.held_out, wanted[:, None].expand(-1, samples), "one update")
        written.sum().item()  # waits for the device
        count = len(wanted) * samples
        seconds = from_first(time.perf_counter() - began) * self.writer.processes(count) / count
        flops = costs.sample_flops(self.generator, self.held_out, config.steps, config.guidance)
        networks = written[:, 0]
        note = f"asked for {task.metric} {wanted.mean():.3g}, chosen on validation data"
        updates = 1 if self.generator.needs_start else None
        details = {"updates": updates, "seconds": seconds, "flops": flops, "note": note}
        rows = [self.row(f"{config.label}, {self.single}", "generator", networks, **details)]
        if samples > 1:
            metric = test_population(task, written.flatten(0, 1), "validation")[f"validation_{task.metric}"]
            best = prompting.best_of(metric.view(-1, samples), task.minimize).to(written.device)
            picked = written[torch.arange(len(best), device=best.device), best]
            details |= {"seconds": samples * seconds, "flops": samples * flops}
            rows.append(self.row(f"{config.label}, best of {samples}", "generator", picked, **details))
        return Update(rows, networks, seconds, flops)

    def curves(self) -> list[PromptCurve]:
        """Asked against achieved validation metrics: held-out and training starts, and the two controls."""
        config, task, held_out = self.config, self.task, self.held_out

        def curve(name: str, starts: Starts, wanted: Tensor, handed: Tensor | None = None) -> PromptCurve:
            kind = "generator" if handed is None else "baseline"
            handed = wanted if handed is None else handed
            achieved = prompting.achieved_metric(self.writer, task, starts, handed, config.samples_per_prompt, name)
            return prompting.prompt_curve(name, kind, wanted, achieved, config.seed)

        attainable = self.wishes(held_out, self.attained)
        training = self.starts("train", config.networks)
        return [
            curve("held-out starts", held_out, self.wishes(held_out, task.best_prompt)),
            curve("held-out starts, attainable", held_out, attainable),
            curve("training starts, attainable", training, self.wishes(training, self.attained)),
            curve("shuffled prompts", held_out, attainable, prompting.shuffled(attainable, config.seed)),
            self._retrieval_curve(attainable),
        ]

    def _retrieval_curve(self, wanted: Float[Tensor, "n p"]) -> PromptCurve:
        stored = baselines.retrieve(self.zoo, self.task, wanted.flatten()).read(self.zoo, self.device)
        metric = test_population(self.task, stored, "validation")[f"validation_{self.task.metric}"]
        return prompting.prompt_curve("retrieval", "baseline", wanted, metric.view_as(wanted), self.config.seed)

    def recursive(self, chosen: int) -> tuple[list[Trace], list[Row]]:
        """Updates of updates, from held-out and from unfamiliar starts; nothing for a generator that needs no start."""
        if not self.generator.needs_start:
            return [], []
        task, config = self.task, self.config
        plans = [
            ("fixed prompt", self.held_out, task.recursive_prompt, "fixed"),
            ("best attainable", self.held_out, self.attained, "fixed"),
            ("stepped prompt", self.held_out, self.attained, "stepped"),
        ]
        unfamiliar = prompting.unfamiliar_networks(self.held_out, task, derive_seed(config.seed, "unfamiliar"))
        plans += [(starts.name, starts, self.attained, "fixed") for starts in unfamiliar]
        traces, rows = [], []
        for name, starts, target, mode in plans:
            generations = prompting.recursive_updates(
                self.writer, task, starts, target, config.recursive_steps, mode, f"recursive, {name}"
            )
            metric = [test_population(task, g.weights, "test")[f"test_{task.metric}"] for g in generations]
            traces.append(trace(name, "generator", range(len(generations)), metric, config.seed))
            note = f"asked for {task.metric} {target:.3g}, not selected"
            title = f"{config.label}, {config.recursive_steps} updates"
            if starts is self.held_out:
                title += f", {name}"
            else:
                single = self.writer(starts, self.candidate_wishes(starts)[:, chosen], f"one update, {name}")
                first = f"{config.label}, one update of {name}"
                rows.append(self.row(first, "generator", single, updates=1, note="the chosen prompt"))
                title += f" of {name}"
            final = generations[-1].weights
            rows.append(self.row(title, "generator", final, updates=config.recursive_steps, note=note))
        return traces, rows

    def trivial_networks(self) -> tuple[dict[str, Float[Tensor, "n D"]], list[Row]]:
        """The trivial networks, by name, and their rows."""
        config, zoo, task, structure = self.config, self.zoo, self.task, self.task.structure
        retrieved = baselines.best_stored(zoo, task, config.networks).read(zoo, self.device)
        pool = baselines.final_stored(zoo, task, "train", 16 * config.soup).read(zoo, self.device)
        aligned, _ = align(pool, pool[0], structure)
        sets = {"retrieval": retrieved}
        for scale in config.noise_scales:
            seed = derive_seed(config.seed, "noise", str(scale))
            sets[f"noise {scale:g}"] = baselines.noisy(retrieved, structure, scale, seed)
        sets["soup"] = baselines.soups(aligned, config.soup)
        sets["interpolation"] = baselines.midpoints(pool[: 2 * config.networks], structure)
        seed = derive_seed(config.seed, "per-weight Gaussian")
        sets["per-weight Gaussian"] = baselines.per_weight_gaussian(aligned, structure, config.networks, seed)
        sets["mean network"] = aligned.mean(0, keepdim=True)
        notes = {
            "retrieval": "the stored snapshots best on validation data, of different runs",
            "soup": f"average of {config.soup} aligned final snapshots, the best runs by validation data",
            "interpolation": "halfway between two aligned final snapshots",
            "per-weight Gaussian": f"fitted to {len(pool)} aligned final snapshots",
            "mean network": f"of {len(pool)} aligned final snapshots",
        }
        return sets, [self.row(name, "baseline", sets[name], note=notes.get(name, "")) for name in sets]

    def tuned_optimisers(self, update: Update) -> tuple[list[Trace], list[Row], float | None]:
        """Tuned optimisers at equal updates, wall-clock and FLOPs, and at their longest; seconds of one step."""
        task, config = self.task, self.config
        if not self._trains_by_gradient:
            return [], [], None
        step_seconds = optimisers.step_seconds(task, self.held_out, config.seed)
        step_flops = costs.training_step_flops(task)
        fitting = {
            "equal updates": 1,
            "equal wall-clock": int(update.seconds / step_seconds),
            "equal FLOPs": int(update.flops / step_flops),
            "longest run": config.optimiser_steps,
        }
        budgets = {name: min(max(1, steps), config.optimiser_steps) for name, steps in fitting.items()}
        tuning = self.starts("validation", config.tuning_networks)
        traces, rows = [], []
        for optimiser in optimisers.OPTIMISERS:
            tuned, longest = optimisers.tune(
                task,
                optimiser,
                tuning,
                self.held_out,
                budgets=list(budgets.values()),
                learning_rates=config.learning_rates,
                seed=derive_seed(config.seed, "optimisers"),
            )
            traces.append(longest)
            for entry in tuned:
                meant = [f"{name} ({fitting[name]:,} fit)" for name, steps in budgets.items() if steps == entry.steps]
                edge = ", at the grid's edge" if entry.at_edge else ""
                note = f"{'; '.join(meant)}; lr {entry.learning_rate:.3g}, tuned over {config.learning_rates}{edge}"
                paid = {"seconds": entry.steps * step_seconds, "flops": entry.steps * step_flops}
                name = f"{optimiser.name}, {entry.steps} step{'s' if entry.steps > 1 else ''}"
                rows.append(self.row(name, "optimiser", entry.weights, updates=entry.steps, note=note, **paid))
        return traces, rows, step_seconds

    def novelty_of(self, sets: dict[str, Float[Tensor, "n D"]]) -> tuple[list[Novelty], float]:
        config = self.config
        bank = Bank.of(self.zoo, self.task, config.novelty_runs, config.novelty_behaviours, self.device)
        sets = {name: weights[: config.novelty_networks] for name, weights in sets.items()}
        held_out = "held-out training"
        sets[held_out] = self._finished(config.novelty_networks)
        kinds = dict.fromkeys(sets, "baseline") | {config.label: "generator", held_out: "reference"}
        return novelty(self.task, sets, kinds, held_out, bank, candidates=config.novelty_candidates, seed=config.seed)

    def costs_of(self, update: Update, spent: Spent, step_seconds: float | None) -> Costs:
        """Training one network costs its share of the zoo's wall-clock or, unless that is known, its timed steps."""
        forward_flops = update.flops / (self.config.steps or self.generator.default_steps)
        timed = (step_seconds or 0.0) * (costs.training_steps(self.task) or 0)
        return costs.costs(
            self.task,
            runs=self.zoo.runs,
            zoo_seconds=spent.zoo_seconds,
            generator_seconds=spent.training_seconds,
            sample_seconds=update.seconds,
            train_seconds=spent.zoo_seconds / self.zoo.runs if spent.zoo_seconds else timed,
            generator_flops=spent.training_examples * costs.TRAINING_FACTOR * forward_flops,
            flops_of_a_sample=update.flops,
        )

    def ordinary_training(self, paid: Costs) -> Row:
        """The final snapshots of the held-out runs."""
        steps = costs.training_steps(self.task)
        details = {"updates": steps, "seconds": paid.train_seconds or None, "flops": paid.train_flops or None}
        return self.row("ordinary training", "reference", self._finished(self.config.networks), **details)

    def notes(self) -> list[str]:
        found = []
        if self.task.validation_data_fn is None:
            found.append("the task has no validation_data_fn: labels, prompts and selection used the test data")
        if not self._trains_by_gradient:
            found.append("optimisers are left out: the task has no training data and supervised recipe to run them on")
        if not self.generator.needs_start:
            found.append("recursive updates are left out: the generator needs no start")
        return found + former_runs_note(self.zoo)

    @property
    def _trains_by_gradient(self) -> bool:
        return self.task.train_data_fn is not None and isinstance(self.task.recipe, SupervisedRecipe)

    def _finished(self, count: int) -> Float[Tensor, "n D"]:
        return baselines.final_stored(self.zoo, self.task, "test", count).read(self.zoo, self.device)
