"""The language tasks that adapters are judged on: prompts that describe them, examples that test them."""

from functools import cached_property

import torch

from Gpt.adapters.answers import Answers, encode_answers
from Gpt.adapters.base import BaseModel, load_base
from Gpt.adapters.conditions import PromptStates, prompt_states
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.suite import Member, RuleSuite
from Gpt.data.adapter_batches import task_prompts
from Gpt.evaluation.adapter_baselines import other_tasks
from Gpt.tasks import Task

SPLITS = ("s2", "s1", "s3")
PROMPTS = 32
SHOTS = 3
DECODED = 32  # examples of a task that are decoded freely


def judged_splits(family: AdapterFamily) -> list[str]:
    """Those of S1, S2, S3 that have members; the report is about the first."""
    return [name for name in SPLITS if family.splits[name]]


class AdapterTasks:
    """The tasks of a family, split by split; wordings and inputs are those of the split's part.

    Attributes:
        rules: the family's source, where its tasks are a rule and a format; else None.

    Raises:
        TaskError: the task is not about adapters.
    """

    def __init__(self, task: Task, device: torch.device | str):
        self.device = device
        self.family, self.recipe = adapter_parts(task)
        self.rules = self.family.source if isinstance(self.family.source, RuleSuite) else None
        self.splits = judged_splits(self.family)

    @cached_property
    def base(self) -> BaseModel:
        """The frozen language model, which nothing but answers needs."""
        return load_base(self.recipe.base, torch.device(self.device))

    def members(self, split: str) -> list[Member]:
        return [self.family.members[i] for i in self.family.splits[split]]

    def prompts(self, split: str, part: str | None = None) -> PromptStates:
        """The prompts `[tasks, N]` of every task of a split, with the wordings of that part or of another."""
        found = task_prompts(self.family, part or _part(split), torch.device(self.device))
        return found[list(self.family.splits[split]), :PROMPTS]

    def prompts_of_others(self, split: str) -> PromptStates:
        """For every task of a split the prompts of another one, of this split or else of another, see `other_tasks`."""
        own, further = self.family.splits[split], [i for s in self.splits if s != split for i in self.family.splits[s]]
        others = other_tasks(self.members(split), [self.family.members[i] for i in further])
        found = task_prompts(self.family, _part(split), torch.device(self.device))
        return found[torch.tensor([*own, *further])[others], :PROMPTS]

    def descriptions(self, suite: RuleSuite, split: str) -> PromptStates:
        """One prompt for every task of a split that states the task and shows no input."""
        members, seed = self.members(split), self.family.seed
        return self.embedded([suite.descriptions(member, _part(split), 1, seed) for member in members])

    def embedded(self, texts: list[list[str]]) -> PromptStates:
        """Sets of prompts, as the generator reads them."""
        return prompt_states(texts, self.family.encoder, self.family.tokens, device=self.device).to(self.device)

    def answers(self, split: str, instructed: bool = False) -> Answers:
        """Examples of every task of a split."""
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

    def decoded(self, suite: RuleSuite, split: str) -> list[list[str]]:
        """Inputs of every task of a split that are answered by free decoding."""
        examples = [suite.examples(m, _part(split), DECODED, self.family.seed) for m in self.members(split)]
        return [[prompt for prompt, _ in pairs] for pairs in examples]


def _part(split: str) -> str:
    """Which part of wordings and inputs a split is measured on."""
    return split if split in ("train", "validation") else "test"
