"""The evaluation of a generator of adapters for prompts without answers: by weights alone.

What is written is compared with the stored adapter of the same task, which may have been held out, and so is everything
that does without a generator. No pass through the language model is needed. The columns, of every split:

    distance        1 - cosine of the changes B A of an adapter and of its task's own stored one, or of the nearest of
                    several, all layers in one vector: 0 for the same direction, 1 for the base model
    lead            this row's distance minus the generator's, task by task; positive where the generator is nearer
    relative_error  length of the difference of both changes over that of the stored one's (%), the least of several;
                    100 for the base model
    nearest         1 - cosine to the nearest adapter of the library, whose task ever it is of; 0 is a copy
    recognised      the nearest adapter of the library is the task's own (%); of training tasks alone, the library's

Where tasks have several adapters of their own, a row says how far one of them is from the others: by how much trainings
differ is the scale of all distances, though no bound, for what is common to several trainings is nearer to each of them
than another one is. That a change is near to another one is not that it does the same: whoever has answers should have
them judged.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.adapters.changes import apart, delta_cosine
from Gpt.adapters.family import AdapterFamily
from Gpt.evaluation import adapter_baselines as baselines
from Gpt.evaluation.adapter_costs import adapter_costs
from Gpt.evaluation.adapter_scores import Line, Scores
from Gpt.evaluation.adapters import AdapterJudge
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.judge import Progress
from Gpt.evaluation.results import Interval, Results, Row
from Gpt.evaluation.statistics import bootstrap_interval
from Gpt.generator import Generator
from Gpt.tasks import Task

MEASURES = ("distance", "relative_error", "nearest", "recognised")


class AdapterDistanceJudge(AdapterJudge):
    """Judges adapters for prompts without answers by their distance to the stored ones."""

    name = "adapters without answers"
    settings = frozenset()
    ignored = frozenset({"optimiser_steps"})  # which configurations of adapters set, and which trains none here
    measure = "distance"

    @classmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        return isinstance(task.family, AdapterFamily) and not task.family.answered

    @classmethod
    def column(cls, task: Task) -> str:
        """Of unseen tasks, where there are any: of the others, the library has the very adapter that is wanted."""
        assert isinstance(task.family, AdapterFamily)
        return f"s3_{cls.measure}" if task.family.splits["s3"] else super().column(task)

    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        """The whole evaluation, see `Judge`.

        Raises:
            ZooError: a task of the family has no stored adapter.
        """
        progress("stored adapters")
        references, stored = self.references(), self.from_stored()
        progress("written adapters")
        written, price = self.written()
        progress("other prompts than the task's")
        lines = [*written, *self.controls(), *references, *stored]
        progress("costs")
        return self.results(
            minimize=True,
            table=[self.row(line, written[0]) for line in lines],
            costs=adapter_costs(self.generator, self.task, self.zoo, price, spent),
            notes=self.notes(),
        )

    def score(self) -> dict[str, float]:
        """What training watches: adapters for the validation tasks, beside their own.

        Returns:
            `validation_distance` and `validation_relative_error` (percent).
        """
        found = self.scores({"validation": self.write(self.tasks.prompts("validation"))})["validation"]
        return {f"validation_{name}": float(found[name].mean()) for name in ("distance", "relative_error")}

    @cached_property
    def own(self) -> dict[str, list[Float[Tensor, "tasks D"]]]:
        """The stored adapters of every task: the first of each, the second, …; from the first again where a task has no
        more."""
        found = {}
        for split in ("validation", *self.tasks.splits):
            rows = self.runs_of(split)
            most = max(map(len, rows))
            found[split] = [self.final([of_task[i % len(of_task)] for of_task in rows]) for i in range(most)]
        return found

    def scores(self, adapters: Mapping[str, Float[Tensor, "tasks D"]], others: bool = False) -> dict[str, Scores]:
        """Every measure of `MEASURES` that there is.

        Args:
            others: these are some of the tasks' own adapters, and are compared with those that differ from them.
        """
        base, spec, splits = self.tasks.recipe.base, self.tasks.recipe.spec, self.tasks.family.splits
        found: dict[str, Scores] = {}
        for split, written in adapters.items():
            apart_by = []
            for own in self.own[split]:
                left_out = (own == written).all(1) & others
                apart_by.append(torch.stack(apart(base, spec, written, own)).masked_fill(left_out, torch.inf))
            distance, relative = torch.stack(apart_by).amin(0)
            cosine = delta_cosine(base, spec, written, self.library)
            scores = {"distance": distance, "relative_error": 100 * relative}
            scores["nearest"] = baselines.nearest_distance(cosine)
            if set(splits[split]) <= set(splits["train"]):
                place = torch.tensor([splits["train"].index(member) for member in splits[split]], device=cosine.device)
                scores["recognised"] = 100 * (cosine.argmax(1) == place).double()
            found[split] = {name: values.cpu() for name, values in scores.items()}
        return found

    def row(self, line: Line, generator: Line) -> Row:
        """Means over tasks with their intervals, and the generator's lead."""
        metrics: dict[str, Interval] = {}
        for split, scores in line.scores.items():
            values = {name: scores[name] for name in MEASURES if name in scores}
            if line is not generator:
                values["lead"] = scores["distance"] - generator.scores[split]["distance"]
            metrics |= {f"{split}_{name}": bootstrap_interval(x, self.config.seed) for name, x in values.items()}
        return Row(line.name, line.kind, metrics, **line.details)

    def references(self) -> list[Line]:
        """The base model, which changes nothing; the tasks' own adapters, and how they differ among themselves; and the
        nearest ones of the library."""
        splits, library = self.tasks.splits, self.library
        base, spec = self.tasks.recipe.base, self.tasks.recipe.spec
        own = {split: self.own[split][0] for split in splits}
        nearest = {split: library[delta_cosine(base, spec, own[split], library).argmax(1)] for split in splits}
        bound = "is told the task's own adapter: no way to choose one of the library is better"
        lines = [
            self.line("base model", "baseline", self.everywhere(self.fresh)),
            self.line("own adapter", "reference", own, note="imported; what all are compared with"),
        ]
        differs = [torch.stack([(other != own[split]).any(1) for other in self.own[split]]).any(0) for split in splits]
        if torch.cat(differs).all():
            note = "the first of a task's own adapters, compared with its others"
            lines.append(self.line("another training", "reference", own, self.scores(own, others=True), note=note))
        return [*lines, self.line("nearest of the library", "reference", nearest, note=bound)]

    def validated(self, adapters: Mapping[float, Float[Tensor, "tasks D"]]) -> dict[float, float]:
        """Mean distance of each set of adapters for the validation tasks to their own."""
        found = {name: self.scores({"validation": written})["validation"] for name, written in adapters.items()}
        return {name: float(scores["distance"].mean()) for name, scores in found.items()}

    def notes(self) -> list[str]:
        """What a reader has to know of this evaluation."""
        tasks, count = self.tasks, len(self.library)
        counts = ", ".join(f"{len(tasks.members(split))} in {split}" for split in tasks.splits)
        among = delta_cosine(tasks.recipe.base, tasks.recipe.spec, self.library, self.library)
        between = baselines.nearest_distance(among, torch.eye(count, dtype=torch.bool, device=among.device)).mean()
        others = [f"an adapter of the library is {float(between):.3g} from the nearest other one"] if count > 1 else []
        return [
            f"tasks: {counts}; their prompts have no answers, so that nothing says what an adapter does: it is "
            "compared with the imported one of its task, the nearest of several",
            "distances are 1 - cosine of the change B A, all layers in one vector; relative errors count its length "
            "too; DoRA's magnitudes count in neither",
            "the tasks of s1 are those that the generator has learnt from, told by other prompts: the library has the "
            "very adapters that are wanted, so that looking one up is hard to beat; of the tasks of s3 it has none",
            *others,
            "training the generator is taken to cost three forward passes of its loss",
            *filter(None, [self.gauge()]),
        ]
