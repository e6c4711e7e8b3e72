"""The evaluation of a generator that is prompted with a metric: its prompts, its updates, the trivial baselines, the
optimisers, novelty, costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.data.alignment import align
from Gpt.errors import ConfigError
from Gpt.evaluation import baselines, costs, optimisers, prompting
from Gpt.evaluation.beside import training_curves
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.judge import EvaluationConfig, Judge, Progress
from Gpt.evaluation.novelty import Bank, Measured, former_runs_note, novelty
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import Starts
from Gpt.evaluation.results import Costs, Novelty, PromptCurve, Results, Row, Trace
from Gpt.evaluation.statistics import bootstrap_interval, prompt_alignment, trace
from Gpt.generator import Generator
from Gpt.recipes import SupervisedRecipe
from Gpt.seeds import derive_seed
from Gpt.tasks import Task


@dataclass(frozen=True)
class Update:
    """One update of the held-out starts with the chosen prompt: `networks` `[n, D]`, one for each start."""

    rows: list[Row]
    networks: Float[Tensor, "n D"]
    price: Price


class PromptJudge(Judge):
    """Judges a generator that is asked for a metric."""

    name = "prompts"
    settings = frozenset(
        {
            "networks", "quick_networks", "prompts", "samples_per_prompt", "prompt_start_coeff", "recursive_steps",
            "optimiser_steps", "learning_rates", "tuning_networks", "soup", "noise_scales", "novelty_networks",
            "novelty_runs", "novelty_behaviours", "novelty_candidates",
        }
    )  # fmt: skip

    @classmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        return task.family is None and bool(generator.needs_start or conditions)

    @classmethod
    def check(cls, config: EvaluationConfig, task: Task, conditions: Sequence[str]) -> None:
        super().check(config, task, conditions)
        if "target_metric" not in conditions:
            raise ConfigError(
                f"condition.names=[{', '.join(conditions)}]: this generator is judged by the {task.metric} that it is "
                "asked for, so it has to be told; add condition=target_metric"
            )

    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        progress("choosing the prompt")
        chosen = self.choose_prompt()
        progress("one update")
        update = self.one_update(chosen)
        progress("prompt curves")
        curves = self.curves()
        progress("recursive updates")
        traces, recursive_rows, after = self.recursive(chosen)
        progress("baselines")
        sets, baseline_rows = self.trivial_networks()
        progress("optimisers")
        optimiser_traces, optimiser_rows, step_seconds = self.tuned_optimisers(update.price)
        progress("novelty")
        novelty_rows, bar = self.novelty_of({self.config.label: update.networks} | after, sets)
        progress("costs")
        paid = costs.costs(self.task, self.zoo, update.price, spent, step_seconds)
        return self.results(
            table=[*update.rows, *recursive_rows, self.ordinary_training(paid), *baseline_rows, *optimiser_rows],
            curves=curves,
            recursive=traces,
            optimisers=optimiser_traces,
            training_curves=training_curves(self.zoo, self.task, self.config.networks, self.config.seed),
            novelty=novelty_rows,
            costs=paid,
            notes=[*self.notes(), f"novelty: a network is good at {bar:.4g} or better in test {self.task.metric}"],
        )

    def score(self) -> dict[str, float]:
        """What training watches, from the validation runs alone.

        Returns:
            `validation_<metric>`, the mean after one update towards the attainable wish that serves best, and
            `validation_alignment`, the mean R² over attainable wishes.
        """
        starts = self.starts("validation", min(self.config.networks, self.config.quick_networks))
        wanted = self.wishes(starts, self.attained)
        achieved = prompting.achieved_metric(self.writer, self.task, starts, wanted, 1, "validation score")
        best = prompting.select_prompt(achieved, self.task.minimize)
        return {
            f"validation_{self.task.metric}": float(achieved[:, best].mean()),
            "validation_alignment": float(prompt_alignment(wanted, achieved).mean()),
        }

    @cached_property
    def attained(self) -> float:
        return prompting.best_attained(self.zoo, self.task)

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
        needs_start = self.generator.needs_start
        request = prompting.update_request(self.held_out, wanted[:, None].expand(-1, samples), needs_start)
        written, price = self.writer.timed(request, "one update")
        written = written.unflatten(0, (-1, samples))
        networks = written[:, 0]
        note = f"asked for {task.metric} {wanted.mean():.3g}, chosen on validation data"
        details = {"updates": 1 if needs_start else None, "note": note}
        name = "one update" if needs_start else "written from noise"
        took = {"seconds": price.seconds, "flops": price.flops}
        rows = [self.row(f"{config.label}, {name}", "generator", networks, **details, **took)]
        if samples > 1:
            metric = test_population(task, written.flatten(0, 1), "validation")[f"validation_{task.metric}"]
            best = prompting.best_of(metric.view(-1, samples), task.minimize).to(written.device)
            picked = written[torch.arange(len(best), device=best.device), best]
            took = {name: samples * cost for name, cost in took.items()}
            rows.append(self.row(f"{config.label}, best of {samples}", "generator", picked, **details, **took))
        return Update(rows, networks, price)

    def curves(self) -> list[PromptCurve]:
        """Asked against achieved validation metrics: held-out and training starts, several updates, two controls."""
        config, task, held_out, updates = self.config, self.task, self.held_out, self.config.recursive_steps

        def curve(name: str, starts: Starts, wanted: Tensor, handed: Tensor | None = None) -> PromptCurve:
            kind = "generator" if handed is None else "baseline"
            handed = wanted if handed is None else handed
            achieved = prompting.achieved_metric(self.writer, task, starts, handed, config.samples_per_prompt, name)
            return prompting.prompt_curve(name, kind, wanted, achieved, config.seed)

        attainable = self.wishes(held_out, self.attained)
        training = self.starts("train", config.networks)
        recursive = []
        if self.generator.needs_start and updates:
            name = f"{updates} updates, attainable"
            achieved = prompting.achieved_recursively(self.writer, task, held_out, attainable, updates, name)
            recursive = [prompting.prompt_curve(name, "generator", attainable, achieved, config.seed)]
        return [
            curve("held-out starts", held_out, self.wishes(held_out, task.best_prompt)),
            curve("held-out starts, attainable", held_out, attainable),
            curve("training starts, attainable", training, self.wishes(training, self.attained)),
            *recursive,
            curve("shuffled prompts", held_out, attainable, prompting.shuffled(attainable, config.seed)),
            self._retrieval_curve(attainable),
        ]

    def _retrieval_curve(self, wanted: Float[Tensor, "n p"]) -> PromptCurve:
        stored = baselines.retrieve(self.zoo, self.task, wanted.flatten()).read(self.zoo, self.device)
        metric = test_population(self.task, stored, "validation")[f"validation_{self.task.metric}"]
        return prompting.prompt_curve("retrieval", "baseline", wanted, metric.view_as(wanted), self.config.seed)

    def recursive(self, chosen: int) -> tuple[list[Trace], list[Row], dict[str, Float[Tensor, "n D"]]]:
        """Updates of updates, from held-out and from unfamiliar starts; nothing for a generator that needs no start.
        The networks, by name, are those of the held-out starts that were asked for the best metric attained."""
        if not self.generator.needs_start or not self.config.recursive_steps:
            return [], [], {}
        task, config = self.task, self.config
        plans = [
            ("fixed prompt", self.held_out, task.recursive_prompt, "fixed"),
            ("best attainable", self.held_out, self.attained, "fixed"),
            ("stepped prompt", self.held_out, self.attained, "stepped"),
        ]
        unfamiliar = prompting.unfamiliar_networks(self.held_out, task, derive_seed(config.seed, "unfamiliar"))
        plans += [(starts.name, starts, self.attained, "fixed") for starts in unfamiliar]
        traces, rows, after = [], [], {}
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
                wanted = self.candidate_wishes(starts)[:, chosen]
                single = prompting.write_updates(self.writer, starts, wanted, f"one update, {name}")
                first = f"{config.label}, one update of {name}"
                rows.append(self.row(first, "generator", single, updates=1, note="the chosen prompt"))
                title += f" of {name}"
            final = generations[-1].weights
            rows.append(self.row(title, "generator", final, updates=config.recursive_steps, note=note))
            if name == "best attainable":
                after[f"{config.label}, {config.recursive_steps} updates"] = final
        return traces, rows, after

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

    def tuned_optimisers(self, price: Price) -> tuple[list[Trace], list[Row], float]:
        """Tuned optimisers at equal updates, wall-clock and FLOPs, and at their longest; seconds of one step."""
        task, config = self.task, self.config
        if not self._trains_by_gradient:
            return [], [], 0.0
        step_seconds = optimisers.step_seconds(task, self.held_out, config.seed)
        step_flops = costs.training_step_flops(task)
        fitting = {
            "equal updates": 1,
            "equal wall-clock": int(price.seconds / step_seconds),
            "equal FLOPs": int(price.flops / step_flops),
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

    def novelty_of(
        self, written: dict[str, Float[Tensor, "n D"]], trivial: dict[str, Float[Tensor, "n D"]]
    ) -> tuple[list[Novelty], float]:
        """A line for each set of networks, and the bar that a good one reaches."""
        config, task, held_out = self.config, self.task, "held-out training"
        bank = Bank.of(
            self.zoo,
            task,
            self.device,
            max_runs=config.novelty_runs,
            max_behaviours=config.novelty_behaviours,
            candidates=config.novelty_candidates,
        )
        count = config.novelty_networks
        sets = {name: weights[:count] for name, weights in (written | trivial).items()}
        sets[held_out] = self._finished(count)
        sizes = [len(weights) for weights in sets.values()]
        own = torch.cat([bank.runs[:count], torch.full((sum(sizes),), -1)])
        found, _ = bank.nearest(torch.cat([bank.weights[:count], *sets.values()]), own)  # the bank is aligned only once
        between, *distances = found.cpu().split([len(own) - sum(sizes), *sizes])
        kinds = dict.fromkeys(trivial, "baseline") | dict.fromkeys(written, "generator") | {held_out: "reference"}
        measured = {}
        for (name, weights), distance in zip(sets.items(), distances, strict=True):
            metric = test_population(task, weights, "test")[f"test_{task.metric}"]
            measured[name] = Measured(kinds[name], metric, distance, bank.overlap(weights), bank.spread(weights))
        return novelty(measured, measured[held_out], float(between.mean()), task.minimize, config.seed)

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
