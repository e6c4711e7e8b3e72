"""A trained run, opened from its folder: ask it for networks, get weights.

    from Gpt.run.trained import open_run

    run = open_run("runs/digits_loss")
    weights = run.write(4, wanted=0.3)              # [4, D], updates of fresh initialisations
    weights = run.write(start=net, wanted=0.3)      # of a network of one's own
    weights = run.write(4, updates=5)               # five in a row, which makes the best networks
    run.measure(weights, "test")                    # {"test_loss": [4], "test_error": [4]}
    net = run.network(weights[0])                   # a module; run.task.structure.state_dict(weights[0]) for the dict

    run = open_run("runs/digits_mask_rpg")
    weights = run.write(4, prompt="all even digits")

Data flow: what is said (a metric, classes in words or bits) becomes a `Wish`, a wish and starting networks become the
`Request` of a `Writer`. `playground.py` is this module on the command line.
"""

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from Gpt import masks
from Gpt.adapters.family import AdapterFamily
from Gpt.config import RunConfig, RunFolderConfig
from Gpt.errors import CheckpointError, ConfigError
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import Starts
from Gpt.evaluation.reading import kept_reader
from Gpt.evaluation.recalibration import recalibrated
from Gpt.evaluation.writing import Request, Writer
from Gpt.generator import Generator, Prompt
from Gpt.masks import MaskSplit
from Gpt.population.functional import stack_initial
from Gpt.run.experiment import Experiment
from Gpt.run.folder import stored_config
from Gpt.seeds import derive_seed
from Gpt.structure import Structure
from Gpt.tasks import Task
from Gpt.vocabulary import CLASSES

COUNT = 8  # networks, unless it is said how many
BEGUN = "the run in {} has no checkpoint yet; the command that began it goes on with it"


def open_run(folder: Path | str, device: str = "auto", data_root: str | None = None) -> "TrainedRun":
    """The trained run in a folder that `main.py` left, with the settings it was trained with.

    Args:
        device: auto, cpu, cuda or cuda:N.
        data_root: folder of the data, where it is another than in training.

    Raises:
        CheckpointError: there is no run in the folder, or its generator is not trained yet.
        ConfigError: there is no such device, or the run is of a version with other settings.
    """
    folder = Path(folder)
    stored = stored_config(folder)
    if stored is None:
        raise CheckpointError(f"there is no run in {folder}: no config.yaml; give the folder that main.py left, runs/…")
    run = TrainedRun(Experiment(moved(stored, folder, device, data_root), folder.name))
    if not run.is_trained:
        raise CheckpointError(BEGUN.format(folder))
    return run


def moved(stored: RunConfig, folder: Path, device: str, data_root: str | None) -> RunConfig:
    """The settings of a run where it lies now, for another device or data that lie elsewhere."""
    run = replace(stored.run, root=str(folder.parent), name=folder.name)
    return replace(stored, run=run, device=device, data=replace(stored.data, root=data_root or stored.data.root))


@dataclass(frozen=True)
class Wish:
    """What every network is asked for.

    Attributes:
        wanted: metric, of a generator that is prompted with one.
        mask: the classes to pick out, which networks are measured on; None for a single task.
        told: the prompt that is the same for all networks, by condition, without the batch axis.
        understood: how words were read, for whoever said them.
    """

    wanted: float | None = None
    mask: Bool[Tensor, " classes"] | None = None
    told: Prompt = field(default_factory=dict)
    understood: tuple[str, ...] = ()

    def request(self, count: int, starts: Starts | None, device: torch.device) -> Request:
        """The wish for `count` networks, from the starts in turn."""
        prompt = {name: value.to(device).expand(count, *value.shape) for name, value in self.told.items()}
        rows = torch.arange(count) % (len(starts.weights) if starts else 1)
        if self.wanted is not None:
            before = starts.metric[rows].float() if starts else torch.full((count,), torch.nan)
            prompt["target_metric"] = torch.stack([before, torch.full_like(before, self.wanted)], 1).to(device)
        return Request(count, prompt, starts.weights[rows] if starts else None)


@dataclass
class TrainedRun:
    """A run whose generator is trained: its parts, and what it can be asked for."""

    experiment: Experiment

    @property
    def task(self) -> Task:
        return self.experiment.task

    @property
    def device(self) -> torch.device:
        return self.experiment.device

    @property
    def is_trained(self) -> bool:
        return self.experiment.config.resume_path is not None or self.experiment.checkpoints.exists()

    @cached_property
    def generator(self) -> Generator:
        """The generator with its best weights, for evaluation.

        Raises:
            CheckpointError: it was not trained yet; says which command trains it.
        """
        experiment = self.experiment
        if self.is_trained:
            return experiment.trained()
        if stored_config(experiment.folder) is not None:
            raise CheckpointError(BEGUN.format(experiment.folder))
        own, usual = asdict(experiment.config.run), asdict(RunFolderConfig())
        settings = [f"run.{key}={value}" for key, value in own.items() if value != usual[key]]
        command = shlex.join(["python", "main.py", "--config-name", experiment.name, *settings])
        raise CheckpointError(f"there is no trained generator in {experiment.folder}; train one with: {command}")

    def write(
        self,
        count: int | None = None,
        *,
        wanted: float | None = None,
        mask: str | Bool[Tensor, " classes"] | None = None,
        prompt: str | None = None,
        start: nn.Module | Mapping[str, Tensor] | Float[Tensor, "*n D"] | None = None,
        updates: int = 1,
        seed: int = 0,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> Float[Tensor, "count D"]:
        """Networks, as plain flat weights on the run's device.

        Args:
            count: 8 by default, or as many as there are starts.
            wanted, mask, prompt: see `wish`.
            start: networks to update, in turn; fresh initialisations by default. None where no start is needed.
            updates: in a row, each of what the one before wrote, which is measured on the validation split in between.
            seed: names the noise and the fresh initialisations; network i does not depend on `count`, but for rounding.
            steps, guidance: of the sampler, see `Generator.sample`.

        Raises:
            ConfigError: the generator cannot be asked for that, or has to be told more.
            StructureError: the start is of another architecture.
        """
        if count is not None and count < 1:
            raise ConfigError(f"count={count}: write one network at least")
        wish = self.wish(wanted=wanted, mask=mask, prompt=prompt)
        starts = None
        if start is not None:
            if not self.generator.needs_start:
                raise ConfigError("start: this generator writes from noise alone; leave it out")
            starts = self.measured_starts(_rows(self.task.structure, start), wish.mask)
        if count is None:
            count = len(starts.weights) if starts else COUNT
        if starts is None and self.generator.needs_start:
            starts = self.fresh_starts(count, seed, wish.mask)
        return self.grant(wish, count, starts, updates, steps=steps, guidance=guidance, seed=seed)

    def grant(
        self, wish: Wish, count: int, starts: Starts | None, updates: int = 1, **sampling: Any
    ) -> Float[Tensor, "count D"]:
        """The networks of a wish; `sampling` are settings of `Writer`.

        Raises:
            ConfigError: there are to be several updates, or none, of what has no start; or none of what has one.
        """
        if updates < 1 or (updates > 1 and starts is None):
            why = "this generator writes from noise alone, hence once" if starts is None else "one at least"
            raise ConfigError(f"updates={updates}: {why}")
        writer = self.writer(**sampling)
        weights = writer(wish.request(count, starts, self.device), "playground")
        for update in range(2, updates + 1):
            assert starts is not None
            starts = self.measured_starts(weights, wish.mask, instead=starts.metric)
            weights = writer(wish.request(count, starts, self.device), f"playground/{update}")
        return weights

    def writer(self, **sampling: Any) -> Writer:
        return Writer(self.generator, max_batch=self.experiment.config.evaluation.max_batch, **sampling)

    def measure(
        self, weights: Float[Tensor, "n D"], split: str = "test", mask: str | Bool[Tensor, " classes"] | None = None
    ) -> dict[str, Float[Tensor, " n"]]:
        """The metrics `<split>_…` of networks by the task's test function; of a family on this mask.

        Raises:
            ConfigError: the task is a family of class masks, and none is given; or it is about adapters.
        """
        self._check_networks()
        if self.task.family is None:
            return test_population(self.task, weights, split)
        if mask is None:
            raise ConfigError(f"task {self.task.name!r} is one task for each class mask; say which by mask=…")
        chosen = mask_of_bits(mask, len(self._classes)) if isinstance(mask, str) else mask
        return test_population(self.task, weights, split, chosen.expand(len(weights), -1))

    def recalibrated(self, weights: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        """The same networks with batch-norm statistics re-estimated on training images.

        Raises:
            ConfigError: they have none, or the task has no training data.
        """
        return recalibrated(self.task, weights.to(self.device), self.device)

    def network(self, weights: Float[Tensor, " D"]) -> nn.Module:
        """The task's module with these weights, on the CPU, for evaluation."""
        net = self.task.constructor()
        net.load_state_dict(self.task.structure.state_dict(weights.cpu()))
        return net.eval()

    def fresh_starts(self, count: int, seed: int, mask: Bool[Tensor, " classes"] | None) -> Starts:
        """New initialisations, which no zoo holds."""
        seeds = [derive_seed(seed, "playground", "start", i) for i in range(count)]
        return self.measured_starts(stack_initial(self.task.constructor, self.task.structure, seeds), mask)

    def measured_starts(
        self,
        weights: Float[Tensor, "n D"],
        mask: Bool[Tensor, " classes"] | None,
        instead: Float[Tensor, " starts"] | None = None,
    ) -> Starts:
        """Networks to start from, with the validation metric that the generator is told.

        Args:
            instead: metrics, taken in turn for networks broken beyond measure, for a prompt has to be finite.
        """
        weights = weights.to(self.device)
        metric = self.measure(weights, "validation", mask)[f"validation_{self.task.metric}"]
        if instead is not None:
            former = instead[torch.arange(len(metric)) % len(instead)].to(metric)
            metric = torch.where(metric.isfinite(), metric, former)
        return Starts("starts", weights, metric)

    # --- what a generator can be asked for ----------------------------------------------------------------------------

    def wish(
        self,
        *,
        wanted: float | None = None,
        mask: str | Bool[Tensor, " classes"] | None = None,
        prompt: str | None = None,
    ) -> Wish:
        """What is asked for, as far as this generator can be asked.

        Args:
            wanted: metric, in the task's plain units; of a generator that knows this prompt, its best one by default.
            mask: of a family of class masks, the classes to pick out, in bits ("1010101010", class 0 first).
            prompt: the same in words.

        Raises:
            ConfigError: it cannot be asked for that, or has to be told more.
        """
        self._check_networks()
        family = self.task.family
        if family is None and (prompt is not None or mask is not None):
            raise ConfigError(
                f"prompt, mask: task {self.task.name!r} is a single task; networks for chosen classes come from a "
                "family of class masks, such as --config-name digits_mask_rpg"
            )
        metric = self._wanted(wanted)
        return Wish(metric) if family is None else self._wish_for_classes(metric, mask, prompt)

    def _check_networks(self) -> None:
        if isinstance(self.task.family, AdapterFamily):
            raise ConfigError(
                f"task {self.task.name!r} has adapters of a language model; write them by rpg.write_adapter, or with "
                'playground.py prompt="…"'
            )

    def _wanted(self, wanted: float | None) -> float | None:
        """The metric that networks are asked for; None if the generator does not know that prompt."""
        names = self.experiment.config.condition.names
        if "target_metric" in names:
            return self.task.best_prompt if wanted is None else wanted
        if wanted is not None:
            raise ConfigError(
                f"wanted={wanted:g}: this generator is not prompted with a metric (condition.names={names})"
            )
        return None

    def _wish_for_classes(
        self, wanted: float | None, mask: str | Bool[Tensor, " classes"] | None, prompt: str | None
    ) -> Wish:
        """A generator that knows sentences is told the sentence, one that knows masks the mask, read off or given."""
        known, names = self.experiment.config.condition.names, self._classes
        told, lines = Prompt(), []
        ways = {"prompt": 'prompt="all even digits"'} | ({"mask": "mask=1010101010"} if "class_mask" in known else {})
        given = {"prompt": prompt, "mask": mask}
        if [way for way, value in given.items() if value is not None] not in [[way] for way in ways]:
            raise ConfigError(f"say which classes to pick out, by {' or by '.join(ways.values())}")
        if prompt is not None:
            chosen, words, embedding = self._read(prompt)
            lines += words
            if "text" in known:
                told["text"] = embedding
        else:
            chosen = mask_of_bits(mask, len(names)) if isinstance(mask, str) else torch.as_tensor(mask).bool()
        if chosen.all() or not chosen.any():
            raise ConfigError("all classes, or none of them, leave nothing to tell apart; choose some of them")
        picked = ", ".join(name for name, inside in zip(names, chosen.tolist(), strict=True) if inside)
        assert isinstance(self.task.family, MaskSplit)
        lines.append(f"networks that pick out {picked} (mask {bits(chosen)}, {mask_role(self.task.family, chosen)})")
        if "class_mask" in known:
            told["class_mask"] = chosen.float()
        return Wish(wanted, chosen, told, tuple(lines))

    def _read(self, prompt: str) -> tuple[Bool[Tensor, " classes"], list[str], Float[Tensor, " features"]]:
        """The mask that a sentence means, what to say about that, and the sentence's embedding."""
        if self.task.vocabulary is None:
            raise ConfigError(f"task {self.task.name!r} has no vocabulary for sentences; give mask=…")
        reader = kept_reader(self.task.vocabulary, self.experiment.encoder)
        reading = reader.read(prompt)
        mask = reading.require()
        sure = ", ".join(
            f"{name} {p:.2f}" for name, p in zip(self._classes, reading.probabilities.tolist(), strict=True)
        )
        lines = [f"“{prompt}” was read as: {sure}"]
        if reading.unsure:
            lines.append(f"not sure about {', '.join(reading.unsure)}; other words may be clearer")
        return mask, lines, reader.embed([prompt])[0]

    @property
    def _classes(self) -> tuple[str, ...]:
        if self.task.vocabulary:
            return CLASSES[self.task.vocabulary]
        return tuple(str(i) for i in range(masks.CLASSES))


def mask_of_bits(text: str, classes: int) -> Bool[Tensor, " classes"]:
    """`1010101010` as a mask.

    Raises:
        ConfigError: it is not one bit for each class.
    """
    if len(text) != classes or set(text) - {"0", "1"}:
        raise ConfigError(f"mask={text}: expected {classes} bits, one for each class, such as {'10' * (classes // 2)}")
    return torch.tensor([bit == "1" for bit in text])


def bits(mask: Bool[Tensor, " classes"]) -> str:
    return "".join("1" if inside else "0" for inside in mask.tolist())


def mask_role(family: MaskSplit, mask: Bool[Tensor, " classes"]) -> str:
    """What a mask was used for in training."""
    roles = {
        "held out for testing": family.test_masks,
        "held out for validation": family.validation_masks,
        "seen in training": family.train_masks,
    }
    return next((role for role, members in roles.items() if (members == mask).all(1).any()), "not seen in training")


def _rows(structure: Structure, start: nn.Module | Mapping[str, Tensor] | Tensor) -> Float[Tensor, "n D"]:
    if isinstance(start, Tensor):
        structure.unflatten(start)  # raises where the length is another
        return start.reshape(-1, structure.size)
    state = start.state_dict() if isinstance(start, nn.Module) else start
    return structure.flatten({name: value.detach() for name, value in state.items()}).reshape(-1, structure.size)
