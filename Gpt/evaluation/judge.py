"""What all judges of generators have in common; `Gpt.evaluation.judges` says which one is asked.

Selection (prompts, guidance, learning rates, stored networks) reads validation data; the test split is measured once,
for the report.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveInt

from Gpt.data.zoo import Zoo
from Gpt.descriptions import Descriptions
from Gpt.errors import ConfigError
from Gpt.evaluation.costs import Spent, trainings
from Gpt.evaluation.results import Results
from Gpt.evaluation.writing import Writer
from Gpt.generator import Generator
from Gpt.tasks import Task

Progress = Callable[[str], None]
TwoOrMore = Annotated[int, Field(ge=2)]
NoiseScale = Annotated[float, Field(ge=0, allow_inf_nan=False)]

EVERY_JUDGE = frozenset({"label", "steps", "guidance", "max_batch", "seed", "beside"})


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is evaluated. Which settings a judge reads beside the first six is in its `settings`.

    Attributes:
        label: the generator's name in the tables.
        steps, guidance: of the sampler, see `Generator.sample`.
        max_batch: networks written at once, by one process; several processes share such batches.
        beside: folders of finished runs whose generators stand in the same table.
        networks: starting networks of each curve, row and trace; or networks written without a prompt.
        quick_networks: the same for the score that training watches.
        prompts: wishes for each starting network.
        samples_per_prompt: networks written for each wish or mask; the best of several for a wish, by validation data,
            get a row.
        prompt_start_coeff: the prompt range ends at this share of the start's own metric (Peebles et al. 2022).
        recursive_steps: updates of the recursive traces; 0 leaves them out, from unfamiliar starts too.
        optimiser_steps: longest run of the optimisers; equal time and equal FLOPs are cut there. Also the training of
            multi-task adapters.
        learning_rates, tuning_networks: grid and starting networks that an optimiser's learning rate is tuned on.
        soup: networks averaged into one soup.
        noise_scales: standard deviations of the noise baseline, in units of each tensor's own.
        novelty_networks: networks of each set whose novelty is measured.
        novelty_runs: training runs that they are compared with, the best ones if there are more; two at least, since
            the distance between two is the unit.
        novelty_behaviours: training networks whose mistakes they are compared with; two at least, a final and a best
            snapshot.
        novelty_candidates: training networks that each is matched with, unit by unit.
        recalibrate: measure whole networks also with batch-norm statistics re-estimated on training images.
    """

    label: str = "G.pt"
    steps: PositiveInt | None = None
    guidance: FiniteFloat = 1.0
    max_batch: PositiveInt = 2048
    seed: int = 0
    beside: tuple[str, ...] = ()
    networks: PositiveInt = 64
    quick_networks: PositiveInt = 16
    prompts: PositiveInt = 20
    samples_per_prompt: PositiveInt = 1
    prompt_start_coeff: FiniteFloat = 0.9
    recursive_steps: NonNegativeInt = 5
    optimiser_steps: NonNegativeInt = 300
    learning_rates: PositiveInt = 21
    tuning_networks: PositiveInt = 8
    soup: PositiveInt = 16
    noise_scales: tuple[NoiseScale, ...] = (0.05, 0.1, 0.2)
    novelty_networks: PositiveInt = 64
    novelty_runs: TwoOrMore = 10_000
    novelty_behaviours: TwoOrMore = 1024
    novelty_candidates: PositiveInt = 8
    recalibrate: bool = False


class Judge(ABC):
    """Judges one generator beside everything that it has to beat. A subclass says what is compared.

    Args:
        conditions: what the generator is prompted with.
        descriptions: sentences, for a generator that is told class masks in words.

    Attributes:
        name: what is judged.
        settings: those of `EvaluationConfig` that are read, beside `EVERY_JUDGE`.
        ignored: those that are not, and may be set: by configurations that serve other tasks too.
        splits: held-out splits of the zoo that an evaluation is not possible without.
    """

    name: ClassVar[str]
    settings: ClassVar[frozenset[str]]
    ignored: ClassVar[frozenset[str]] = frozenset()
    splits: ClassVar[frozenset[str]] = frozenset({"test", "validation"})

    def __init__(
        self,
        generator: Generator,
        task: Task,
        zoo: Zoo,
        config: EvaluationConfig,
        device: torch.device | str,
        conditions: Sequence[str] = (),
        descriptions: Descriptions | None = None,
    ):
        self.generator, self.task, self.zoo, self.config, self.device = generator, task, zoo, config, device
        self.conditions, self.descriptions = conditions, descriptions
        self.writer = Writer(generator, config.steps, config.guidance, config.seed, config.max_batch)

    @classmethod
    @abstractmethod
    def fits(cls, task: Task, generator: Generator, conditions: Sequence[str]) -> bool:
        """Whether this is the judge of such a generator."""

    @classmethod
    def check(cls, config: EvaluationConfig, task: Task, conditions: Sequence[str]) -> None:
        """Raises:
        ConfigError: a setting is changed that this judge does not read, or that does not fit the task; or the
            conditions lack what it prompts with.
        """
        for setting in fields(config):
            value = getattr(config, setting.name)
            if value != setting.default and setting.name not in EVERY_JUDGE | cls.settings | cls.ignored:
                raise ConfigError(
                    f"evaluation.{setting.name}={value} does nothing in the evaluation of {cls.name}, which reads "
                    f"{', '.join(sorted(EVERY_JUDGE | cls.settings))}; leave it out"
                )

    @classmethod
    def column(cls, task: Task) -> str:
        """The column of the table that the evaluation is about."""
        return f"test_{task.metric}"

    @abstractmethod
    def evaluate(self, spent: Spent = Spent(), progress: Progress = lambda phrase: None) -> Results:
        """The whole evaluation.

        Args:
            spent: on the generator and on its zoo, for the break-even number.
            progress: is told what is being done, a phrase at a time.
        """

    @abstractmethod
    def score(self) -> dict[str, float]:
        """What training watches, from validation data alone.

        Returns:
            `validation_<metric>` of the task, and what else there is to watch.
        """

    def results(self, **found: Any) -> Results:
        """What was found about this task, and what there is to say about its zoo."""
        task = self.task
        about: dict[str, Any] = {"task": task.name, "metric": self.column(task), "minimize": task.minimize}
        notes = [*found.get("notes", []), *_dropped_note(self.zoo)]
        return Results(**(about | found | {"notes": notes}))


def _dropped_note(zoo: Zoo) -> list[str]:
    """What to say of a zoo that lacks runs, whose splits are smaller than asked for; nothing of any other."""
    if not zoo.dropped:
        return []
    run, why = next(iter(zoo.dropped.items()))
    lost = len(zoo.dropped)
    return [f"runs of the zoo that were dropped: {lost:,} of {lost + trainings(zoo):,}, such as run {run}: {why}"]
