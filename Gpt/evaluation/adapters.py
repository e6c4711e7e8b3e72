"""The evaluation of a generator of adapters: language tasks it never saw, beside everything that it has to beat.

Three splits, fixed before training, of which the first is what the report is about:

    s2    unseen pairs of a seen rule and a seen format
    s1    the training tasks, with unseen inputs and wordings
    s3    unseen rules

Every number is a mean over the tasks of a split with a 95 % bootstrap interval over tasks; `adapter_scores` says what
the columns mean. Selection reads the validation tasks; the three splits are measured once.
"""

import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from Gpt import seeds
from Gpt.adapters.answers import Answers, answer_scores, encode_answers
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import PromptStates, prompt_states
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.peft_io import gauge_report
from Gpt.adapters.suite import Member, RuleSuite
from Gpt.data.adapter_batches import fresh_adapter, prompt_for, task_prompts
from Gpt.data.zoo import Zoo
from Gpt.distributed import Rows, busy, from_first, in_chunks
from Gpt.errors import ZooError
from Gpt.evaluation import adapter_baselines as baselines
from Gpt.evaluation.adapter_confusion import confusions
from Gpt.evaluation.adapter_costs import adapter_costs
from Gpt.evaluation.adapter_scores import Line, score_tasks
from Gpt.evaluation.costs import Spent
from Gpt.evaluation.evaluate import EvaluationConfig, Progress
from Gpt.evaluation.prompting import evaluating
from Gpt.evaluation.results import Confusion, Novelty, Results
from Gpt.evaluation.statistics import bootstrap_interval, data_copying_z
from Gpt.generator import Generator
from Gpt.seeds import derive_seed
from Gpt.tasks import Task

SPLITS = ("s2", "s1", "s3")
PROMPTS = 32
FEWER_PROMPTS = (16, 4, 1)
SHOTS = 3
REMARKS = {"smollm2": "the base model, SmolLM2-135M-Instruct, is read back from weights of 4 bits"}
TEMPERATURES = (0.01, 0.02, 0.05, 0.1, 0.2)
MULTITASK_BATCH = 256  # as many examples as a generator meets in a step of its own
GAUGED = 32  # adapters whose gauges are compared
DECODED = 32  # examples of a task that are decoded freely


def evaluate_adapters(
    generator: Generator,
    task: Task,
    zoo: Zoo,
    config: EvaluationConfig,
    device: torch.device | str,
    spent: Spent = Spent(),
    *,
    progress: Progress | None = None,
) -> Results:
    """Judge a generator of adapters on the splits of its family.

    Args:
        config: `optimiser_steps` steps train each multi-task adapter; `label`, `steps`, `guidance`, `max_batch` and
            `seed` mean what they always do. How many examples test each task is the family's to say.
        spent: on the generator and on its zoo.

    Raises:
        TaskError: the task is not about adapters.
        ZooError: a task of the family has no trained adapter.
    """
    say = progress or (lambda phrase: None)
    bench = AdapterBench(generator, task, zoo, config, device)
    with evaluating(generator):
        say("base model and trained adapters")
        references = bench.references()
        say("written adapters")
        written, seconds = bench.written()
        say("other prompts than the task's")
        controls = bench.controls()
        say("stored adapters")
        stored = bench.from_stored()
        say("multi-task adapters")
        multitask = bench.multitask()
        say("distances and costs")
        novelty = [bench.novelty(line, references[-1]) for line in (written[0], references[-1], *stored)]
        one = bench.prompts(bench.splits[0])[:1]
        paid = adapter_costs(generator, task, zoo, lambda: bench.write(one), seconds, spent)
        say("rules and formats")
        found = bench.confusions(written[0])
    ends = written[0], references[0], references[-1]
    lines = [*written, *controls, *references, *stored, *multitask]
    return Results(
        task=task.name,
        metric=adapters_metric(bench.family),
        minimize=False,
        table=[line.row(*ends, config.seed) for line in lines],
        novelty=novelty,
        confusions=found,
        costs=paid,
        notes=bench.notes(),
    )


def judged_splits(family: AdapterFamily) -> list[str]:
    """Those of S1, S2, S3 that have members; the report is about the first."""
    return [name for name in SPLITS if family.splits[name]]


def adapters_metric(family: AdapterFamily) -> str:
    """The column that the evaluation is about."""
    return f"{judged_splits(family)[0]}_exact"


def adapters_score(
    generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
) -> dict[str, float]:
    """What training watches: adapters for the validation tasks, from wordings and for inputs held out for validation.

    Returns:
        `validation_error` (100 - exact match, percent) and `validation_loss`.
    """
    bench = AdapterBench(generator, task, zoo, config, device)
    with evaluating(generator):
        weights = bench.write(bench.prompts("validation"))
    scores = answer_scores(bench.base, bench.recipe.spec, weights, bench.answers("validation"))
    return {
        "validation_error": 100 - 100 * float(scores.exact.float().mean()),
        "validation_loss": float(scores.loss.mean()),
    }


class AdapterBench:
    """One evaluation's parts, each a method; what they share is made once."""

    def __init__(
        self, generator: Generator, task: Task, zoo: Zoo, config: EvaluationConfig, device: torch.device | str
    ):
        self.generator, self.task, self.zoo, self.config, self.device = generator, task, zoo, config, device
        self.family, self.recipe = adapter_parts(task)
        self.base = load_base(self.recipe.base, torch.device(device))
        self.rules = self.family.source if isinstance(self.family.source, RuleSuite) else None
        self.splits = judged_splits(self.family)
        self.fresh = fresh_adapter(task).to(device)

    # --- prompts, examples, measurements ------------------------------------------------------------------------------

    def members(self, split: str) -> list[Member]:
        return [self.family.members[i] for i in self.family.splits[split]]

    def prompts(self, split: str) -> PromptStates:
        """The prompts `[tasks, N]` of every task of a split, in the wordings of that part."""
        found = task_prompts(self.family, _part(split), torch.device(self.device))
        return found[list(self.family.splits[split]), :PROMPTS]

    def descriptions(self, suite: RuleSuite, split: str) -> PromptStates:
        """One prompt for every task of a split that states the task and shows no input."""
        members, seed = self.members(split), self.family.seed
        texts = [suite.descriptions(member, _part(split), 1, seed) for member in members]
        return prompt_states(texts, self.family.encoder, self.family.tokens, device=self.device).to(self.device)

    def answers(self, split: str, instructed: bool = False) -> Answers:
        """Examples of every task of a split, inputs of that part."""
        found = self.family.answers(self.recipe.base, _part(split), instructed=instructed)
        return found[list(self.family.splits[split])].to(self.device)

    def shown_answers(self, split: str) -> Answers:
        """The same, after three worked examples of the training part each."""
        suite, count, seed = self.family.source, self.family.examples, self.family.seed
        rows = []
        for member in self.members(split):
            shown = ["".join(pair) for pair in suite.examples(member, "train", SHOTS * count, seed)]
            before = ["".join(shown[SHOTS * i :][:SHOTS]) for i in range(count)]
            bare = suite.examples(member, _part(split), count, seed)
            rows.append([(shots + prompt, answer) for shots, (prompt, answer) in zip(before, bare, strict=True)])
        return encode_answers(self.base.tokenizer, rows).to(self.device)

    @torch.no_grad()
    def write(self, prompts: PromptStates) -> Float[Tensor, "tasks D"]:
        """An adapter for every set of prompts, `max_batch` at once, shared by the processes."""

        def write(chunk: slice) -> Rows:
            written = self.generator.sample(
                prompt_for(self.generator, prompts[chunk]),
                count=chunk.stop - chunk.start,
                steps=self.config.steps,
                guidance=self.config.guidance,
                seed=derive_seed(self.config.seed, "adapters", chunk.start),
            )
            return {"weights": written.float()}

        return in_chunks(write, len(prompts), self.config.max_batch)["weights"]

    def line(
        self,
        name: str,
        kind: str,
        adapters: Mapping[str, Float[Tensor, "tasks D"]],
        answers: Callable[[str], Answers] | None = None,
        **details: Any,
    ) -> Line:
        """Measure `adapters[split]`, one for each of its tasks, on `answers(split)`, by default bare examples."""
        suite, spec, answers = self.family.source, self.recipe.spec, answers or self.answers
        scores = {
            split: score_tasks(self.base, spec, suite, self.members(split), weights, answers(split))
            for split, weights in adapters.items()
        }
        return Line(name, kind, scores, adapters, details)

    def everywhere(self, adapter: Float[Tensor, " D"]) -> dict[str, Float[Tensor, "tasks D"]]:
        """One adapter for all tasks."""
        return {split: adapter.expand(len(self.family.splits[split]), -1) for split in self.splits}

    # --- the generator ------------------------------------------------------------------------------------------------

    def written(self) -> tuple[list[Line], float]:
        """Adapters from 32 prompts in unseen wordings, from fewer, from none with an input; and the seconds of one."""
        sets = {split: self.prompts(split) for split in self.splits}
        first = sets[self.splits[0]]
        self.write(first)  # what is compiled or allocated at first is not timed
        began = time.perf_counter()
        self.write(first).sum().item()  # waits for the device
        seconds = from_first(time.perf_counter() - began) * busy(len(first), self.config.max_batch) / len(first)
        label = self.config.label
        written = {split: self.write(prompts) for split, prompts in sets.items()}
        lines = [self.line(label, "generator", written, seconds=seconds)]
        less = {
            f"{count} prompt{'s' * (count > 1)}": {split: prompts[:, :count] for split, prompts in sets.items()}
            for count in FEWER_PROMPTS
        }
        if self.rules:
            less["description only"] = {split: self.descriptions(self.rules, split) for split in self.splits}
        for name, few in less.items():
            written = {split: self.write(baselines.repeated(prompts, PROMPTS)) for split, prompts in few.items()}
            lines.append(self.line(f"{label}, {name}", "generator", written))
        return lines, seconds

    def controls(self) -> list[Line]:
        """The generator asked for something else, or for nothing: how much of its score is owed to the prompts."""
        draw = seeds.rng("cpu", self.config.seed, "random prompts")
        letters = torch.randint(ord("a"), ord("z") + 1, (PROMPTS, 60), generator=draw).tolist()
        nonsense = {"random strings": ["".join(map(chr, row)) for row in letters], "empty prompts": [""] * PROMPTS}
        embedded = prompt_states(list(nonsense.values()), self.family.encoder, self.family.tokens).to(self.device)
        label = self.config.label
        shuffled = {s: self.write(self.prompts(s)[baselines.other_tasks(self.members(s))]) for s in self.splits}
        note = "prompts of a task of the same split that differs in rule and format, where there is one"
        lines = [self.line(f"{label}, shuffled prompts", "baseline", shuffled, note=note)]
        for name, adapter in zip(nonsense, self.write(embedded), strict=True):
            lines.append(self.line(f"{label}, {name}", "baseline", self.everywhere(adapter)))
        return lines

    # --- what it has to beat ------------------------------------------------------------------------------------------

    def references(self) -> list[Line]:
        """The base model bare, instructed, and with worked examples; last, adapters trained for each task."""
        base, name = self.everywhere(self.fresh), "base model"
        instructed = partial(self.answers, instructed=True)
        trained = {split: self.trained(split) for split in self.splits}
        updates: int | None = self.recipe.iterations
        note = f"{self.recipe.iterations * self.recipe.examples} labelled examples of this very task"
        if self.task.checkpoints:
            updates, note = None, "imported"
        return [
            self.line(name, "baseline", base),
            self.line(f"{name}, instruction in the prompt", "baseline", base, instructed),
            self.line(f"{name}, {SHOTS} examples in the prompt", "baseline", base, self.shown_answers),
            self.line("trained adapter", "reference", trained, updates=updates, note=note),
        ]

    def trained(self, split: str) -> Float[Tensor, "tasks D"]:
        """The final adapter of the first run of every task; S2 and S3 are the test runs of the zoo."""
        rows = self.zoo.split("test" if split in ("s2", "s3") else "train").cpu()
        of_rows = self.family.member_of_runs(self.zoo.run_ids[rows.to(self.zoo.device)].cpu()).tolist()
        first = dict(zip(reversed(of_rows), reversed(rows.tolist()), strict=True))
        missing = [self.family.members[i].name for i in self.family.splits[split] if i not in first]
        if missing:
            raise ZooError(
                f"the zoo has no trained adapter for {len(missing)} tasks of {split}, such as {missing[0]}; collect at "
                f"least one run for each: zoo.runs={self.family.test_runs + self.family.validation_runs} and the "
                f"{len(self.family.splits['train'])} training tasks, or look at what was dropped"
            )
        chosen = torch.tensor([first[i] for i in self.family.splits[split]])
        return self.zoo.read(chosen, torch.full_like(chosen, -1)).to(self.device)

    @cached_property
    def library(self) -> Float[Tensor, "n D"]:
        """The trained adapter of every training task."""
        return self.trained("train")

    @cached_property
    def library_prompts(self) -> PromptStates:
        return self.prompts("train")

    def from_stored(self) -> list[Line]:
        """Adapters that the library gives without a generator."""
        library, temperature = self.library, self.temperature()
        similar = {s: baselines.similarity(self.prompts(s), self.library_prompts) for s in self.splits}
        names = {s: [(member.rule, member.format) for member in self.members(s)] for s in ("train", *self.splits)}
        nearest = {s: baselines.nearest(similar[s], library) for s in self.splits}
        mix = {s: baselines.softmax_mix(similar[s], library, temperature) for s in self.splits}
        arithmetic = {s: baselines.task_arithmetic(names[s], names["train"], library) for s in self.splits}
        chosen = f"softmax at temperature {temperature:g}, chosen on validation tasks"
        return [
            self.line("mean adapter", "baseline", self.everywhere(library.mean(0)), note="of all training tasks"),
            self.line("retrieval: most similar task", "baseline", nearest),
            self.line("mix by similarity", "baseline", mix, note=chosen),
            self.line("task arithmetic", "baseline", arithmetic, note="is told rule and format, not the prompts"),
        ]

    def temperature(self) -> float:
        """The temperature of the mix with the least loss on validation tasks, when the library lacks them."""
        train, validation = (torch.tensor(self.family.splits[name]) for name in ("train", "validation"))
        own = (validation[:, None] == train).to(self.device)
        similar = baselines.similarity(self.prompts("validation"), self.library_prompts).masked_fill(own, -torch.inf)
        answers = self.answers("validation")

        def loss(temperature: float) -> float:
            mixed = baselines.softmax_mix(similar, self.library, temperature)
            return float(answer_scores(self.base, self.recipe.spec, mixed, answers).loss.mean())

        return min(TEMPERATURES, key=loss)

    def multitask(self) -> list[Line]:
        """One adapter for all training tasks, from bare inputs; another, trained and tested with instructions."""
        lines = []
        for name, instructed in {"one adapter for all tasks": False, "the same, with instructions": True}.items():
            adapter = baselines.multitask_adapter(
                self.base, self.recipe.spec, self.fresh, self.answers("train", instructed),
                steps=self.config.optimiser_steps, batch=MULTITASK_BATCH, learning_rate=self.recipe.learning_rate,
                seed=self.config.seed,
            )  # fmt: skip
            answers, note = partial(self.answers, instructed=instructed), f"{MULTITASK_BATCH} examples a step"
            steps = self.config.optimiser_steps
            lines.append(self.line(name, "baseline", self.everywhere(adapter), answers, updates=steps, note=note))
        return lines

    # --- distances and confusions -------------------------------------------------------------------------------------

    def novelty(self, line: Line, trained: Line) -> Novelty:
        """1 - cosine of the change B A to the nearest training adapter, for the first split."""
        split, spec = self.splits[0], self.recipe.spec
        between = partial(baselines.delta_cosine, self.base, spec)
        own = baselines.nearest_distance(between(line.adapters[split], self.library))
        held_out = baselines.nearest_distance(between(trained.adapters[split], self.library))
        same = torch.eye(len(self.library), dtype=torch.bool, device=own.device)
        among = baselines.nearest_distance(between(self.library, self.library), same)
        exact, bar = line.scores[split]["exact"], trained.scores[split]["exact"]
        good = exact >= bar.mean() - bar.std(correction=0)
        return Novelty(
            name=line.name,
            kind=line.kind,
            metric=bootstrap_interval(exact, self.config.seed),
            distance=float(own.mean()),
            distance_ratio=float(own.mean() / among.mean()),
            error_overlap=None,
            copying_z=data_copying_z(own, held_out),
            novel_and_good=float(((own >= among.mean()).cpu() & good).double().mean()),
        )

    def confusions(self, line: Line) -> list[Confusion]:
        """Which rule and which format the adapters of each task carry out; nothing for tasks without either."""
        if self.rules is None:
            return []
        length = self.family.answers(self.recipe.base, "test").positions.shape[-1]
        found = []
        for split, weights in line.adapters.items():
            members = self.members(split)
            examples = [self.rules.examples(m, _part(split), DECODED, self.family.seed) for m in members]
            prompts = [[prompt for prompt, _ in pairs] for pairs in examples]
            found += confusions(self.base, self.recipe.spec, self.rules, members, weights, prompts, length, split)
        return found

    def notes(self) -> list[str]:
        """What a reader has to know of this evaluation."""
        counts = ", ".join(f"{len(self.family.splits[split])} in {split}" for split in self.splits)
        return [
            f"tasks: {counts}; {self.family.examples} examples of each, on the bare input: only the adapter, or the "
            "prompt where a row says so, knows the task",
            "format and content are judged on the most likely token after the right ones, not on free decoding; the "
            "tables of rules and formats are",
            "distances are 1 - cosine of the change B A to the nearest training adapter; ratios are to the same "
            "distance between training adapters",
            "a trained adapter is cheap: where the break-even number of tasks is large, training each one is the "
            "better choice for whoever has labelled examples; the generator needs none",
            "training the generator is taken to cost three forward passes of its loss, and training an adapter two of "
            "the frozen language model",
            *filter(None, [REMARKS.get(self.recipe.base), self.gauge()]),
        ]

    def gauge(self) -> str | None:
        """What is wrong with averaging or regressing the library, where every adapter has an A of its own."""
        if not self.recipe.spec.train_a or len(self.library) < 2:
            return None
        return gauge_report([self.task.structure.state_dict(row) for row in self.library[:GAUGED].cpu()]).warning


def _part(split: str) -> str:
    """Which part of wordings and inputs a split is measured on."""
    return split if split in ("train", "validation") else "test"
