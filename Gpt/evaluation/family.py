"""The evaluation of a generator for a family of tasks: networks for class masks that no training network was made for.

Every number is a mean over held-out masks, with a 95 % bootstrap interval over masks, and the worst mask stands beside
it. Some masks are harder than others for everyone, so what tells two ways apart is their difference mask by mask: the
generator's `lead`. Selection (guidance, ridge penalties, stored networks) reads the validation masks and validation
images; the test masks are written for and measured once, on test images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.evaluation import baselines, costs
from Gpt.evaluation.beside import training_curves
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.judge import Judge, Progress
from Gpt.evaluation.mask_baselines import KERNEL_SETTINGS, kernel_ridge_networks
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import best_attained, validation_metric
from Gpt.evaluation.reading import heard
from Gpt.evaluation.results import Costs, Results, Row
from Gpt.evaluation.statistics import bootstrap_interval
from Gpt.evaluation.writing import Request, Writer
from Gpt.generator import Generator, Prompt
from Gpt.masks import (
    MaskSplit,
    hamming,
    mean_network,
    nearest_network,
    nearest_or_complement,
    ridge_networks,
    swap_outputs,
)
from Gpt.tasks import Task

GUIDANCE = (1.0, 1.5, 2.0)
QUANTILES = (0.0, 0.1, 0.25, 0.5)  # of what trained networks reach, the best first: metrics to ask for
RIDGE_SETTINGS = [{"penalty": penalty} for penalty in (0.1, 1.0, 10.0, 100.0, 1000.0)]


@dataclass(frozen=True)
class Wish:
    """How networks are asked for.

    Attributes:
        conditions: that a mask is told by, "class_mask" and "text".
        wanted: metric to ask for, of a generator that is prompted with one.
        wordings: the split whose wordings sentences are put in.
    """

    guidance: float
    conditions: tuple[str, ...] = ("class_mask",)
    wanted: float | None = None
    wordings: str = "validation"


@dataclass(frozen=True)
class Line:
    """A way to obtain networks for masks, and what they score on test images.

    Attributes:
        scores: {metric: a mean over the networks of every mask}, the metric that the task is about first.
        worst: that metric of the single networks of the mask they are worst on.
        held_out: which of the held-out masks these are; None if they are others.
    """

    name: str
    kind: str
    scores: dict[str, Float[Tensor, " masks"]]
    worst: Float[Tensor, " n"]
    held_out: Int[Tensor, " masks"] | None
    details: dict[str, Any] = field(default_factory=dict)

    def row(self, generator: "Line", task: Task, seed: int) -> Row:
        """Means over masks with their intervals, and the lead of the generator, which was measured on all of them: how
        much better it is, mask by mask."""
        (main, own), *others = self.scores.items()
        metrics = {main: bootstrap_interval(own, seed)}
        metrics[f"worst_mask_{task.metric}"] = bootstrap_interval(self.worst, seed)
        if self is not generator and self.held_out is not None:
            difference = own - generator.scores[main][self.held_out]
            metrics["lead"] = bootstrap_interval(difference if task.minimize else -difference, seed)
        metrics |= {name: bootstrap_interval(values, seed) for name, values in others}
        return Row(self.name, self.kind, metrics, **self.details)


class MaskJudge(Judge):
    """Judges a generator that is told a class mask, by bits, in words, or both; beside it may be asked for a metric."""

    name = "class masks"
    settings = frozenset({"samples_per_prompt"})

    @classmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        return isinstance(task.family, MaskSplit)

    @property
    def family(self) -> MaskSplit:
        assert isinstance(self.task.family, MaskSplit)
        return self.task.family

    @property
    def masks(self) -> Bool[Tensor, "masks classes"]:
        """The held-out ones."""
        return self.family.test_masks

    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        progress("choosing the guidance")
        wish = self.choose_wish()
        progress("unseen masks")
        lines, price = self.written(wish)
        paid = costs.costs(self.task, self.zoo, price, spent)
        progress("baselines")
        lines += [self.ordinary_training(paid), *self.trivial_networks(), *self.majority_class()]
        return self.results(
            table=[line.row(lines[0], self.task, self.config.seed) for line in lines],
            training_curves=training_curves(self.zoo, self.task, None, self.config.seed),
            costs=paid,
            notes=self.notes(),
        )

    def score(self) -> dict[str, float]:
        """What training watches: the mean over all validation masks, a network each, and the worst of them.

        Returns:
            `validation_<metric>` and `validation_worst_mask`, both on validation images.
        """
        masks = self.family.validation_masks
        metric = self.validation_metric(self.write(masks, "validation score", self.wish), masks)
        worst = metric.max() if self.task.minimize else metric.min()
        return {f"validation_{self.task.metric}": float(metric.mean()), "validation_worst_mask": float(worst)}

    @property
    def wish(self) -> Wish:
        """The one that nothing was chosen for: the best metric that a training run attained."""
        wanted = best_attained(self.zoo, self.task) if "target_metric" in self.conditions else None
        told = tuple(name for name in ("class_mask", "text") if name in self.conditions)
        return Wish(self.config.guidance, told, wanted)

    def write(self, masks: Bool[Tensor, "P classes"], name: str, wish: Wish) -> Float[Tensor, "P D"]:
        """A network for every mask; `name` names the noise."""
        return self.writer_of(wish)(self.request(masks, wish), name)

    def writer_of(self, wish: Wish) -> Writer:
        return replace(self.writer, guidance=wish.guidance)

    def request(self, masks: Bool[Tensor, "P classes"], wish: Wish) -> Request:
        """The masks, as bits and in words (which words, the networks' numbers say), and, where it is asked for, (metric
        of the start on its mask, wanted metric).

        A generator that needs starts gets the initialisations of the held-out runs, one after the other.
        """
        numbers = torch.arange(len(masks))
        start = self._starts[numbers % len(self._starts)] if self.generator.needs_start else None
        prompt: Prompt = {}
        if "class_mask" in wish.conditions:
            prompt["class_mask"] = masks.float().to(self.device)
        if "text" in wish.conditions and self.descriptions is not None:
            sentences = self.descriptions(masks, wish.wordings)
            prompt["text"] = sentences[numbers, numbers % sentences.shape[1]].to(self.device)
        if wish.wanted is not None:
            given = torch.full((len(masks),), torch.nan) if start is None else self.validation_metric(start, masks)
            pair = torch.stack([given, torch.full_like(given, wish.wanted)], 1)
            prompt["target_metric"] = pair.float().to(self.device)
        return Request(len(masks), prompt, start)

    @cached_property
    def _starts(self) -> Float[Tensor, "n D"]:
        runs = self.zoo.split("test")
        return self.zoo.read(runs, torch.zeros_like(runs)).to(self.device)

    @cached_property
    def seen(self) -> tuple[Bool[Tensor, "n classes"], Float[Tensor, "n D"]]:
        """The masks and final networks of the training runs, the best on validation images first."""
        stored = baselines.final_stored(self.zoo, self.task, "train")
        return self.masks_of_rows(stored.runs), stored.read(self.zoo, self.device)

    def masks_of_rows(self, rows: Int[Tensor, " n"]) -> Bool[Tensor, "n classes"]:
        return self.family.mask_of_runs(self.zoo.run_ids[rows.to(self.zoo.run_ids.device)].cpu())

    def validation_metric(self, weights: Float[Tensor, "P D"], masks: Bool[Tensor, "P classes"]) -> Float[Tensor, " P"]:
        found = test_population(self.task, weights, "validation", masks, device=self.device)
        return found[f"validation_{self.task.metric}"]

    def line(
        self,
        name: str,
        kind: str,
        weights: Float[Tensor, "P D"],
        masks: Bool[Tensor, "masks classes"],
        of_mask: Int[Tensor, " P"],
        **details,
    ) -> Line:
        """Network i measured on test images for the mask `masks[of_mask[i]]`."""
        columns = test_population(self.task, weights, "test", masks[of_mask], device=self.device)
        main = f"test_{self.task.metric}"
        names = [main, *(name for name in columns if name != main)]
        scores = {name: per_mask(columns[name], of_mask) for name in names}
        means, measured = scores[main], of_mask.unique()
        worst = measured[means.argmax() if self.task.minimize else means.argmin()]
        held_out = measured if torch.equal(masks, self.masks) else None
        return Line(name, kind, scores, columns[main][of_mask == worst], held_out, details)

    # --- the generator ------------------------------------------------------------------------------------------------

    def choose_wish(self) -> Wish:
        """The wanted metric that serves the validation masks best, where one is asked for, then the guidance; without a
        null condition there is no guidance to choose."""
        masks, _ = repeated(self.family.validation_masks, self.config.samples_per_prompt)

        def best(wishes: list[Wish]) -> Wish:
            scores = [float(self.validation_metric(self.write(masks, "choice", w), masks).mean()) for w in wishes]
            return wishes[scores.index(min(scores) if self.task.minimize else max(scores))]

        wish = self.wish
        if wish.wanted is not None:
            finals = validation_metric(self.zoo, self.task)[self.zoo.split("train").cpu(), -1]
            finals = finals[finals.isfinite()]
            places = [q if self.task.minimize else 1 - q for q in QUANTILES]
            wish = best([replace(wish, wanted=float(finals.quantile(place))) for place in places])
        conditions = self.generator.conditions
        if conditions is None or conditions.dropout == 0:
            return wish
        return best([replace(wish, guidance=g) for g in sorted({*GUIDANCE, self.config.guidance})])

    def written(self, wish: Wish) -> tuple[list[Line], Price]:
        """Networks for the held-out masks, for as many seen ones, and, as a control, for other masks than wanted."""
        label, samples, wish = self.config.label, self.config.samples_per_prompt, replace(wish, wordings="test")
        masks, of_mask = repeated(self.masks, samples)
        familiar = self.family.train_masks[: len(self.masks)]
        told_familiar, of_familiar = repeated(familiar, samples)
        networks, price = self.writer_of(wish).timed(self.request(masks, wish), "unseen masks")
        for_familiar = self.write(told_familiar, "seen masks", wish)
        details = {"seconds": price.seconds, "flops": price.flops}
        note = f"{samples} networks a mask; guidance {wish.guidance:g}, chosen on validation masks"
        if wish.wanted is not None:
            note += f"; asked for {self.task.metric} {wish.wanted:.3g}, likewise"
        lines = [
            self.line(f"{label}, unseen masks", "generator", networks, self.masks, of_mask, note=note, **details),
            self.line(f"{label}, seen masks", "generator", for_familiar, familiar, of_familiar, note=note, **details),
            self.line(
                f"{label}, shuffled masks", "control", networks, self.masks, (of_mask + 1) % len(self.masks),
                note="the networks for unseen masks, each measured on another one",
            ),
        ]  # fmt: skip
        if self.descriptions is not None and len(wish.conditions) > 1:
            spoken = self.write(masks, "sentences alone", replace(wish, conditions=("text",)))
            name = f"{label}, unseen masks in words alone"
            lines.append(self.line(name, "generator", spoken, self.masks, of_mask, note=note, **details))
            read = heard(self.descriptions, self.masks)
            understood = read[of_mask, torch.arange(len(masks)) % read.shape[1]]  # sentences as they were told above
            told = self.write(understood, "sentences read", replace(wish, conditions=("class_mask",)))
            right = float((read == self.masks[:, None]).all(-1).float().mean())
            name, note = f"{label}, unseen masks read off words", f"{right:.0%} of the sentences read without a mistake"
            lines.append(self.line(name, "generator", told, self.masks, of_mask, note=note, **details))
        return lines, price

    # --- what it has to beat ------------------------------------------------------------------------------------------

    def ordinary_training(self, paid: Costs) -> Line:
        """The final networks of the held-out runs, each on the mask that it was trained on."""
        stored = baselines.final_stored(self.zoo, self.task, "test")
        of_mask = hamming(self.masks_of_rows(stored.runs), self.masks).argmin(1)
        weights = stored.read(self.zoo, self.device)
        details = {"seconds": paid.train_seconds or None, "flops": paid.train_flops or None}
        steps, note = costs.training_steps(self.task), "trained on these masks"
        return self.line(
            "ordinary training", "reference", weights, self.masks, of_mask, updates=steps, note=note, **details
        )

    def trivial_networks(self) -> list[Line]:
        """Networks that a table of the seen ones gives."""
        seen, weights = self.seen
        wanted, one_each = self.masks, torch.arange(len(self.masks))
        either = nearest_or_complement(wanted, seen, weights, self.task.structure)
        sets = {
            "retrieval: nearest seen mask": (nearest_network(wanted, seen, weights), "the best run of that mask"),
            "retrieval: nearest mask or complement": (either, "a complement's network with its outputs swapped"),
            "ridge from mask to weights": self.regression(ridge_networks, RIDGE_SETTINGS),
            "ridge, with products of classes": self.regression(partial(ridge_networks, products=True), RIDGE_SETTINGS),
            "kernel ridge from mask to weights": self.regression(kernel_ridge_networks, KERNEL_SETTINGS),
            "mean network": (mean_network(wanted, weights), "of all seen ones"),
        }
        found = [self.line(name, "baseline", made, wanted, one_each, note=note) for name, (made, note) in sets.items()]
        return [*self.complements(), *found]

    def complements(self) -> list[Line]:
        """Networks of the complements with their outputs swapped, for the held-out masks whose complement was seen."""
        seen, weights = self.seen
        distance = hamming(~self.masks, seen)
        of_mask = (distance == 0).any(1).nonzero().squeeze(1)
        if len(of_mask) == 0:
            return []
        best = distance[of_mask].argmin(1).to(weights.device)
        swapped = swap_outputs(weights[best], self.task.structure)
        note = f"{len(of_mask)} of {len(self.masks)} masks have theirs in training"
        return [self.line("complement with swapped outputs", "baseline", swapped, self.masks, of_mask, note=note)]

    def regression(
        self, regress: Callable[..., Float[Tensor, "P D"]], candidates: list[dict[str, float]]
    ) -> tuple[Float[Tensor, "masks D"], str]:
        """Networks by a regression from mask to weights, with the settings that are best on the validation masks."""
        (seen, weights), validation = self.seen, self.family.validation_masks

        def score(settings: dict[str, float]) -> float:
            return float(self.validation_metric(regress(validation, seen, weights, **settings), validation).mean())

        best = (min if self.task.minimize else max)(candidates, key=score)
        chosen = ", ".join(f"{name} {value:g}" for name, value in best.items())
        return regress(self.masks, seen, weights, **best), f"{chosen}; chosen on validation masks"

    def majority_class(self) -> list[Line]:
        """Always the answer that is right more often on the training images: no network at all, so that nothing but
        its error is known; nothing where the task is about something else."""
        if self.task.metric != "error":
            return []
        train, test = (self.masks[:, self.task.data(split)[1]] for split in ("train", "test"))
        usual = train.float().mean(1, keepdim=True) > 0.5
        error = 100 * (test != usual).float().mean(1)
        every, scores = torch.arange(len(error)), {"test_error": error}
        return [Line("majority class", "baseline", scores, error.max()[None], every, {"note": "no network"})]

    def notes(self) -> list[str]:
        family = self.family
        complements = "and from their complements" if not family.complements else "but hold the complements"
        found = [
            f"{family.held_out} masks held out for testing, {family.validation} for validation; the "
            f"{len(family.train_masks)} training masks differ in more than {family.radius} classes from all of these "
            f"{complements}",
        ]
        if getattr(self.task.recipe, "shared_init", False):
            found.append(
                "all training networks began as one initialisation, which helps the generator and, as much, the ridge "
                "and the mean network"
            )
        return found


def repeated(masks: Bool[Tensor, "masks classes"], count: int) -> tuple[Bool[Tensor, "P classes"], Int[Tensor, " P"]]:
    """Every mask `count` times, and which mask each row is."""
    of_mask = torch.arange(len(masks)).repeat_interleave(count)
    return masks[of_mask], of_mask


def per_mask(values: Float[Tensor, " P"], of_mask: Int[Tensor, " P"]) -> Float[Tensor, " masks"]:
    """Mean over the networks of every mask that has any, in the order of the masks."""
    return torch.stack([values[of_mask == mask].mean() for mask in of_mask.unique()])
