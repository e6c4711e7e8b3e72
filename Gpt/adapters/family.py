"""Which tasks of a suite have adapters to learn from, which are held out, and which run of the zoo belongs to which.

The parts of the report:

    S1  tasks of the training part, with inputs and wordings that are new
    S2  rule and format are known, their combination is new
    S3  the rule is new
"""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from random import Random

import torch
from jaxtyping import Int
from torch import Tensor

from Gpt.adapters.answers import Answers, encode_answers
from Gpt.adapters.base import load_tokenizer
from Gpt.adapters.suite import SUITES, Member, Suite
from Gpt.adapters.user import is_prompt_folder, read_prompts
from Gpt.errors import ConfigError
from Gpt.seeds import derive_seed

SHOWN = {"decides_zoo": False}  # to generators; the adapters are the same without


@dataclass(frozen=True)
class AdapterFamily:
    """Members are tasks of a suite, numbered; runs are adapters, each trained on one member.

    Attributes:
        suite: "full" (20 rules x 8 formats), "mini" (3 x 2), or a folder that `Gpt.adapters.tools prepare` wrote.
        unseen_rules: rules that are held out with all their formats (S3); of a folder, tasks.
        unseen_combinations: combinations of the other rules and formats that are held out (S2).
        validation: members of the training part whose S1 examples and prompts choose settings.
        seed: of the split and of all examples and prompts.
        runs_per_member: runs for each held-out and each validation member; training runs cycle without end.
        train_examples, examples: labelled examples of each member, to train on, and to validate and to test on each;
            of prompts without answers there are none.
        prompts: unlabelled prompts of each member that describe it to a generator.
        encoder: what reads these prompts, see `Gpt.adapters.conditions`.
        tokens: states of each prompt's tokens (or sentences, as the encoder has it) that a generator is shown, padded
            or cut to this many; 0 for one pooled state a prompt.

    Raises:
        ConfigError: there is no such suite, or the split leaves nothing to train on, or a held-out combination would
            have a rule or format that no training member has.
    """

    suite: str = "full"
    unseen_rules: int = 3
    unseen_combinations: int = 36
    validation: int = 8
    seed: int = 0
    runs_per_member: int = 1
    train_examples: int = 2048
    examples: int = 128
    prompts: int = field(default=128, metadata=SHOWN)
    encoder: str = field(default="minilm", metadata=SHOWN)
    tokens: int = field(default=0, metadata=SHOWN)

    def __post_init__(self) -> None:
        sizes = (self.unseen_rules, self.unseen_combinations, self.validation, self.tokens)
        if min(sizes) < 0 or self.runs_per_member < 1:
            raise ConfigError(f"{self}: sizes must not be negative, and runs_per_member must be at least 1")
        train = [self.members[i] for i in self.splits["train"]]
        if len(train) < max(self.validation, 1):
            raise ConfigError(f"{self} leaves {len(train)} of {len(self.members)} tasks to train on; hold fewer out")
        for attribute in ("rule", "format"):
            known = {getattr(member, attribute) for member in train}
            if not {getattr(self.members[i], attribute) for i in self.splits["s2"]} <= known:
                raise ConfigError(f"{self}: a combination has a {attribute} without training tasks; hold fewer out")

    @cached_property
    def source(self) -> Suite:
        if self.suite in SUITES:
            return SUITES[self.suite]
        if is_prompt_folder(self.suite):
            return read_prompts(self.suite)
        raise ConfigError(
            f"there is no adapter suite {self.suite!r}; expected {', '.join(SUITES)} or a folder that "
            "`python -m Gpt.adapters.tools prepare` has written"
        )

    @property
    def members(self) -> tuple[Member, ...]:
        return self.source.members

    @property
    def answered(self) -> bool:
        """Whether there are examples to train and to test adapters on; otherwise they are judged by their weights."""
        return self.source.answered

    @cached_property
    def splits(self) -> dict[str, tuple[int, ...]]:
        """Member numbers of "train", "validation" (some of them), "s1" (all of them), "s2" and "s3"."""
        draw = Random(derive_seed(self.seed, "adapter split"))
        rules = list(dict.fromkeys(member.rule for member in self.members))
        unseen = set(draw.sample(rules, min(self.unseen_rules, len(rules))))
        known = [i for i, member in enumerate(self.members) if member.rule not in unseen]
        draw.shuffle(known)
        s2, train = known[: self.unseen_combinations], known[self.unseen_combinations :]
        s3 = [i for i, member in enumerate(self.members) if member.rule in unseen]
        parts = {"train": train, "validation": train[: self.validation], "s1": train, "s2": s2, "s3": s3}
        return {name: tuple(sorted(numbers)) for name, numbers in parts.items()}

    # --- runs ---------------------------------------------------------------------------------------------------------

    @property
    def test_runs(self) -> int:
        """Runs of the test split, on the members of S2 and S3; hand it to `Zoo` as its `test_runs`."""
        return (len(self.splits["s2"]) + len(self.splits["s3"])) * self.runs_per_member

    @property
    def validation_runs(self) -> int:
        """Runs of the validation split; hand it to `Zoo` as its `validation_runs`."""
        return self.validation * self.runs_per_member

    def member_of_runs(self, run_ids: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The member that each run is trained on: S2 and S3 in turn, then the validation members, then training ones.

        Raises:
            ConfigError: a run id is negative.
        """
        if len(run_ids) and int(run_ids.min()) < 0:
            raise ConfigError(f"run ids count from 0, got {int(run_ids.min())}")
        held_out, validation = [*self.splits["s2"], *self.splits["s3"]], self.splits["validation"]
        train = list(self.splits["train"])
        Random(derive_seed(self.seed, "adapter order")).shuffle(train)  # any stretch of runs covers the rules evenly
        test_runs, first_train = self.test_runs, self.test_runs + self.validation_runs

        def member(run: int) -> int:
            if run < test_runs:
                return held_out[run % len(held_out)]
            if run < first_train:
                return validation[(run - test_runs) % len(validation)]
            return train[(run - first_train) % len(train)]

        return torch.tensor([member(run) for run in run_ids.tolist()], dtype=torch.long, device=run_ids.device)

    # --- data ---------------------------------------------------------------------------------------------------------

    def condition_prompts(self, split: str, count: int | None = None) -> list[list[str]]:
        """`[members][prompts]` sentences, with the wordings and inputs of "train", "validation" or "test"."""
        count = self.prompts if count is None else count
        return [self.source.condition_prompts(member, split, count, self.seed) for member in self.members]

    def answers(self, base: str, split: str, *, instructed: bool = False) -> Answers:
        """`[members, examples, …]` of "train", "validation" or "test" in the tokens of a base model; on the CPU.

        Args:
            instructed: state the task before each input.
        """
        return _answers(self, base, split, instructed)


@lru_cache(maxsize=8)
def _answers(family: AdapterFamily, base: str, split: str, instructed: bool) -> Answers:
    count = family.train_examples if split == "train" else family.examples
    draw = family.source.instructed if instructed else family.source.examples
    table = [draw(member, split, count, family.seed) for member in family.members]
    return encode_answers(load_tokenizer(base), table)
