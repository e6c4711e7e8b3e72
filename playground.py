"""Write networks with a trained generator, and walk through its latent space.

    python playground.py                                     the generator of runs/digits_loss, trained by main.py
    python playground.py --config-name cifar10_loss wanted=1.3 count=16
    python playground.py run.name=mine keyframes=0           the generator of another run, no walk
    python playground.py --config-name digits_mask_rpg prompt="all even digits"      networks for a class mask, in words
    python playground.py --config-name digits_mask_rpg mask=1010101010               or in bits, class 0 first

Every network starts from a fresh initialisation (or from noise alone, if the generator needs no start). What is left in
the run folder, under playground/:

    network-000.safetensors …   a complete state_dict each
    networks.json               what was asked for, and what each network measures
    walk.gif                    one start, one prompt, a closed loop of noise: first-layer filters and the metric
"""

import dataclasses
import json
import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from jaxtyping import Bool, Float
from omegaconf import DictConfig, OmegaConf
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from experiment import Experiment
from Gpt import masks
from Gpt.config import RunConfig, checked, nearest
from Gpt.errors import CheckpointError, ConfigError
from Gpt.evaluation.population import test_population
from Gpt.evaluation.prompting import Starts
from Gpt.generator import Generator, Prompt
from Gpt.masks import MaskSplit
from Gpt.population import stack_initial
from Gpt.report.walk import first_layer_filters, slerp_loop, walk_gif
from Gpt.seeds import derive_seed, rng
from Gpt.tasks import Task
from Gpt.text import SentenceEncoder, SentenceReader, TextHead, train_reader
from Gpt.vocabulary import CLASSES
from main import check_arguments, guard, typed_config


@dataclass(frozen=True)
class PlaygroundConfig:
    """Options of this script; all others are those of main.py and say which run the generator is from.

    Attributes:
        count: networks to write.
        wanted: metric to ask for, in the task's plain units; the task's best prompt when None.
        prompt: sentence that says which classes count as positive (tasks with a family of class masks).
        mask: the same in bits, the first class first.
        seed: names the starting networks and the noise.
        steps, guidance: of the sampler, see `Generator.sample`.
        keyframes: noises that the walk passes through; 0 for no walk.
        frames: networks from each of those noises to the next.
        out: folder to write to; `playground` in the run folder when None.
    """

    count: PositiveInt = 8
    wanted: FiniteFloat | None = None
    prompt: str | None = None
    mask: str | None = None
    seed: int = 0
    steps: PositiveInt | None = None
    guidance: FiniteFloat = 1.0
    keyframes: NonNegativeInt = 6
    frames: PositiveInt = 20
    out: str | None = None


def play(experiment: Experiment, config: PlaygroundConfig) -> Path:
    """Write the networks and the walk; returns the folder.

    Raises:
        CheckpointError: there is no trained generator; says which command trains it.
        ConfigError: the generator cannot be asked for that.
    """
    task, metric = experiment.task, f"validation_{experiment.task.metric}"
    generator = trained_generator(experiment)
    wanted, mask = asked_metric(experiment, config), asked_mask(experiment, config)
    folder = Path(config.out) if config.out else experiment.folder / "playground"
    folder.mkdir(parents=True, exist_ok=True)

    starts = fresh_starts(task, config.count, config.seed, experiment.device)
    write = Author(generator, wanted, config, experiment.config.evaluation.max_batch, mask)
    weights = write(starts)
    scores = {f"start_{metric}": starts.metric} if generator.needs_start else {}
    scores |= measured(task, weights, "validation", mask) | measured(task, weights, "test", mask)
    if wanted is not None:
        print(f"asked for {metric.replace('_', ' ')} {wanted:g}")
    elif mask is None:
        print("unprompted")
    print(table(scores))
    files = [folder / f"network-{i:03d}.safetensors" for i in range(config.count)]
    for file, row in zip(files, weights.cpu(), strict=True):
        save_file(task.structure.state_dict(row), file)
    facts = {
        "task": task.name,
        "run": str(experiment.folder),
        "options": dataclasses.asdict(config) | {"wanted": wanted, "mask": None if mask is None else bits(mask)},
        "networks": [
            {"file": file.name} | {name: _finite(values[i]) for name, values in scores.items()}
            for i, file in enumerate(files)
        ],
    }
    if config.keyframes:
        along = walk(write, task, starts, folder / "walk.gif")
        facts["walk"] = {"file": "walk.gif", metric: [_finite(value) for value in along]}
    (folder / "networks.json").write_text(json.dumps(facts, indent=1))
    print(f"{config.count} networks, networks.json{' and walk.gif' if config.keyframes else ''} are in {folder}")
    return folder


@dataclass(frozen=True)
class Author:
    """A generator that is asked for one metric, or one class mask, `max_batch` networks at a time."""

    generator: Generator
    wanted: float | None
    config: PlaygroundConfig
    max_batch: int
    mask: Bool[Tensor, " classes"] | None = None

    def __call__(self, starts: Starts, noise: Float[Tensor, "n ..."] | None = None) -> Float[Tensor, "n D"]:
        """One network for each start, from the given noise or from noise that the seed names."""
        parts = []
        for rows in torch.arange(len(starts.weights)).split(self.max_batch):
            parts.append(
                self.generator.sample(
                    self._prompt(starts.metric[rows].to(starts.weights)),
                    starts.weights[rows] if self.generator.needs_start else None,
                    count=len(rows),
                    steps=self.config.steps,
                    guidance=self.config.guidance,
                    seed=derive_seed(self.config.seed, "playground", int(rows[0])),
                    noise=None if noise is None else noise[rows],
                )
            )
        return torch.cat(parts)

    def _prompt(self, metric: Float[Tensor, " n"]) -> Prompt:
        prompt: Prompt = {}
        if self.mask is not None:
            prompt["class_mask"] = self.mask.float().to(metric.device).expand(len(metric), -1)
        if self.wanted is None:
            return prompt
        known = metric if self.generator.needs_start else torch.full_like(metric, torch.nan)  # as in training
        return prompt | {"target_metric": torch.stack([known, torch.full_like(metric, self.wanted)], 1)}


def trained_generator(experiment: Experiment) -> Generator:
    """The run's generator.

    Raises:
        CheckpointError: it was not trained yet.
    """
    if experiment.config.resume_path is None and not experiment.checkpoints.exists():
        settings = [f"run.name={experiment.config.run.name}"] if experiment.config.run.name else []
        command = shlex.join(["python", "main.py", "--config-name", experiment.name, *settings])
        raise CheckpointError(f"there is no trained generator in {experiment.folder}; train one with: {command}")
    return experiment.trained()


def asked_metric(experiment: Experiment, config: PlaygroundConfig) -> float | None:
    """The metric that networks are asked for; None if the generator does not know that prompt.

    Raises:
        ConfigError: a metric is wanted of a generator that does not know it.
    """
    names = experiment.config.condition.names
    if "target_metric" in names:
        return experiment.task.best_prompt if config.wanted is None else config.wanted
    if config.wanted is not None:
        raise ConfigError(
            f"wanted={config.wanted:g}: this generator is not prompted with a metric (condition.names={names})"
        )
    return None


def asked_mask(experiment: Experiment, config: PlaygroundConfig) -> Bool[Tensor, " classes"] | None:
    """The classes that networks are asked to pick out, printed with how they were understood; None for a single task.

    Raises:
        ConfigError: a mask is wanted of a single task, a family is not told which, or what it is told says nothing.
    """
    task, names = experiment.task, class_names(experiment.task)
    if task.family is None:
        if config.prompt is not None or config.mask is not None:
            raise ConfigError(
                f"prompt, mask: task {task.name!r} is a single task; networks for chosen classes come from a family of "
                "class masks, such as --config-name digits_mask_rpg"
            )
        return None
    if (config.prompt is None) == (config.mask is None):
        raise ConfigError('say which classes to pick out, either prompt="all even digits" or mask=1010101010')
    if config.prompt is not None:
        reading = sentence_reader(experiment).read(config.prompt)
        mask = reading.require()
        sure = ", ".join(f"{name} {p:.2f}" for name, p in zip(names, reading.probabilities.tolist(), strict=True))
        print(f"“{config.prompt}” was read as: {sure}")
    else:
        mask = mask_of_bits(config.mask or "", len(names))
    if mask.all() or not mask.any():
        raise ConfigError("all classes, or none of them, leave nothing to tell apart; choose some of them")
    chosen = ", ".join(name for name, inside in zip(names, mask.tolist(), strict=True) if inside)
    print(f"networks that pick out {chosen} (mask {bits(mask)}, {mask_role(task.family, mask)})")
    return mask


def sentence_reader(experiment: Experiment) -> SentenceReader:
    """The reader of the task's vocabulary, trained at its first use and kept in the run folder.

    Raises:
        ConfigError: the task has no vocabulary, or the optional packages for text are missing.
    """
    vocabulary = experiment.task.vocabulary
    if vocabulary is None:
        raise ConfigError(f"task {experiment.task.name!r} has no vocabulary for sentences; give mask=…")
    folder = experiment.folder / "text"
    encoder = SentenceEncoder(cache=folder / "embeddings.safetensors")
    file = folder / f"{vocabulary}.safetensors"
    if file.is_file():
        return SentenceReader(encoder, TextHead.load(file, encoder.identity))
    print(f"learning to read sentences about {vocabulary}, once …", flush=True)
    reader = train_reader(encoder, vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    reader.head.save(file, encoder.identity)
    return reader


def class_names(task: Task) -> tuple[str, ...]:
    """Names of the task's classes, or their numbers."""
    return CLASSES[task.vocabulary] if task.vocabulary else tuple(str(i) for i in range(masks.CLASSES))


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


def measured(
    task: Task, weights: Float[Tensor, "n D"], split: str, mask: Bool[Tensor, " classes"] | None
) -> dict[str, Float[Tensor, " n"]]:
    """The metrics of networks, of a family on this mask."""
    if mask is None:
        return test_population(task, weights, split)
    return test_population(task, weights, split, mask.expand(len(weights), -1))


def fresh_starts(task: Task, count: int, seed: int, device: torch.device) -> Starts:
    """New initialisations, which no zoo holds."""
    seeds = [derive_seed(seed, "playground", "start", i) for i in range(count)]
    weights = stack_initial(task.constructor, task.structure, seeds).to(device)
    return Starts("fresh starts", weights, test_population(task, weights, "validation")[f"validation_{task.metric}"])


def walk(write: Author, task: Task, starts: Starts, path: Path) -> Float[Tensor, " networks"]:
    """Animate the networks along a closed loop of noise, from the first start; returns their validation metrics."""
    device, config = starts.weights.device, write.config
    generator = rng(device, config.seed, "playground", "walk")
    shape = config.keyframes, *write.generator.noise_shape
    noise = slerp_loop(torch.randn(shape, generator=generator, device=device), config.frames)
    repeated = Starts("walk", starts.weights[:1].expand(len(noise), -1), starts.metric[:1].expand(len(noise)))
    weights = write(repeated, noise)
    metric = measured(task, weights, "validation", write.mask)[f"validation_{task.metric}"]
    walk_gif(first_layer_filters(task.structure, weights), metric.tolist(), path, name=f"validation {task.metric}")
    return metric


def table(scores: dict[str, Float[Tensor, " n"]]) -> str:
    """One line for each network, then the means."""
    values = torch.stack(list(scores.values()), 1)
    widths = [max(10, len(name)) for name in scores]
    lines = [("", list(scores))]
    lines += [(f"network-{i:03d}", [f"{value:.4g}" for value in row]) for i, row in enumerate(values.tolist())]
    lines += [("mean", [f"{value:.4g}" for value in values.mean(0).tolist()])]
    return "\n".join(
        f"{label:11s}"
        + "".join(f"  {cell.replace('_', ' '):>{width}}" for cell, width in zip(cells, widths, strict=True))
        for label, cells in lines
    )


def split_arguments(arguments: list[str]) -> tuple[PlaygroundConfig, list[str]]:
    """This script's options, and the arguments that are main.py's.

    Raises:
        ConfigError: a key is misspelt (names the nearest right one) or a value is of the wrong type.
    """
    own = [f.name for f in dataclasses.fields(PlaygroundConfig)]
    known = [*own, *(f.name for f in dataclasses.fields(RunConfig))]
    mine, others, words = [], [], {}
    for argument in arguments:
        key, assigns, text = argument.partition("=")
        if assigns and key in ("prompt", "mask"):  # 0101 is no number, and a sentence may hold anything
            words[key] = text
        elif assigns and key in own:
            mine.append(argument)
        elif assigns and key.isidentifier() and key not in known:
            raise ConfigError(f"configuration: there is no key {key!r}; {nearest(key, known)}")
        else:
            others.append(argument)
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(mine))
    return checked(PlaygroundConfig, values | words), others


def _finite(value: Float[Tensor, ""]) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value.item() if math.isfinite(value) else None


def main() -> None:
    """Command-line entry."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{__doc__}\n{PlaygroundConfig.__doc__}")
        return
    options, others = guard(lambda: split_arguments(sys.argv[1:]))
    sys.argv[1:] = guard(lambda: check_arguments(others))

    @hydra.main(version_base="1.3", config_path="configs", config_name="digits_loss")
    def compose_and_play(composed: DictConfig) -> None:
        name = HydraConfig.get().job.config_name
        guard(lambda: play(Experiment(typed_config(composed), name), options), interrupted="starts over")

    compose_and_play()


if __name__ == "__main__":
    main()
