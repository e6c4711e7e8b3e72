"""The evaluation of a generator for a family of tasks: networks for class masks that no training network was made for.

Every number is a mean over held-out masks, with a 95 % bootstrap interval over masks, and the worst mask stands beside
it. Selection (guidance, ridge penalties, stored networks) reads the validation masks and validation images; the test
masks are written for and measured once, on test images.
"""

import time
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError
from Gpt.evaluation import baselines, costs
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.evaluate import EvaluationConfig, Progress
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import evaluating
from Gpt.evaluation.results import Costs, Results, Row
from Gpt.evaluation.statistics import bootstrap_interval
from Gpt.generator import Generator
from Gpt.masks import (
    MaskSplit,
    hamming,
    mean_network,
    nearest_network,
    nearest_or_complement,
    ridge_networks,
)
from Gpt.seeds import derive_seed
from Gpt.tasks import Task

GUIDANCE = (1.0, 1.5, 2.0)
PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def evaluate_family(
    generator: Generator,
    task: Task,
    zoo: Zoo,
    config: EvaluationConfig,
    device: torch.device | str,
    spent: Spent = Spent(),
    *,
    progress: Progress | None = None,
) -> Results:
    """Judge a generator on the held-out masks of a family, beside everything that it has to beat.

    Args:
        config: `samples_per_prompt` networks are written for each mask; `guidance` is one more candidate of the
            selection; `label`, `steps`, `max_batch` and `seed` mean what they always do.
        spent: on the generator and on its zoo.

    Raises:
        ConfigError: the task is no family.
    """
    say = progress or (lambda phrase: None)
    bench = FamilyBench(generator, task, zoo, config, device)
    with evaluating(generator):
        say("choosing the guidance")
        guidance = bench.choose_guidance()
        say("unseen masks")
        rows, paid = bench.written(guidance, spent)
        say("baselines")
        rows += [bench.ordinary_training(paid), *bench.trivial_networks(), bench.majority_class()]
    return Results(
        task=task.name,
        metric=f"test_{task.metric}",
        minimize=task.minimize,
        table=rows,
        costs=paid,
        notes=bench.notes(),
    )


def family_score(
    generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """What training watches: the mean over all validation masks, a network each, and the worst of them.

    Returns:
        `validation_<metric>` and `validation_worst_mask`, both on validation images.
    """
    bench = FamilyBench(generator, task, zoo, config, device)
    with evaluating(generator):
        weights = bench.write(bench.family.validation_masks, "validation score", config.guidance)
    metric = bench.validation_metric(weights, bench.family.validation_masks)
    worst = metric.max() if task.minimize else metric.min()
    return {f"validation_{task.metric}": float(metric.mean()), "validation_worst_mask": float(worst)}


class FamilyBench:
    """One evaluation's parts, each a method; what they share is made once."""

    def __init__(
        self, generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
    ):
        self.family = family_of(task)
        self.generator, self.task, self.zoo, self.config, self.device = generator, task, zoo, config, device
        self.masks = self.family.test_masks

    def write(self, masks: Bool[Tensor, "P classes"], name: str, guidance: float) -> Float[Tensor, "P D"]:
        """A network for every mask, at most `max_batch` at once; `name` names the noise.

        A generator that needs starts gets the initialisations of the held-out runs, one after the other.
        """
        parts = []
        for rows in torch.arange(len(masks)).split(self.config.max_batch):
            parts.append(
                self.generator.sample(
                    {"class_mask": masks[rows].float().to(self.device)},
                    self._starts[rows % len(self._starts)] if self.generator.needs_start else None,
                    count=len(rows),
                    steps=self.config.steps,
                    guidance=guidance,
                    seed=derive_seed(self.config.seed, name, int(rows[0])),
                ).float()
            )
        return torch.cat(parts)

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

    def row(
        self,
        name: str,
        kind: str,
        weights: Float[Tensor, "P D"],
        masks: Bool[Tensor, "masks classes"],
        of_mask: Int[Tensor, " P"],
        **details,
    ) -> Row:
        """Network i measured on test images for the mask `masks[of_mask[i]]`."""
        columns = test_population(self.task, weights, "test", masks[of_mask], device=self.device)
        seed, main = self.config.seed, columns.pop(f"test_{self.task.metric}")
        of_worst = main[of_mask == self.worst_mask(main, of_mask)]
        intervals = {
            f"test_{self.task.metric}": bootstrap_interval(per_mask(main, of_mask), seed),
            f"worst_mask_{self.task.metric}": bootstrap_interval(of_worst, seed),
        }
        intervals |= {name: bootstrap_interval(per_mask(other, of_mask), seed) for name, other in columns.items()}
        return Row(name, kind, intervals, **details)

    def worst_mask(self, metric: Float[Tensor, " P"], of_mask: Int[Tensor, " P"]) -> int:
        """The mask whose networks are worst on average."""
        means = per_mask(metric, of_mask)
        return int(of_mask.unique()[means.argmax() if self.task.minimize else means.argmin()])

    # --- the generator ------------------------------------------------------------------------------------------------

    def choose_guidance(self) -> float:
        """The guidance that is best on the validation masks; without a null condition there is no choice."""
        conditions = getattr(self.generator, "conditions", None)
        if conditions is None or conditions.dropout == 0:
            return self.config.guidance
        masks, _ = repeated(self.family.validation_masks, self.config.samples_per_prompt)
        scores = {}
        for guidance in sorted({*GUIDANCE, self.config.guidance}):
            scores[guidance] = float(self.validation_metric(self.write(masks, "choice", guidance), masks).mean())
        best = min if self.task.minimize else max
        return best(scores, key=lambda guidance: scores[guidance])

    def written(self, guidance: float, spent: Spent) -> tuple[list[Row], Costs]:
        """Networks for the held-out masks, for as many seen ones, and, as a control, for other masks than wanted."""
        label, samples = self.config.label, self.config.samples_per_prompt
        masks, of_mask = repeated(self.masks, samples)
        familiar = self.family.train_masks[: len(self.masks)]
        for_familiar = self.write(repeated(familiar, samples)[0], "seen masks", guidance)  # compiles what is timed next
        began = time.perf_counter()
        networks = self.write(masks, "unseen masks", guidance)
        networks.sum().item()  # waits for the device
        seconds = (time.perf_counter() - began) / len(masks)
        flops = costs.count_flops(lambda: self.write(self.masks[:1], "unseen masks", guidance))
        details = {"seconds": seconds, "flops": flops}
        note = f"{samples} networks a mask; guidance {guidance:g}, chosen on validation masks"
        rows = [
            self.row(f"{label}, unseen masks", "generator", networks, self.masks, of_mask, note=note, **details),
            self.row(f"{label}, seen masks", "generator", for_familiar, familiar, of_mask, note=note, **details),
            self.row(
                f"{label}, shuffled masks", "baseline", networks, self.masks, (of_mask + 1) % len(self.masks),
                note="the networks for unseen masks, each measured on another one",
            ),
        ]  # fmt: skip
        passes = (self.config.steps or self.generator.default_steps) * (1 if guidance == 1 else 2)
        paid = costs.costs(
            self.task,
            runs=self.zoo.runs,
            zoo_seconds=spent.zoo_seconds,
            generator_seconds=spent.training_seconds,
            sample_seconds=seconds,
            train_seconds=spent.zoo_seconds / self.zoo.runs,
            generator_flops=spent.training_examples * costs.TRAINING_FACTOR * flops / passes,
            flops_of_a_sample=flops,
        )
        return rows, paid

    # --- what it has to beat ------------------------------------------------------------------------------------------

    def ordinary_training(self, paid: Costs) -> Row:
        """The final networks of the held-out runs, each on the mask that it was trained on."""
        stored = baselines.final_stored(self.zoo, self.task, "test")
        of_mask = hamming(self.masks_of_rows(stored.runs), self.masks).argmin(1)
        weights = stored.read(self.zoo, self.device)
        details = {"seconds": paid.train_seconds or None, "flops": paid.train_flops or None}
        steps, note = costs.training_steps(self.task), "trained on these masks"
        return self.row(
            "ordinary training", "reference", weights, self.masks, of_mask, updates=steps, note=note, **details
        )

    def trivial_networks(self) -> list[Row]:
        """Networks that a table of the seen ones gives."""
        seen, weights = self.seen
        wanted, one_each = self.masks, torch.arange(len(self.masks))
        either = nearest_or_complement(wanted, seen, weights, self.task.structure)
        sets = {
            "retrieval: nearest seen mask": (nearest_network(wanted, seen, weights), "the best run of that mask"),
            "retrieval: nearest mask or complement": (either, "a complement's network with its outputs swapped"),
            "ridge from mask to weights": self.ridge(products=False),
            "ridge, with products of classes": self.ridge(products=True),
            "mean network": (mean_network(wanted, weights), "of all seen ones"),
        }
        return [self.row(name, "baseline", found, wanted, one_each, note=note) for name, (found, note) in sets.items()]

    def ridge(self, products: bool) -> tuple[Float[Tensor, "masks D"], str]:
        """Networks by ridge regression, with the penalty that is best on the validation masks."""
        seen, weights = self.seen
        validation = self.family.validation_masks

        def regressed(wanted: Tensor, penalty: float) -> Tensor:
            return ridge_networks(wanted, seen, weights, penalty=penalty, products=products)

        scores = [float(self.validation_metric(regressed(validation, p), validation).mean()) for p in PENALTIES]
        best = PENALTIES[scores.index(min(scores) if self.task.minimize else max(scores))]
        return regressed(self.masks, best), f"penalty {best:g}, chosen on validation masks"

    def majority_class(self) -> Row:
        """Always the answer that is right more often on the training images: no network at all."""
        train, test = (self.masks[:, self.task.data(split)[1]] for split in ("train", "test"))
        usual = train.float().mean(1, keepdim=True) > 0.5
        error = 100 * (test != usual).float().mean(1)
        worst = bootstrap_interval(error.max()[None], self.config.seed)
        metrics = {"test_error": bootstrap_interval(error, self.config.seed), "worst_mask_error": worst}
        return Row("majority class", "baseline", metrics, note="no network")

    def notes(self) -> list[str]:
        family = self.family
        found = [
            f"{family.held_out} masks held out for testing, {family.validation} for validation; the "
            f"{len(family.train_masks)} training masks differ in more than {family.radius} classes from all of these "
            "and from their complements",
        ]
        if getattr(self.task.recipe, "shared_init", False):
            found.append(
                "all training networks began as one initialisation, which helps the generator and, as much, the ridge "
                "and the mean network"
            )
        return found


def family_of(task: Task) -> MaskSplit:
    """The task's masks.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(task.family, MaskSplit):
        raise ConfigError(f"task {task.name!r} is not one task for each mask; give it the key 'family', a MaskSplit")
    return task.family


def repeated(masks: Bool[Tensor, "masks classes"], count: int) -> tuple[Bool[Tensor, "P classes"], Int[Tensor, " P"]]:
    """Every mask `count` times, and which mask each row is."""
    of_mask = torch.arange(len(masks)).repeat_interleave(count)
    return masks[of_mask], of_mask


def per_mask(values: Float[Tensor, " P"], of_mask: Int[Tensor, " P"]) -> Float[Tensor, " masks"]:
    """Mean over the networks of every mask that has any, in the order of the masks."""
    return torch.stack([values[of_mask == mask].mean() for mask in of_mask.unique()])
