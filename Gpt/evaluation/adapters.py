"""The evaluation of a generator of adapters: language tasks it never saw, beside everything that it has to beat.

Three splits, fixed before training, of which the first is what the report is about:

    s2    unseen pairs of a seen rule and a seen format
    s1    the training tasks, with unseen inputs and wordings
    s3    unseen rules

Every number is a mean over the tasks of a split with a 95 % bootstrap interval over tasks; `adapter_scores` says what
the columns mean. Selection reads the validation tasks; the three splits are measured once.

Several processes share what goes through the language model: answers, free decoding, and the training of the two
multi-task adapters, each of which one process trains. Costs are those of one device: seconds are measured where
adapters are written, see `Price`, and where the zoo was collected, by each worker its own.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt.adapters.answers import Answers
from Gpt.adapters.changes import delta_cosine
from Gpt.adapters.conditions import PromptStates
from Gpt.adapters.decoding import greedy_replies
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.peft_io import gauge_report
from Gpt.data.adapter_batches import fresh_adapter, prompt_for
from Gpt.distributed import Rows, in_chunks
from Gpt.errors import ZooError
from Gpt.evaluation import adapter_baselines as baselines
from Gpt.evaluation.adapter_confusion import confusions
from Gpt.evaluation.adapter_costs import adapter_costs
from Gpt.evaluation.adapter_scores import Line, Scores, exact_by_rule, score_adapters, score_tasks
from Gpt.evaluation.adapter_tasks import PROMPTS, SHOTS, AdapterTasks, judged_splits
from Gpt.evaluation.costs import Price, Spent
from Gpt.evaluation.judge import Judge, Progress
from Gpt.evaluation.novelty import Measured, novelty
from Gpt.evaluation.results import Confusion, Novelty, Results
from Gpt.evaluation.writing import Request
from Gpt.generator import Generator
from Gpt.seeds import rng
from Gpt.tasks import Task

FEWER_PROMPTS = (16, 4, 1)
REMARKS = {"smollm2": "the base model, SmolLM2-135M-Instruct, is read back from weights of 4 bits"}
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
MULTITASK_BATCH = 256  # as many examples as a generator meets in a step of its own
GAUGED = 32  # adapters whose gauges are compared


class AdapterJudge(Judge):
    """Judges a generator of adapters on the splits of its family, by as many examples of each task as that says.

    Attributes:
        measure: what the report is about, of the first split.
    """

    name = "adapters"
    settings = frozenset({"optimiser_steps"})
    splits = frozenset({"validation"})
    measure: ClassVar[str] = "exact"

    @classmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        return isinstance(task.family, AdapterFamily) and task.family.answered

    @classmethod
    def column(cls, task: Task) -> str:
        assert isinstance(task.family, AdapterFamily)
        return f"{judged_splits(task.family)[0]}_{cls.measure}"

    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        """The whole evaluation, see `Judge`.

        Raises:
            TaskError: the task is not about adapters.
            ZooError: a task of the family has no trained adapter.
        """
        progress("base model and trained adapters")
        references = self.references()
        progress("written adapters")
        written, price = self.written()
        progress("other prompts than the task's")
        controls = self.controls()
        progress("stored adapters")
        stored = self.from_stored()
        progress("multi-task adapters")
        multitask = self.multitask()
        progress("distances and costs")
        found = self.novelty([written[0], references[-1], *stored], references[-1])
        paid = adapter_costs(self.generator, self.task, self.zoo, price, spent)
        progress("rules and formats")
        ends = written[0], references[0], references[-1]
        lines = [*written, *controls, *references, *stored, *multitask]
        return self.results(
            minimize=False,
            table=[line.row(*ends, self.config.seed) for line in lines],
            novelty=found,
            confusions=self.confusions(written[0]),
            costs=paid,
            notes=[*self.notes(), *self.rules([references[-1], written[0]])],
        )

    def score(self) -> dict[str, float]:
        """What training watches: adapters for the validation tasks, from wordings and for inputs held out for them.

        Returns:
            `validation_error` (100 - exact match, percent) and `validation_loss`.
        """
        tasks, split = self.tasks, "validation"
        written, answers = {split: self.write(tasks.prompts(split))}, {split: tasks.answers(split)}
        scores = score_adapters(tasks.base, tasks.recipe.spec, written, answers)[split]
        return {
            "validation_error": 100 - float(scores["exact"].mean()),
            "validation_loss": float(scores["loss"].mean()),
        }

    @cached_property
    def tasks(self) -> AdapterTasks:
        return AdapterTasks(self.task, self.device)

    @cached_property
    def fresh(self) -> Float[Tensor, " D"]:
        """The untrained adapter, which is the base model."""
        return fresh_adapter(self.task).to(self.device)

    def request(self, prompts: PromptStates) -> Request:
        """An adapter for every set of prompts."""
        return Request(len(prompts), prompt_for(self.generator, prompts))

    def write(self, prompts: PromptStates) -> Float[Tensor, "tasks D"]:
        return self.writer(self.request(prompts), "adapters")

    def line(
        self,
        name: str,
        kind: str,
        adapters: Mapping[str, Float[Tensor, "tasks D"]],
        scores: dict[str, Scores] | None = None,
        **details: Any,
    ) -> Line:
        """Measure `adapters[split]`, one for each of its tasks, by default as `scores` does."""
        return Line(name, kind, scores or self.scores(adapters), adapters, details)

    def scores(self, adapters: Mapping[str, Float[Tensor, "tasks D"]]) -> dict[str, Scores]:
        """What adapters make of bare examples."""
        return self.answered(adapters, self.tasks.answers)

    def answered(
        self, adapters: Mapping[str, Float[Tensor, "tasks D"]], answers: Callable[[str], Answers]
    ) -> dict[str, Scores]:
        """What adapters make of the examples `answers(split)`."""
        tasks = self.tasks
        members = {split: tasks.members(split) for split in adapters}
        examples = {split: answers(split) for split in adapters}
        return score_tasks(tasks.base, tasks.recipe.spec, tasks.family.source, members, adapters, examples)

    def everywhere(self, adapter: Float[Tensor, " D"]) -> dict[str, Float[Tensor, "tasks D"]]:
        """One adapter for all tasks."""
        return {split: adapter.expand(len(self.tasks.members(split)), -1) for split in self.tasks.splits}

    # --- the generator ------------------------------------------------------------------------------------------------

    def written(self) -> tuple[list[Line], Price]:
        """Adapters from 32 prompts in unseen wordings, from fewer, without an input, in known wordings, and read as
        they are where prompts are translated; a price."""
        tasks, label = self.tasks, self.config.label
        sets = {split: tasks.prompts(split) for split in tasks.splits}
        _, price = self.writer.timed(self.request(sets[tasks.splits[0]]), "adapters")
        written = {split: self.write(prompts) for split, prompts in sets.items()}
        lines = [self.line(label, "generator", written, seconds=price.seconds, flops=price.flops)]
        less = {
            f"{count} prompt{'s' * (count > 1)}": {split: prompts[:, :count] for split, prompts in sets.items()}
            for count in FEWER_PROMPTS
        }
        if tasks.rules:
            less["description only"] = {split: tasks.descriptions(tasks.rules, split) for split in tasks.splits}
            less["wordings of training"] = {split: tasks.prompts(split, "train") for split in tasks.splits}
        for name, few in less.items():
            written = {split: self.write(baselines.repeated(prompts, PROMPTS)) for split, prompts in few.items()}
            lines.append(self.line(f"{label}, {name}", "generator", written))
        if self.generator.translates:
            try:
                self.generator.translates = False
                written = {split: self.write(prompts) for split, prompts in sets.items()}
            finally:
                self.generator.translates = True
            lines.append(self.line(f"{label}, prompts not translated", "generator", written))
        return lines, price

    def controls(self) -> list[Line]:
        """The generator asked for something else, or for nothing: how much of its score is owed to the prompts."""
        draw = rng("cpu", self.config.seed, "random prompts")
        letters = torch.randint(ord("a"), ord("z") + 1, (PROMPTS, 60), generator=draw).tolist()
        nonsense = {"random strings": ["".join(map(chr, row)) for row in letters], "empty prompts": [""] * PROMPTS}
        embedded = self.tasks.embedded(list(nonsense.values()))
        tasks, label = self.tasks, self.config.label
        shuffled = {split: self.write(tasks.prompts_of_others(split)) for split in tasks.splits}
        note = "prompts of another task: of the same split, and of another rule and format, where there is one"
        lines = [self.line(f"{label}, shuffled prompts", "control", shuffled, note=note)]
        for name, adapter in zip(nonsense, self.write(embedded), strict=True):
            lines.append(self.line(f"{label}, {name}", "control", self.everywhere(adapter)))
        return lines

    # --- what it has to beat ------------------------------------------------------------------------------------------

    def references(self) -> list[Line]:
        """The base model bare, instructed, and with worked examples; last, adapters trained for each task."""
        tasks, base, name = self.tasks, self.everywhere(self.fresh), "base model"
        instructed = partial(tasks.answers, instructed=True)
        trained = {split: self.trained(split) for split in tasks.splits}
        updates: int | None = tasks.recipe.iterations
        labelled = min(tasks.recipe.iterations * tasks.recipe.examples, tasks.family.train_examples)
        note = f"{labelled} labelled examples of this very task"
        if self.task.checkpoints:
            updates, note = None, "imported"
        lines = [self.line(name, "baseline", base)]
        if tasks.rules:  # otherwise the examples are all that is known
            told = self.answered(base, instructed)
            lines.append(self.line(f"{name}, instruction in the prompt", "baseline", base, told))
        shown = self.answered(base, tasks.shown_answers)
        return [
            *lines,
            self.line(f"{name}, {SHOTS} examples in the prompt", "baseline", base, shown),
            self.line("trained adapter", "reference", trained, updates=updates, note=note),
        ]

    def trained(self, split: str) -> Float[Tensor, "tasks D"]:
        """The final adapter of the first run of every task."""
        return self.final([rows[0] for rows in self.runs_of(split)])

    def final(self, rows: Sequence[int]) -> Float[Tensor, "n D"]:
        """The final adapters of runs, by their rows in the zoo."""
        chosen = torch.tensor(rows)
        return self.zoo.read(chosen, torch.full_like(chosen, -1)).to(self.device)

    def runs_of(self, split: str) -> list[list[int]]:
        """The rows of every task's runs, at least one; S2 and S3 are the test runs of the zoo."""
        family = self.tasks.family
        rows = self.zoo.split("test" if split in ("s2", "s3") else "train").cpu()
        of_rows = family.member_of_runs(self.zoo.run_ids[rows.to(self.zoo.device)].cpu()).tolist()
        found: dict[int, list[int]] = {}
        for member, row in zip(of_rows, rows.tolist(), strict=True):
            found.setdefault(member, []).append(row)
        missing = [family.members[i].name for i in family.splits[split] if i not in found]
        if missing:
            raise ZooError(
                f"the zoo has no trained adapter for {len(missing)} tasks of {split}, such as {missing[0]}; collect at "
                f"least one run for each: zoo.runs={family.test_runs + family.validation_runs} and the "
                f"{len(family.splits['train'])} training tasks, or look at what was dropped"
            )
        return [found[i] for i in family.splits[split]]

    @cached_property
    def library(self) -> Float[Tensor, "n D"]:
        """The trained adapter of every training task."""
        return self.trained("train")

    @cached_property
    def library_prompts(self) -> PromptStates:
        return self.tasks.prompts("train")

    def from_stored(self) -> list[Line]:
        """Adapters that the library gives without a generator."""
        tasks, library, temperature = self.tasks, self.library, self.temperature()
        similar = {s: baselines.similarity(tasks.prompts(s), self.library_prompts) for s in tasks.splits}
        names = {s: [(member.rule, member.format) for member in tasks.members(s)] for s in ("train", *tasks.splits)}
        nearest = {s: baselines.nearest(similar[s], library) for s in tasks.splits}
        mix = {s: baselines.softmax_mix(similar[s], library, temperature) for s in tasks.splits}
        arithmetic = {s: baselines.task_arithmetic(names[s], names["train"], library) for s in tasks.splits}
        chosen = f"softmax at temperature {temperature:g}, chosen on validation tasks"
        lines = [
            self.line("mean adapter", "baseline", self.everywhere(library.mean(0)), note="of all training tasks"),
            self.line("retrieval: most similar task", "baseline", nearest),
            self.line("mix by similarity", "baseline", mix, note=chosen),
        ]
        if tasks.rules:
            note = "is told rule and format, not the prompts"
            lines.append(self.line("task arithmetic", "baseline", arithmetic, note=note))
        return lines

    def temperature(self) -> float:
        """The temperature of the mix that is best by `validated`, when the library lacks the validation tasks."""
        tasks = self.tasks
        train, validation = (torch.tensor(tasks.family.splits[name]) for name in ("train", "validation"))
        own = (validation[:, None] == train).to(self.device)
        similar = baselines.similarity(tasks.prompts("validation"), self.library_prompts).masked_fill(own, -torch.inf)
        mixed = {temperature: baselines.softmax_mix(similar, self.library, temperature) for temperature in TEMPERATURES}
        found = self.validated(mixed)
        return min(found, key=found.__getitem__)

    def validated(self, adapters: Mapping[float, Float[Tensor, "tasks D"]]) -> dict[float, float]:
        """Mean loss of each set of adapters for the validation tasks."""
        tasks = self.tasks
        answers = dict.fromkeys(adapters, tasks.answers("validation"))
        scores = score_adapters(tasks.base, tasks.recipe.spec, adapters, answers)
        return {name: float(found["loss"].mean()) for name, found in scores.items()}

    def multitask(self) -> list[Line]:
        """One adapter for all training tasks, from bare inputs; another, trained and tested with instructions."""
        tasks, steps = self.tasks, self.config.optimiser_steps
        ways = {"one adapter for all tasks": False} | ({"the same, with instructions": True} if tasks.rules else {})

        def train(chunk: slice) -> Rows:
            adapter = baselines.multitask_adapter(
                tasks.base, tasks.recipe.spec, self.fresh, tasks.answers("train", [*ways.values()][chunk.start]),
                steps=steps, batch=MULTITASK_BATCH, learning_rate=tasks.recipe.learning_rate, seed=self.config.seed,
            )  # fmt: skip
            return {"adapter": adapter[None]}

        trained, lines, note = in_chunks(train, len(ways), 1)["adapter"], [], f"{MULTITASK_BATCH} examples a step"
        for (name, instructed), adapter in zip(ways.items(), trained, strict=True):
            adapters = self.everywhere(adapter)
            scores = self.answered(adapters, partial(tasks.answers, instructed=instructed))
            lines.append(self.line(name, "baseline", adapters, scores, updates=steps, note=note))
        return lines

    # --- distances and confusions -------------------------------------------------------------------------------------

    def novelty(self, lines: Sequence[Line], trained: Line) -> list[Novelty]:
        """1 - cosine of the change B A to the nearest training adapter, for the first split."""
        split = self.tasks.splits[0]
        between = partial(delta_cosine, self.tasks.recipe.base, self.tasks.recipe.spec)

        def measured(line: Line) -> Measured:
            distance = baselines.nearest_distance(between(line.adapters[split], self.library)).cpu()
            return Measured(line.kind, line.scores[split]["exact"], distance)

        same = torch.eye(len(self.library), dtype=torch.bool, device=self.library.device)
        among = baselines.nearest_distance(between(self.library, self.library), same)
        sets = {line.name: measured(line) for line in lines}
        return novelty(sets, sets[trained.name], float(among.mean()), minimize=False, seed=self.config.seed)[0]

    def confusions(self, line: Line) -> list[Confusion]:
        """Which rule and which format the adapters of each task carry out; nothing for tasks without either."""
        tasks, found = self.tasks, []
        if tasks.rules is None:
            return []
        length = tasks.family.answers(tasks.recipe.base, "test").positions.shape[-1]
        prompts = {split: tasks.decoded(tasks.rules, split) for split in line.adapters}
        together = [inputs for of_split in prompts.values() for inputs in of_split]
        weights = torch.cat([*line.adapters.values()])
        replies = iter(greedy_replies(tasks.base, tasks.recipe.spec, weights, together, length))
        for split, inputs in prompts.items():
            own = [next(replies) for _ in inputs]
            found += confusions(tasks.rules, tasks.members(split), inputs, own, split)
        return found

    def rules(self, lines: Sequence[Line]) -> list[str]:
        """Which rules adapters of these kinds carry out exactly, and which they do not."""
        if self.tasks.rules is None:
            return []
        members = {split: self.tasks.members(split) for split in self.tasks.splits}
        return [f"{line.name}, exact (%) by rule: {exact_by_rule(line, members)}" for line in lines]

    def notes(self) -> list[str]:
        """What a reader has to know of this evaluation."""
        tasks = self.tasks
        counts = ", ".join(f"{len(tasks.members(split))} in {split}" for split in tasks.splits)
        return [
            f"tasks: {counts}; {tasks.family.examples} examples of each, on the bare input: only the adapter, or the "
            "prompt where a row says so, knows the task",
            "format and content are judged on the most likely token after the right ones, not on free decoding; the "
            "tables of rules and formats are",
            "distances are 1 - cosine of the change B A to the nearest training adapter; ratios are to the same "
            "distance between training adapters",
            "a trained adapter is cheap: where the break-even number of tasks is large, training each one is the "
            "better choice for whoever has labelled examples; the generator needs none",
            "training the generator is taken to cost three forward passes of its loss, and training an adapter two of "
            "the frozen language model",
            *filter(None, [REMARKS.get(tasks.recipe.base), self.gauge()]),
        ]

    def gauge(self) -> str | None:
        """What is wrong with averaging or regressing the library, where every adapter has an A of its own."""
        if not self.tasks.recipe.spec.train_a or len(self.library) < 2:
            return None
        return gauge_report([self.task.structure.state_dict(row) for row in self.library[:GAUGED].cpu()]).warning
