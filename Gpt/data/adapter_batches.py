"""Training examples for generators of adapters: a trained adapter, prompts of its task, and examples to answer.

target    [B, D]              a stored adapter of the task (member) that example b is about
prompt    a random set of the member's prompts, without answers: {"text": [B, N, L, features]} and the mask of its
          padding, {"text_mask": [B, N, L]}, or the set's mean, {"text": [B, features]}
answers   [B, E]              inputs and answers of that member, for the loss through the frozen language model, if the
          family has any
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from Gpt.adapters.answers import Answers
from Gpt.adapters.base import load_base
from Gpt.adapters.conditions import PromptStates, prompt_states
from Gpt.adapters.family import AdapterFamily
from Gpt.adapters.measure import adapter_parts
from Gpt.adapters.replay import AnswerLoss
from Gpt.data.batches import BatchConfig
from Gpt.data.zoo import Zoo
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Generator, Prompt
from Gpt.tasks import Task


@dataclass(kw_only=True)
class AdapterBatch(Batch):
    """A `Gpt.generator.Batch` with what the losses of adapters need besides.

    Attributes:
        members: the task of every example.
        fresh: the untrained adapter, which is the base model.
        known: all prompts of every task that batches of this kind are drawn from.
        answers: E examples of every task; None where prompts have no answers.
        loss_of: the loss of answers through the frozen language model; None without answers.
    """

    members: Int[Tensor, " B"]
    fresh: Float[Tensor, " D"]
    known: PromptStates
    answers: Answers | None
    loss_of: AnswerLoss | None

    def answer_loss(self, weights: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """Cross-entropy (nats a token) of the answers that the base model gives with each of these adapters.

        Raises:
            ConfigError: there are no answers.
        """
        if self.answers is None or self.loss_of is None:
            raise ConfigError("the prompts of this task have no answers, so no loss goes through the language model")
        return self.loss_of(weights, self.answers)


class AdapterBatchSampler:
    """Draws batches for the adapters of one split, every rule as often as any other, however many of its tasks there
    are. All draws come from the `rng` given, on the zoo's device.

    Args:
        split: "train" or "validation"; the wordings and the inputs are of that part too.
        config: of `BatchConfig`, `last_snapshots` alone.
        prompts: rows of a set. It holds 1 to `prompts` different prompts, a number drawn evenly in its logarithm and
            repeated to fill the rows, so that a generator meets small sets too.
        examples: to be answered by each adapter.
        pooled: hand out the mean of the set instead.
    """

    def __init__(
        self,
        zoo: Zoo,
        task: Task,
        split: str,
        config: BatchConfig,
        *,
        prompts: int = 32,
        examples: int = 8,
        pooled: bool = False,
    ):
        self.zoo, self.split, self.config = zoo, split, config
        self.family, self.recipe = adapter_parts(task)
        self.rows = zoo.split(split)
        self.members = self.family.member_of_runs(zoo.run_ids)
        rules = [self.family.members[i].rule for i in self.members[self.rows].tolist()]
        self.shares = _even_shares(rules).to(zoo.device)
        self.prompts, self.examples, self.pooled = prompts, examples, pooled
        self.fresh = fresh_adapter(task).to(zoo.device)

    def __call__(self, count: int, rng: torch.Generator) -> AdapterBatch:
        """`count` independent examples."""
        rows = self.rows[self.shares.multinomial(count, replacement=True, generator=rng)]
        last = min(self.config.last_snapshots or self.zoo.snapshots, self.zoo.snapshots)
        target = self.zoo.read(rows, self.zoo.snapshots - 1 - _below(last, (count,), rng))
        members = self.members[rows]
        sets = self._prompt_sets(members, rng)
        return AdapterBatch(
            target=target,
            prompt=_prompt(sets, self.pooled),
            members=members,
            fresh=self.fresh,
            known=self._known,
            answers=self._examples(members, rng),
            loss_of=self._loss_of if self.family.answered else None,
        )

    def _examples(self, members: Int[Tensor, " B"], rng: torch.Generator) -> Answers | None:
        if not self.family.answered:
            return None
        chosen = _below(self._answers.tokens.shape[1], (len(members), self.examples), rng)
        return self._answers[members[:, None], chosen]

    def _prompt_sets(self, members: Int[Tensor, " B"], rng: torch.Generator) -> PromptStates:
        count, stored = len(members), self._stored.mask.shape[1]
        order = torch.rand(count, stored, generator=rng, device=rng.device).argsort(1)
        most = min(self.prompts, stored)
        different = most ** torch.rand(count, 1, generator=rng, device=rng.device)
        repeated = torch.arange(self.prompts, device=rng.device) % different.round().long()
        return self._stored[members[:, None], order.gather(1, repeated)]

    @cached_property
    def _loss_of(self) -> AnswerLoss:
        return AnswerLoss(load_base(self.recipe.base, self.zoo.device), self.recipe.spec)

    @cached_property
    def _stored(self) -> PromptStates:
        return task_prompts(self.family, self.split, self.zoo.device)

    @cached_property
    def _known(self) -> PromptStates:
        return self._stored[self.members[self.rows].unique()]

    @cached_property
    def _answers(self) -> Answers:
        return self.family.answers(self.recipe.base, self.split).to(self.zoo.device)


@lru_cache(maxsize=8)
def task_prompts(family: AdapterFamily, part: str, device: torch.device) -> PromptStates:
    """The prompts `[members, prompts]` of every task, in the wordings and with the inputs of "train", "validation" or
    "test". They are embedded once."""
    return prompt_states(family.condition_prompts(part), family.encoder, family.tokens, device=device).to(device)


def fresh_adapter(task: Task) -> Float[Tensor, " D"]:
    """The untrained adapter: the base model."""
    return task.structure.flatten({name: value.detach() for name, value in task.template.state_dict().items()})


def prompt_for(generator: Generator, sets: PromptStates) -> Prompt:
    """Sets `[B, N]` of prompts in the form that a generator reads."""
    return _prompt(sets, pooled=not generator.reads_prompt_sets)


def _prompt(sets: PromptStates, pooled: bool) -> Prompt:
    return {"text": sets.pooled()} if pooled else {"text": sets.states, "text_mask": sets.mask}


def _even_shares(kinds: Sequence[str]) -> Float[Tensor, " n"]:
    """What each of these is drawn with, so that all kinds are drawn alike."""
    counts = Counter(kinds)
    return torch.tensor([1 / counts[kind] for kind in kinds])


def _below(limit: int, shape: tuple[int, ...], rng: torch.Generator) -> Int[Tensor, "..."]:
    return torch.randint(limit, shape, generator=rng, device=rng.device)
