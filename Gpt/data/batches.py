"""Training examples out of a zoo.

G.pt learns from pairs of snapshots of one run, generators that start from noise from single snapshots.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field, PositiveInt
from torch import Tensor

from Gpt.data.augmentation import random_index
from Gpt.data.zoo import Zoo
from Gpt.descriptions import SENTENCES, Descriptions
from Gpt.errors import ConfigError
from Gpt.generator import Batch, Prompt
from Gpt.masks import MaskSplit
from Gpt.tasks import Task

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class BatchConfig:
    """How examples are drawn.

    Attributes:
        from_initial: share of pairs that start at the initialisation, where one-step optimisation starts; the others
            are G.pt's: a spacing, then a start, both uniform.
        last_snapshots: without a start, targets are drawn from this many snapshots at the end of each run; None for
            all.
    """

    from_initial: Share = 0.5
    last_snapshots: PositiveInt | None = None


class BatchSampler:
    """Draws batches from the runs of one split. All draws come from the `rng` given, which lives on the zoo's device.

    Args:
        conditions: names of the prompt's conditions.
        with_start: whether examples have a starting network (an earlier snapshot of the same run).
        permute: rename the hidden units of every example, the same way in start and target.
        identities: how many training runs have an identity, which prompts then name as "identity", Int `[B]`: 0, 1, …
            in the order of the zoo. Runs of other splits have none and borrow those of training runs in turn.
        descriptions: what the condition "text" takes the sentences of a run's mask from, one of them for each example.

    Raises:
        ConfigError: the zoo does not go with the conditions, the starts or the number of identities.
        ZooError: it lacks the metric that prompts are about.
    """

    def __init__(
        self,
        zoo: Zoo,
        task: Task,
        split: str,
        conditions: tuple[str, ...],
        config: BatchConfig,
        *,
        with_start: bool,
        permute: bool,
        identities: int = 0,
        descriptions: Descriptions | None = None,
    ):
        if with_start and zoo.snapshots < 2:
            raise ConfigError("this generator learns from pairs of snapshots, but the zoo has one snapshot of each run")
        self.zoo, self.task, self.config = zoo, task, config
        self.rows = zoo.split(split)
        self.conditions, self.with_start, self.permute = conditions, with_start, permute
        self.metric = zoo.column(f"validation_{task.metric}") if "target_metric" in conditions else None
        self.masks = _masks_of_rows(zoo, task, conditions)
        self.sentences = None
        if "text" in conditions and self.masks is not None:
            if descriptions is None:
                raise ConfigError("condition text: there are no sentences about the class masks; give `descriptions`")
            self.sentences = descriptions(self.masks[self.rows] > 0.5, split).to(zoo.device)
        self.identities = identities
        runs = len(self.rows)
        if identities and split == "train" and runs != identities:
            raise ConfigError(f"generator.identities={identities} does not fit {runs} training runs: use {runs}")

    def __call__(self, count: int, rng: torch.Generator) -> Batch:
        """`count` independent examples."""
        chosen = torch.randint(len(self.rows), (count,), generator=rng, device=rng.device)
        start, target = self._pairs(count, rng) if self.with_start else (None, self._singles(count, rng))
        return self._batch(chosen, start, target, rng)

    def distinct(self, most: int, rng: torch.Generator) -> Batch:
        """`most` different networks without starts, all of them where there are no more."""
        networks = torch.randperm(len(self.rows) * self._last, generator=rng, device=rng.device)[:most]
        return self._batch(networks // self._last, None, self.zoo.snapshots - 1 - networks % self._last, rng)

    def _batch(
        self,
        chosen: Int[Tensor, " B"],
        start: Int[Tensor, " B"] | None,
        target: Int[Tensor, " B"],
        rng: torch.Generator,
    ) -> Batch:
        """Snapshots of the chosen ones of the split's runs, and the prompts that they answer."""
        count, rows = len(chosen), self.rows[chosen]
        weights = [self.zoo.read(rows, snapshots) for snapshots in (target, start) if snapshots is not None]
        if self.permute:
            index = random_index(self.zoo.structure, self.task.aug_fn, self.task.template, count, rng)
            weights = [flat.gather(1, index) for flat in weights]
        prompt = self._prompt(rows, start, target)
        if self.sentences is not None:
            which = torch.randint(SENTENCES, (count,), generator=rng, device=rng.device)
            prompt["text"] = self.sentences[chosen, which]
        if self.identities:
            prompt["identity"] = chosen % self.identities
        masks = None if self.masks is None else self.masks[rows]
        return Batch(weights[0], None if start is None else weights[1], prompt, masks=masks)

    def _pairs(self, count: int, rng: torch.Generator) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
        """Snapshot indices (start, target) with start < target."""
        spacing = torch.randint(1, self.zoo.snapshots, (count,), generator=rng, device=rng.device)
        first = (_uniform(count, rng) * (self.zoo.snapshots - spacing)).long()
        initial = _uniform(count, rng) < self.config.from_initial
        return torch.where(initial, 0, first), torch.where(initial, spacing, first + spacing)

    @property
    def _last(self) -> int:
        """How many snapshots at the end of each run may be targets."""
        return min(self.config.last_snapshots or self.zoo.snapshots, self.zoo.snapshots)

    def _singles(self, count: int, rng: torch.Generator) -> Int[Tensor, " B"]:
        return self.zoo.snapshots - 1 - torch.randint(self._last, (count,), generator=rng, device=rng.device)

    def _prompt(self, rows: Tensor, start: Tensor | None, target: Tensor) -> Prompt:
        prompt: Prompt = {}
        if self.metric is not None:
            wanted = self.metric[rows, target]
            given = self.metric[rows, start] if start is not None else torch.full_like(wanted, torch.nan)
            prompt["target_metric"] = torch.stack([given, wanted], dim=1)
        if self.masks is not None and "class_mask" in self.conditions:
            prompt["class_mask"] = self.masks[rows]
        return prompt


def _uniform(count: int, rng: torch.Generator) -> Float[Tensor, " count"]:
    return torch.rand(count, generator=rng, device=rng.device)


def _masks_of_rows(zoo: Zoo, task: Task, conditions: tuple[str, ...]) -> Float[Tensor, "runs classes"] | None:
    """The mask that each run was trained on; None where there are none, and none are asked for."""
    if isinstance(task.family, MaskSplit):
        return task.family.mask_of_runs(zoo.run_ids).float()
    check_conditions(task, conditions)
    return None


def check_conditions(task: Task, conditions: tuple[str, ...]) -> None:
    """Raises:
    ConfigError: the task is a single one, and a condition is about members of a family.
    """
    for condition in ("class_mask", "text"):
        if condition in conditions and not task.family:
            raise ConfigError(
                f"condition {condition}: task {task.name!r} has no masks; choose a task with the key 'family', such as "
                "digits_mask, or another condition"
            )
